"""Large images that are read by regions: what all file formats share."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np


class RegionSource(abc.ABC):
    """One image, at one or more resolutions, of which any region can be read without the rest.

    Safe to use from several threads. Subclasses only read what lies inside the image.

    Args:
        level_shapes: height and width in pixels of each level; level 0 is the full resolution.
        channels: C of what `read` returns, 1 or 3.
        background: uint8 value outside the image.
        mpp: micrometres per pixel of level 0, if known.
        tile: height and width of level 0's tiles; reads aligned to them are cheapest. None: whole.
    """

    def __init__(
        self,
        level_shapes: Sequence[tuple[int, int]],
        *,
        channels: int,
        background: int,
        mpp: float | None = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.level_shapes = tuple(level_shapes)
        height, width = self.level_shapes[0]
        self.downsamples = tuple((height / h + width / w) / 2 for h, w in self.level_shapes)
        """Pixels of level 0 per pixel of each level, along a side; 1.0 for level 0."""
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
            ImageReadError: if a part of the file that is needed is damaged.
        """
        if not 0 <= level < len(self.level_shapes):
            raise IndexError(f"level {level} of {len(self.level_shapes)}")
        rows, cols = self.level_shapes[level]
        top, bottom = max(y, 0), min(y + height, rows)
        left, right = max(x, 0), min(x + width, cols)
        if top < bottom and left < right:
            window = self._inside(level, top, left, bottom - top, right - left)
            if window.shape[:2] == (height, width):
                return np.ascontiguousarray(window)
        else:
            window = None
        out = np.full((height, width, self.channels), self.background, np.uint8)
        if window is not None:
            out[top - y : bottom - y, left - x : right - x] = window
        return out
