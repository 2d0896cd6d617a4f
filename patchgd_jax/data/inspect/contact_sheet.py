"""A picture of many examples, with the patches that were drawn: `patchgd-jax data show`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.errors import DataError, DiskError
from patchgd_jax.io.files import fsync_path
from patchgd_jax.io.text import printable

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

_GAP = 16
_PAGE, _INK, _FRAME = (255, 255, 255), (40, 40, 40), (205, 205, 205)
# Seen on black, on white and on the pink of stained tissue.
_SAMPLED, _EDGE = (0, 215, 90), (0, 40, 20)
_SKIPPED, _LINE = (128, 128, 128, 165), (128, 128, 128, 150)
_LEAST_LINES = 8
"""Pixels between grid lines below which they are left out, as they would hide the image."""


@dataclass(frozen=True, eq=False)
class SheetEntry:
    """An example on a contact sheet."""

    image: np.ndarray
    """`uint8 [H, W, C]` with C 1 or 3."""
    caption: str = ""
    grid: PatchGrid | None = None
    """Drawn over the image, if given; it may be an image's of another size, a smaller one say."""
    sampled: Sequence[int] = ()
    """Patches to outline."""
    skipped: Sequence[int] = ()
    """Patches to dim, as background."""


def contact_sheet(
    examples: Sequence[SheetEntry], path: str | Path, *, columns: int = 4, cell: int = 256
) -> None:
    """Draws examples side by side into a PNG file; whole or not at all.

    Args:
        examples: from left to right, then down.
        path: the file.
        columns: examples in a line.
        cell: longer side of each image on the sheet, in pixels.

    Raises:
        DataError: if there is no example.
        DiskError: if the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not examples:
        raise DataError("there is no example to show")
    columns = min(columns, len(examples))
    lines = -(-len(examples) // columns)
    font = ImageFont.load_default(max(11, cell // 17))
    text_height = int(sum(font.getbbox("Ág")[1::2])) + 4
    keys = _keys(examples)
    width = columns * (cell + _GAP) + _GAP
    height = lines * (cell + text_height + _GAP) + _GAP + (text_height if keys else 0)
    sheet = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    for number, entry in enumerate(examples):
        left = _GAP + number % columns * (cell + _GAP)
        top = _GAP + number // columns * (cell + text_height + _GAP)
        small = _small(entry, cell)
        x, y = left + (cell - small.width) // 2, top + (cell - small.height) // 2
        sheet.paste(small, (x, y))
        draw.rectangle((x - 1, y - 1, x + small.width, y + small.height), outline=_FRAME)
        caption = _fitted(printable(entry.caption), font, cell)
        at = left + (cell - font.getlength(caption)) / 2
        draw.text((at, top + cell + 4), caption, fill=_INK, font=font)
    _draw_keys(draw, keys, font, height - text_height - _GAP // 2)
    _write(sheet, Path(path))


def _small(entry: SheetEntry, cell: int) -> Image.Image:
    """The image at the size of the sheet, with its patches."""
    from PIL import Image

    height, width, channels = entry.image.shape
    scale = cell / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(entry.image[..., 0] if channels == 1 else entry.image)
    # Few pixels are shown as the squares they are.
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    small = image.resize(size, how, reducing_gap=3.0).convert("RGBA")
    if entry.grid is not None:
        small = _with_patches(small, entry, entry.grid)
    return small.convert("RGB")


def _with_patches(small: Image.Image, entry: SheetEntry, grid: PatchGrid) -> Image.Image:
    from PIL import Image, ImageDraw

    across, down = small.width / grid.width, small.height / grid.height

    def box(patch: int) -> tuple[int, int, int, int]:
        y, x = patch // grid.cols * grid.stride, patch % grid.cols * grid.stride
        right, bottom = min(x + grid.patch, grid.width), min(y + grid.patch, grid.height)
        return round(x * across), round(y * down), round(right * across), round(bottom * down)

    over = Image.new("RGBA", small.size)
    draw = ImageDraw.Draw(over)
    for patch in entry.skipped:
        left, top, right, bottom = box(patch)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=_SKIPPED)
    if grid.stride * min(across, down) >= _LEAST_LINES:
        for column in range(1, grid.cols):
            x = round(column * grid.stride * across)
            draw.line((x, 0, x, small.height), fill=_LINE)
        for row in range(1, grid.rows):
            y = round(row * grid.stride * down)
            draw.line((0, y, small.width, y), fill=_LINE)
    wide = grid.patch * min(across, down) >= 16
    for patch in entry.sampled:
        left, top, right, bottom = box(patch)
        if wide:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_EDGE, width=4)
            draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=_SAMPLED, width=2)
        else:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_SAMPLED)
    return Image.alpha_composite(small, over)


def _fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened in its middle until it is no wider than that."""
    if font.getlength(text) <= width:
        return text
    # The ends of a path say more than its middle.
    low, high = 0, len(text)
    while low + 1 < high:
        middle = (low + high) // 2
        if font.getlength(_shortened(text, middle)) <= width:
            low = middle
        else:
            high = middle
    return _shortened(text, low)


def _shortened(text: str, length: int) -> str:
    front = length // 2
    return f"{text[:front]}...{text[len(text) - (length - front) :]}"


def _keys(examples: Sequence[SheetEntry]) -> list[str]:
    """What the sheet needs to explain."""
    drawn = [entry for entry in examples if entry.grid is not None]
    return [
        name
        for name, used in (
            ("sampled patch", any(len(entry.sampled) for entry in drawn)),
            ("background, skipped", any(len(entry.skipped) for entry in drawn)),
        )
        if used
    ]


def _draw_keys(
    draw: ImageDraw.ImageDraw,
    keys: Sequence[str],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    top: int,
) -> None:
    left: float = _GAP
    for key in keys:
        side = int(font.getbbox("X")[3])
        square = (left, top, left + side, top + side)
        if key == "sampled patch":
            draw.rectangle(square, outline=_EDGE, width=4)
            inner = (square[0] + 1, square[1] + 1, square[2] - 1, square[3] - 1)
            draw.rectangle(inner, outline=_SAMPLED, width=2)
        else:
            draw.rectangle(square, fill=_SKIPPED[:3])
        draw.text((left + side + 6, top), key, fill=_INK, font=font)
        left += side + 6 + font.getlength(key) + 2 * _GAP


def _write(sheet: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    try:
        sheet.save(partial, "PNG")
        fsync_path(partial)
        partial.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
