"""Batch normalisation with its gradient written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.models.layers.remat import keep

EPSILON = 1e-5


def sum_over(x: Any, axes: tuple[str, ...]) -> Any:
    """Sums over mesh axes, if there are any."""
    return lax.psum(x, axes) if axes else x


def patch_count(x: Array, mask: Array, axes: tuple[str, ...]) -> Array:
    """Counts the patches of `x [M, H, W, C]` that `mask bool [M]` keeps, over mesh axes."""
    kept = mask.astype(x.dtype).sum()
    if axes:
        # A mask may be equal on all devices of an axis, and jax only sums what may differ.
        kept += jnp.zeros_like(x[0, 0, 0, 0])
    return sum_over(kept, axes)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm(
    x: Array, scale: Array, bias: Array, mask: Array | None, axes: tuple[str, ...] = ()
) -> tuple[Array, Array, Array]:
    """Normalises each channel by its statistics over the batch.

    The gradient takes two sums and one pass over the map; automatic differentiation takes several
    of each. No gradient flows through the returned statistics, which are for the running averages.

    Args:
        x: `float [M, H, W, C]`; statistics are computed in at least float32.
        scale: `float [C]`.
        bias: `float [C]`.
        mask: `bool [M]`, False for patches to leave out of the statistics; None to use all.
        axes: mesh axes over which the batch is sharded.

    Returns:
        The normalised map, in x's dtype; the mean and the unbiased variance, `[C]` each.
    """
    return _forward(x, scale, bias, mask, axes)[0]


def _forward(
    x: Array, scale: Array, bias: Array, mask: Array | None, axes: tuple[str, ...]
) -> tuple[tuple[Array, Array, Array], Any]:
    out, (mean, inverse, number) = _normalised(x, scale, bias, mask, axes)
    # The arguments are saved themselves: returned by the jitted function, they would be new values.
    return out, (x, scale, mean, inverse, mask, number)


@partial(jax.jit, static_argnums=4, inline=True)
def _normalised(
    x: Array, scale: Array, bias: Array, mask: Array | None, axes: tuple[str, ...]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Any]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, variance, number = _statistics(wide, mask, axes)
    mean, variance = keep(mean), keep(variance)
    inverse = lax.rsqrt(variance + EPSILON)
    factor = inverse * scale
    y = wide * factor + (bias - mean * factor)
    unbiased = variance * (number / jnp.maximum(number - 1, 1))
    return (y.astype(x.dtype), mean, unbiased), (mean, inverse, number)


def _statistics(
    x: Array, mask: Array | None, axes: tuple[str, ...]
) -> tuple[Array, Array, Array | float]:
    """Mean and biased variance per channel, and the number of values they are taken of.

    The variance is E[x^2] - E[x]^2, as in Flax: a map of x - E[x] would be written and read again.
    """
    if mask is None:
        number: Array | float = sum_over(float(x.size // x.shape[-1]), axes)
        counted = x
    else:
        share = mask.astype(x.dtype)[:, None, None, None]
        number = jnp.maximum(patch_count(x, mask, axes) * x.shape[1] * x.shape[2], 1)
        counted = x * share
    mean = sum_over(counted.sum((0, 1, 2)), axes) / number
    square = sum_over((counted * x).sum((0, 1, 2)), axes) / number
    return mean, jnp.maximum(square - mean * mean, 0), number


@partial(jax.jit, static_argnums=0, inline=True)
def _backward(
    axes: tuple[str, ...], saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, None]:
    x, scale, mean, inverse, mask, number = saved
    dy, wide = cotangents[0].astype(mean.dtype), x.astype(mean.dtype)
    dbias = dy.sum((0, 1, 2))
    dscale = ((dy * wide).sum((0, 1, 2)) - mean * dbias) * inverse
    factor = inverse * scale
    # Each device returns its part of the parameters' gradient, but a map's depends on all parts.
    slope = factor * inverse * sum_over(dscale, axes) / number
    common = wide * slope + (factor * sum_over(dbias, axes) / number - mean * slope)
    if mask is not None:
        common *= mask.astype(mean.dtype)[:, None, None, None]
    dx = dy * factor - common
    return dx.astype(x.dtype), dscale, dbias, None


batch_norm.defvjp(_forward, _backward)
