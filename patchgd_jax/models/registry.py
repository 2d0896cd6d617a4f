"""The encoders and heads by name: the shipped ones, and those that users add."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from patchgd_jax.config import ModelConfig
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import PatchModel
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.adapters import Channels, from_linen, rematerialised
from patchgd_jax.models.encoders.convnext_v2 import ConvNeXtV2
from patchgd_jax.models.encoders.inverted_residual import EfficientNet, MobileNetV2
from patchgd_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResidualBlock, ResNet
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.models.encoders.vit import TOKEN_SIDE, ViT
from patchgd_jax.models.heads.adaptive import AdaptiveCNNHead
from patchgd_jax.models.heads.simple import AttentionHead, CNNHead, ConvHead, LinearHead
from patchgd_jax.models.heads.transformer import TransformerHead


class EncoderEntry(NamedTuple):
    """An encoder's constructor and the properties known before it runs."""

    build: Callable[..., nn.Module]
    norms: tuple[str, ...] = ()
    """Allowed values of its `norm`, the default first; empty if it takes none."""
    features: int | None = None
    """Width of the features before its last layer, where known."""
    smallest_side: int = 1
    """Smallest allowed patch side in pixels."""
    side_multiple: int = 1
    """Pixels that the patch side must be a multiple of."""


class HeadEntry(NamedTuple):
    """A head's constructor and its restriction."""

    build: Callable[..., nn.Module]
    fixed_grid: bool = False
    """Whether a model trained on one grid works on that grid only."""


_CNN = partial(EncoderEntry, norms=("batch", "group"), smallest_side=4)


def _resnet(blocks: tuple[int, ...], block: type[ResidualBlock]) -> EncoderEntry:
    build = partial(ResNet, blocks=blocks, block=block)
    return _CNN(build, features=512 * block.expansion)


def _convnext_v2(blocks: tuple[int, ...], widths: tuple[int, ...]) -> EncoderEntry:
    build = partial(ConvNeXtV2, blocks=blocks, widths=widths)
    return EncoderEntry(build, ("layer",), features=widths[-1], smallest_side=32)


def _vit(width: int, heads: int) -> EncoderEntry:
    build = partial(ViT, width=width, heads=heads)
    return EncoderEntry(build, ("layer",), width, TOKEN_SIDE, TOKEN_SIDE)


_ENCODERS: dict[str, EncoderEntry] = {
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

_HEADS: dict[str, HeadEntry] = {
    "attention": HeadEntry(AttentionHead),
    "linear": HeadEntry(LinearHead),
    "conv": HeadEntry(ConvHead),
    "transformer": HeadEntry(TransformerHead),
    "adaptive-cnn": HeadEntry(AdaptiveCNNHead),
    "cnn-original": HeadEntry(CNNHead, fixed_grid=True),
    "cnn-smaller": HeadEntry(partial(CNNHead, same_size_blocks=0), fixed_grid=True),
    "cnn-larger": HeadEntry(partial(CNNHead, stride_2_blocks=4), fixed_grid=True),
    "cnn-smaller-feat": HeadEntry(partial(CNNHead, features=128), fixed_grid=True),
    "cnn-larger-feat": HeadEntry(partial(CNNHead, features=512), fixed_grid=True),
}

ENCODERS: Mapping[str, EncoderEntry] = MappingProxyType(_ENCODERS)
"""Encoders by name, read-only; `register_encoder` adds to them."""
HEADS: Mapping[str, HeadEntry] = MappingProxyType(_HEADS)
"""Heads by name, read-only; `register_head` adds to them."""


def register_encoder(
    name: str,
    constructor: Callable[..., nn.Module],
    *,
    norms: Sequence[str] = (),
    features: int | None = None,
    smallest_side: int = 1,
    side_multiple: int = 1,
) -> None:
    """Adds an encoder to those known by name, in this process.

    Args:
        name: for `ModelConfig.encoder`; must be new.
        constructor: of a Flax Linen module `[M, p, p, C] -> [M, latent_dim]`. It is called with
            `latent_dim`, and with those of `norm`, `dtype`, `remat`, `drop_path`, `stem_stride`,
            `window`, `axis_name` and `rows_sharded` (see `build_encoder`) that it takes.
        norms: allowed values of its `norm`, among group, batch and layer; the default first.
        features: width of the features before its last layer.
        smallest_side: the smallest allowed patch side in pixels.
        side_multiple: what the patch side must be a multiple of, in pixels.

    Raises:
        ConfigError: if the name is taken.
    """
    if name in _ENCODERS:
        raise ConfigError(f"there is an encoder {name!r} already; register yours by another name")
    _ENCODERS[name] = EncoderEntry(
        constructor, tuple(norms), features, smallest_side, side_multiple
    )


def register_head(
    name: str, constructor: Callable[..., nn.Module], *, fixed_grid: bool = False
) -> None:
    """Adds a head to those known by name, in this process.

    Args:
        name: for `ModelConfig.head`; must be new.
        constructor: of a Flax Linen module `([B, rows, cols, D], mask) -> [B, classes]`. It is
            called with `classes`, with `dropout` where the config sets one, and with `axis_name`
            (see `build_model`) if it takes it.
        fixed_grid: whether a model trained on one grid works on that grid only.

    Raises:
        ConfigError: if the name is taken.
    """
    if name in _HEADS:
        raise ConfigError(f"there is a head {name!r} already; register yours by another name")
    _HEADS[name] = HeadEntry(constructor, fixed_grid)


def encoder_entry(name: str) -> EncoderEntry:
    """Looks up an encoder; if unknown, in the entry points `patchgd_jax.encoders`.

    Raises:
        ConfigError: if there is none of that name, with the nearest name; or it cannot be loaded.
    """
    return _lookup("encoder", name, _ENCODERS, EncoderEntry)


def head_entry(name: str) -> HeadEntry:
    """Looks up a head; if unknown, in the entry points `patchgd_jax.heads`.

    Raises:
        ConfigError: if there is none of that name, with the nearest name; or it cannot be loaded.
    """
    return _lookup("head", name, _HEADS, HeadEntry)


def _lookup(kind: str, name: str, known: dict[str, Any], entry_type: type) -> Any:
    """Finds an entry among the known ones or those of installed packages.

    An entry point gives an entry, or a constructor.
    """
    if name not in known:
        installed = entry_points(group=f"patchgd_jax.{kind}s")
        if name not in installed.names:
            raise unknown_name(kind, name, [*known, *sorted(installed.names)])
        try:
            found = installed[name].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the {kind} {name!r} cannot be loaded from {installed[name].value}: {error}; "
                "install its package anew"
            ) from error
        known[name] = found if isinstance(found, entry_type) else entry_type(found)
    return known[name]


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


def build_encoder(
    config: ModelConfig,
    patch: int,
    window: int | None = None,
    axis_name: tuple[str, ...] = (),
    rows_sharded: bool = False,
) -> nn.Module:
    """Builds an encoder for one patch side.

    Args:
        config: names and sizes.
        patch: side of a patch in pixels.
        window: pools windows of this side at every position of the last map instead of the whole
            map: `[M, H, W, C]` then becomes `[M, h, w, latent_dim]`.
        axis_name: mesh axes over which batch statistics are taken in training.
        rows_sharded: whether the rows of patches are sharded over devices.

    Raises:
        ConfigError: for an unknown name; a norm, stochastic depth, stride of the stem or window
            that the encoder does not have; or a patch side that it does not take.
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
    options = _accepted(
        entry.build,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        axis_name=axis_name,
        rows_sharded=rows_sharded,
    )
    if norm is not None:
        options["norm"] = norm
    drop_path, stem_stride = config.drop_path or None, config.stem_stride
    optional = (
        ("drop_path", drop_path, "has no stochastic depth: leave model.drop_path at 0"),
        ("stem_stride", stem_stride, "has no stem with a stride: leave model.stem_stride out"),
        (
            "window",
            window,
            "is not convolutional: it gives no map of an image of another size; take a "
            "convolutional encoder such as resnet18, or --method patchwise",
        ),
    )
    for option, value, refusal in optional:
        if value is not None:
            if not _accepted(entry.build, **{option: value}):
                raise ConfigError(f"{name} {refusal}")
            options[option] = value
    return entry.build(latent_dim=config.latent_dim, **options)


def _accepted(build: Callable[..., nn.Module], **options: Any) -> dict[str, Any]:
    """Those of the options that a constructor takes."""
    taken = inspect.signature(build).parameters
    return {name: value for name, value in options.items() if name in taken}


def map_side(config: ModelConfig, patch: int, channels: int) -> int:
    """The side of the encoder's last map of one patch: its `window` in a fully convolutional model.

    Raises:
        ConfigError: if the encoder is not convolutional, or as `build_encoder`.
    """
    encoder = build_encoder(config, patch, window=1)
    patches = jax.ShapeDtypeStruct((1, patch, patch, channels), jnp.float32)
    init = partial(encoder.init_with_output, train=False)
    latents, _ = jax.eval_shape(init, jax.random.key(0), patches)
    return int(latents.shape[1])


def build_model(
    config: ModelConfig,
    *,
    grid: Grid,
    channels: int,
    classes: int,
    mean: Channels,
    std: Channels,
    window: int | None = None,
    axis_name: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    rows_sharded: bool = False,
) -> PatchModel:
    """Builds a model for one grid.

    Args:
        config: names and sizes.
        grid: the patch grid of the images.
        channels: channels of the images.
        classes: number of logits: `Task.num_outputs`.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        window: see `build_encoder`.
        axis_name: by `encoder` and `head`, the mesh axes over which batch statistics are taken in
            training. The model then trains inside a `shard_map` over these axes only.
        rows_sharded: see `build_encoder`.

    Raises:
        ConfigError: for an unknown name, or as `build_encoder`.
    """
    # Both sides of a patch must be allowed.
    encoder, *_ = (
        build_encoder(config, side, window, axis_name.get("encoder", ()), rows_sharded)
        for side in grid.patch_shape
    )
    head = head_entry(config.head).build
    options = _accepted(head, axis_name=axis_name.get("head", ()))
    if config.dropout is not None:
        # Only an explicit rate overrides the dropout that a published head comes with.
        options["dropout"] = config.dropout
    model = from_linen(
        encoder, head(classes=classes, **options), grid=grid, channels=channels, mean=mean, std=std
    )
    return rematerialised(model) if config.remat == "everything" else model
