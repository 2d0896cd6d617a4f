"""Vision transformers with 16 px tokens: ViT and DeiT, which are one network.

Sources: arXiv 2010.11929 and 2012.12877 (without distillation).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import Patchify
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.norm import layer_norm
from patchgd_jax.models.layers.remat import Remat, keep, rematerialise

TOKEN_SIDE = 16
"""Side in pixels of the square that becomes a token."""

_SMALL = nn.initializers.truncated_normal(0.02)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of `[M, T, heads, d]` each, with scores and softmax in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("mqhd,mkhd->mhqk", q, k, preferred_element_type=wide)
    weights = nn.softmax(scores * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("mhqk,mkhd->mqhd", weights, v)


class Block(nn.Module):
    """Self-attention and two dense layers, each after a LayerNorm and around a residual."""

    heads: int
    dtype: Any
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, T, D]` to the same shape; no norm here looks at the mask."""
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)

        def dense(features: int, y: jax.Array, name: str) -> jax.Array:
            layer = nn.Dense(
                features, dtype=self.dtype, param_dtype=param_dtype, kernel_init=_SMALL, name=name
            )
            return keep(layer(y))

        count, tokens, width = x.shape
        y = dense(3 * width, layer_norm(self.dtype)(x), "qkv")
        y = y.reshape(count, tokens, 3, self.heads, width // self.heads)
        y = keep(_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]))
        y = dense(width, y.reshape(count, tokens, width), "proj")
        x = x + drop_path(self.drop_path, y, train)
        y = nn.gelu(dense(4 * width, layer_norm(self.dtype)(x), "fc1"), approximate=False)
        return x + drop_path(self.drop_path, dense(width, y, "fc2"), train)


class ViT(nn.Module):
    """The transformer up to the norm of the class token, then a dense layer to the latent vector.

    Patches must have a multiple of 16 px. The table of positions, `pos_embed`, is made for the grid
    of tokens of the patch side that the parameters are initialised with, the class token first;
    published tables are interpolated to it when they are loaded (`interpolate_positions` of
    `models.layers.positions`). `drop_path` is the rate of stochastic depth in the last block.
    """

    latent_dim: int
    width: int
    heads: int
    depth: int = 12
    norm: Literal["layer"] = "layer"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    drop_path: float = 0.0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage: every one is a stage of its own."""
        return (1,) * self.depth

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        x = Patchify(self.width, TOKEN_SIDE, self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls_token", _SMALL, (1, 1, self.width), param_dtype)
        table = self.param("pos_embed", _SMALL, (1, 1 + x.shape[1], self.width), param_dtype)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([token, x], axis=1) + table.astype(self.dtype)
        block = rematerialise(Block, self.remat)
        for index, rate in enumerate(drop_rates(self.drop_path, self.depth)):
            # Named here, so that the tree is the same under every policy.
            x = block(self.heads, self.dtype, rate, name=f"Block_{index}")(x, train, mask)
        x = layer_norm(self.dtype)(x[:, 0])
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
