"""Base class of large images that are read by regions."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np


class RegionSource(abc.ABC):
    """An image at one or more resolutions, read by regions; safe to use from several threads.

    Args:
        level_shapes: height and width in pixels of each level; level 0 is the full resolution.
        channels: C of the pixels that `read` returns, 1 or 3.
        background: uint8 value outside the image.
        mpp: micrometres per pixel of level 0, if known.
        tile: height and width of level 0's tiles; reads aligned to them are cheapest. None: whole.
    """

    def __init__(
        self,
        level_shapes: Sequence[tuple[int, int]],
        channels: int,
        background: int,
        *,
        mpp: float | None = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.level_shapes = tuple(level_shapes)
        height, width = self.level_shapes[0]
        self.downsamples = tuple((height / h + width / w) / 2 for h, w in self.level_shapes)
        """Pixels of level 0 per pixel of each level, along a side."""
        self.channels = channels
        self.background = background
        self.mpp = mpp
        self.tile = tile

    @abc.abstractmethod
    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Reads a window that lies inside the level and holds at least one pixel.

        Returns:
            `uint8 [height, width, C]`, the caller's own.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        """Reads a region.

        Args:
            y: top row, in pixels of that level; may be negative or beyond the image.
            x: left column.
            height: rows.
            width: columns.
            level: index into `level_shapes`.

        Returns:
            `uint8 [height, width, C]`, C-contiguous and the caller's own; background outside.

        Raises:
            ImageReadError: if a required part of the file is damaged.
        """
        if not 0 <= level < len(self.level_shapes):
            raise IndexError(f"level {level} of {len(self.level_shapes)}")
        rows, cols = self.level_shapes[level]
        top, bottom = max(y, 0), min(y + height, rows)
        left, right = max(x, 0), min(x + width, cols)
        overlaps = top < bottom and left < right
        if overlaps and (bottom - top, right - left) == (height, width):
            return np.ascontiguousarray(self._inside(level, y, x, height, width))
        out = np.full((height, width, self.channels), self.background, np.uint8)
        if overlaps:
            window = self._inside(level, top, left, bottom - top, right - left)
            out[top - y : bottom - y, left - x : right - x] = window
        return out
