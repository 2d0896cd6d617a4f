"""A small CNN for patches of simple pictures: the encoder of the default run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.models.layers.conv import Conv
from patchgd_jax.models.layers.norm import Norm, Normalize
from patchgd_jax.models.layers.pool import max_pool, mean_pool
from patchgd_jax.models.layers.remat import Remat, rematerialise


class Stage(nn.Module):
    """A 3x3 convolution, norm and ReLU."""

    features: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Maps `x [M, H, W, C]` to `[M, H, W, features]`."""
        x = Conv(self.features, dtype=self.dtype)(x)
        return nn.relu(Normalize(self.norm, self.dtype, groups=8)(x, train=train, mask=mask))


class SmallCNN(nn.Module):
    """Four 3x3 convolutions after a patchifying stem, then mean and maximum over the map.

    Every stage works on few pixels with many channels, which suits matrix units and two CPU cores
    alike: a 64 px patch costs about 25 MFLOP. BatchNorm is the default because GroupNorm scales
    every patch alike: a corner of a stroke then weighs as much as a whole digit. Trained from image
    labels, GroupNorm had 14 to 16 % after 6,000 images and BatchNorm 94 % (with other heads).
    `window` and `stem_stride` (4 if None) are as `models.build_encoder` has them.
    """

    latent_dim: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    widths: tuple[int, ...] = (32, 64, 128, 128)
    window: int | None = None
    stem_stride: int | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return (1,) * len(self.widths)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Encodes `x float [M, p, p, C]` to `float [M, latent_dim]`."""
        x = x.astype(self.dtype)
        count, height, width, channels = x.shape
        side = self.stem_stride or 4
        x = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        rows, cols = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(count, rows, side, cols, side, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(count, rows, cols, side**2 * channels)
        block = rematerialise(Stage, self.remat)
        for stage, features in enumerate(self.widths):
            if stage >= 2 and min(x.shape[1:3]) >= 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
            # Named here, so that the tree is the same under every policy.
            x = block(features, self.norm, self.dtype, name=f"Stage_{stage}")(x, train, mask)
        x = jnp.concatenate([mean_pool(x, self.window), max_pool(x, self.window)], axis=-1)
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(self.latent_dim, dtype=self.dtype, param_dtype=param_dtype)(x)
