"""The layout of a table of images: padded sizes, and the valid patches of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.data.images.padding import padded_sizes
from patchgd_jax.data.sources.file_reader import THREADS, FileReader, Header, used_patches
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import DataError

_LISTED = 10


class Layout(NamedTuple):
    """Padded sizes, and the valid patches of each image."""

    shapes: tuple[tuple[int, int], ...]
    """Heights and widths in pixels."""
    member: np.ndarray
    """`int64 [n]`, index into `shapes` by row of the table."""
    patches: tuple[np.ndarray, ...] | None
    """Valid patch ids, `int32 [m]`, by row of the table, in its padded grid. None: all."""
    slots: tuple[int | None, ...]
    """Largest number of valid patches by shape, at least J; or None."""
    notes: tuple[str, ...]
    """Remarks for the user, a line each."""


def plan_layout(
    table: ImageTable,
    headers: Sequence[Header | DataError],
    reader: FileReader,
    patchgd: PatchGDConfig,
) -> Layout:
    """Chooses the padded sizes, and finds the valid patches of each image.

    Args:
        table: the images.
        headers: of its files, in its order.
        reader: of its files.
        patchgd: the patches.

    Raises:
        DataError: if files cannot be read, with the first ten, unless bad ones are substituted.
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

    # Stops on damaged headers before the run begins.
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
            f"Images of {different} size{'s' * (different > 1)} are padded to {len(shapes)}: "
            f"{listed}; {100 * chosen.padding:.0f}% is padding, which is not encoded. "
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
        used = np.ones((rows, cols), bool)
        if config.empty.method != "none":
            # A grid over the image alone, which may be smaller than a patch.
            height, width = (rows - 1) * stride + patch, (cols - 1) * stride + patch
            grid = PatchGrid(height, width, patch, stride, reader.background)
            used = used_patches(table.paths[row], reader, grid)
        y, x = np.nonzero(used)
        return (y * windows(shapes[member[row]][1]) + x).astype(np.int32)

    with ThreadPoolExecutor(THREADS) as pool:
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


def _attempt(look: Callable[[int], Any], row: int) -> Any:
    """Calls `look` on a row; returns its result or `DataError`."""
    try:
        return look(row)
    except DataError as error:
        return error


def _each(table: ImageTable, results: Iterable[Any], substitute: bool, instead: Any) -> list[Any]:
    """Replaces errors by `instead` if bad images are substituted; otherwise raises them as one."""
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
