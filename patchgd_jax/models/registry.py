"""The encoders and heads by name: the shipped ones, and those that a user registers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.config import ModelConfig
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import PatchModel
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.adapters import from_linen, rematerialised
from patchgd_jax.models.encoders.convnext_v2 import ConvNeXtV2
from patchgd_jax.models.encoders.efficientnet import EfficientNet
from patchgd_jax.models.encoders.mobilenet_v2 import MobileNetV2
from patchgd_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResNet
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.models.encoders.vit import TOKEN_SIDE, ViT
from patchgd_jax.models.heads.adaptive import AdaptiveCNNHead
from patchgd_jax.models.heads.simple import AttentionHead, CNNHead, ConvHead, LinearHead
from patchgd_jax.models.heads.transformer import TransformerHead


class EncoderEntry(NamedTuple):
    """An encoder's constructor and what can be known before it runs."""

    build: Callable[..., nn.Module]
    norms: tuple[str, ...] = ()
    """What its `norm` can be, its own first; empty if it takes none."""
    features: int | None = None
    """Width of the features that its last layer makes the latent vector of, where known."""
    smallest_side: int = 1
    """Smallest patch side in pixels that it can take."""
    side_multiple: int = 1
    """Pixels that the patch side must be a multiple of."""


class HeadEntry(NamedTuple):
    """A head's constructor and what a user of it must know."""

    build: Callable[..., nn.Module]
    fixed_grid: bool
    """Whether a model trained on one grid works on that grid only."""


_CNN = partial(EncoderEntry, norms=("batch", "group"), smallest_side=4)


def _resnet(blocks: tuple[int, ...], block: type[BasicBlock] | type[Bottleneck]) -> EncoderEntry:
    build = partial(ResNet, blocks=blocks, block=block)
    return _CNN(build, features=512 * block.expansion)


def _convnext_v2(blocks: tuple[int, ...], widths: tuple[int, ...]) -> EncoderEntry:
    build = partial(ConvNeXtV2, blocks=blocks, widths=widths)
    return EncoderEntry(build, ("layer",), features=widths[-1], smallest_side=32)


def _vit(width: int, heads: int) -> EncoderEntry:
    build = partial(ViT, width=width, heads=heads)
    return EncoderEntry(build, ("layer",), width, TOKEN_SIDE, TOKEN_SIDE)


ENCODERS: dict[str, EncoderEntry] = {
    "small-cnn": _CNN(SmallCNN, features=256),
    "resnet18": _resnet((2, 2, 2, 2), BasicBlock),
    "resnet34": _resnet((3, 4, 6, 3), BasicBlock),
    "resnet50": _resnet((3, 4, 6, 3), Bottleneck),
    "resnet101": _resnet((3, 4, 23, 3), Bottleneck),
    "mobilenet-v2": _CNN(MobileNetV2, features=1280),
    "efficientnet-b0": _CNN(EfficientNet, features=1280),
    "convnext-v2-atto": _convnext_v2((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext-v2-femto": _convnext_v2((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext-v2-pico": _convnext_v2((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext-v2-nano": _convnext_v2((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext-v2-tiny": _convnext_v2((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext-v2-base": _convnext_v2((3, 3, 27, 3), (128, 256, 512, 1024)),
    # One network under two names, for its two sets of published weights.
    **{
        f"{family}-{size}": _vit(width, heads)
        for family in ("deit", "vit")
        for size, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    },
}

HEADS: dict[str, HeadEntry] = {
    "attention": HeadEntry(AttentionHead, fixed_grid=False),
    "linear": HeadEntry(LinearHead, fixed_grid=False),
    "conv": HeadEntry(ConvHead, fixed_grid=False),
    "transformer": HeadEntry(TransformerHead, fixed_grid=False),
    "adaptive-cnn": HeadEntry(AdaptiveCNNHead, fixed_grid=False),
    "cnn-original": HeadEntry(CNNHead, fixed_grid=True),
    "cnn-smaller": HeadEntry(partial(CNNHead, same_size_blocks=0), fixed_grid=True),
    "cnn-larger": HeadEntry(partial(CNNHead, stride_2_blocks=4), fixed_grid=True),
    "cnn-smaller-feat": HeadEntry(partial(CNNHead, features=128), fixed_grid=True),
    "cnn-larger-feat": HeadEntry(partial(CNNHead, features=512), fixed_grid=True),
}


def register_encoder(
    name: str,
    constructor: Callable[..., nn.Module],
    *,
    norms: Sequence[str] = (),
    features: int | None = None,
    smallest_side: int = 1,
    side_multiple: int = 1,
) -> None:
    """Makes an encoder known by name, as the shipped ones are.

    Args:
        name: for `ModelConfig.encoder`; must be new.
        constructor: of a Flax Linen module `[M, p, p, C] -> [M, latent_dim]`. It is called with
            `latent_dim`, and with those of `norm`, `dtype`, `remat`, `drop_path`, `stem_stride` and
            `window` (see `build_encoder`) that it takes.
        norms: what its `norm` can be, of group, batch and layer, the default first.
        features: width of the features that the latent vector is made of.
        smallest_side: the smallest patch side in pixels that it can take.
        side_multiple: what the patch side must be a multiple of, in pixels.

    Raises:
        ConfigError: if the name is taken.
    """
    if name in ENCODERS:
        raise ConfigError(f"there is an encoder {name!r} already; register yours by another name")
    ENCODERS[name] = EncoderEntry(constructor, tuple(norms), features, smallest_side, side_multiple)


def register_head(
    name: str, constructor: Callable[..., nn.Module], *, fixed_grid: bool = False
) -> None:
    """Makes a head known by name, as the shipped ones are.

    Args:
        name: for `ModelConfig.head`; must be new.
        constructor: of a Flax Linen module `([B, rows, cols, D], mask) -> [B, classes]`. It is
            called with `classes`, and with `dropout` where the config sets one.
        fixed_grid: whether a model trained on one grid works on that grid only.

    Raises:
        ConfigError: if the name is taken.
    """
    if name in HEADS:
        raise ConfigError(f"there is a head {name!r} already; register yours by another name")
    HEADS[name] = HeadEntry(constructor, fixed_grid)


def encoder_entry(name: str) -> EncoderEntry:
    """Looks an encoder up.

    Raises:
        ConfigError: if there is none of that name; it names the nearest.
    """
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    return ENCODERS[name]


def encoder_norm(config: ModelConfig) -> str | None:
    """The norm that the encoder is built with; None if it takes none.

    Raises:
        ConfigError: for an unknown encoder, or a norm that it cannot have.
    """
    norms = encoder_entry(config.encoder).norms
    if config.norm is None:
        return norms[0] if norms else None
    if config.norm not in norms:
        raise ConfigError(
            f"model.norm {config.norm} is not possible in {config.encoder}; "
            + (f"it can have {' or '.join(norms)}" if norms else "leave it out")
        )
    return config.norm


def build_encoder(config: ModelConfig, patch: int, window: int | None = None) -> nn.Module:
    """Builds an encoder for one patch side.

    Args:
        config: names and sizes.
        patch: side of a patch in pixels.
        window: pool windows of so many entries of the last map, at every position, instead of the
            whole map: `[M, H, W, C]` then becomes `[M, h, w, latent_dim]`.

    Raises:
        ConfigError: for an unknown name, a norm, stochastic depth, stride of the stem or window
            that the encoder cannot have, or a patch side that it cannot take.
    """
    name, entry = config.encoder, encoder_entry(config.encoder)
    norm = encoder_norm(config)
    if patch < entry.smallest_side:
        raise ConfigError(
            f"patch side {patch} is too small for {name}; it needs at least "
            f"{entry.smallest_side} px"
        )
    if patch % entry.side_multiple:
        below = patch - patch % entry.side_multiple
        raise ConfigError(
            f"patch side {patch} is not possible in {name}; it needs a multiple of "
            f"{entry.side_multiple} px: {below} or {below + entry.side_multiple}"
        )
    taken = inspect.signature(entry.build).parameters
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
    options = {key: value for key, value in options.items() if key in taken}
    if norm is not None:
        options["norm"] = norm
    if config.drop_path:
        if "drop_path" not in taken:
            raise ConfigError(f"{name} has no stochastic depth; leave model.drop_path at 0")
        options["drop_path"] = config.drop_path
    if config.stem_stride is not None:
        if "stem_stride" not in taken:
            raise ConfigError(f"{name} has no stem with a stride; leave model.stem_stride out")
        options["stem_stride"] = config.stem_stride
    if window is not None:
        if "window" not in taken:
            raise ConfigError(
                f"{name} is not convolutional: it gives no map of an image of another size; take a "
                "convolutional encoder, resnet18 say, or --method patchwise"
            )
        options["window"] = window
    return entry.build(latent_dim=config.latent_dim, **options)


def map_side(config: ModelConfig, patch: int, channels: int) -> int:
    """The side of the last map that the encoder has of a patch: the `window` of its mean.

    Raises:
        ConfigError: if the encoder is not convolutional, or as `build_encoder`.
    """
    encoder = build_encoder(config, patch, window=1)
    patches = jax.ShapeDtypeStruct((1, patch, patch, channels), jnp.float32)
    init = partial(encoder.init_with_output, train=False)
    latents, _ = jax.eval_shape(init, jax.random.key(0), patches)
    return int(latents.shape[1])


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
    grid: Grid,
    channels: int,
    classes: int,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    window: int | None = None,
) -> PatchModel:
    """Builds a model for one grid.

    Args:
        config: names and sizes.
        grid: the patch grid of the images.
        channels: channels of the images.
        classes: number of logits: `Task.num_outputs`.
        mean: per-channel mean that is taken from pixels in [0, 1].
        std: per-channel standard deviation that they are divided by.
        window: see `build_encoder`.

    Raises:
        ConfigError: for an unknown name, or what `build_encoder` refuses.
    """
    # Every side of a patch must be one that the encoder can take.
    encoder, *_ = (build_encoder(config, side, window) for side in grid.patch_shape)
    head = head_entry(config.head)
    # Only an explicit rate overrides the dropout that a published head comes with.
    dropout = {"dropout": config.dropout} if config.dropout is not None else {}
    model = from_linen(
        encoder,
        head.build(classes=classes, **dropout),
        grid=grid,
        channels=channels,
        mean=mean,
        std=std,
    )
    return rematerialised(model) if config.remat == "everything" else model
