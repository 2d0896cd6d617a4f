"""Regions of tiled TIFF files (BigTIFF, SVS, OME-TIFF, NDPI), read tile by tile."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Literal

import numpy as np

from patchgd_jax.data.images.pixels import to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.data.images.tiff_levels import read_pyramid


class TileCache:
    """The least recently used cache of decoded tiles; safe to use from several threads.

    Args:
        max_bytes: bytes of pixels to keep; larger tiles are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the tile of a key, or loads it.

        The lock is not held while loading, so two threads may load the same tile at once.

        Args:
            key: names the tile.
            load: makes it; its errors pass through.

        Returns:
            The tile, shared with later callers: not to be written to.
        """
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        tile = load()
        with self._lock:
            if key not in self._tiles and tile.nbytes <= self.max_bytes:
                self._tiles[key] = tile
                self.nbytes += tile.nbytes
                while self.nbytes > self.max_bytes:
                    self.nbytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def clear(self) -> None:
        """Drops all tiles."""
        with self._lock:
            self._tiles.clear()
            self.nbytes = 0


class TiffRegions(RegionSource):
    """Regions of a TIFF; only the required tiles are read and decoded.

    Tiles missing in the file are background. The orientation must be upright; colour profiles are
    ignored. The arguments are those of `open_regions`.

    Raises:
        ImageReadError: if the file is truncated, damaged or unsupported.
        ConfigError: if tifffile or imagecodecs is not installed.
    """

    def __init__(
        self, path: Path, channels: Literal[1, 3] | None, background: int, cache_bytes: int
    ) -> None:
        self.path = path
        self._pyramid = read_pyramid(path)
        self._cache = TileCache(cache_bytes)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ImageReadError(path, str(error)) from error
        super().__init__(
            [level.shape for level in self._pyramid.levels],
            channels or self._pyramid.channels,
            background,
            mpp=self._pyramid.mpp,
            tile=self._pyramid.levels[0].tile,
        )

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        if self._file.closed:
            raise ValueError(f"{self.path} is closed")
        there = self._pyramid.levels[level]
        rows, cols = there.tile
        out = np.empty((height, width, self.channels), np.uint8)
        for row in range(y // rows, -(-(y + height) // rows)):
            for col in range(x // cols, -(-(x + width) // cols)):
                top, left = row * rows, col * cols
                a, b = max(y, top), min(y + height, top + rows)
                c, d = max(x, left), min(x + width, left + cols)
                part = out[a - y : b - y, c - x : d - x]
                if there.counts[row * there.cols + col] == 0:
                    part[...] = self.background
                    continue
                load = functools.partial(self._load, level, row, col)
                tile = self._cache.get((level, row, col), load)
                part[...] = tile[a - top : b - top, c - left : d - left]
        return out

    def _load(self, level: int, row: int, col: int) -> np.ndarray:
        """Reads and decodes a tile without its padding: `uint8 [h, w, C]`."""
        pyramid, there = self._pyramid, self._pyramid.levels[level]
        height = min(there.tile[0], there.shape[0] - row * there.tile[0])
        width = min(there.tile[1], there.shape[1] - col * there.tile[1])
        try:
            planes = [
                self._decode(level, plane * there.rows * there.cols + row * there.cols + col)
                for plane in range(there.planes)
            ]
            pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)
            if pixels.shape[0] < height or pixels.shape[1] < width:
                raise ValueError(f"it holds {pixels.shape[0]} x {pixels.shape[1]} px only")
        except Exception as error:
            # Each codec has error classes of its own.
            place = f"the tile at row {row}, column {col} of level {level}"
            reason = f"{place} is damaged: {str(error) or type(error).__name__}"
            raise ImageReadError(self.path, reason) from error
        if pixels.shape != (height, width, pyramid.colours):
            # A view would keep more bytes alive than the cache counts.
            pixels = pixels[:height, :width, : pyramid.colours].copy()
        if pyramid.ycbcr:
            from PIL import Image

            data = np.ascontiguousarray(pixels).tobytes()
            pixels = np.asarray(Image.frombytes("YCbCr", (width, height), data).convert("RGB"))
        if pyramid.inverted:
            pixels = ~pixels
        return to_uint8(
            pixels, channels=self.channels, background=self.background, alpha=pyramid.alpha
        )

    def _decode(self, level: int, index: int) -> np.ndarray:
        """Decodes a tile of one plane: `[h, w, S]`."""
        there = self._pyramid.levels[level]
        count = int(there.counts[index])
        # pread does not use the file position, so threads need no lock.
        data = os.pread(self._file.fileno(), count, int(there.offsets[index]))
        if len(data) != count:
            raise ValueError(f"only {len(data)} of its {count} bytes are there")
        return there.decode(data, index, **there.tables)[0][0]

    def close(self) -> None:
        """Closes the file and drops its tiles; reading afterwards is an error."""
        self._file.close()
        self._cache.clear()
