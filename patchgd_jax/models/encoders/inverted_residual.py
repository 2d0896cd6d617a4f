"""MobileNetV2 at width 1 and EfficientNet-B0, as in torchvision (arXiv 1801.04381, 1905.11946)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from patchgd_jax.models.encoders.base import CNN
from patchgd_jax.models.layers.conv import stem_side
from patchgd_jax.models.layers.drop_path import drop_path
from patchgd_jax.models.layers.factory import ConvNorm, LayerFactory
from patchgd_jax.models.layers.pool import mean_pool
from patchgd_jax.models.layers.remat import rematerialise


class Network(NamedTuple):
    """How the two networks differ."""

    block_name: str
    activation: Callable[[Array], Array]
    squeezes: bool
    stages: tuple[tuple[int, int, int, int, int], ...]
    """Expansion factor, side of the kernel, output channels, blocks, stride of the first."""


class SqueezeExcitation(nn.Module):
    """Scales each channel by a small network's output for all channels' means (1709.01507)."""

    squeezed: int
    layers: LayerFactory

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales `x [M, H, W, C]`."""
        y = x.mean((1, 2), keepdims=True)
        y = nn.silu(self.layers.conv(self.squeezed, 1, use_bias=True)(y))
        return x * nn.sigmoid(self.layers.conv(x.shape[-1], 1, use_bias=True)(y))


class InvertedResidual(nn.Module):
    """Widens, convolves each channel, and narrows without an activation; a residual if it can."""

    expansion: int
    side: int
    features: int
    stride: int
    network: Network
    layers: LayerFactory
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features]`."""
        activation, layers = self.network.activation, self.layers
        channels = x.shape[-1]
        wide = channels * self.expansion
        y = x
        if self.expansion > 1:
            y = activation(ConvNorm(wide, 1, layers, name="expand")(y, train, mask))
        depthwise = ConvNorm(wide, self.side, layers, self.stride, depthwise=True, name="depthwise")
        y = activation(depthwise(y, train, mask))
        if self.network.squeezes:
            y = SqueezeExcitation(channels // 4, layers)(y)
        y = ConvNorm(self.features, 1, layers, name="project")(y, train, mask)
        return x + drop_path(self.drop_path, y, train) if x.shape == y.shape else y


class InvertedResidualNet(CNN):
    """The network up to global average pooling, then a dense layer to the latent vector."""

    dropout: float = 0.0
    """Of the pooled features; 0.2 in torchvision."""

    network = Network("", nn.relu, False, ())
    drop_path = 0.0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(count for _, _, _, count, _ in self.network.stages)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        network, layers, stride = self.network, self.layers(), self.stem_stride or 2
        stem = ConvNorm(32, stem_side(3, stride), layers, stride, name="stem")
        x = network.activation(stem(x.astype(self.dtype), train, mask))
        block = rematerialise(InvertedResidual, self.remat)
        number = 0
        for expansion, side, features, count, first_stride in network.stages:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                rate = self.drop_path * number / sum(self.blocks)
                name = f"{network.block_name}_{number}"
                layer = block(expansion, side, features, stride, network, layers, rate, name=name)
                x = layer(x, train, mask)
                number += 1
        x = network.activation(ConvNorm(1280, 1, layers, name="last")(x, train, mask))
        x = nn.Dropout(self.dropout, deterministic=not train)(mean_pool(x, self.window))
        return self.latents(x)


class MobileNetV2(InvertedResidualNet):
    """MobileNetV2; its stages are table 2 of the paper."""

    network = Network(
        block_name="InvertedResidual",
        activation=nn.relu6,
        squeezes=False,
        stages=(
            (1, 3, 16, 1, 1),
            (6, 3, 24, 2, 2),
            (6, 3, 32, 3, 2),
            (6, 3, 64, 4, 2),
            (6, 3, 96, 3, 1),
            (6, 3, 160, 3, 2),
            (6, 3, 320, 1, 1),
        ),
    )


class EfficientNet(InvertedResidualNet):
    """EfficientNet-B0; its stages are table 1 of the paper."""

    drop_path: float = 0.0
    """Rate of stochastic depth that a block after the last would have; 0.2 in torchvision."""

    network = Network(
        block_name="MBConv",
        activation=nn.silu,
        squeezes=True,
        stages=(
            (1, 3, 16, 1, 1),
            (6, 3, 24, 2, 2),
            (6, 5, 40, 2, 2),
            (6, 3, 80, 3, 2),
            (6, 5, 112, 3, 1),
            (6, 5, 192, 4, 2),
            (6, 3, 320, 1, 1),
        ),
    )
