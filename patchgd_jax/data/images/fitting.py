"""Shrinks and pads an image of any size to a fixed one."""

from __future__ import annotations

import numpy as np

from patchgd_jax.data.images.region_base import RegionSource

_BAND_BYTES = 8 * 2**20
_STRIP_BYTES = 2**20
"""Bytes that Pillow shrinks at a time: small buffers are reused, while allocating large ones anew
takes as long as shrinking."""


def best_level(source: RegionSource, height: int, width: int) -> int:
    """Finds the smallest level of at least `height` x `width` px; 0 if there is none."""
    shapes = source.level_shapes
    fitting = [k for k, (rows, cols) in enumerate(shapes) if rows >= height and cols >= width]
    return min(fitting, key=lambda level: shapes[level], default=0)


def fitted_shape(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Computes the height and width of an image after shrinking it into a size.

    Args:
        shape: height and width of the image.
        size: largest height and width.

    Returns:
        Height and width in the same proportion up to rounding, at least 1; `shape` itself if it
        fits already.
    """
    (height, width), (rows, cols) = shape, size
    if height <= rows and width <= cols:
        return shape
    # In integers, so that the limiting side gets exactly its size.
    if height * cols >= width * rows:
        return rows, max(1, min(cols, (2 * width * rows + height) // (2 * height)))
    return max(1, min(rows, (2 * height * cols + width) // (2 * width))), cols


def read_resized(
    source: RegionSource, size: tuple[int, int], background: int, level: int | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads the whole image shrunk into a size and padded, keeping its proportions.

    Areas are averaged (Pillow's box filter) from the smallest level that is large enough, band by
    band, in the memory of a few rows of tiles. Smaller images keep their pixels.

    Args:
        source: the image.
        size: height and width of the result.
        background: uint8 value of the padding.
        level: the level to read. None: the best.

    Returns:
        `uint8 [*size, C]` with the image at its top left, and the image's height and width in it.
    """
    height, width = fitted_shape(source.level_shapes[level or 0], size)
    if level is None:
        level = best_level(source, height, width)
    out = np.full((*size, source.channels), background, np.uint8)
    _shrink_into(out[:height, :width], source, level)
    return out, (height, width)


def _shrink_into(out: np.ndarray, source: RegionSource, level: int) -> None:
    """Fills `out` with the whole level, by bands of whole rows of tiles, to decode each tile once.

    Input rows are kept if the next output row needs them, too.
    """
    from PIL import Image

    (rows, cols), (height, width) = source.level_shapes[level], out.shape[:2]
    step = source.tile[0] if source.tile else 1
    step *= max(1, _BAND_BYTES // (step * cols * source.channels))
    # Pillow needs four bytes for a pixel in colour.
    strip = max(1, _STRIP_BYTES // 4 * height // (rows * cols))
    top, done = 0, 0
    kept = np.empty((0, cols, source.channels), np.uint8)
    for start in range(0, rows, step):
        bottom = min(start + step, rows)
        band = source.read(start, 0, bottom - start, cols, level)
        if len(kept):
            band = np.concatenate([kept, band])
        ready = bottom * height // rows
        while done < ready:
            upto = min(done + strip, ready)
            first, last = done * rows // height, -(-upto * rows // height)
            pixels = band[first - top : last - top]
            image = Image.fromarray(pixels[..., 0] if source.channels == 1 else pixels)
            lower = min(upto * rows / height - first, len(pixels))
            box = (0, done * rows / height - first, cols, lower)
            small = image.resize((width, upto - done), Image.Resampling.BOX, box=box)
            out[done:upto] = np.asarray(small).reshape(upto - done, width, -1)
            done = upto
        following = done * rows // height
        kept, top = band[following - top :].copy(), following
