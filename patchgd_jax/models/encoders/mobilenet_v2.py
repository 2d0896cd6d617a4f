"""MobileNetV2 at width 1, as in torchvision (arXiv 1801.04381)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import stem_side
from patchgd_jax.models.layers.conv_norm import ConvNorm
from patchgd_jax.models.layers.norm import Norm
from patchgd_jax.models.layers.pool import mean_pool
from patchgd_jax.models.layers.remat import Remat, rematerialise

# Table 2 of the paper: expansion factor, output channels, blocks, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widens, convolves each channel, and narrows without an activation; a residual if it can."""

    expansion: int
    features: int
    stride: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features]`."""
        wide = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            expand = ConvNorm(wide, 1, self.norm, self.dtype, name="expand")
            y = nn.relu6(expand(y, train, mask))
        depthwise = ConvNorm(
            wide, 3, self.norm, self.dtype, self.stride, depthwise=True, name="depthwise"
        )
        y = nn.relu6(depthwise(y, train, mask))
        y = ConvNorm(self.features, 1, self.norm, self.dtype, name="project")(y, train, mask)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """The network up to global average pooling, then a dense layer to the latent vector.

    `dropout` is the published one of the pooled features (0.2 there). `window` and
    `stem_stride` (2 if None) are as `models.build_encoder` has them.
    """

    latent_dim: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    dropout: float = 0.0
    window: int | None = None
    stem_stride: int | None = None

    # Of each stage, as other encoders have it as a field.
    blocks = tuple(count for _, _, count, _ in _STAGES)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        stride = self.stem_stride or 2
        stem = ConvNorm(32, stem_side(3, stride), self.norm, self.dtype, stride, name="stem")
        x = nn.relu6(stem(x.astype(self.dtype), train, mask))
        block = rematerialise(InvertedResidual, self.remat)
        number = 0
        for expansion, features, count, stride in _STAGES:
            for index in range(count):
                layer = block(
                    expansion,
                    features,
                    stride if index == 0 else 1,
                    self.norm,
                    self.dtype,
                    # Named here, so that the tree is the same under every policy.
                    name=f"InvertedResidual_{number}",
                )
                x = layer(x, train, mask)
                number += 1
        x = nn.relu6(ConvNorm(1280, 1, self.norm, self.dtype, name="last")(x, train, mask))
        x = nn.Dropout(self.dropout, deterministic=not train)(mean_pool(x, self.window))
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
