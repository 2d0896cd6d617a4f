"""A small CNN for patches of simple pictures: the encoder of the default run."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.encoders.base import CNN
from patchgd_jax.models.layers.conv import space_to_depth
from patchgd_jax.models.layers.factory import LayerFactory
from patchgd_jax.models.layers.pool import max_pool, mean_pool
from patchgd_jax.models.layers.remat import rematerialise


class Stage(nn.Module):
    """A 3x3 convolution, norm and ReLU."""

    features: int
    layers: LayerFactory

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps `x [M, H, W, C]` to `[M, H, W, features]`."""
        x = self.layers.conv(self.features)(x)
        return nn.relu(self.layers.normalize(groups=8)(x, train=train, mask=mask))


class SmallCNN(CNN):
    """Four 3x3 convolutions after a patchifying stem, then mean and maximum over the map.

    Every stage works on few pixels with many channels, which suits matrix units and two CPU cores
    alike: a 64 px patch costs about 25 MFLOP. BatchNorm is the default because GroupNorm scales
    every patch alike: a corner of a stroke then weighs as much as a whole digit. Trained from image
    labels, GroupNorm had 14 to 16 % after 6,000 images and BatchNorm 94 % (with other heads).
    """

    widths: tuple[int, ...] = (32, 64, 128, 128)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return (1,) * len(self.widths)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        side = self.stem_stride or 4
        (_, height, width, _) = x.shape
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        x = space_to_depth(x, side)
        block, layers = rematerialise(Stage, self.remat), self.layers()
        for stage, features in enumerate(self.widths):
            if stage >= 2 and min(x.shape[1:3]) >= 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = block(features, layers, name=f"Stage_{stage}")(x, train, mask)
        pools = [pool(x, self.window) for pool in (mean_pool, max_pool)]
        return self.latents(jnp.concatenate(pools, axis=-1))
