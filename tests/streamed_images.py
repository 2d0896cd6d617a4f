"""Region sources over arrays, which tell what was read of them."""

from __future__ import annotations

import threading

import numpy as np


class ArrayImage:
    """One image in memory; pixels outside it are 77, so that reading them shows."""

    mpp = None
    tile = None
    downsamples = (1.0,)

    def __init__(self, pixels):
        self.pixels = pixels
        self.level_shapes = (pixels.shape[:2],)
        self.channels = pixels.shape[2]
        self.reads = []
        self._lock = threading.Lock()

    def read(self, y, x, height, width, level=0):
        with self._lock:
            self.reads.append((y, x, height, width))
        out = np.full((height, width, self.channels), 77, np.uint8)
        seen = self.pixels[y : y + height, x : x + width]
        out[: seen.shape[0], : seen.shape[1]] = seen
        return out

    def close(self):
        pass


def images_of(batch):
    """The sources of a batch, each of its true size, and the batch without its pixels."""
    sizes = batch.get("size", [image.shape[:2] for image in batch["image"]])
    images = [
        ArrayImage(np.ascontiguousarray(pixels[:height, :width]))
        for pixels, (height, width) in zip(batch["image"], sizes, strict=True)
    ]
    return images, {name: value for name, value in batch.items() if name != "image"}
