"""What all region sources share: the background outside the image, and the levels' scale."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


class ClippedRegions(abc.ABC):
    """A `RegionSource` whose subclass only reads what lies inside the image.

    Pickled, it is its arguments: unpickling opens the file anew.

    Args:
        arguments: with which the subclass makes the same source again.
        level_shapes: height and width of each level, the largest first.
        channels: 1 or 3.
        background: uint8 value outside the image.
        mpp: micrometres per pixel of level 0, if known.
        tile: height and width of level 0's tiles, if it has any.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        level_shapes: Sequence[tuple[int, int]],
        *,
        channels: int,
        background: int,
        mpp: float | None = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self._arguments = arguments
        self.level_shapes = tuple(level_shapes)
        height, width = self.level_shapes[0]
        self.downsamples = tuple((height / h + width / w) / 2 for h, w in self.level_shapes)
        self.channels = channels
        self.background = background
        self.mpp = mpp
        self.tile = tile

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._arguments), ()

    @abc.abstractmethod
    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Reads a window that lies inside the level and holds at least one pixel.

        Returns:
            `uint8 [height, width, C]`, the caller's own.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the file; see `RegionSource.close`."""

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        """Reads a region; see `RegionSource.read`."""
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
