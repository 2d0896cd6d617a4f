"""Position embeddings of a vision transformer for another grid of tokens."""

from __future__ import annotations

import numpy as np

# Of the cubic convolution kernel (Keys, 1981); PyTorch's bicubic interpolation has the same.
_SHARPNESS = -0.75


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, t = _SHARPNESS, np.abs(distance)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _weights(outputs: int, inputs: int) -> np.ndarray:
    """Makes the matrix `[outputs, inputs]` of interpolation along one axis; edges are repeated."""
    centres = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    weights = np.zeros((outputs, inputs))
    first = np.floor(centres).astype(int)
    for offset in (-1, 0, 1, 2):
        tap = first + offset
        np.add.at(weights, (np.arange(outputs), tap.clip(0, inputs - 1)), _cubic(centres - tap))
    return weights


def interpolate_positions(table: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Resamples a table of position embeddings bicubically, as DeiT does to change resolution.

    It equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` on the square
    of tokens (arXiv 2012.12877, section 6). The class token's entry stays, and so does a table that
    already has the grid.

    Args:
        table: `float [1, 1 + side * side, D]`, the class token first, then the tokens row by row.
        rows: rows of the new grid.
        cols: columns of the new grid.

    Returns:
        `[1, 1 + rows * cols, D]` in the table's dtype.

    Raises:
        ValueError: if the table's tokens do not form a square.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if side < 1 or side * side + 1 != table.shape[1]:
        raise ValueError(f"{table.shape[1]} positions are not a class token and a square")
    if (rows, cols) == (side, side):
        return table
    grid = table[0, 1:].reshape(side, side, -1).astype(np.float64)
    grid = np.einsum("rs,ct,std->rcd", _weights(rows, side), _weights(cols, side), grid)
    tokens = grid.reshape(1, rows * cols, -1).astype(table.dtype)
    return np.concatenate([table[:, :1], tokens], axis=1)
