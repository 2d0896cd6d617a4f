"""2-D convolution that is fast on every platform.

On GPU and TPU it is XLA's own; on the CPU `conv2d` chooses by shape among XLA's and the matrix
products of `cpu_conv`, in both directions. `depthwise_conv2d` has a kernel for each channel, and
`Patchify` is the convolution whose windows do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from patchgd_jax.models.layers.cpu import conv as cpu_conv
from patchgd_jax.models.layers.remat import keep

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Kernels with fewer channels make thin products, one per tap: XLA:CPU's convolution is faster.
_FEW_CHANNELS = 8
# With fewer tiles than this, transforming the weights costs Winograd more than it saves; the same
# holds for maps on which many taps meet nothing but padding.
_WINOGRAD_TILES = 64
_WINOGRAD_SIDE = 4
# Its buffers are eight times the map. On the head's maps of a large image, and on those of whole
# images, they would be most of the memory; such maps go through it in strips.
_LARGE_BYTES = 2**24
_STRIP_BYTES = 2**21
SHORTEST = "tpu"
"""The platform whose traces are the shortest; the shapes are the same for all."""
_DIVIDED: ContextVar[bool] = ContextVar("rows_divided", default=False)
_PLATFORM: ContextVar[str | None] = ContextVar("traced_for", default=None)


def _traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a function of stride, padding, platform and arrays once for all arrays of one form.

    A network has many convolutions of the same shapes. The operations are copied to where they are
    called from, but not into traces for one platform, which are for their shapes alone: there a
    call of hundreds of operations stays one while it is traced on.
    """
    static = (0, 1, 2)
    copied = jax.jit(function, static_argnums=static, inline=True)
    called = jax.jit(function, static_argnums=static)

    def call(stride: int, padding: int, platform: str | None, *arrays: Any) -> Any:
        return (copied if platform is None else called)(stride, padding, platform, *arrays)

    return call


def _native(x: jax.Array, w: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def _large(x: jax.Array) -> bool:
    return x.size * x.dtype.itemsize >= _LARGE_BYTES


def _strip_rows(x: jax.Array) -> int:
    """Rows of a strip for a map that is large; else 0."""
    row_bytes = x.size * x.dtype.itemsize // x.shape[1]
    return cpu_conv.strip_rows(x.shape[1], row_bytes, _STRIP_BYTES) if _large(x) else 0


def _winograd_pays(
    x: jax.Array, w_shape: tuple[int, ...], stride: int, padding: int, tiles: int
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


def _forward_cpu(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    if w.shape[2] < _FEW_CHANNELS:
        return _native(x, w, stride, padding)
    if _winograd_pays(x, w.shape, stride, padding, _WINOGRAD_TILES):
        if rows := _strip_rows(x):
            return cpu_conv.map_strips(lambda x: cpu_conv.winograd(x, w), x, rows)
        return cpu_conv.winograd(x, w)
    if _large(x) and w.shape[0] > 1:
        return _native(x, w, stride, padding)
    return cpu_conv.taps(x, w, stride, padding)


def _input_gradient_cpu(
    dy: jax.Array, w: jax.Array, stride: int, padding: int, x_shape: tuple[int, ...]
) -> jax.Array:
    if _winograd_pays(dy, w.shape, stride, padding, _WINOGRAD_TILES):
        if rows := _strip_rows(dy):
            return cpu_conv.map_strips(lambda dy: cpu_conv.winograd_input_gradient(dy, w), dy, rows)
        return cpu_conv.winograd_input_gradient(dy, w)
    side = w.shape[0]
    if _large(dy) and side > 1 and stride == 1 and padding < side:
        return _native(dy, jnp.flip(w, (0, 1)).swapaxes(2, 3), 1, side - 1 - padding)
    return cpu_conv.taps_input_gradient(dy, w, stride, padding, x_shape)


def _weight_gradient_cpu(
    x: jax.Array, dy: jax.Array, stride: int, padding: int, w_shape: tuple[int, ...]
) -> jax.Array:
    if w_shape[2] < _FEW_CHANNELS:
        return cpu_conv.rows_weight_gradient(x, dy, w_shape[0], stride, padding)
    if _winograd_pays(x, w_shape, stride, padding, 1):
        if rows := _strip_rows(x):
            return cpu_conv.strips_weight_gradient(x, dy, rows)
        return cpu_conv.winograd_weight_gradient(x, dy)
    return cpu_conv.taps_weight_gradient(x, dy, w_shape[0], stride, padding)


@contextmanager
def rows_divided() -> Iterator[None]:
    """Layers applied herein have the rows of their maps on several devices.

    XLA knows how to exchange the rows that neighbours need for its own convolution; the CPU's
    products would gather whole maps.
    """
    token = _DIVIDED.set(True)
    try:
        yield
    finally:
        _DIVIDED.reset(token)


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Layers applied herein are traced for one platform: cpu, cuda, rocm or tpu.

    Else a trace has the kernels of all platforms, and the one to take is found by the compiler.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def _by_platform(
    platform: str | None, *args: jax.Array, cpu: Callable[..., Any], default: Callable[..., Any]
) -> Any:
    if platform is None:
        return lax.platform_dependent(*args, cpu=cpu, default=default)
    return cpu(*args) if platform == "cpu" else default(*args)


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
    if _DIVIDED.get():
        return _native(x, w, stride, padding)
    return _chosen(x, w, stride, padding, _PLATFORM.get())


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _chosen(
    x: jax.Array, w: jax.Array, stride: int, padding: int, platform: str | None
) -> jax.Array:
    return _conv2d(stride, padding, platform, x, w)


@_traced_once
def _conv2d(
    stride: int, padding: int, platform: str | None, x: jax.Array, w: jax.Array
) -> jax.Array:
    return _by_platform(
        platform,
        x,
        w,
        cpu=lambda x, w: _forward_cpu(x, w, stride, padding),
        default=lambda x, w: _native(x, w, stride, padding),
    )


def _forward(
    x: jax.Array, w: jax.Array, stride: int, padding: int, platform: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv2d(stride, padding, platform, x, w), (x, w)


@_traced_once
def _backward(
    stride: int,
    padding: int,
    platform: str | None,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def on_cpu(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            _input_gradient_cpu(dy, w, stride, padding, x.shape),
            _weight_gradient_cpu(x, dy, stride, padding, w.shape),
        )

    def elsewhere(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, w: _native(x, w, stride, padding), x, w)[1](dy)

    return _by_platform(platform, *saved, dy, cpu=on_cpu, default=elsewhere)


_chosen.defvjp(_forward, _backward)


def depthwise_conv2d(x: jax.Array, w: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """As `conv2d`, with one kernel for each channel, as torch.nn.Conv2d with `groups=C` does.

    XLA:CPU has no fast grouped convolution, and its gradients are slower still.

    Args:
        x: `float [M, H, W, C]`.
        w: `float [k, k, 1, C]` of the same dtype.
        stride: of both axes.
        padding: zeros added on every side, in pixels.

    Returns:
        `float [M, (H + 2 * padding - k) // stride + 1, ..., C]`.
    """
    if _DIVIDED.get():
        return _native(x, w, stride, padding, x.shape[3])
    return _depthwise_chosen(x, w, stride, padding, _PLATFORM.get())


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise_chosen(
    x: jax.Array, w: jax.Array, stride: int, padding: int, platform: str | None
) -> jax.Array:
    return _depthwise(stride, padding, platform, x, w)


@_traced_once
def _depthwise(
    stride: int, padding: int, platform: str | None, x: jax.Array, w: jax.Array
) -> jax.Array:
    return _by_platform(
        platform,
        x,
        w,
        cpu=lambda x, w: cpu_conv.depthwise_taps(x, w, stride, padding),
        default=lambda x, w: _native(x, w, stride, padding, x.shape[3]),
    )


def _depthwise_forward(
    x: jax.Array, w: jax.Array, stride: int, padding: int, platform: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(stride, padding, platform, x, w), (x, w)


@_traced_once
def _depthwise_backward(
    stride: int,
    padding: int,
    platform: str | None,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def on_cpu(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            cpu_conv.depthwise_input_gradient(dy, w, stride, padding, x.shape),
            cpu_conv.depthwise_weight_gradient(x, dy, w.shape[0], stride, padding),
        )

    def elsewhere(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        native = partial(_native, stride=stride, padding=padding, groups=x.shape[3])
        return jax.vjp(native, x, w)[1](dy)

    return _by_platform(platform, *saved, dy, cpu=on_cpu, default=elsewhere)


_depthwise_chosen.defvjp(_depthwise_forward, _depthwise_backward)


def stem_side(side: int, stride: int) -> int:
    """The side of a stem's kernel: its own, or the next odd one that passes over no pixel."""
    return max(side, stride + 1 - stride % 2)


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
        x = keep(conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), param_dtype)
            x = x + bias.astype(self.dtype)
        return x


class DepthwiseConv(nn.Module):
    """A square convolution with one kernel per channel, `[k, k, 1, C]`; else as `Conv`.

    The padding is `side // 2`.
    """

    side: int
    stride: int = 1
    use_bias: bool = False
    kernel_init: Any = nn.initializers.he_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x [M, H, W, C]`."""
        channels = x.shape[-1]
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        shape = (self.side, self.side, 1, channels)
        kernel = self.param("kernel", self.kernel_init, shape, param_dtype).astype(self.dtype)
        x = keep(depthwise_conv2d(x.astype(self.dtype), kernel, self.stride, self.side // 2))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (channels,), param_dtype)
            x = x + bias.astype(self.dtype)
        return x


class Patchify(nn.Module):
    """A convolution with a bias whose stride is its side: each square of pixels becomes one.

    Pixels beyond the last whole square are not seen, as in any convolution without padding. The
    kernel is `[side, side, C, features]`.
    """

    features: int
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H // side, W // side, features]`."""
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        count, height, width, channels = x.shape
        side, rows, cols = self.side, height // self.side, width // self.side
        init = nn.initializers.truncated_normal(0.02)
        kernel = self.param("kernel", init, (side, side, channels, self.features), param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), param_dtype)
        x = x[:, : rows * side, : cols * side].astype(self.dtype)
        x = x.reshape(count, rows, side, cols, side, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(count, rows, cols, side * side * channels)
        product = x @ kernel.reshape(-1, self.features).astype(self.dtype)
        return keep(product) + bias.astype(self.dtype)
