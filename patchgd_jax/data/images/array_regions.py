"""Regions of arrays, of `.npy` files, and of image files that are decoded as a whole."""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchgd_jax.data.images.pixels import DTYPES, to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import MAX_PIXELS, ImageReadError, read_header, read_image
from patchgd_jax.errors import DataError


class ArrayRegions(RegionSource):
    """Regions of an array in memory or memory-mapped; a single level.

    Args:
        array: `bool`, `uint8` or `uint16`, `[H, W]` or `[H, W, C]` with C 1 or 3; not copied.
        background: uint8 value outside the image.
        channels: 1 or 3. None: the array's own.
        mpp: micrometres per pixel, if known.

    Raises:
        DataError: if the array has another shape or type.
    """

    def __init__(
        self,
        array: np.ndarray,
        background: int = 0,
        *,
        channels: Literal[1, 3] | None = None,
        mpp: float | None = None,
    ) -> None:
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[-1] not in (1, 3) or array.size == 0:
            raise DataError(
                f"an image of shape {array.shape}; it must be [H, W] or [H, W, C] with C 1 or 3"
            )
        if array.dtype.name not in DTYPES:
            raise DataError(f"an image of {array.dtype}; it must be one of {', '.join(DTYPES)}")
        self._array: np.ndarray | None = array
        height, width, own = array.shape
        super().__init__([(height, width)], channels or own, background, mpp=mpp)

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        if self._array is None:
            raise ValueError("the image is closed")
        window = self._array[y : y + height, x : x + width]
        out = to_uint8(window, channels=self.channels, background=self.background)
        return np.array(out) if out is window else out

    def close(self) -> None:
        """Drops the array; reading afterwards is an error."""
        self._array = None


class NpyRegions(ArrayRegions):
    """Regions of a memory-mapped `.npy` file with an array as of `ArrayRegions`.

    The arguments are those of `open_regions`.

    Raises:
        ImageReadError: if the file is truncated, no array, or no image.
    """

    def __init__(self, path: Path, channels: Literal[1, 3] | None, background: int) -> None:
        try:
            super().__init__(np.load(path, mmap_mode="r"), background, channels=channels)
        except (OSError, ValueError, EOFError, SyntaxError, DataError) as error:
            raise ImageReadError(path, str(error)) from error


class FlatRegions(RegionSource):
    """Regions of an image file that can only be decoded as a whole; a single level.

    The first region decodes the image, which stays in memory. The arguments are those of
    `open_regions` and `read_image`.

    Raises:
        ImageReadError: as `read_header`.
    """

    def __init__(
        self,
        path: Path,
        channels: Literal[1, 3] | None,
        background: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None
        self._closed = False
        # The limit is applied here, for an error that names the remedy.
        header = read_header(path, max_pixels=sys.maxsize)
        height, width = header.height, header.width
        if height * width > max_pixels:
            raise ImageReadError(
                path,
                f"it has {height} x {width} px, too many to decode it as a whole; convert it once "
                "with `patchgd-jax data tile`",
            )
        channels = channels or header.channels
        options: dict[str, Any] = {"background": background, "max_pixels": max_pixels}
        self._read = partial(read_image, path, channels=channels, **options)
        super().__init__([(height, width)], channels, background)

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            if self._pixels is None:
                pixels = self._read()
                if pixels.shape[:2] != self.level_shapes[0]:
                    raise ImageReadError(self.path, "its size has changed since it was opened")
                self._pixels = pixels
            pixels = self._pixels
        return pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Drops the pixels; reading afterwards is an error."""
        with self._lock:
            self._pixels, self._closed = None, True
