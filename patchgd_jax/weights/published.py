"""Tables that map published tensor names and layouts to those of our encoders, and back.

ResNet, MobileNetV2 and EfficientNet have torchvision's names, ViT and DeiT timm's, and ConvNeXt-V2
the official ones (timm's are read as well).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from patchgd_jax.errors import ConfigError
from patchgd_jax.weights.positions import interpolate_positions

FlaxPath = tuple[str, ...]
"""Collection first, then relative to the encoder: `("params", "Conv_0", "kernel")`."""

LATENT_LAYER = "Dense_0"
"""The last layer of every encoder, from features to latents; no published network has it."""

Kind = Literal[
    "conv", "conv-bias", "dense", "batch-norm", "layer-norm", "grn", "grn-timm", "tokens"
]
_Layout = Literal["as-is", "conv", "dense", "per-channel", "positions"]


class Rule(NamedTuple):
    """One layer: published name (`layer1.0.conv1`), our path (`("Bottleneck_0", "Conv_0")`)."""

    published: str
    path: FlaxPath
    kind: Kind


class PublishedNames(NamedTuple):
    """Key mapping and input normalisation of an architecture's published checkpoints.

    Where two rules have one path, both names are read, and the first is written.
    """

    rules: tuple[Rule, ...]
    classifier: str
    """Regular expression of the keys of the published classifier."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of pixels in [0, 1], per channel (RGB)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    ignored: str = r".*\.num_batches_tracked"
    """Regular expression of keys without content."""


class _Tensor(NamedTuple):
    published: str
    collection: str
    name: str
    layout: _Layout


_NORM = (_Tensor("weight", "params", "scale", "as-is"), _Tensor("bias", "params", "bias", "as-is"))
_CONV = _Tensor("weight", "params", "kernel", "conv")
_BIAS = _Tensor("bias", "params", "bias", "as-is")
_TENSORS: Mapping[Kind, tuple[_Tensor, ...]] = {
    "conv": (_CONV,),
    "conv-bias": (_CONV, _BIAS),
    "dense": (_Tensor("weight", "params", "kernel", "dense"), _BIAS),
    "batch-norm": (
        *_NORM,
        _Tensor("running_mean", "batch_stats", "mean", "as-is"),
        _Tensor("running_var", "batch_stats", "var", "as-is"),
    ),
    "layer-norm": _NORM,
    "grn": (
        _Tensor("gamma", "params", "gamma", "per-channel"),
        _Tensor("beta", "params", "beta", "per-channel"),
    ),
    "grn-timm": (
        _Tensor("weight", "params", "gamma", "as-is"),
        _Tensor("bias", "params", "beta", "as-is"),
    ),
    "tokens": (
        _Tensor("cls_token", "params", "cls_token", "as-is"),
        _Tensor("pos_embed", "params", "pos_embed", "positions"),
    ),
}


@cache
def _by_key(rules: tuple[Rule, ...]) -> dict[str, tuple[FlaxPath, _Layout]]:
    index: dict[str, tuple[FlaxPath, _Layout]] = {}
    for rule in rules:
        for tensor in _TENSORS[rule.kind]:
            key = f"{rule.published}.{tensor.published}".lstrip(".")
            index[key] = (tensor.collection, *rule.path, tensor.name), tensor.layout
    return index


@cache
def _by_path(rules: tuple[Rule, ...]) -> dict[FlaxPath, str]:
    # Of several names of a path the first is kept.
    return {path: key for key, (path, _) in reversed(_by_key(rules).items())}


def flax_path(names: PublishedNames, key: str) -> FlaxPath | None:
    """Looks up our path of a published tensor; None for classifier, ignored and unknown keys."""
    entry = _by_key(names.rules).get(key)
    return None if entry is None else entry[0]


def published_name(names: PublishedNames, path: FlaxPath) -> str:
    """Looks up the published name of a tensor of our encoder.

    Raises `ConfigError` for the latent layer, and for a norm that is not the published one.
    """
    try:
        return _by_path(names.rules)[tuple(path)]
    except KeyError:
        raise ConfigError(
            f"{'/'.join(path)} has no published name; only an encoder with its architecture's own "
            "norm has, and without its latent layer"
        ) from None


# From PyTorch to Flax; the way back is the inverse permutation.
_AXES: Mapping[_Layout, tuple[int, ...]] = {"conv": (2, 3, 1, 0), "dense": (1, 0)}


def to_flax_layout(
    names: PublishedNames, key: str, array: np.ndarray, target_shape: tuple[int, ...]
) -> np.ndarray:
    """Converts a published tensor to the layout of our encoder.

    Convolutions go from OIHW to HWIO, dense layers are transposed (timm writes some of them as 1x1
    convolutions), and position embeddings are interpolated to a square of tokens.

    The result has another shape than the target if the published tensor's shape is wrong.
    """
    layout = _by_key(names.rules)[key][1]
    if layout == "per-channel":
        return array.reshape(-1)
    if layout == "positions":
        side = round(max(0, target_shape[1] - 1) ** 0.5)
        try:
            return interpolate_positions(array, side, side)
        except (ValueError, IndexError):
            return array
    if layout == "dense" and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    axes = _AXES.get(layout)
    return array.transpose(axes) if axes is not None and array.ndim == len(axes) else array


def to_published_layout(names: PublishedNames, key: str, array: np.ndarray) -> np.ndarray:
    """Inverts `to_flax_layout`; position embeddings keep their grid."""
    layout = _by_key(names.rules)[key][1]
    if layout == "per-channel":
        return array.reshape(1, 1, 1, -1)
    axes = _AXES.get(layout)
    return array if axes is None else array.transpose(np.argsort(axes))


_Rules = Iterator[Rule]


def _resnet(blocks: tuple[int, ...], block: str, convolutions: int) -> _Rules:
    yield Rule("conv1", ("Conv_0",), "conv")
    yield Rule("bn1", ("Normalize_0",), "batch-norm")
    for stage, count in enumerate(blocks):
        for index in range(count):
            layer, ours = f"layer{stage + 1}.{index}", f"{block}_{sum(blocks[:stage]) + index}"
            for number in range(convolutions):
                yield Rule(f"{layer}.conv{number + 1}", (ours, f"Conv_{number}"), "conv")
                yield Rule(f"{layer}.bn{number + 1}", (ours, f"Normalize_{number}"), "batch-norm")
            # Only a block that changes the map's shape has a convolution in its shortcut.
            if index == 0 and (stage > 0 or block == "Bottleneck"):
                yield Rule(f"{layer}.downsample.0", (ours, f"Conv_{convolutions}"), "conv")
                norm = (ours, f"Normalize_{convolutions}")
                yield Rule(f"{layer}.downsample.1", norm, "batch-norm")


def _conv_norm(layer: str, *path: str, depthwise: bool = False) -> _Rules:
    conv = "DepthwiseConv_0" if depthwise else "Conv_0"
    yield Rule(f"{layer}.0", (*path, conv), "conv")
    yield Rule(f"{layer}.1", (*path, "Normalize_0"), "batch-norm")


def _mobilenet_v2() -> _Rules:
    yield from _conv_norm("features.0", "stem")
    for index in range(1, 18):
        layer, ours = f"features.{index}.conv", f"InvertedResidual_{index - 1}"
        # The first block does not expand, so its layers are numbered from the next one.
        first = 0 if index == 1 else 1
        if first:
            yield from _conv_norm(f"{layer}.0", ours, "expand")
        yield from _conv_norm(f"{layer}.{first}", ours, "depthwise", depthwise=True)
        # Without an activation, the last two are not wrapped.
        yield Rule(f"{layer}.{first + 1}", (ours, "project", "Conv_0"), "conv")
        yield Rule(f"{layer}.{first + 2}", (ours, "project", "Normalize_0"), "batch-norm")
    yield from _conv_norm("features.18", "last")


def _efficientnet(blocks: tuple[int, ...]) -> _Rules:
    yield from _conv_norm("features.0", "stem")
    for stage, count in enumerate(blocks):
        for index in range(count):
            layer = f"features.{stage + 1}.{index}.block"
            ours = f"MBConv_{sum(blocks[:stage]) + index}"
            first = 0 if stage == 0 else 1
            if first:
                yield from _conv_norm(f"{layer}.0", ours, "expand")
            yield from _conv_norm(f"{layer}.{first}", ours, "depthwise", depthwise=True)
            for number, dense in ((1, "Conv_0"), (2, "Conv_1")):
                path = (ours, "SqueezeExcitation_0", dense)
                yield Rule(f"{layer}.{first + 1}.fc{number}", path, "conv-bias")
            yield from _conv_norm(f"{layer}.{first + 2}", ours, "project")
    yield from _conv_norm(f"features.{len(blocks) + 1}", "last")


def _vit(depth: int) -> _Rules:
    yield Rule("", (), "tokens")
    yield Rule("patch_embed.proj", ("Patchify_0",), "conv-bias")
    for index in range(depth):
        layer, ours = f"blocks.{index}", f"Block_{index}"
        for number in (0, 1):
            yield Rule(f"{layer}.norm{number + 1}", (ours, f"LayerNorm_{number}"), "layer-norm")
        for dense in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            yield Rule(f"{layer}.{dense}", (ours, dense.partition(".")[2]), "dense")
    yield Rule("norm", ("LayerNorm_0",), "layer-norm")


def _convnext_v2(depths: tuple[int, ...]) -> _Rules:
    """The official names first, then timm's."""
    official = ("dwconv", "norm", "pwconv1", "grn", "pwconv2")
    timm = ("conv_dw", "norm", "mlp.fc1", "mlp.grn", "mlp.fc2")
    publishers: tuple[tuple[str, tuple[str, ...], Kind, str], ...] = (
        ("stages.{}.{}", official, "grn", "norm"),
        ("stages.{}.blocks.{}", timm, "grn-timm", "head.norm"),
    )
    for blocks, layers, grn, last in publishers:
        for stage, count in enumerate(depths):
            conv, norm = (0, 1) if stage == 0 else (1, 0)
            layer = f"downsample_layers.{stage}"
            if layers is timm:
                layer = "stem" if stage == 0 else f"stages.{stage}.downsample"
            yield Rule(f"{layer}.{conv}", (f"Patchify_{stage}",), "conv-bias")
            yield Rule(f"{layer}.{norm}", (f"LayerNorm_{stage}",), "layer-norm")
            kinds: tuple[Kind, ...] = ("conv-bias", "layer-norm", "dense", grn, "dense")
            ours = ("DepthwiseConv_0", "LayerNorm_0", "Dense_0", "GRN_0", "Dense_1")
            for index in range(count):
                block = f"Block_{sum(depths[:stage]) + index}"
                for name, ours_name, kind in zip(layers, ours, kinds, strict=True):
                    yield Rule(f"{blocks.format(stage, index)}.{name}", (block, ours_name), kind)
        yield Rule(last, (f"LayerNorm_{len(depths)}",), "layer-norm")


_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_DEPTHS_V2 = {
    "atto": (2, 2, 6, 2),
    "femto": (2, 2, 6, 2),
    "pico": (2, 2, 6, 2),
    "nano": (2, 2, 8, 2),
    "tiny": (3, 3, 9, 3),
    "base": (3, 3, 27, 3),
}

_TABLES = {
    "resnet18": (_resnet((2, 2, 2, 2), "BasicBlock", 2), r"fc\.(weight|bias)"),
    "resnet34": (_resnet((3, 4, 6, 3), "BasicBlock", 2), r"fc\.(weight|bias)"),
    "resnet50": (_resnet((3, 4, 6, 3), "Bottleneck", 3), r"fc\.(weight|bias)"),
    "resnet101": (_resnet((3, 4, 23, 3), "Bottleneck", 3), r"fc\.(weight|bias)"),
    "mobilenet-v2": (_mobilenet_v2(), r"classifier\.1\.(weight|bias)"),
    "efficientnet-b0": (_efficientnet((1, 2, 2, 3, 3, 4, 1)), r"classifier\.1\.(weight|bias)"),
    **{
        f"convnext-v2-{size}": (_convnext_v2(depths), r"head\.(fc\.)?(weight|bias)")
        for size, depths in _DEPTHS_V2.items()
    },
    **{
        f"{n}-{size}": (_vit(12), r"head\.(weight|bias)")
        for n in ("deit", "vit")
        for size in ("tiny", "small", "base")
    },
}
PUBLISHED: Mapping[str, PublishedNames] = {
    # ViT is DeiT's network, with weights that were trained on pixels in [-1, 1].
    name: PublishedNames(tuple(rules), classifier, *(_HALVES if name.startswith("vit-") else ()))
    for name, (rules, classifier) in _TABLES.items()
}
"""By the name of the encoder."""
