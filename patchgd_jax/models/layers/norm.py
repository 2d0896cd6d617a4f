"""The normalisation layers an encoder can be built with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from patchgd_jax.models.layers.remat import keep

Norm = Literal["group", "batch"]

_EPSILON = 1e-5
_MOMENTUM = 0.9
_AXES: ContextVar[tuple[str, ...]] = ContextVar("batch_statistics_axes", default=())


@contextmanager
def statistics_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Batch statistics of layers applied herein are those of all devices along these mesh axes."""
    token = _AXES.set(axes)
    try:
        yield
    finally:
        _AXES.reset(token)


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return lax.psum(x, axes) if axes else x


def _statistics(
    x: jax.Array, counts: jax.Array | None, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """Mean and biased variance per channel, and the number of values they are taken of.

    The variance is E[x^2] - E[x]^2, as in Flax: a map of x - E[x] would be written and read again.
    """
    if counts is None:
        number: jax.Array | float = _sum(float(x.size // x.shape[-1]), axes)
        counted = x
    else:
        share = counts.astype(x.dtype)[:, None, None, None]
        kept = share.sum()
        if axes:
            # A mask may be alike on all devices, and jax sums only what may differ.
            kept += jnp.zeros_like(x[0, 0, 0, 0])
        number = jnp.maximum(_sum(kept, axes) * x.shape[1] * x.shape[2], 1)
        counted = x * share
    mean = _sum(counted.sum((0, 1, 2)), axes) / number
    square = _sum((counted * x).sum((0, 1, 2)), axes) / number
    return mean, jnp.maximum(square - mean * mean, 0), number


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    counts: jax.Array | None,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by its statistics over the batch.

    The gradient is written out: two sums and one pass over the map, where automatic differentiation
    takes several of each. None flows through the returned statistics, which are for the running
    averages.

    Args:
        x: `float [M, H, W, C]`; statistics are taken in at least float32.
        scale: `float [C]`.
        bias: `float [C]`.
        counts: `bool [M]`, False for patches that the statistics leave out; None for none.
        axes: mesh axes along which each device has a part of the batch.

    Returns:
        The normalised map, in x's dtype; the mean and the unbiased variance, `[C]` each.
    """
    return _batch_norm_forward(x, scale, bias, counts, axes)[0]


def _batch_norm_forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    counts: jax.Array | None,
    axes: tuple[str, ...],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    out, (mean, inverse, number) = _normalised(x, scale, bias, counts, axes)
    # What was given is saved as it is: handed through what is traced once, it would be a new value.
    return out, (x, scale, mean, inverse, counts, number)


@partial(jax.jit, static_argnums=4, inline=True)
def _normalised(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    counts: jax.Array | None,
    axes: tuple[str, ...],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, variance, number = _statistics(wide, counts, axes)
    mean, variance = keep(mean), keep(variance)
    inverse = lax.rsqrt(variance + _EPSILON)
    factor = inverse * scale
    y = wide * factor + (bias - mean * factor)
    unbiased = variance * (number / jnp.maximum(number - 1, 1))
    return (y.astype(x.dtype), mean, unbiased), (mean, inverse, number)


@partial(jax.jit, static_argnums=0, inline=True)
def _batch_norm_backward(
    axes: tuple[str, ...], saved: Any, cotangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, scale, mean, inverse, counts, number = saved
    dy, wide = cotangents[0].astype(mean.dtype), x.astype(mean.dtype)
    dbias = dy.sum((0, 1, 2))
    dscale = ((dy * wide).sum((0, 1, 2)) - mean * dbias) * inverse
    factor = inverse * scale
    # Each device returns its part of the parameters' gradient, but a map's depends on all parts.
    slope = factor * inverse * _sum(dscale, axes) / number
    common = wide * slope + (factor * _sum(dbias, axes) / number - mean * slope)
    if counts is not None:
        common *= counts.astype(mean.dtype)[:, None, None, None]
    dx = dy * factor - common
    return dx.astype(x.dtype), dscale, dbias, None


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class Normalize(nn.Module):
    """GroupNorm or BatchNorm, chosen by name.

    BatchNorm is PyTorch's: momentum 0.9 (0.1 there), epsilon 1e-5, and a running variance that is
    unbiased. Its statistics leave out masked patches.
    """

    kind: Norm
    dtype: Any = jnp.float32
    groups: int = 32
    """The most that GroupNorm makes: as many of them as divide the channels."""
    zero_scale: bool = False
    """Start the scale at zero: for the last norm of a residual branch."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x [M, H, W, C]`.

        `mask bool [M]` is True for the patches that count; if none
        does, the running statistics stay.
        """
        scale_init = (
            nn.initializers.zeros_init() if self.zero_scale else nn.initializers.ones_init()
        )
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        channels = x.shape[-1]
        if self.kind == "group":
            return nn.GroupNorm(
                num_groups=math.gcd(self.groups, channels),
                dtype=self.dtype,
                param_dtype=param_dtype,
                scale_init=scale_init,
            )(x)
        scale = self.param("scale", scale_init, (channels,), param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), param_dtype)
        zeros, ones = partial(jnp.zeros, channels), partial(jnp.ones, channels)
        running_mean = self.variable("batch_stats", "mean", zeros, param_dtype)
        running_variance = self.variable("batch_stats", "var", ones, param_dtype)
        x = x.astype(self.dtype)
        if not train:
            factor = lax.rsqrt(running_variance.value + _EPSILON) * scale
            return (x * factor + (bias - running_mean.value * factor)).astype(self.dtype)
        axes = _AXES.get()
        some: jax.Array | None = None
        if mask is not None:
            some = _sum(mask.sum(), axes) > 0
            # Without a single patch the variance would be zero, and the maps would overflow.
            mask = mask | ~some
        y, mean, variance = batch_norm(x, scale, bias, mask, axes)
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_variance, variance)):
                moved = _MOMENTUM * running.value + (1 - _MOMENTUM) * new
                running.value = moved if some is None else jnp.where(some, moved, running.value)
        return y


def layer_norm(dtype: Any) -> nn.LayerNorm:
    """LayerNorm over the channels as ConvNeXt and ViT have it: epsilon 1e-6, statistics wide."""
    param_dtype = jnp.promote_types(jnp.float32, dtype)
    # The fast variance is a difference of squares, which loses half of float32's digits.
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)
