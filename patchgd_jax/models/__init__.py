"""The shipped encoders and heads, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.config import ModelConfig
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.grid import PatchGrid
from patchgd_jax.models.heads import AttentionHead, CNNHead, LinearHead
from patchgd_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from patchgd_jax.models.small_cnn import SmallCNN
from patchgd_jax.patch_model import PatchModel, from_linen, rematerialised


class HeadEntry(NamedTuple):
    """A head's constructor and what a user of it must know."""

    build: Callable[..., nn.Module]
    fixed_grid: bool
    """Whether a model trained on one grid works on that grid only."""


ENCODERS: Mapping[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), block=Bottleneck),
}

HEADS: Mapping[str, HeadEntry] = {
    "attention": HeadEntry(AttentionHead, fixed_grid=False),
    "linear": HeadEntry(LinearHead, fixed_grid=False),
    "cnn-original": HeadEntry(CNNHead, fixed_grid=True),
    "cnn-smaller": HeadEntry(partial(CNNHead, same_size_blocks=0), fixed_grid=True),
    "cnn-larger": HeadEntry(partial(CNNHead, stride_2_blocks=4), fixed_grid=True),
    "cnn-smaller-feat": HeadEntry(partial(CNNHead, features=128), fixed_grid=True),
    "cnn-larger-feat": HeadEntry(partial(CNNHead, features=512), fixed_grid=True),
}


def head_entry(name: str) -> HeadEntry:
    """Looks a head up.

    Raises:
        ConfigError: if there is none of that name; it names the nearest.
    """
    if name not in HEADS:
        raise unknown_name("head", name, HEADS)
    return HEADS[name]


def build_model(
    config: ModelConfig,
    *,
    grid: PatchGrid,
    channels: int,
    classes: int,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
) -> PatchModel:
    """Builds a shipped model for one grid.

    Args:
        config: names and sizes.
        grid: the patch grid of the images.
        channels: channels of the images.
        classes: number of logits.
        mean: per-channel mean that is taken from pixels in [0, 1].
        std: per-channel standard deviation that they are divided by.

    Raises:
        ConfigError: for an unknown name, or a patch too small for the encoder.
    """
    if config.encoder not in ENCODERS:
        raise unknown_name("encoder", config.encoder, ENCODERS)
    head = head_entry(config.head)
    if grid.patch < 4:
        raise ConfigError(f"patch side {grid.patch} is too small; the encoders need at least 4 px")
    dtype: Any = jnp.dtype(config.dtype)
    # Only an explicit rate overrides the dropout that a published head comes with.
    dropout = {"dropout": config.dropout} if config.dropout is not None else {}
    model = from_linen(
        ENCODERS[config.encoder](
            latent_dim=config.latent_dim, norm=config.norm, dtype=dtype, remat=config.remat
        ),
        head.build(classes=classes, **dropout),
        grid=grid,
        channels=channels,
        mean=mean,
        std=std,
    )
    return rematerialised(model) if config.remat == "everything" else model
