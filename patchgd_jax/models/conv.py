"""2-D convolution that is fast on every platform.

XLA:CPU runs a convolution's weight gradient inside a loop body with a naive kernel, 30 to 200
times slower than a matrix product of the same size, and convolutions on very small maps slowly
everywhere. On CPU the gradients are therefore matrix products over shifted slices; on GPU and TPU
everything stays XLA's own convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this output side XLA:CPU's convolution is slower than an im2col product (measured).
_SMALL_MAP = 3
# From this side on XLA:CPU's convolution beats the im2col product for the input gradient.
_LARGE_MAP = 16


def _native(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_LAYOUT
    )


def _shifted(x: jax.Array, i: int, j: int, stride: int, out: tuple[int, int]) -> jax.Array:
    height, width = out
    return x[
        :, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride
    ]


def _pad(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _out_size(x: jax.Array, side: int, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((n + 2 * padding - side) // stride + 1 for n in x.shape[1:3])
    return height, width


def _im2col(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    side, _, _, features = w.shape
    out = _out_size(x, side, stride, padding)
    x = _pad(x, padding)
    columns = jnp.concatenate(
        [_shifted(x, i, j, stride, out) for i in range(side) for j in range(side)], axis=-1
    )
    return lax.dot_general(columns, w.reshape(-1, features), (((3,), (0,)), ((), ())))


def _input_gradient_cpu(
    dy: jax.Array, w: jax.Array, stride: int, padding: int, x_shape: tuple[int, ...]
) -> jax.Array:
    side = w.shape[0]
    if stride == 1 and dy.shape[1] >= _LARGE_MAP and padding < side:
        flipped = jnp.flip(w, (0, 1)).transpose(0, 1, 3, 2)
        return _native(dy, flipped, 1, side - 1 - padding)
    zeros = jnp.zeros(x_shape, dy.dtype)
    (dx,) = jax.vjp(lambda x: _im2col(x, w, stride, padding), zeros)[1](dy)
    return dx


def _weight_gradient_cpu(
    x: jax.Array, dy: jax.Array, stride: int, padding: int, side: int
) -> jax.Array:
    out = (dy.shape[1], dy.shape[2])
    x = _pad(x, padding)
    # One product per kernel row: an im2col buffer of `side` columns instead of `side * side`.
    wide = jnp.concatenate(
        [x[:, :, j : j + stride * (out[1] - 1) + 1 : stride] for j in range(side)], -1
    )
    flat_dy = dy.reshape(-1, dy.shape[-1])
    rows = [
        lax.dot_general(
            wide[:, i : i + stride * (out[0] - 1) + 1 : stride].reshape(-1, wide.shape[-1]),
            flat_dy,
            (((0,), (0,)), ((), ())),
        )
        for i in range(side)
    ]
    return jnp.stack(rows).reshape(side, side, x.shape[-1], dy.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: jax.Array, w: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves with zero padding on every side, as torch.nn.Conv2d does.

    Args:
        x: `float [M, H, W, C]`.
        w: `float [k, k, C, F]` of the same dtype.
        stride: of both axes.
        padding: zeros added on every side, in pixels.

    Returns:
        `float [M, (H + 2 * padding - k) // stride + 1, ..., F]`.
    """

    def on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
        small = max(_out_size(x, w.shape[0], stride, padding)) <= _SMALL_MAP
        return (_im2col if small or w.shape[0] == 1 else _native)(x, w, stride, padding)

    return lax.platform_dependent(
        x, w, cpu=on_cpu, default=lambda x, w: _native(x, w, stride, padding)
    )


def _forward(
    x: jax.Array, w: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv2d(x, w, stride, padding), (x, w)


def _backward(
    stride: int, padding: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def on_cpu(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            _input_gradient_cpu(dy, w, stride, padding, x.shape),
            _weight_gradient_cpu(x, dy, stride, padding, w.shape[0]),
        )

    def elsewhere(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, w: _native(x, w, stride, padding), x, w)[1](dy)

    return lax.platform_dependent(*saved, dy, cpu=on_cpu, default=elsewhere)


conv2d.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A square convolution layer over `conv2d`.

    The kernel is `[k, k, C, features]`, float32 (float64 if `dtype` is); the computation and the
    output are in `dtype`.
    """

    features: int
    side: int = 3
    stride: int = 1
    padding: int | None = None
    """None: `side // 2`, which keeps the map's size at stride 1."""
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x [M, H, W, C]`."""
        shape = (self.side, self.side, x.shape[-1], self.features)
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, param_dtype)
        padding = self.side // 2 if self.padding is None else self.padding
        x = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), param_dtype)
            x = x + bias.astype(self.dtype)
        return x
