"""2-D convolution layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.layers import cpu
from patchgd_jax.models.layers.dense import SMALL, param_dtype
from patchgd_jax.models.layers.remat import keep
from patchgd_jax.models.layers.xla_conv import xla_conv2d


def conv2d(
    x: Array, w: Array, stride: int = 1, padding: int = 0, *, rows_sharded: bool = False
) -> Array:
    """Convolves with zero padding on every side, as torch.nn.Conv2d does.

    Args:
        x: `float [M, H, W, C]`.
        w: `float [k, k, C, F]` of the same dtype.
        stride: of both axes.
        padding: zeros added on every side, in pixels.
        rows_sharded: whether H is sharded over devices. XLA exchanges the rows at the borders for
            its own convolution only; the CPU's kernels would gather whole maps.

    Returns:
        `float [M, (H + 2 * padding - k) // stride + 1, ..., F]`.
    """
    return (xla_conv2d if rows_sharded else cpu.conv2d)(x, w, stride, padding)


def depthwise_conv2d(
    x: Array, w: Array, stride: int = 1, padding: int = 0, *, rows_sharded: bool = False
) -> Array:
    """As `conv2d` with one kernel for each channel, `w [k, k, 1, C]`: torch's `groups=C`."""
    return (xla_conv2d if rows_sharded else cpu.depthwise_conv2d)(x, w, stride, padding)


def stem_side(side: int, stride: int) -> int:
    """The side of a stem's kernel: its own, or the next odd one that skips no pixel."""
    return max(side, stride + 1 - stride % 2)


class Conv(nn.Module):
    """A square convolution.

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
    rows_sharded: bool = False
    """See `conv2d`."""
    kernel_init: Any = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves `x [M, H, W, C]`."""
        padding = self.side // 2 if self.padding is None else self.padding
        shape = (self.side, self.side, x.shape[-1], self.features)
        return _convolved(self, conv2d, x, shape, padding)


class DepthwiseConv(nn.Module):
    """A square convolution with one kernel per channel, `[k, k, 1, C]`; else as `Conv`."""

    side: int
    stride: int = 1
    use_bias: bool = False
    kernel_init: Any = nn.initializers.he_normal()
    dtype: Any = jnp.float32
    rows_sharded: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves `x [M, H, W, C]`."""
        shape = (self.side, self.side, 1, x.shape[-1])
        return _convolved(self, depthwise_conv2d, x, shape, self.side // 2)


def _convolved(
    layer: Conv | DepthwiseConv,
    convolve: Callable[..., Array],
    x: Array,
    shape: tuple[int, ...],
    padding: int,
) -> Array:
    """Applies a layer whose kernel has a shape, and its bias."""
    dtype, wide = layer.dtype, param_dtype(layer.dtype)
    kernel = layer.param("kernel", layer.kernel_init, shape, wide).astype(dtype)
    x = x.astype(dtype)
    x = keep(convolve(x, kernel, layer.stride, padding, rows_sharded=layer.rows_sharded))
    if layer.use_bias:
        bias = layer.param("bias", nn.initializers.zeros_init(), shape[-1:], wide)
        x = x + bias.astype(dtype)
    return x


def space_to_depth(x: Array, side: int) -> Array:
    """Reshapes `x [M, r * side, c * side, C]` to `[M, r, c, side * side * C]`."""
    count, height, width, channels = x.shape
    rows, cols = height // side, width // side
    x = x.reshape(count, rows, side, cols, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, rows, cols, side * side * channels)


class Patchify(nn.Module):
    """A convolution with a bias whose stride is its side: windows do not overlap.

    Pixels beyond the last whole window are not seen, as in any convolution without padding. The
    kernel is `[side, side, C, features]`.
    """

    features: int
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `x [M, H, W, C]` to `[M, H // side, W // side, features]`."""
        wide = param_dtype(self.dtype)
        side, (height, width, channels) = self.side, x.shape[1:]
        kernel = self.param("kernel", SMALL, (side, side, channels, self.features), wide)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), wide)
        x = x[:, : height // side * side, : width // side * side].astype(self.dtype)
        product = space_to_depth(x, side) @ kernel.reshape(-1, self.features).astype(self.dtype)
        return keep(product) + bias.astype(self.dtype)
