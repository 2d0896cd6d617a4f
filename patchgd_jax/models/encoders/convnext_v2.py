"""ConvNeXt-V2, atto to base (arXiv 2301.00808)."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.encoders.base import CNN
from patchgd_jax.models.layers.conv import Patchify
from patchgd_jax.models.layers.dense import SMALL, dense
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.factory import LayerFactory
from patchgd_jax.models.layers.norm import layer_norm
from patchgd_jax.models.layers.pool import mean_pool
from patchgd_jax.models.layers.remat import keep, rematerialise


class GRN(nn.Module):
    """Global response normalisation (section 3.2): channels compete by their norms over the map."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
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

    layers: LayerFactory
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, H, W, C]` to the same shape; LayerNorm needs no mask."""
        channels, layers = x.shape[-1], self.layers
        y = layers.depthwise(7, use_bias=True, kernel_init=SMALL)(x)
        y = keep(dense(4 * channels, layers.dtype, kernel_init=SMALL)(layer_norm(layers.dtype)(y)))
        y = GRN()(nn.gelu(y, approximate=False))
        y = keep(dense(channels, layers.dtype, kernel_init=SMALL)(y))
        return x + drop_path(self.drop_path, y, train)


class ConvNeXtV2(CNN):
    """The network up to the norm of the pooled features, then a dense layer to the latent vector.

    Patches must have 32 px at least; pixels beyond the last multiple of four are not seen.
    """

    blocks: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (40, 80, 160, 320)
    norm: Literal["layer"] = "layer"
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        block, layers = rematerialise(Block, self.remat), self.layers()
        rates = iter(enumerate(drop_rates(self.drop_path, sum(self.blocks))))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            if stage == 0:
                x = layer_norm(self.dtype)(Patchify(width, self.stem_stride or 4, self.dtype)(x))
            else:
                x = Patchify(width, 2, self.dtype)(layer_norm(self.dtype)(x))
            for index, rate in islice(rates, count):
                x = block(layers, rate, name=f"Block_{index}")(x, train, mask)
        return self.latents(layer_norm(self.dtype)(mean_pool(x, self.window)))
