"""ResNet-18/34/50/101, version 1.5 as in torchvision (arXiv 1512.03385; stride in the 3x3)."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from patchgd_jax.models.encoders.base import CNN
from patchgd_jax.models.layers.conv import stem_side
from patchgd_jax.models.layers.drop_path import drop_path, drop_rates
from patchgd_jax.models.layers.factory import LayerFactory
from patchgd_jax.models.layers.norm import Norm
from patchgd_jax.models.layers.pool import max_pool_3x3, mean_pool
from patchgd_jax.models.layers.remat import rematerialise


class ResidualBlock(nn.Module):
    """A branch of convolutions beside a residual connection."""

    features: int
    stride: int
    layers: LayerFactory
    drop_path: float = 0.0

    expansion = 1

    def branch(self, x: Array, norm: Callable[..., Array]) -> Array:
        """The convolutions, each followed by `norm`."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features * expansion]`."""

        def norm(x: Array, zero_scale: bool = False) -> Array:
            return self.layers.normalize(zero_scale=zero_scale)(x, train=train, mask=mask)

        y = drop_path(self.drop_path, self.branch(x, norm), train)
        if x.shape != y.shape:
            x = norm(self.layers.conv(y.shape[-1], 1, self.stride)(x))
        return nn.relu(x + y)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    def branch(self, x: Array, norm: Callable[..., Array]) -> Array:
        """See `ResidualBlock`."""
        conv = self.layers.conv
        y = nn.relu(norm(conv(self.features, 3, self.stride)(x)))
        return norm(conv(self.features)(y), zero_scale=True)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride."""

    expansion = 4

    def branch(self, x: Array, norm: Callable[..., Array]) -> Array:
        """See `ResidualBlock`."""
        conv = self.layers.conv
        y = nn.relu(norm(conv(self.features, 1)(x)))
        y = nn.relu(norm(conv(self.features, 3, self.stride)(y)))
        return norm(conv(self.features * self.expansion, 1)(y), zero_scale=True)


class ResNet(CNN):
    """The network up to global average pooling, then a dense layer to the latent vector."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    block: type[ResidualBlock] = BasicBlock
    norm: Norm = "group"
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block (arXiv 1603.09382)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        layers, stride = self.layers(), self.stem_stride or 2
        x = layers.conv(64, stem_side(7, stride), stride)(x.astype(self.dtype))
        x = max_pool_3x3(nn.relu(layers.normalize()(x, train=train, mask=mask)))
        block = rematerialise(self.block, self.remat)
        rates = drop_rates(self.drop_path, sum(self.blocks))
        number = 0
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"{self.block.__name__}_{number}"
                layer = block(64 * 2**stage, stride, layers, rates[number], name=name)
                x = layer(x, train, mask)
                number += 1
        return self.latents(mean_pool(x, self.window))
