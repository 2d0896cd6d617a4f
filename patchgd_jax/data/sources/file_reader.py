"""Reads image files for the model: headers, whole images and background."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.config import DataConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.background import patch_mask
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.errors import DataError

THREADS = 2
"""Number of threads that examine files before a run."""
_MASK_PATCH = 8
"""Smallest side in pixels of a patch in the shrunk image for the background mask."""

Resize = Callable[[RegionSource, tuple[int, int], int], tuple[np.ndarray, tuple[int, int]]]
"""`read_resized`, or another function of image, size and background with its result."""


class Header(NamedTuple):
    """An image file's header."""

    level_shapes: tuple[tuple[int, int], ...]
    """Height and width in pixels of each level."""
    channels: int
    """1 or 3."""


def read_headers(paths: Sequence[Path]) -> tuple[Header | DataError, ...]:
    """Opens each file once; returns its header or its error."""

    def read(path: Path) -> Header | DataError:
        try:
            with closing(open_regions(path, channels=None)) as source:
                return Header(source.level_shapes, source.channels)
        except DataError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return tuple(pool.map(read, paths))


@dataclass(frozen=True)
class FileReader:
    """Reads a file as the model's input.

    Args:
        config: size, fit, channels and level.
        background: uint8 value beyond the image and under transparent pixels.
        resize: implements `fit` resize.
        scalable: whether `resize` to a smaller size gives the same image, shrunk, for less work.
    """

    config: DataConfig
    background: int
    resize: Resize = read_resized
    scalable: bool = True

    def open(self, path: Any) -> RegionSource:
        """Opens a file; only its header is read."""
        return open_regions(path, channels=self.config.num_channels, background=self.background)

    def shape(self, level_shapes: Sequence[tuple[int, int]], path: Any) -> tuple[int, int]:
        """Height and width of the result of `read` for a file with such levels.

        Raises:
            DataError: if the file lacks `data.level`.
        """
        if self.config.fit == "resize":
            return self.config.size
        if self.config.level >= len(level_shapes):
            raise DataError(
                f"image {path} has {len(level_shapes)} levels, but data.level is "
                f"{self.config.level} (counted from 0)"
            )
        return level_shapes[self.config.level]

    def read(self, path: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Reads a file.

        Returns:
            `uint8 [H, W, C]`, and the height and width of the image at its top left; the rest is
            background.

        Raises:
            DataError: if the file cannot be used.
        """
        with closing(self.open(path)) as source:
            if self.config.fit == "resize":
                return self.resize(source, self.config.size, self.background)
            height, width = self.shape(source.level_shapes, path)
            return source.read(0, 0, height, width, self.config.level), (height, width)


def used_patches(path: Any, reader: FileReader, grid: PatchGrid) -> np.ndarray:
    """Finds the patches of a file with content, `bool [rows, cols]`.

    Args:
        path: the file.
        reader: reads it; its settings define background.
        grid: over the result of `reader.read`.

    Raises:
        DataError: if the file cannot be read.
    """
    config = reader.config
    mask = partial(
        patch_mask,
        rows=grid.rows,
        cols=grid.cols,
        patch=grid.patch,
        stride=grid.stride,
        config=config.empty,
        background=reader.background,
    )
    if config.fit == "native":
        # From the lowest suitable level.
        with closing(reader.open(path)) as source:
            reader.shape(source.level_shapes, path)
            return mask(source, level=config.level)
    by = 1
    if reader.scalable:
        # A smaller image gives the same mask from a smaller level.
        by = math.gcd(grid.patch, grid.stride, *config.size)
        while by > 1 and (grid.patch // by < _MASK_PATCH or by & (by - 1)):
            by //= 2
    smaller = dataclasses.replace(config, size=(config.size[0] // by, config.size[1] // by))
    image, (height, width) = dataclasses.replace(reader, config=smaller).read(path)
    regions = ArrayRegions(image[:height, :width], background=reader.background)
    return mask(regions, patch=grid.patch // by, stride=grid.stride // by)
