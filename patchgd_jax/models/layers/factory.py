"""What the layers of one encoder have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import linen as nn
from jax import Array

from patchgd_jax.models.layers.conv import Conv, DepthwiseConv
from patchgd_jax.models.layers.norm import Norm, Normalize


@dataclass(frozen=True)
class LayerFactory:
    """Makes the convolutions and norms of an encoder.

    Args:
        norm: of all blocks.
        dtype: of all computations.
        axis_name: see `Normalize`.
        rows_sharded: see `conv2d`.
    """

    norm: Norm
    dtype: Any
    axis_name: tuple[str, ...] = ()
    rows_sharded: bool = False

    def conv(self, features: int, side: int = 3, stride: int = 1, **options: Any) -> Conv:
        """A convolution without a bias, unless the options say otherwise."""
        options |= {"dtype": self.dtype, "rows_sharded": self.rows_sharded}
        return Conv(features, side, stride, **options)

    def depthwise(self, side: int, stride: int = 1, **options: Any) -> DepthwiseConv:
        """A convolution of each channel, without a bias unless the options say otherwise."""
        options |= {"dtype": self.dtype, "rows_sharded": self.rows_sharded}
        return DepthwiseConv(side, stride, **options)

    def normalize(self, **options: Any) -> Normalize:
        """A norm of the encoder's kind."""
        return Normalize(self.norm, self.dtype, axis_name=self.axis_name, **options)


class ConvNorm(nn.Module):
    """A convolution without a bias, padded to keep the map's size at stride 1, then a norm."""

    features: int
    side: int
    layers: LayerFactory
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features]`."""
        if self.depthwise:
            x = self.layers.depthwise(self.side, self.stride)(x)
        else:
            x = self.layers.conv(self.features, self.side, self.stride)(x)
        return self.layers.normalize()(x, train=train, mask=mask)
