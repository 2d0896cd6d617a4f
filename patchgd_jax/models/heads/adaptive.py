"""A CNN over Z that ends in adaptive average pooling, so that any grid will do."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.layers.conv import Conv
from patchgd_jax.models.layers.dense import dense, param_dtype


def adaptive_average_pool(x: Array, mask: Array, bins: int) -> Array:
    """Means over `bins x bins` parts of each map, as torch.nn.AdaptiveAvgPool2d without a mask.

    Part `i` of a side of `n` is `floor(i n / bins)` up to, not including,
    `ceil((i + 1) n / bins)`; `n` is where the last entry of the mask is, so that a padded map is
    divided as the map alone.

    Args:
        x: `float [B, rows, cols, F]`.
        mask: `bool [B, rows, cols]`, False for entries that do not count.
        bins: parts of a side.

    Returns:
        `float [B, bins, bins, F]`; a part in which nothing counts is zero.
    """

    def members(used: Array) -> Array:
        place = jnp.arange(used.shape[1])
        length = jnp.max(jnp.where(used, place + 1, 1), axis=1, keepdims=True)
        part = jnp.arange(bins)
        first = part * length // bins
        last = -(-(part + 1) * length // bins)
        inside = (place >= first[..., None]) & (place < last[..., None])
        return inside.astype(x.dtype)

    rows, cols = members(mask.any(2)), members(mask.any(1))
    counts = mask.astype(x.dtype)
    total = jnp.einsum("bir,bjc,brcf->bijf", rows, cols, x * counts[..., None])
    number = jnp.einsum("bir,bjc,brc->bij", rows, cols, counts)
    return total / jnp.maximum(number, 1)[..., None]


class AdaptiveCNNHead(nn.Module):
    """Blocks of [3x3 conv, LayerNorm, ReLU, Dropout2d], adaptive pooling, then a dense layer.

    LayerNorm over the channels of each entry keeps padding out; batch statistics would not.
    """

    classes: int
    features: int = 128
    strides: tuple[int, ...] = (1, 2)
    bins: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; entries where `mask` is False do not count."""
        if mask is None:
            mask = jnp.ones(z.shape[:3], bool)
        for stride in self.strides:
            # Padding of a map must look to a convolution like the end of the map.
            z = jnp.where(mask[..., None], z, 0)
            z = Conv(self.features, stride=stride, use_bias=True, dtype=self.dtype)(z)
            norm = nn.LayerNorm(1e-6, dtype=self.dtype, param_dtype=param_dtype(self.dtype))
            z = nn.relu(norm(z))
            z = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(z)
            mask = mask[:, ::stride, ::stride]
        pooled = adaptive_average_pool(z, mask, self.bins).reshape(z.shape[0], -1)
        return dense(self.classes, self.dtype)(pooled)
