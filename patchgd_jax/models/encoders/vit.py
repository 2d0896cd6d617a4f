"""Vision transformers with 16 px tokens: ViT and DeiT, which are one network.

Sources: arXiv 2010.11929 and 2012.12877 (without distillation).
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.encoders.base import Encoder
from patchgd_jax.models.layers.conv import Patchify
from patchgd_jax.models.layers.dense import SMALL, dense, param_dtype
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.norm import layer_norm
from patchgd_jax.models.layers.remat import keep, rematerialise

TOKEN_SIDE = 16
"""Side in pixels of the square that becomes a token."""


def _attention(q: Array, k: Array, v: Array) -> Array:
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
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, T, D]` to the same shape; LayerNorm needs no mask."""

        def layer(features: int, y: Array, name: str) -> Array:
            return keep(dense(features, self.dtype, kernel_init=SMALL, name=name)(y))

        count, tokens, width = x.shape
        y = layer(3 * width, layer_norm(self.dtype)(x), "qkv")
        y = y.reshape(count, tokens, 3, self.heads, width // self.heads)
        y = keep(_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]))
        y = layer(width, y.reshape(count, tokens, width), "proj")
        x = x + drop_path(self.drop_path, y, train)
        y = nn.gelu(layer(4 * width, layer_norm(self.dtype)(x), "fc1"), approximate=False)
        return x + drop_path(self.drop_path, layer(width, y, "fc2"), train)


class ViT(Encoder):
    """The transformer up to the norm of the class token, then a dense layer to the latent vector.

    Patch sides are multiples of 16 px. The table of positions, `pos_embed`, has an entry for the
    class token, then one for each token of the patch side used at initialisation; published tables
    are interpolated to it when they are loaded (`interpolate_positions`).
    """

    width: int = 192
    heads: int = 3
    depth: int = 12
    norm: Literal["layer"] = "layer"
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage: every one is a stage of its own."""
        return (1,) * self.depth

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        wide = param_dtype(self.dtype)
        x = Patchify(self.width, TOKEN_SIDE, self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls_token", SMALL, (1, 1, self.width), wide)
        table = self.param("pos_embed", SMALL, (1, 1 + x.shape[1], self.width), wide)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([token, x], axis=1) + table.astype(self.dtype)
        block = rematerialise(Block, self.remat)
        for index, rate in enumerate(drop_rates(self.drop_path, self.depth)):
            x = block(self.heads, self.dtype, rate, name=f"Block_{index}")(x, train, mask)
        return self.latents(layer_norm(self.dtype)(x[:, 0]))
