"""2-D convolution on the CPU: chooses an implementation by shape, in both directions."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from patchgd_jax.models.layers.cpu.strips import map_strips, strip_rows, strips_weight_gradient
from patchgd_jax.models.layers.cpu.taps import (
    rows_weight_gradient,
    taps,
    taps_input_gradient,
    taps_weight_gradient,
)
from patchgd_jax.models.layers.cpu.winograd import (
    winograd,
    winograd_input_gradient,
    winograd_weight_gradient,
)
from patchgd_jax.models.layers.xla_conv import xla_conv2d

# Kernels with fewer channels make thin products, one per tap: XLA:CPU's convolution is faster.
_FEW_CHANNELS = 8
# With fewer tiles than this, transforming the weights costs Winograd more than it saves; the same
# holds for maps on which many taps meet nothing but padding.
_WINOGRAD_TILES = 64
_WINOGRAD_SIDE = 4
# Winograd's buffers are eight times the map. Large maps go through it in strips: the buffers would
# be most of the memory of the head of a large image, and of whole images.
_LARGE_BYTES = 2**24
_STRIP_BYTES = 2**21


def forward(x: Array, w: Array, stride: int, padding: int) -> Array:
    """Convolves `x [M, H, W, C]` with `w [k, k, C, F]`."""
    if w.shape[2] < _FEW_CHANNELS:
        return xla_conv2d(x, w, stride, padding)
    if _winograd_pays(x, w.shape, stride, padding, _WINOGRAD_TILES):
        if rows := _strip_rows(x):
            return map_strips(lambda x: winograd(x, w), x, rows)
        return winograd(x, w)
    if _large(x) and w.shape[0] > 1:
        return xla_conv2d(x, w, stride, padding)
    return taps(x, w, stride, padding)


def gradients(x: Array, w: Array, dy: Array, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of `forward` for `dy [M, H', W', F]`: those of `x` and `w`."""
    dx = _input_gradient(dy, w, stride, padding, x.shape)
    return dx, _weight_gradient(x, dy, stride, padding, w.shape)


def _input_gradient(
    dy: Array, w: Array, stride: int, padding: int, x_shape: tuple[int, ...]
) -> Array:
    if _winograd_pays(dy, w.shape, stride, padding, _WINOGRAD_TILES):
        if rows := _strip_rows(dy):
            return map_strips(lambda dy: winograd_input_gradient(dy, w), dy, rows)
        return winograd_input_gradient(dy, w)
    side = w.shape[0]
    if _large(dy) and side > 1 and stride == 1 and padding < side:
        return xla_conv2d(dy, jnp.flip(w, (0, 1)).swapaxes(2, 3), 1, side - 1 - padding)
    return taps_input_gradient(dy, w, stride, padding, x_shape)


def _weight_gradient(
    x: Array, dy: Array, stride: int, padding: int, w_shape: tuple[int, ...]
) -> Array:
    if w_shape[2] < _FEW_CHANNELS:
        return rows_weight_gradient(x, dy, w_shape[0], stride, padding)
    if _winograd_pays(x, w_shape, stride, padding, 1):
        if rows := _strip_rows(x):
            return strips_weight_gradient(x, dy, rows)
        return winograd_weight_gradient(x, dy)
    return taps_weight_gradient(x, dy, w_shape[0], stride, padding)


def _winograd_pays(
    x: Array, w_shape: tuple[int, ...], stride: int, padding: int, tiles: int
) -> bool:
    tile_count = x.shape[0] * -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
    # In half precision the transforms would lose bits that matter.
    return (
        w_shape[0] == 3
        and (stride, padding) == (1, 1)
        and x.dtype in (jnp.float32, jnp.float64)
        and min(x.shape[1:3]) >= _WINOGRAD_SIDE
        and tile_count >= tiles
        and (not _large(x) or _strip_rows(x) > 0)
    )


def _large(x: Array) -> bool:
    return x.size * x.dtype.itemsize >= _LARGE_BYTES


def _strip_rows(x: Array) -> int:
    """Rows of a strip for a map that is large; else 0."""
    row_bytes = x.size * x.dtype.itemsize // x.shape[1]
    return strip_rows(x.shape[1], row_bytes, _STRIP_BYTES) if _large(x) else 0
