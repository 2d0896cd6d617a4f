"""A convolution with its norm: what MobileNetV2 and EfficientNet are made of."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from patchgd_jax.models.layers.conv import Conv, DepthwiseConv
from patchgd_jax.models.layers.norm import Norm, Normalize


class ConvNorm(nn.Module):
    """A convolution without a bias, padded to keep the map's size at stride 1, then a norm."""

    features: int
    side: int
    norm: Norm
    dtype: Any
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H / stride, W / stride, features]`."""
        if self.depthwise:
            x = DepthwiseConv(self.side, self.stride, dtype=self.dtype)(x)
        else:
            x = Conv(self.features, self.side, self.stride, dtype=self.dtype)(x)
        return Normalize(self.norm, self.dtype)(x, train=train, mask=mask)
