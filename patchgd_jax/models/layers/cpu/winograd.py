"""Winograd's minimal filtering: 16 products where a 3x3 kernel has 36."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from patchgd_jax.models.layers.cpu.windows import crop, pad, tap

# F(2x2, 3x3) of Lavin and Gray, arXiv 1509.09308, section 4.1: Y = A' [(G w G') * (B' d B)] A.
_B = np.array([[1, 0, 0, 0], [0, 1, -1, 1], [-1, 1, 1, 0], [0, 0, 0, -1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])

Tiles = list[list[Array]]
"""Arrays by row and column of a tile."""


def _combine(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """`matrix @ parts`, written out so that zeros and ones cost nothing."""
    combined = []
    for row in matrix:
        total: Array | None = None
        for factor, part in zip(row, parts, strict=True):
            if factor == 0:
                continue
            term = part if abs(factor) == 1 else lax.mul(part, np.asarray(abs(factor), part.dtype))
            if total is None:
                total = term if factor > 0 else lax.neg(term)
            else:
                total = (lax.add if factor > 0 else lax.sub)(total, term)
        assert total is not None
        combined.append(total)
    return combined


def _combine_both(matrix: np.ndarray, tiles: Tiles) -> Tiles:
    """`matrix @ tiles @ matrix.T` over rows and columns of a tile."""
    columns = [_combine(matrix, list(column)) for column in zip(*tiles, strict=True)]
    return [_combine(matrix, list(row)) for row in zip(*columns, strict=True)]


def _input_tiles(x: Array) -> Tiles:
    """`B' d B` of every 4x4 window at stride 2: a 4x4 list of `[M, ceil(H/2), ceil(W/2), C]`."""
    height, width = x.shape[1:3]
    x = pad(x, (1, 1 + height % 2), (1, 1 + width % 2))
    height, width = x.shape[1:3]
    rows = [slice(i, min(i + height - 2, height), 2) for i in range(4)]
    cols = [slice(j, min(j + width - 2, width), 2) for j in range(4)]
    windows = [[crop(x, row, col) for col in cols] for row in rows]
    return _combine_both(_B.T, windows)


def _by_row(tiles: Tiles) -> list[Array]:
    """Each row of tiles as one `[4, rest, C]`: its four products are then one operation."""
    return [jnp.stack(row).reshape(4, -1, row[0].shape[-1]) for row in tiles]


def _kernel_tiles(w: Array) -> list[Array]:
    """`G w G'` of `w [3, 3, C, F]` by row, `[4, C, F]` each."""
    return _by_row(_combine_both(_G, [[tap(w, i, j) for j in range(3)] for i in range(3)]))


def winograd(x: Array, w: Array) -> Array:
    """Convolves `x [M, H, W, C]` with `w [3, 3, C, F]` at stride 1 and padding 1.

    Its rounding error in float32 is about twice that of the direct sum.
    """
    return _winograd(_input_tiles(x), _kernel_tiles(w), x.shape, contract=1)


def winograd_input_gradient(dy: Array, w: Array) -> Array:
    """The gradient of `winograd`'s `x`: it convolves `dy` with the kernel turned by half a turn.

    The turned kernel's transform is the kernel's own with rows and columns 0 and 3 exchanged, so
    the one of the forward pass serves again.
    """
    turn = [3, 1, 2, 0]
    pixels = _input_tiles(dy)
    pixels = [[pixels[i][j] for j in turn] for i in turn]
    return _winograd(pixels, _kernel_tiles(w), dy.shape, contract=2, turn=turn)


def _winograd(
    pixels: Tiles,
    kernel: list[Array],
    shape: tuple[int, ...],
    *,
    contract: int,
    turn: list[int] | None = None,
) -> Array:
    """Multiplies tiles with the kernel's axis `contract`, and transforms the outputs back."""
    count, height, width = shape[:3]
    rows, cols = pixels[0][0].shape[1:3]
    products = [
        [
            part.reshape(count, rows, cols, -1)
            for part in lax.dot_general(a, b, (((2,), (contract,)), ((0,), (0,))))
        ]
        for a, b in zip(_by_row(pixels), kernel, strict=True)
    ]
    if turn is not None:
        products = [[products[i][j] for j in turn] for i in turn]
    outputs = _combine_both(_A.T, products)
    y = jnp.stack([jnp.stack(row, 3) for row in outputs], 2)
    return y.reshape(count, 2 * rows, 2 * cols, -1)[:, :height, :width]


def winograd_weight_gradient(x: Array, dy: Array) -> Array:
    """The gradient of `winograd`'s `w`, again with 16 products instead of 36."""
    height, width = dy.shape[1:3]
    dy = pad(dy, (0, height % 2), (0, width % 2))
    rows = [slice(i, dy.shape[1], 2) for i in range(2)]
    cols = [slice(j, dy.shape[2], 2) for j in range(2)]
    slopes = _combine_both(_A, [[crop(dy, row, col) for col in cols] for row in rows])
    products = [
        list(lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,)))))
        for a, b in zip(_by_row(_input_tiles(x)), _by_row(slopes), strict=True)
    ]
    return jnp.stack([jnp.stack(row) for row in _combine_both(_G.T, products)])
