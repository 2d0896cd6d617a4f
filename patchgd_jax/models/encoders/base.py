"""What the encoders share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.layers.dense import dense
from patchgd_jax.models.layers.factory import LayerFactory
from patchgd_jax.models.layers.remat import Remat


class Encoder(nn.Module):
    """An encoder of blocks, called as `encoder(patches, train=..., mask=...)`.

    Blocks are named here, `<Name>_0`, `<Name>_1` ..., so that the parameters have the same names
    under every policy of rematerialisation.
    """

    latent_dim: int
    norm: Any = "batch"
    dtype: Any = jnp.float32
    remat: Remat = "none"

    def latents(self, features: Array) -> Array:
        """The dense layer from features to `[M, latent_dim]`, which is the last of each encoder."""
        return dense(self.latent_dim, self.dtype)(features)


class CNN(Encoder):
    """A convolutional encoder of patches of any size."""

    window: int | None = None
    """Side of the windows of the last map to pool; None pools the whole map."""
    stem_stride: int | None = None
    """Stride of the first convolution; None takes the published one."""
    axis_name: tuple[str, ...] = ()
    """Mesh axes over which batch statistics are taken in training."""
    rows_sharded: bool = False
    """Whether the rows of patches are sharded over devices."""

    def layers(self) -> LayerFactory:
        """Makes the encoder's convolutions and norms."""
        return LayerFactory(self.norm, self.dtype, self.axis_name, self.rows_sharded)
