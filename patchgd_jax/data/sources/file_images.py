"""Examples from image files: flat ones and slides, resized to one size or in their own."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from patchgd_jax.config import DataConfig, PatchGDConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.background import patch_mask
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.padding import padded_sizes
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import DataError

_THREADS = 2
_MASK_PATCH = 8
"""Smallest side in pixels of a patch in the picture in which background is found."""
_LISTED = 10


class Header(NamedTuple):
    """An image file's header."""

    level_shapes: tuple[tuple[int, int], ...]
    """Height and width in pixels of each level."""
    channels: int
    """1 or 3."""


def read_headers(paths: Sequence[Path]) -> tuple[Header | DataError, ...]:
    """Opens each file once; an error stands for a file that cannot be used."""

    def read(path: Path) -> Header | DataError:
        try:
            with closing(open_regions(path, channels=None)) as source:
                return Header(source.level_shapes, source.channels)
        except DataError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(read, paths))


class Resize(Protocol):
    """Reads a whole image at a size; see `read_resized`."""

    def __call__(
        self, source: RegionSource, size: tuple[int, int], background: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns `uint8 [*size, C]`, and the image's height and width at its top left."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Reads a file as the model's input.

    Args:
        config: size, fit, channels and level.
        background: uint8 value beyond the image and under transparent pixels.
        resize: what `fit` resize does.
        scalable: whether `resize` to a smaller size gives the same picture, shrunk, for less work.
    """

    config: DataConfig
    background: int
    resize: Resize = read_resized
    scalable: bool = True

    def open(self, path: Any) -> RegionSource:
        """Opens a file; only its header is read."""
        return open_regions(path, channels=self.config.num_channels, background=self.background)

    def shape(self, level_shapes: Sequence[tuple[int, int]], path: Any) -> tuple[int, int]:
        """Height and width of what `read` returns of a file with such levels.

        Raises:
            DataError: if the file lacks the level that is read.
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
            `uint8 [H, W, C]`, and the height and width of the part that is image; the rest, to the
            right and below, is background.

        Raises:
            DataError: if the file cannot be used.
        """
        with closing(self.open(path)) as source:
            if self.config.fit == "resize":
                return self.resize(source, self.config.size, self.background)
            height, width = self.shape(source.level_shapes, path)
            return source.read(0, 0, height, width, self.config.level), (height, width)


class Layout(NamedTuple):
    """Padded sizes, and the valid patches of each image."""

    shapes: tuple[tuple[int, int], ...]
    """Heights and widths in pixels."""
    member: np.ndarray
    """`int64 [n]`, index into `shapes` by row of the table."""
    patches: tuple[np.ndarray, ...] | None
    """Valid patch ids by row of the table, in the grid of its padded size. None: all are."""
    slots: tuple[int | None, ...]
    """The most patches of an image of each size, and at least J; or None."""
    notes: tuple[str, ...]
    """Remarks for the user, a line each."""


class FileImages:
    """The examples of some rows of a table; stateless.

    Args:
        table: paths and labels.
        rows: `int64 [n]`, which rows of it these examples are.
        layout: of the whole table.
        reader: of its files.
    """

    def __init__(
        self, table: ImageTable, rows: np.ndarray, layout: Layout, reader: FileReader
    ) -> None:
        self.table = table
        self.rows = np.asarray(rows, np.int64)
        self._layout = layout
        self._reader = reader

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.table.class_names

    @property
    def labels(self) -> np.ndarray:
        """The table's labels of all examples."""
        return self.table.labels[self.rows]

    @property
    def fingerprint(self) -> str:
        """Changes whenever an example would."""
        rows = hashlib.sha256(self.rows.tobytes())
        for patches in self._layout.patches or ():
            rows.update(patches.tobytes())
        config = self._reader.config
        look = (config.size, config.fit, config.level, config.num_channels, self._reader.background)
        return (
            f"files table={self.table.fingerprint} rows={rows.hexdigest()[:16]} "
            f"shapes={self._layout.shapes} look={look} panda={config.panda_options}"
        )

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """Indices by padded size, `int64 [n]` each; sizes that no example has are left out."""
        member = self._layout.member[self.rows]
        every = (np.flatnonzero(member == i) for i in range(len(self._layout.shapes)))
        return tuple(indices for indices in every if len(indices))

    def describe(self, index: int) -> str:
        """The path, and the line of the CSV file if there is one."""
        row = int(self.rows[index])
        line = self.table.rows[row]
        return f"{self.table.paths[row]}{f' (line {line})' if line else ''}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example.

        Returns:
            `image` `uint8 [H, W, C]` of its padded size, `size` `int32 [2]`, `label`, `id`
            (int64), `patches` `int32 [M]` unless all are valid, and `weight` `float32 []` if the
            table has weights.
        """
        row = int(self.rows[index])
        image, size = self._reader.read(self.table.paths[row])
        height, width = self._layout.shapes[self.padded_size(index)]
        if image.shape[:2] != (height, width):
            if image.shape[0] > height or image.shape[1] > width:
                raise DataError(
                    f"image {self.describe(index)} is {image.shape[0]} x {image.shape[1]} px, more "
                    f"than the {height} x {width} when the run began; restart the run"
                )
            padded = np.full((height, width, image.shape[2]), self._reader.background, np.uint8)
            padded[: image.shape[0], : image.shape[1]] = image
            image = padded
        return {"image": image, "size": np.array(size, np.int32), **self.entry(index)}

    def entry(self, index: int) -> dict[str, Any]:
        """An example without its pixels; see `RegionExamples`."""
        row = int(self.rows[index])
        example: dict[str, Any] = {"label": self.table.labels[row], "id": np.int64(index)}
        slots = self._layout.slots[self.padded_size(index)]
        if slots is not None:
            assert self._layout.patches is not None
            numbers = self._layout.patches[row]
            example["patches"] = np.full(slots, np.iinfo(np.int32).max, np.int32)
            example["patches"][: len(numbers)] = numbers
        if self.table.weights is not None:
            example["weight"] = np.float32(self.table.weights[row])
        return example

    def padded_size(self, index: int) -> int:
        """The number of an example's padded size; see `RegionExamples`."""
        return int(self._layout.member[self.rows[index]])

    def open(self, index: int) -> RegionSource:
        """An example's image, at all its levels; see `RegionExamples`."""
        return self._reader.open(self.table.paths[int(self.rows[index])])


def plan_layout(
    table: ImageTable,
    headers: Sequence[Header | DataError],
    reader: FileReader,
    patchgd: PatchGDConfig,
) -> Layout:
    """Chooses the padded sizes, and finds the background of each image if that is left out.

    Args:
        table: the images.
        headers: of its files, in its order.
        reader: of its files.
        patchgd: the patches.

    Raises:
        DataError: if files cannot be read, of which it lists ten, unless bad ones are substituted.
    """
    config = reader.config
    patch, stride = patchgd.patch, patchgd.stride or patchgd.patch
    substitute = config.bad_images == "substitute"
    notes: list[str] = []

    def windows(length: int) -> int:
        return max(0, -(-(length - patch) // stride)) + 1

    def size(row: int) -> tuple[int, int]:
        header = headers[row]
        if isinstance(header, DataError):
            raise header
        return reader.shape(header.level_shapes, table.paths[row])

    # Damage that shows in a header must not wait for the middle of a run.
    sizes = _each(table, map(partial(_attempt, size), range(len(table))), substitute, (1, 1))
    if config.fit == "resize":
        shapes: tuple[tuple[int, int], ...] = (config.size,)
        member = np.zeros(len(table), np.int64)
        grids = np.tile([windows(side) for side in config.size], (len(table), 1))
    else:
        grids = np.array([[windows(side) for side in size] for size in sizes])
        chosen = padded_sizes(grids)
        member = chosen.member
        shapes = tuple(
            ((rows - 1) * stride + patch, (cols - 1) * stride + patch)
            for rows, cols in chosen.boxes
        )
        different = len(set(sizes))
        listed = ", ".join(
            f"{height} x {width} px ({int((member == i).sum())} images)"
            for i, (height, width) in enumerate(shapes)
        )
        notes.append(
            f"Images of {different} size{'s' if different > 1 else ''} are padded to "
            f"{len(shapes)}: {listed}; "
            f"{100 * chosen.padding:.0f}% is padding, which is not encoded. "
            f"{2 * len(shapes)} programs to compile."
        )
    full = np.array([[windows(side) for side in shapes[m]] for m in member])
    # Inner steps with an empty group are no-ops, so images with fewer patches than steps are fine.
    least = patchgd.num_inner_steps if patchgd.mode in ("patchgd", "accumulate") else 1
    alike = (full == grids).all() and full.prod(1).min() >= least
    if config.empty.method == "none" and (config.fit == "resize" or alike):
        return Layout(shapes, member, None, (None,) * len(shapes), tuple(notes))

    def valid_ids(row: int) -> np.ndarray:
        rows, cols = grids[row]
        wide = windows(shapes[member[row]][1])
        used = np.ones((rows, cols), bool)
        if config.empty.method != "none":
            # A grid over the image alone, which may be smaller than a patch.
            height, width = (rows - 1) * stride + patch, (cols - 1) * stride + patch
            grid = PatchGrid(height, width, patch, stride, reader.background)
            used = used_patches(table.paths[row], reader, grid)
        y, x = np.nonzero(used)
        return (y * wide + x).astype(np.int32)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_attempt, valid_ids), range(len(table)))
        patches = _each(table, found, substitute, np.zeros(1, np.int32))
    counts = np.array([len(p) for p in patches])
    if config.empty.method != "none":
        total = int(grids.prod(1).sum())
        notes.append(
            f"{100 * (1 - counts.sum() / total):.1f}% of all patches are background and left out."
        )
    slots = tuple(max(least, int(counts[member == i].max())) for i in range(len(shapes)))
    return Layout(shapes, member, tuple(patches), slots, tuple(notes))


def used_patches(path: Any, reader: FileReader, grid: PatchGrid) -> np.ndarray:
    """Finds which patches of a file are not background, `bool [rows, cols]`.

    Args:
        path: the file.
        reader: reads it; its settings define background.
        grid: over what `reader` reads.

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
        # From the lowest level: the pixels themselves need not be read.
        with closing(reader.open(path)) as source:
            reader.shape(source.level_shapes, path)
            return mask(source, level=config.level)
    by = 1
    if reader.scalable:
        # A smaller picture shows the same, and needs a smaller level only.
        by = math.gcd(grid.patch, grid.stride, *config.size)
        while by > 1 and (grid.patch // by < _MASK_PATCH or by & (by - 1)):
            by //= 2
    smaller = dataclasses.replace(config, size=(config.size[0] // by, config.size[1] // by))
    image, (height, width) = dataclasses.replace(reader, config=smaller).read(path)
    regions = ArrayRegions(image[:height, :width], background=reader.background)
    return mask(regions, patch=grid.patch // by, stride=grid.stride // by)


def _attempt(look: Callable[[int], Any], row: int) -> Any:
    """Looks at a row; its `DataError` is returned."""
    try:
        return look(row)
    except DataError as error:
        return error


def _each(table: ImageTable, results: Iterable[Any], substitute: bool, instead: Any) -> list[Any]:
    """Replaces errors by `instead` if bad images are substituted; raises one of all otherwise."""
    found = list(results)
    failed = [(row, r) for row, r in enumerate(found) if isinstance(r, DataError)]
    if failed and not substitute:
        lines = [
            f"{f'line {table.rows[row]}: ' if table.rows[row] else ''}{error}"
            for row, error in failed[:_LISTED]
        ]
        more = f"\n  and {len(failed) - _LISTED} more" if len(failed) > _LISTED else ""
        raise DataError(
            f"{len(failed)} of {len(table)} images cannot be read; repair or remove them, or use "
            "--data.bad-images substitute:\n  " + "\n  ".join(lines) + more
        )
    for row, _ in failed:
        found[row] = instead
    return found
