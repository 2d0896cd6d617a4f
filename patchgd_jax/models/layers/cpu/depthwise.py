"""Convolution with one kernel per channel, as a sum of shifted and scaled maps."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.models.layers.cpu.windows import crop, output_size, pad, reaches, tap


def forward(x: Array, w: Array, stride: int, padding: int) -> Array:
    """Convolves each channel of `x [M, H, W, C]` with its own kernel of `w [k, k, 1, C]`.

    One pass over the map that multiplies and adds shifted slices; no products of matrices.
    """
    side, height, width = w.shape[0], *output_size(x.shape, w.shape[0], stride, padding)
    padded = pad(x, (padding, padding), (padding, padding))
    shape = (x.shape[0], height, width, x.shape[3])
    total = jnp.zeros(shape, x.dtype)
    for i, j, _, _ in reaches(x.shape, shape, side, stride, padding):
        met = _met(padded, i, j, stride, height, width)
        total = lax.add(total, met * lax.squeeze(tap(w, i, j), (0,)))
    return total


def gradients(x: Array, w: Array, dy: Array, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of `forward` for `dy [M, H', W', C]`: those of `x` and `w`."""
    return (
        input_gradient(dy, w, stride, padding, x.shape),
        weight_gradient(x, dy, w.shape[0], stride, padding),
    )


def input_gradient(
    dy: Array, w: Array, stride: int, padding: int, x_shape: tuple[int, ...]
) -> Array:
    """Convolves the spread `dy` with the turned kernels: the gradient of `x`."""
    low = w.shape[0] - 1 - padding
    axes = [
        (low, n + padding - (stride * (outputs - 1) + 1), stride - 1)
        for n, outputs in zip(x_shape[1:3], dy.shape[1:3], strict=True)
    ]
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *axes, (0, 0, 0)])
    # Inside the loop over pixels, XLA:CPU would work the spreading out anew for every tap.
    return forward(lax.optimization_barrier(spread), jnp.flip(w, (0, 1)), 1, 0)


def weight_gradient(x: Array, dy: Array, side: int, stride: int, padding: int) -> Array:
    """The gradient of `w [side, side, 1, C]` for `x [M, H, W, C]` and `dy [M, H', W', C]`."""
    height, width, channels = dy.shape[1:]
    padded = pad(x, (padding, padding), (padding, padding))
    taps = [[jnp.zeros((1, channels), x.dtype)] * side for _ in range(side)]
    for i, j, _, _ in reaches(x.shape, dy.shape, side, stride, padding):
        met = _met(padded, i, j, stride, height, width)
        taps[i][j] = (met * dy).sum((0, 1, 2))[None]
    return jnp.stack([jnp.stack(row) for row in taps])


def _met(padded: Array, i: int, j: int, stride: int, height: int, width: int) -> Array:
    """The pixels that tap `(i, j)` meets at each output."""
    rows = slice(i, i + stride * (height - 1) + 1, stride)
    return crop(padded, rows, slice(j, j + stride * (width - 1) + 1, stride))
