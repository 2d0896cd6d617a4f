"""Names and layouts of published weights, and where each is in an encoder of ours.

One table per architecture, read in both directions. ResNet, MobileNetV2 and EfficientNet have
torchvision's names, ViT and DeiT timm's, and ConvNeXt-V2 the official ones (timm's are understood
as well). Only names and NumPy arrays are handled here, no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.layers.positions import interpolate_positions

FlaxPath = tuple[str, ...]
"""Collection first, then relative to the encoder: `("params", "Conv_0", "kernel")`."""

LATENT_LAYER = "Dense_0"
"""Every encoder's last layer, which makes latents of features: nothing published is like it."""

Kind = Literal[
    "conv", "conv-bias", "dense", "batch-norm", "layer-norm", "grn", "grn-timm", "tokens"
]
_Layout = Literal["as-is", "conv", "dense", "per-channel", "positions"]


class Rule(NamedTuple):
    """One layer under its published name and in our encoder."""

    published: str
    """Such as `layer1.0.conv1`."""
    path: FlaxPath
    """Such as `("Bottleneck_0", "Conv_0")`."""
    kind: Kind
    """Which tensors the layer has."""


class PublishedNames(NamedTuple):
    """What must be known of an architecture's published weights.

    Where two rules have one path, both names are read, and the first is written.
    """

    rules: tuple[Rule, ...]
    classifier: str
    """Regular expression of the keys of the published classifier, which no encoder of ours has."""
    ignored: str
    """Regular expression of keys without content."""
    mean: tuple[float, ...]
    """Per channel (RGB), of pixels in [0, 1], that the weights were trained with."""
    std: tuple[float, ...]
    """Likewise."""
    default_side: int
    """Side in pixels of the images that the weights were trained on."""


class _Tensor(NamedTuple):
    published: str
    collection: str
    name: str
    layout: _Layout


_NORM = (
    _Tensor("weight", "params", "scale", "as-is"),
    _Tensor("bias", "params", "bias", "as-is"),
)
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


class _Index(NamedTuple):
    """A table unrolled to single tensors."""

    by_key: Mapping[str, tuple[FlaxPath, _Layout]]
    by_path: Mapping[FlaxPath, str]


@cache
def _index(rules: tuple[Rule, ...]) -> _Index:
    by_key: dict[str, tuple[FlaxPath, _Layout]] = {}
    by_path: dict[FlaxPath, str] = {}
    for rule in rules:
        for tensor in _TENSORS[rule.kind]:
            key = f"{rule.published}.{tensor.published}".lstrip(".")
            path = (tensor.collection, *rule.path, tensor.name)
            by_key[key] = path, tensor.layout
            by_path.setdefault(path, key)
    return _Index(by_key, by_path)


def flax_path(names: PublishedNames, key: str) -> FlaxPath | None:
    """Where a published tensor belongs; None for a key that the table does not have.

    The classifier's and the ignored keys are not in the table.
    """
    entry = _index(names.rules).by_key.get(key)
    return None if entry is None else entry[0]


def published_name(names: PublishedNames, path: FlaxPath) -> str:
    """The published name of one of the encoder's tensors.

    Raises:
        ConfigError: if it has none: it is of the latent layer, or of a norm that was chosen instead
            of the published one.
    """
    try:
        return _index(names.rules).by_path[tuple(path)]
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
    """A published tensor in the layout of our encoder.

    Convolutions go from OIHW to HWIO, dense layers are transposed (timm writes some of them as 1x1
    convolutions), and position embeddings are interpolated to the number of tokens that
    `target_shape` has, a square.

    Args:
        names: the architecture's table.
        key: the published name, one of the table's.
        array: the published tensor.
        target_shape: of our encoder's parameter.

    Returns:
        The array; where its own shape cannot be right, it may have another than the target.
    """
    layout = _index(names.rules).by_key[key][1]
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
    """The inverse of `to_flax_layout`; position embeddings keep the grid that they are for.

    Args:
        names: the architecture's table.
        key: the published name, one of the table's.
        array: our encoder's parameter or statistic.
    """
    layout = _index(names.rules).by_key[key][1]
    if layout == "per-channel":
        return array.reshape(1, 1, 1, -1)
    axes = _AXES.get(layout)
    return array if axes is None else array.transpose(np.argsort(axes))


def to_flax(encoder: str, tensors: Mapping[str, np.ndarray]) -> dict[FlaxPath, np.ndarray]:
    """Published weights under our paths and in our layouts, without the classifier.

    Args:
        encoder: name of a registered encoder.
        tensors: by published name.

    Raises:
        ConfigError: for an encoder without published weights, and for keys that its table does not
            have; it names them.
    """
    names = published(encoder)
    kept = {
        key: array
        for key, array in tensors.items()
        if not re.fullmatch(names.classifier, key) and not re.fullmatch(names.ignored, key)
    }
    unknown = sorted(key for key in kept if flax_path(names, key) is None)
    if unknown:
        raise ConfigError(f"no weights of {encoder}: unexpected keys {', '.join(unknown)}")
    index = _index(names.rules).by_key
    return {
        index[key][0]: to_flax_layout(names, key, array, array.shape) for key, array in kept.items()
    }


def from_flax(encoder: str, tensors: Mapping[FlaxPath, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: our weights under their published names and in those layouts.

    The latent layer is left out. PyTorch's counter `num_batches_tracked` is 0 in every BatchNorm.

    Args:
        encoder: name of a registered encoder.
        tensors: by path.

    Raises:
        ConfigError: for an encoder without published weights, and for a path without a name.
    """
    names = published(encoder)
    result: dict[str, np.ndarray] = {}
    for path, array in tensors.items():
        if path[1] == LATENT_LAYER:
            continue
        key = published_name(names, path)
        result[key] = to_published_layout(names, key, np.asarray(array))
        if key.endswith(".running_var"):
            counter = key.removesuffix("running_var") + "num_batches_tracked"
            result[counter] = np.zeros((), np.int64)
    return result


def published(encoder: str) -> PublishedNames:
    """The table of an encoder.

    Raises:
        ConfigError: if there is none of that name; it names the nearest.
    """
    if encoder not in PUBLISHED:
        raise unknown_name("encoder with published weights", encoder, PUBLISHED)
    return PUBLISHED[encoder]


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
        yield Rule(f"{layer}.norm1", (ours, "LayerNorm_0"), "layer-norm")
        yield Rule(f"{layer}.attn.qkv", (ours, "qkv"), "dense")
        yield Rule(f"{layer}.attn.proj", (ours, "proj"), "dense")
        yield Rule(f"{layer}.norm2", (ours, "LayerNorm_1"), "layer-norm")
        yield Rule(f"{layer}.mlp.fc1", (ours, "fc1"), "dense")
        yield Rule(f"{layer}.mlp.fc2", (ours, "fc2"), "dense")
    yield Rule("norm", ("LayerNorm_0",), "layer-norm")


def _convnext_v2(depths: tuple[int, ...]) -> _Rules:
    """The official names first, then timm's."""
    for stage, count in enumerate(depths):
        conv, norm = (0, 1) if stage == 0 else (1, 0)
        layer = f"downsample_layers.{stage}"
        yield Rule(f"{layer}.{conv}", (f"Patchify_{stage}",), "conv-bias")
        yield Rule(f"{layer}.{norm}", (f"LayerNorm_{stage}",), "layer-norm")
        for index in range(count):
            layer, ours = f"stages.{stage}.{index}", f"Block_{sum(depths[:stage]) + index}"
            yield Rule(f"{layer}.dwconv", (ours, "DepthwiseConv_0"), "conv-bias")
            yield Rule(f"{layer}.norm", (ours, "LayerNorm_0"), "layer-norm")
            yield Rule(f"{layer}.pwconv1", (ours, "Dense_0"), "dense")
            yield Rule(f"{layer}.grn", (ours, "GRN_0"), "grn")
            yield Rule(f"{layer}.pwconv2", (ours, "Dense_1"), "dense")
    last = (f"LayerNorm_{len(depths)}",)
    yield Rule("norm", last, "layer-norm")
    for stage, count in enumerate(depths):
        conv, norm = (0, 1) if stage == 0 else (1, 0)
        layer = "stem" if stage == 0 else f"stages.{stage}.downsample"
        yield Rule(f"{layer}.{conv}", (f"Patchify_{stage}",), "conv-bias")
        yield Rule(f"{layer}.{norm}", (f"LayerNorm_{stage}",), "layer-norm")
        for index in range(count):
            layer, ours = f"stages.{stage}.blocks.{index}", f"Block_{sum(depths[:stage]) + index}"
            yield Rule(f"{layer}.conv_dw", (ours, "DepthwiseConv_0"), "conv-bias")
            yield Rule(f"{layer}.norm", (ours, "LayerNorm_0"), "layer-norm")
            yield Rule(f"{layer}.mlp.fc1", (ours, "Dense_0"), "dense")
            yield Rule(f"{layer}.mlp.grn", (ours, "GRN_0"), "grn-timm")
            yield Rule(f"{layer}.mlp.fc2", (ours, "Dense_1"), "dense")
    yield Rule("head.norm", last, "layer-norm")


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _names(
    rules: _Rules,
    classifier: str,
    mean: tuple[float, ...] = _IMAGENET_MEAN,
    std: tuple[float, ...] = _IMAGENET_STD,
) -> PublishedNames:
    ignored = r".*\.num_batches_tracked"
    return PublishedNames(tuple(rules), classifier, ignored, mean, std, default_side=224)


_HALF = (0.5, 0.5, 0.5)
_DEPTHS_V2 = {
    "atto": (2, 2, 6, 2),
    "femto": (2, 2, 6, 2),
    "pico": (2, 2, 6, 2),
    "nano": (2, 2, 8, 2),
    "tiny": (3, 3, 9, 3),
    "base": (3, 3, 27, 3),
}

PUBLISHED: Mapping[str, PublishedNames] = {
    "resnet18": _names(_resnet((2, 2, 2, 2), "BasicBlock", 2), r"fc\.(weight|bias)"),
    "resnet34": _names(_resnet((3, 4, 6, 3), "BasicBlock", 2), r"fc\.(weight|bias)"),
    "resnet50": _names(_resnet((3, 4, 6, 3), "Bottleneck", 3), r"fc\.(weight|bias)"),
    "resnet101": _names(_resnet((3, 4, 23, 3), "Bottleneck", 3), r"fc\.(weight|bias)"),
    "mobilenet-v2": _names(_mobilenet_v2(), r"classifier\.1\.(weight|bias)"),
    "efficientnet-b0": _names(
        _efficientnet((1, 2, 2, 3, 3, 4, 1)), r"classifier\.1\.(weight|bias)"
    ),
    **{
        f"convnext-v2-{size}": _names(_convnext_v2(depths), r"head\.(fc\.)?(weight|bias)")
        for size, depths in _DEPTHS_V2.items()
    },
    **{
        f"deit-{size}": _names(_vit(12), r"head\.(weight|bias)")
        for size in ("tiny", "small", "base")
    },
    # The same network; its weights were trained on pixels in [-1, 1].
    **{
        f"vit-{size}": _names(_vit(12), r"head\.(weight|bias)", _HALF, _HALF)
        for size in ("tiny", "small", "base")
    },
}
