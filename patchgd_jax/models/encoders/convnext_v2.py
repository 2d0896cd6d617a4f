"""ConvNeXt-V2, atto to base (arXiv 2301.00808)."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import DepthwiseConv, Patchify
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.norm import layer_norm
from patchgd_jax.models.layers.pool import mean_pool
from patchgd_jax.models.layers.remat import Remat, keep, rematerialise

_SMALL = nn.initializers.truncated_normal(0.02)


class GRN(nn.Module):
    """Global response normalisation (section 3.2): channels compete by their norms over the map."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Rescales `x [M, H, W, C]`; norms are taken in at least float32."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        zeros = nn.initializers.zeros_init()
        gamma = self.param("gamma", zeros, (x.shape[-1],), wide.dtype)
        beta = self.param("beta", zeros, (x.shape[-1],), wide.dtype)
        squares = jnp.square(wide).sum((1, 2), keepdims=True)
        # The root has no slope at zero, where a silent channel is.
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        share = norms / (norms.mean(-1, keepdims=True) + 1e-6)
        return (wide + gamma * (wide * share) + beta).astype(x.dtype)


class Block(nn.Module):
    """A 7x7 convolution of each channel, LayerNorm, and two dense layers around GELU and GRN."""

    dtype: Any
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to the same shape; no norm here looks at the mask."""
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)

        def dense(features: int, y: jax.Array) -> jax.Array:
            layer = nn.Dense(
                features, dtype=self.dtype, param_dtype=param_dtype, kernel_init=_SMALL
            )
            return keep(layer(y))

        channels = x.shape[-1]
        y = DepthwiseConv(7, use_bias=True, kernel_init=_SMALL, dtype=self.dtype)(x)
        y = dense(4 * channels, layer_norm(self.dtype)(y))
        y = GRN()(nn.gelu(y, approximate=False))
        return x + drop_path(self.drop_path, dense(channels, y), train)


class ConvNeXtV2(nn.Module):
    """The network up to the norm of the pooled features, then a dense layer to the latent vector.

    Patches must have 32 px at least; pixels beyond the last multiple of four are not seen.
    `drop_path` is the rate of stochastic depth in the last block; `window` and `stem_stride` (4 if
    None) are as `models.build_encoder` has them.
    """

    latent_dim: int
    blocks: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...]
    norm: Literal["layer"] = "layer"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    drop_path: float = 0.0
    window: int | None = None
    stem_stride: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        block = rematerialise(Block, self.remat)
        layers = iter(enumerate(drop_rates(self.drop_path, sum(self.blocks))))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            if stage == 0:
                x = layer_norm(self.dtype)(Patchify(width, self.stem_stride or 4, self.dtype)(x))
            else:
                x = Patchify(width, 2, self.dtype)(layer_norm(self.dtype)(x))
            for index, rate in islice(layers, count):
                # Named here, so that the tree is the same under every policy.
                x = block(self.dtype, rate, name=f"Block_{index}")(x, train, mask)
        x = layer_norm(self.dtype)(mean_pool(x, self.window))
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
