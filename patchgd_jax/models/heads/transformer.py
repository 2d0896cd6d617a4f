"""A small transformer over the patches of Z, with 2-D position codes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.errors import ConfigError
from patchgd_jax.models.layers.dense import dense, param_dtype


def position_codes(rows: int, cols: int, features: int) -> Array:
    """Sine and cosine codes of the places of a grid.

    One half of the features encodes the row and the other the column, each as in Vaswani et al.,
    Attention Is All You Need, arXiv 1706.03762, section 3.5: with `F / 4` frequencies
    `10000 ** (-4 i / F)`, first the sines, then the cosines. A place has the same code on every
    grid.

    Args:
        rows: rows of the grid.
        cols: columns of the grid.
        features: F, a multiple of four.

    Returns:
        `float32 [rows, cols, F]`.

    Raises:
        ConfigError: if F is no multiple of four.
    """
    if features % 4:
        raise ConfigError(f"2-D position codes need a multiple of 4 features, not {features}")
    frequency = 10_000.0 ** (-jnp.arange(features // 4) / (features // 4))

    def axis(length: int) -> Array:
        angle = jnp.arange(length)[:, None] * frequency
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    shape = (rows, cols, features // 2)
    by_row = jnp.broadcast_to(axis(rows)[:, None], shape)
    by_col = jnp.broadcast_to(axis(cols)[None, :], shape)
    return jnp.concatenate([by_row, by_col], axis=-1).astype(jnp.float32)


class TransformerHead(nn.Module):
    """Self-attention over the patches and a class token, for any grid.

    Blocks of [LayerNorm, attention] and [LayerNorm, dense, GELU, dense], each with a residual
    connection, as in Dosovitskiy et al., An Image Is Worth 16x16 Words, arXiv 2010.11929.
    """

    classes: int
    features: int = 128
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; patches where `mask` is False get no attention.

        Sows `attention`, `[B, rows, cols]`: the class token's attention to each patch in the last
        layer, averaged over the heads and normalised over the patches.
        """
        wide = param_dtype(self.dtype)

        def layer(features: int, x: Array) -> Array:
            return dense(features, self.dtype)(x)

        def norm(x: Array) -> Array:
            return nn.LayerNorm(1e-6, dtype=self.dtype, param_dtype=wide)(x)

        def drop(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        batch, rows, cols, _ = z.shape
        x = layer(self.features, z)
        x += position_codes(rows, cols, self.features).astype(x.dtype)
        x = x.reshape(batch, rows * cols, self.features)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.features), wide)
        token = token.astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.features)), x], axis=1)
        seen = None
        if mask is not None:
            seen = jnp.pad(mask.reshape(batch, -1), ((0, 0), (1, 0)), constant_values=True)
        weights = x
        for _ in range(self.layers):
            query, key, value = (
                part.reshape(batch, -1, self.heads, self.features // self.heads)
                for part in jnp.split(layer(3 * self.features, norm(x)), 3, axis=-1)
            )
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
            if seen is not None:
                scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
            weights = nn.softmax(scores.astype(wide))
            read = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
            x += drop(layer(self.features, read.reshape(x.shape)))
            hidden = nn.gelu(layer(2 * self.features, norm(x)), approximate=False)
            x += drop(layer(self.features, hidden))
        attention = weights[:, :, 0, 1:].mean(1)
        attention /= attention.sum(1, keepdims=True)
        self.sow("intermediates", "attention", attention.reshape(batch, rows, cols))
        return layer(self.classes, drop(norm(x[:, 0])))
