"""EfficientNet-B0, as in torchvision (arXiv 1905.11946)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import Conv, stem_side
from patchgd_jax.models.layers.conv_norm import ConvNorm
from patchgd_jax.models.layers.drop_path import drop_path
from patchgd_jax.models.layers.norm import Norm
from patchgd_jax.models.layers.pool import mean_pool
from patchgd_jax.models.layers.remat import Remat, rematerialise

# Table 1 of the paper: expansion factor, side of the kernel, output channels, blocks, stride.
_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class SqueezeExcitation(nn.Module):
    """Scales each channel by what a small network makes of all channels' means (1709.01507)."""

    squeezed: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x [M, H, W, C]`."""
        y = x.mean((1, 2), keepdims=True)
        y = nn.silu(Conv(self.squeezed, 1, use_bias=True, dtype=self.dtype)(y))
        return x * nn.sigmoid(Conv(x.shape[-1], 1, use_bias=True, dtype=self.dtype)(y))


class MBConv(nn.Module):
    """MobileNetV2's inverted residual with squeeze and excitation."""

    expansion: int
    side: int
    features: int
    stride: int
    norm: Norm
    dtype: Any
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features]`."""
        channels = x.shape[-1]
        wide = channels * self.expansion
        y = x
        if self.expansion > 1:
            expand = ConvNorm(wide, 1, self.norm, self.dtype, name="expand")
            y = nn.silu(expand(y, train, mask))
        depthwise = ConvNorm(
            wide, self.side, self.norm, self.dtype, self.stride, depthwise=True, name="depthwise"
        )
        y = nn.silu(depthwise(y, train, mask))
        y = SqueezeExcitation(channels // 4, self.dtype)(y)
        y = ConvNorm(self.features, 1, self.norm, self.dtype, name="project")(y, train, mask)
        return x + drop_path(self.drop_path, y, train) if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """The network up to global average pooling, then a dense layer to the latent vector.

    `drop_path` is the rate of stochastic depth that a block after the last would have (0.2 in
    torchvision), and `dropout` the published one of the pooled features (0.2 as well). `window` and
    `stem_stride` (2 if None) are as `models.build_encoder` has them.
    """

    latent_dim: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    drop_path: float = 0.0
    dropout: float = 0.0
    window: int | None = None
    stem_stride: int | None = None

    # Of each stage, as other encoders have it as a field.
    blocks = tuple(count for _, _, _, count, _ in _STAGES)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        stride = self.stem_stride or 2
        stem = ConvNorm(32, stem_side(3, stride), self.norm, self.dtype, stride, name="stem")
        x = nn.silu(stem(x.astype(self.dtype), train, mask))
        block = rematerialise(MBConv, self.remat)
        total = sum(self.blocks)
        number = 0
        for expansion, side, features, count, stride in _STAGES:
            for index in range(count):
                layer = block(
                    expansion,
                    side,
                    features,
                    stride if index == 0 else 1,
                    self.norm,
                    self.dtype,
                    self.drop_path * number / total,
                    # Named here, so that the tree is the same under every policy.
                    name=f"MBConv_{number}",
                )
                x = layer(x, train, mask)
                number += 1
        x = nn.silu(ConvNorm(1280, 1, self.norm, self.dtype, name="last")(x, train, mask))
        x = nn.Dropout(self.dropout, deterministic=not train)(mean_pool(x, self.window))
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
