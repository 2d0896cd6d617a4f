"""ResNet-18/34/50/101, version 1.5 as in torchvision (arXiv 1512.03385; stride in the 3x3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import Conv, stem_side
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.norm import Norm, Normalize
from patchgd_jax.models.layers.pool import max_pool_3x3, mean_pool
from patchgd_jax.models.layers.remat import Remat, rematerialise


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    features: int
    stride: int
    norm: Norm
    dtype: Any
    drop_path: float = 0.0

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features * expansion]`."""

        def norm(x: jax.Array, zero_scale: bool = False) -> jax.Array:
            layer = Normalize(self.norm, self.dtype, zero_scale=zero_scale)
            return layer(x, train=train, mask=mask)

        residual = x
        y = nn.relu(norm(Conv(self.features, stride=self.stride, dtype=self.dtype)(x)))
        y = norm(Conv(self.features, dtype=self.dtype)(y), zero_scale=True)
        y = drop_path(self.drop_path, y, train)
        if residual.shape != y.shape:
            residual = norm(Conv(self.features, 1, self.stride, dtype=self.dtype)(residual))
        return nn.relu(residual + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection; the 3x3 carries the stride."""

    features: int
    stride: int
    norm: Norm
    dtype: Any
    drop_path: float = 0.0

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features * expansion]`."""

        def norm(x: jax.Array, zero_scale: bool = False) -> jax.Array:
            layer = Normalize(self.norm, self.dtype, zero_scale=zero_scale)
            return layer(x, train=train, mask=mask)

        residual = x
        wide = self.features * self.expansion
        y = nn.relu(norm(Conv(self.features, 1, dtype=self.dtype)(x)))
        y = nn.relu(norm(Conv(self.features, 3, self.stride, dtype=self.dtype)(y)))
        y = norm(Conv(wide, 1, dtype=self.dtype)(y), zero_scale=True)
        y = drop_path(self.drop_path, y, train)
        if residual.shape != y.shape:
            residual = norm(Conv(wide, 1, self.stride, dtype=self.dtype)(residual))
        return nn.relu(residual + y)


class ResNet(nn.Module):
    """The network up to global average pooling, then a dense layer to the latent vector.

    `drop_path` is the rate of stochastic depth in the last block (arXiv 1603.09382); `window` and
    `stem_stride` (2 if None) are as `models.build_encoder` has them.
    """

    latent_dim: int
    blocks: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck]
    norm: Norm = "group"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    drop_path: float = 0.0
    window: int | None = None
    stem_stride: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        stride = self.stem_stride or 2
        x = Conv(64, stem_side(7, stride), stride, dtype=self.dtype)(x.astype(self.dtype))
        x = nn.relu(Normalize(self.norm, self.dtype)(x, train=train, mask=mask))
        x = max_pool_3x3(x)
        block = rematerialise(self.block, self.remat)
        rates = drop_rates(self.drop_path, sum(self.blocks))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                number = sum(self.blocks[:stage]) + index
                # Named here, so that the tree is the same under every policy.
                name = f"{self.block.__name__}_{number}"
                layer = block(
                    64 * 2**stage, stride, self.norm, self.dtype, rates[number], name=name
                )
                x = layer(x, train, mask)
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        x = mean_pool(x, self.window)
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
