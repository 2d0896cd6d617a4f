"""Every key and shape of the published weights, from the architectures' definitions.

Data for tests, written without looking at the package's tables: torchvision's names for ResNet,
MobileNetV2 and EfficientNet, timm's for ViT and DeiT, and for ConvNeXt-V2 the official ones and
timm's.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def _conv(key, out, into, side, bias=False) -> Shapes:
    shapes = {f"{key}.weight": (out, into, side, side)}
    return {**shapes, f"{key}.bias": (out,)} if bias else shapes


def _linear(key, out, into) -> Shapes:
    return {f"{key}.weight": (out, into), f"{key}.bias": (out,)}


def _layer_norm(key, width) -> Shapes:
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def _batch_norm(key, width) -> Shapes:
    statistics = {f"{key}.running_mean": (width,), f"{key}.running_var": (width,)}
    return {**_layer_norm(key, width), **statistics, f"{key}.num_batches_tracked": ()}


def resnet(blocks, bottleneck, classes) -> Shapes:
    shapes = {**_conv("conv1", 64, 3, 7), **_batch_norm("bn1", 64)}
    into = 64
    for stage, count in enumerate(blocks, 1):
        planes = 32 * 2**stage
        out = 4 * planes if bottleneck else planes
        for index in range(count):
            key = f"layer{stage}.{index}"
            layers = (
                [(planes, into, 1), (planes, planes, 3), (out, planes, 1)]
                if bottleneck
                else [(planes, into, 3), (planes, planes, 3)]
            )
            for number, (wide, narrow, side) in enumerate(layers, 1):
                shapes |= _conv(f"{key}.conv{number}", wide, narrow, side)
                shapes |= _batch_norm(f"{key}.bn{number}", wide)
            if into != out:
                shapes |= _conv(f"{key}.downsample.0", out, into, 1)
                shapes |= _batch_norm(f"{key}.downsample.1", out)
            into = out
    return shapes | _linear("fc", classes, into)


def mobilenet_v2(classes) -> Shapes:
    shapes = {**_conv("features.0.0", 32, 3, 3), **_batch_norm("features.0.1", 32)}
    # The first block, which has no expansion.
    shapes |= _conv("features.1.conv.0.0", 32, 1, 3) | _batch_norm("features.1.conv.0.1", 32)
    shapes |= _conv("features.1.conv.1", 16, 32, 1) | _batch_norm("features.1.conv.2", 16)
    outs = [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    for index, (into, out) in enumerate(zip([16, *outs], outs, strict=False), 2):
        key, wide = f"features.{index}.conv", 6 * into
        shapes |= _conv(f"{key}.0.0", wide, into, 1) | _batch_norm(f"{key}.0.1", wide)
        shapes |= _conv(f"{key}.1.0", wide, 1, 3) | _batch_norm(f"{key}.1.1", wide)
        shapes |= _conv(f"{key}.2", out, wide, 1) | _batch_norm(f"{key}.3", out)
    shapes |= _conv("features.18.0", 1280, 320, 1) | _batch_norm("features.18.1", 1280)
    return shapes | _linear("classifier.1", classes, 1280)


def efficientnet_b0(classes) -> Shapes:
    shapes = {**_conv("features.0.0", 32, 3, 3), **_batch_norm("features.0.1", 32)}
    into = 32
    stages = [(16, 1, 3), (24, 2, 3), (40, 2, 5), (80, 3, 3), (112, 3, 5), (192, 4, 5), (320, 1, 3)]
    for stage, (out, count, side) in enumerate(stages, 1):
        for index in range(count):
            wide, squeezed = into * (1 if stage == 1 else 6), into // 4
            layers = [
                {**_conv("0", wide, 1, side), **_batch_norm("1", wide)},
                {**_conv("fc1", squeezed, wide, 1, True), **_conv("fc2", wide, squeezed, 1, True)},
                {**_conv("0", out, wide, 1), **_batch_norm("1", out)},
            ]
            if stage > 1:
                layers.insert(0, {**_conv("0", wide, into, 1), **_batch_norm("1", wide)})
            for number, layer in enumerate(layers):
                prefix = f"features.{stage}.{index}.block.{number}"
                shapes |= {f"{prefix}.{key}": shape for key, shape in layer.items()}
            into = out
    shapes |= _conv("features.8.0", 1280, 320, 1) | _batch_norm("features.8.1", 1280)
    return shapes | _linear("classifier.1", classes, 1280)


def vit(width, classes) -> Shapes:
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    shapes |= _conv("patch_embed.proj", width, 3, 16, bias=True)
    for index in range(12):
        key = f"blocks.{index}"
        shapes |= _layer_norm(f"{key}.norm1", width) | _layer_norm(f"{key}.norm2", width)
        shapes |= _linear(f"{key}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{key}.attn.proj", width, width)
        shapes |= _linear(f"{key}.mlp.fc1", 4 * width, width)
        shapes |= _linear(f"{key}.mlp.fc2", width, 4 * width)
    return shapes | _layer_norm("norm", width) | _linear("head", classes, width)


def convnext_v2(depths, widths, classes) -> Shapes:
    shapes = _conv("downsample_layers.0.0", widths[0], 3, 4, bias=True)
    shapes |= _layer_norm("downsample_layers.0.1", widths[0])
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage > 0:
            into = widths[stage - 1]
            shapes |= _layer_norm(f"downsample_layers.{stage}.0", into)
            shapes |= _conv(f"downsample_layers.{stage}.1", width, into, 2, bias=True)
        for index in range(depth):
            key = f"stages.{stage}.{index}"
            shapes |= _conv(f"{key}.dwconv", width, 1, 7, bias=True)
            shapes |= _layer_norm(f"{key}.norm", width)
            shapes |= _linear(f"{key}.pwconv1", 4 * width, width)
            shapes[f"{key}.grn.gamma"] = shapes[f"{key}.grn.beta"] = (1, 1, 1, 4 * width)
            shapes |= _linear(f"{key}.pwconv2", width, 4 * width)
    return shapes | _layer_norm("norm", widths[3]) | _linear("head", classes, widths[3])


def convnext_v2_timm(depths, widths, classes) -> Shapes:
    """As timm writes the small ones (to nano), with dense layers as 1x1 convolutions."""
    shapes = _conv("stem.0", widths[0], 3, 4, bias=True) | _layer_norm("stem.1", widths[0])
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage > 0:
            into = widths[stage - 1]
            shapes |= _layer_norm(f"stages.{stage}.downsample.0", into)
            shapes |= _conv(f"stages.{stage}.downsample.1", width, into, 2, bias=True)
        for index in range(depth):
            key = f"stages.{stage}.blocks.{index}"
            shapes |= _conv(f"{key}.conv_dw", width, 1, 7, bias=True)
            shapes |= _layer_norm(f"{key}.norm", width)
            shapes |= _conv(f"{key}.mlp.fc1", 4 * width, width, 1, bias=True)
            shapes |= _layer_norm(f"{key}.mlp.grn", 4 * width)
            shapes |= _conv(f"{key}.mlp.fc2", width, 4 * width, 1, bias=True)
    return shapes | _layer_norm("head.norm", widths[3]) | _linear("head.fc", classes, widths[3])


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
CONVNEXTS = {
    "convnext-v2-atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext-v2-femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext-v2-pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext-v2-nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext-v2-tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext-v2-base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}
VITS = {
    f"{family}-{size}": width
    for family in ("deit", "vit")
    for size, width in (("tiny", 192), ("small", 384), ("base", 768))
}
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenet-v2": 3_504_872,
    "efficientnet-b0": 5_288_548,
    "convnext-v2-atto": 3_708_400,
    "convnext-v2-femto": 5_233_240,
    "convnext-v2-pico": 9_066_280,
    "convnext-v2-nano": 15_623_800,
    "convnext-v2-tiny": 28_635_496,
    "convnext-v2-base": 88_717_800,
    "deit-tiny": 5_717_416,
    "deit-small": 22_050_664,
    "deit-base": 86_567_656,
    "vit-tiny": 5_717_416,
    "vit-small": 22_050_664,
    "vit-base": 86_567_656,
}
"""The published numbers of parameters, with the layer for ImageNet's 1000 classes."""


def published_shapes(encoder: str, classes: int = 1000) -> Shapes:
    """The keys and shapes of an encoder's published weights, the classifier included."""
    if encoder in RESNETS:
        return resnet(*RESNETS[encoder], classes)
    if encoder in CONVNEXTS:
        return convnext_v2(*CONVNEXTS[encoder], classes)
    if encoder in VITS:
        return vit(VITS[encoder], classes)
    return {"mobilenet-v2": mobilenet_v2, "efficientnet-b0": efficientnet_b0}[encoder](classes)
