"""Normalisation layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from patchgd_jax.models.layers.batch_norm import EPSILON, batch_norm, patch_count
from patchgd_jax.models.layers.dense import param_dtype

Norm = Literal["group", "batch"]

_MOMENTUM = 0.9


class Normalize(nn.Module):
    """GroupNorm or BatchNorm, chosen by name.

    BatchNorm is PyTorch's: momentum 0.9 (0.1 there), epsilon 1e-5, and a running variance that is
    unbiased. Its statistics leave out masked patches.
    """

    kind: Norm
    dtype: Any = jnp.float32
    groups: int = 32
    """The largest number of groups in GroupNorm; it takes one that divides the channels."""
    zero_scale: bool = False
    """Whether the scale starts at zero: for the last norm of a residual branch."""
    axis_name: tuple[str, ...] = ()
    """Mesh axes over which batch statistics are taken in training, as in Flax's BatchNorm."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Normalises `x [M, H, W, C]`.

        Args:
            x: the maps.
            train: whether to use the statistics of this batch and to update the running ones.
            mask: `bool [M]`, False for patches to leave out of the statistics. If it is False for
                all, the running statistics stay.
        """
        init = nn.initializers
        scale_init = init.zeros_init() if self.zero_scale else init.ones_init()
        wide, channels = param_dtype(self.dtype), x.shape[-1]
        if self.kind == "group":
            groups = math.gcd(self.groups, channels)
            options = {"dtype": self.dtype, "param_dtype": wide, "scale_init": scale_init}
            return nn.GroupNorm(groups, **options)(x)
        scale = self.param("scale", scale_init, (channels,), wide)
        bias = self.param("bias", init.zeros_init(), (channels,), wide)
        zeros, ones = partial(jnp.zeros, channels), partial(jnp.ones, channels)
        running_mean = self.variable("batch_stats", "mean", zeros, wide)
        running_variance = self.variable("batch_stats", "var", ones, wide)
        x = x.astype(self.dtype)
        if not train:
            factor = lax.rsqrt(running_variance.value + EPSILON) * scale
            return (x * factor + (bias - running_mean.value * factor)).astype(self.dtype)
        axes = () if self.is_initializing() else self.axis_name
        some: Array | None = None
        if mask is not None:
            some = patch_count(x, mask, axes) > 0
            # Without a single patch the variance would be zero, and the maps would overflow.
            mask = mask | ~some
        y, mean, variance = batch_norm(x, scale, bias, mask, axes)
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_variance, variance)):
                moved = _MOMENTUM * running.value + (1 - _MOMENTUM) * new
                running.value = moved if some is None else jnp.where(some, moved, running.value)
        return y


def layer_norm(dtype: Any) -> nn.LayerNorm:
    """LayerNorm over the channels as in ConvNeXt and ViT: epsilon 1e-6, statistics in float32."""
    # The fast variance is a difference of squares, which loses half of float32's digits.
    wide = param_dtype(dtype)
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, param_dtype=wide, use_fast_variance=False)
