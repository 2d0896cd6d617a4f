"""Heads (theta2): networks that read the whole latent block Z and give logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.models.layers.conv import Conv
from patchgd_jax.models.layers.dense import dense
from patchgd_jax.models.layers.norm import Normalize


class CNNHead(nn.Module):
    """The papers' head: blocks of [3x3 conv, ReLU, BatchNorm, Dropout2d], then a dense layer.

    The dense layer reads the flattened map, so the grid is fixed at initialisation.
    Source: arXiv 2301.13817, section 4; five sizes in its ablation.
    """

    classes: int
    same_size_blocks: int = 1
    stride_2_blocks: int = 3
    features: int = 256
    dropout: float = 0.2
    dtype: Any = jnp.float32
    axis_name: tuple[str, ...] = ()
    """Mesh axes over which batch statistics are taken in training."""

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; entries where `mask` is False are zeroed."""
        if mask is not None:
            z = jnp.where(mask[..., None], z, 0)
        strides = [1] * self.same_size_blocks + [2] * self.stride_2_blocks
        for stride in strides:
            z = Conv(self.features, stride=stride, use_bias=True, dtype=self.dtype)(z)
            z = nn.relu(z)
            z = Normalize("batch", self.dtype, axis_name=self.axis_name)(z, train=train)
            # Dropout2d drops whole maps.
            z = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(z)
        z = z.reshape(z.shape[0], -1)
        return dense(self.classes, self.dtype)(z)


class LinearHead(nn.Module):
    """A dense layer on the mean of the patches' latents, for any grid."""

    classes: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; patches where `mask` is False do not count."""
        where = None if mask is None else mask[..., None]
        pooled = z.mean((1, 2), where=where)
        pooled = nn.Dropout(self.dropout, deterministic=not train)(pooled)
        return dense(self.classes, self.dtype)(pooled)


class AttentionHead(nn.Module):
    """Gated attention pooling over the patches of Z, for any grid.

    Attention starts uniform, as a mean: before the encoder has learned anything, other weights only
    hide patches from it (training accuracy after 3,200 images: 63 % against 31 %).

    Source: Ilse et al., Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, eq. 9.
    """

    classes: int
    features: int = 128
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; patches where `mask` is False have no weight.

        Sows `attention`, `[B, rows, cols]`: the weight of each patch, which sum to one.
        """
        zeros = nn.initializers.zeros_init()
        batch, rows, cols, width = z.shape
        z = z.reshape(batch, rows * cols, width)
        x = nn.relu(dense(self.features, self.dtype)(z))
        gate = nn.sigmoid(dense(self.features // 2, self.dtype)(x))
        gated = nn.tanh(dense(self.features // 2, self.dtype)(x)) * gate
        score = dense(1, self.dtype, kernel_init=zeros)(gated)
        if mask is not None:
            score = jnp.where(mask.reshape(batch, rows * cols, 1), score, -jnp.inf)
        weights = nn.softmax(score, axis=1)
        self.sow("intermediates", "attention", weights.reshape(batch, rows, cols))
        pooled = (weights * x).sum(1)
        pooled = nn.Dropout(self.dropout, deterministic=not train)(pooled)
        return dense(self.classes, self.dtype)(pooled)


class ConvHead(nn.Module):
    """Convolutions only: 3x3, ReLU, 1x1 to a map of each class, and the mean of each map.

    Source: Lin et al., Network in Network, arXiv 1312.4400, section 3.2.
    """

    classes: int
    features: int = 128
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, mask: Array | None, *, train: bool) -> Array:
        """Classifies `z float [B, rows, cols, D]`; entries where `mask` is False do not count."""
        where = None if mask is None else mask[..., None]
        if where is not None:
            z = jnp.where(where, z, 0)
        z = nn.relu(Conv(self.features, use_bias=True, dtype=self.dtype)(z))
        z = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(z)
        z = Conv(self.classes, 1, use_bias=True, dtype=self.dtype)(z)
        return z.mean((1, 2), where=where)
