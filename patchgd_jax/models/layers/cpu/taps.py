"""Convolution as a sum of matrix products, one for each kernel tap."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.models.layers.cpu.windows import Reach, crop, output_size, pad, reaches, tap


def taps(x: Array, w: Array, stride: int, padding: int) -> Array:
    """Convolves `x [M, H, W, C]` with `w [k, k, C, F]`, one product per kernel tap.

    A tap is multiplied with the pixels it meets and never with the padding: on a 2x2 map a padded
    3x3 kernel costs 16 products of one pixel instead of 36.
    """
    side, _, _, features = w.shape
    height, width = output_size(x.shape, side, stride, padding)
    shape = (x.shape[0], height, width, features)
    total = jnp.zeros(shape, x.dtype)
    for i, j, rows, cols in reaches(x.shape, shape, side, stride, padding):
        part = crop(x, rows.inputs(stride), cols.inputs(stride))
        part = lax.dot_general(part, tap(w, i, j), (((3,), (0,)), ((), ())))
        total = lax.add(total, pad(part, rows.margin(height), cols.margin(width)))
    return total


def taps_input_gradient(
    dy: Array, w: Array, stride: int, padding: int, x_shape: tuple[int, ...]
) -> Array:
    """The gradient of `taps`' `x` of shape `x_shape` for `dy [M, H', W', F]`.

    Inputs whose rows and columns have the same remainder by the stride meet the same taps: each
    such phase is a sum of products over a map of its own size, and no zeros between pixels are
    ever written.
    """
    side = w.shape[0]
    height, width = (-(-n // stride) for n in x_shape[1:3])
    phases = []
    for row in range(stride):
        for col in range(stride):
            total = jnp.zeros((dy.shape[0], height, width, w.shape[2]), dy.dtype)
            for i in range((row + padding) % stride, side, stride):
                for j in range((col + padding) % stride, side, stride):
                    # Phase pixel n meets output n + shift through this tap.
                    rows = Reach.of((row + padding - i) // stride, dy.shape[1], height, 1, 0)
                    cols = Reach.of((col + padding - j) // stride, dy.shape[2], width, 1, 0)
                    if rows.last < rows.first or cols.last < cols.first:
                        continue
                    met = crop(dy, rows.inputs(1), cols.inputs(1))
                    part = lax.dot_general(met, tap(w, i, j), (((3,), (1,)), ((), ())))
                    part = pad(part, rows.margin(height), cols.margin(width))
                    total = lax.add(total, part)
            phases.append(total)
    if stride == 1:
        return phases[0]
    grid = [jnp.stack(phases[i * stride : (i + 1) * stride], 3) for i in range(stride)]
    dx = jnp.stack(grid, 2).reshape(dy.shape[0], stride * height, stride * width, -1)
    return dx[:, : x_shape[1], : x_shape[2]]


def taps_weight_gradient(x: Array, dy: Array, side: int, stride: int, padding: int) -> Array:
    """The gradient of `w [side, side, C, F]` for `x [M, H, W, C]` and `dy [M, H', W', F]`."""
    channels, features = x.shape[-1], dy.shape[-1]
    taps = [[jnp.zeros((channels, features), x.dtype)] * side for _ in range(side)]
    for i, j, rows, cols in reaches(x.shape, dy.shape, side, stride, padding):
        read = crop(x, rows.inputs(stride), cols.inputs(stride)).reshape(-1, channels)
        met = crop(dy, rows.outputs(), cols.outputs()).reshape(-1, features)
        taps[i][j] = _transposed_product(read, met)
    return jnp.stack([jnp.stack(row) for row in taps])


def rows_weight_gradient(x: Array, dy: Array, side: int, stride: int, padding: int) -> Array:
    """As `taps_weight_gradient`, with one product per kernel row: for kernels of few channels."""
    height, width = dy.shape[1:3]
    # Otherwise the buffers, which need x alone, are made long before they are needed.
    x, dy = lax.optimization_barrier((x, dy))
    x = pad(x, (padding, padding), (padding, padding))
    wide = jnp.concatenate(
        [x[:, :, j : j + stride * (width - 1) + 1 : stride] for j in range(side)], -1
    )
    flat = dy.reshape(-1, dy.shape[-1])
    rows = [
        _transposed_product(
            wide[:, i : i + stride * (height - 1) + 1 : stride].reshape(-1, wide.shape[-1]), flat
        )
        for i in range(side)
    ]
    return jnp.stack(rows).reshape(side, side, x.shape[-1], dy.shape[-1])


def _transposed_product(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))
