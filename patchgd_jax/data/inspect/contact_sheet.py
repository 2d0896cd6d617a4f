"""Draws examples with their sampled patches side by side: `patchgd-jax data show`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.errors import DataError
from patchgd_jax.io.files import atomic_file
from patchgd_jax.io.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 100
_GAP, _CAPTION, _KEYS = 16, 24, 40
"""Pixels between images, for each caption, and for the legend."""
_SAMPLED = {"edgecolor": (0, 215 / 255, 90 / 255), "facecolor": "none"}
_SKIPPED = {"facecolor": (0.5, 0.5, 0.5, 0.65), "edgecolor": "none"}
_EDGE = (0, 40 / 255, 20 / 255)
"""Border of the outlines of sampled patches, for contrast on black, white and pink."""
_LEAST_LINES = 8
"""Least pixels between grid lines; denser ones are omitted, as they would hide the image."""


@dataclass(frozen=True, eq=False)
class SheetEntry:
    """An example on a contact sheet."""

    image: np.ndarray
    """`uint8 [H, W, C]` with C 1 or 3."""
    caption: str = ""
    grid: PatchGrid | None = None
    """Drawn over the image, scaled to it."""
    sampled: Sequence[int] = ()
    """Ids of patches to outline."""
    skipped: Sequence[int] = ()
    """Ids of background patches, to dim."""


def contact_sheet(
    examples: Sequence[SheetEntry],
    path: str | Path,
    *,
    columns: int = 4,
    cell: int = 256,
    note: str = "",
) -> None:
    """Draws examples side by side into a PNG file, written atomically.

    Args:
        examples: from left to right, then down.
        path: the file.
        columns: largest number of examples in a line.
        cell: longer side of each image on the sheet, in pixels.
        note: a line below the examples.

    Raises:
        DataError: if there is no example.
        DiskError: if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not examples:
        raise DataError("there is no example to show")
    columns = min(columns, len(examples))
    lines = -(-len(examples) // columns)
    drawn = [entry for entry in examples if entry.grid is not None]
    keys = [
        Patch(label=label, **style)
        for label, style, used in (
            ("sampled patch", _SAMPLED, any(len(entry.sampled) for entry in drawn)),
            ("background, skipped", _SKIPPED, any(len(entry.skipped) for entry in drawn)),
        )
        if used
    ]
    width = columns * (cell + _GAP) + _GAP
    height = lines * (cell + _CAPTION + _GAP) + _GAP + (_KEYS if keys or note else 0)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    for number, entry in enumerate(examples):
        left = _GAP + number % columns * (cell + _GAP)
        top = _GAP + number // columns * (cell + _CAPTION + _GAP)
        below = height - top - cell
        axes = figure.add_axes((left / width, below / height, cell / width, cell / height))
        _draw(axes, entry, cell)
        caption = _shortened(printable(entry.caption), cell // 6)
        figure.text(
            (left + cell / 2) / width, (below - 4) / height, caption,
            ha="center", va="top", fontsize=7, parse_math=False,
        )  # fmt: skip
    if keys or note:
        figure.legend(
            handles=keys, title=note or None, loc="lower left", ncols=2, fontsize=7,
            title_fontsize=7, frameon=False, alignment="left",
        )  # fmt: skip
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _draw(axes: Axes, entry: SheetEntry, cell: int) -> None:
    """Draws an image and its patches; data coordinates are pixels of the grid."""
    from PIL import Image

    height, width, channels = entry.image.shape
    image = Image.fromarray(entry.image[..., 0] if channels == 1 else entry.image)
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grid = entry.grid
    if grid is not None:
        height, width = grid.height, grid.width
    axes.imshow(
        np.asarray(image.convert("RGB")), extent=(0, width, height, 0), interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[], anchor="C")
    for spine in axes.spines.values():
        spine.set(color=(0.8, 0.8, 0.8), linewidth=0.5)
    if grid is None:
        return
    scale = cell / max(height, width)
    _add_patches(axes, grid, entry.skipped, linewidth=0, **_SKIPPED)
    if grid.stride * scale >= _LEAST_LINES:
        style: Any = {"colors": [(0.5, 0.5, 0.5, 0.6)], "linewidth": 0.72}
        axes.vlines(np.arange(1, grid.cols) * grid.stride, 0, height, **style)
        axes.hlines(np.arange(1, grid.rows) * grid.stride, 0, width, **style)
    if grid.patch * scale >= 16:
        _add_patches(axes, grid, entry.sampled, edgecolor=_EDGE, facecolor="none", linewidth=2.9)
        _add_patches(axes, grid, entry.sampled, linewidth=1.4, **_SAMPLED)
    else:
        _add_patches(axes, grid, entry.sampled, linewidth=0.72, **_SAMPLED)


def _add_patches(axes: Axes, grid: PatchGrid, ids: Iterable[int], **style: Any) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = []
    for row, col in (divmod(patch, grid.cols) for patch in ids):
        y, x = row * grid.stride, col * grid.stride
        size = min(grid.patch, grid.width - x), min(grid.patch, grid.height - y)
        boxes.append(Rectangle((x, y), *size))
    axes.add_collection(PatchCollection(boxes, zorder=3, **style), autolim=False)


def _shortened(text: str, length: int) -> str:
    """Replaces the middle of a text longer than `length` by `...`."""
    if len(text) <= length:
        return text
    kept = max(0, length - 3)
    return f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
