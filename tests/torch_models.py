"""The published architectures in PyTorch, written from their definitions, with published key names.

`torch_model(name, classes)` gives the whole network, classifier included. Its keys and shapes are
those of `published_shapes.py`, which loading weights strictly proves.
"""

from __future__ import annotations

import torch
from published_shapes import CONVNEXTS, RESNETS, VITS
from torch import nn
from torch.nn import functional


def conv_norm(into, out, side=1, stride=1, groups=1, activation=None):
    layers = [
        nn.Conv2d(into, out, side, stride, side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class ResidualBlock(nn.Module):
    """ResNet's two blocks; the stride is in the first 3x3 convolution."""

    def __init__(self, into, planes, stride, bottleneck):
        super().__init__()
        out = planes * (4 if bottleneck else 1)
        sides = (1, 3, 1) if bottleneck else (3, 3)
        widths = (into, planes, planes, out) if bottleneck else (into, planes, out)
        self.count = len(sides)
        for number, side in enumerate(sides, 1):
            step = stride if side == 3 and (bottleneck or number == 1) else 1
            conv = nn.Conv2d(widths[number - 1], widths[number], side, step, side // 2, bias=False)
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(widths[number]))
        self.downsample = conv_norm(into, out, 1, stride) if into != out else nn.Identity()

    def forward(self, x):
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = functional.relu(y) if number < self.count else y
        return functional.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """Version 1.5, with either of the two blocks."""

    def __init__(self, blocks, bottleneck, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        into = 64
        for stage, count in enumerate(blocks):
            planes, layers = 64 * 2**stage, []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(ResidualBlock(into, planes, stride, bottleneck))
                into = planes * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(into, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, into, out, stride, expansion):
        super().__init__()
        wide = into * expansion
        layers = [conv_norm(into, wide, activation=nn.ReLU6)] if expansion > 1 else []
        layers.append(conv_norm(wide, wide, 3, stride, wide, nn.ReLU6))
        self.conv = nn.Sequential(*layers, *conv_norm(wide, out))
        self.residual = stride == 1 and into == out

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class Features(nn.Module):
    """A stack of blocks, global average pooling, and a classifier in the second place."""

    def __init__(self, features, width, classes):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(width, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2(classes):
    layers, into = [conv_norm(3, 32, 3, 2, activation=nn.ReLU6)], 32
    for expansion, out, count, stride in [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:  # fmt: skip
        for index in range(count):
            layers.append(InvertedResidual(into, out, 1 if index else stride, expansion))
            into = out
    layers.append(conv_norm(320, 1280, activation=nn.ReLU6))
    return Features(layers, 1280, classes)


class SqueezeExcitation(nn.Module):
    """Scales channels by what a small network makes of their means."""

    def __init__(self, wide, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)

    def forward(self, x):
        y = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(functional.silu(self.fc1(y))))


class MBConv(nn.Module):
    """EfficientNet's block; the expansion is left out at factor 1."""

    def __init__(self, into, out, side, stride, expansion):
        super().__init__()
        wide = into * expansion
        layers = [conv_norm(into, wide, activation=nn.SiLU)] if expansion > 1 else []
        layers.append(conv_norm(wide, wide, side, stride, wide, nn.SiLU))
        layers += [SqueezeExcitation(wide, into // 4), conv_norm(wide, out)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and into == out

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


def efficientnet_b0(classes):
    stages, into = [conv_norm(3, 32, 3, 2, activation=nn.SiLU)], 32
    for expansion, side, out, count, stride in [
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2), (6, 3, 320, 1, 1),
    ]:  # fmt: skip
        blocks = []
        for index in range(count):
            blocks.append(MBConv(into, out, side, 1 if index else stride, expansion))
            into = out
        stages.append(nn.Sequential(*blocks))
    stages.append(conv_norm(320, 1280, activation=nn.SiLU))
    return Features(stages, 1280, classes)


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        count, tokens, width = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, width))


class ViTBlock(nn.Module):
    """Attention and two linear layers, each with a residual."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """Its table of positions is for 224 px, and is interpolated for any other side."""

    def __init__(self, width, classes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.Sequential(*(ViTBlock(width, width // 64) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def positions(self, shape):
        square = self.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        square = functional.interpolate(square, shape, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], square.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        x = self.patch_embed["proj"](x)
        positions = self.pos_embed if x.shape[2:] == (14, 14) else self.positions(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[M, C, H, W]`."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation of `[M, H, W, C]`."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x):
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (norms / (norms.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """ConvNeXt-V2's block, channels last but for its first convolution."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.grn = nn.Linear(width, 4 * width), GRN(4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(functional.gelu(self.pwconv1(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXtV2(nn.Module):
    """Four stages, each after a convolution that shrinks the map."""

    def __init__(self, depths, widths, classes):
        super().__init__()
        stem = [nn.Conv2d(3, widths[0], 4, 4), ChannelsFirstNorm(widths[0], eps=1e-6)]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for into, out in zip(widths, widths[1:], strict=False):
            layers = [ChannelsFirstNorm(into, eps=1e-6), nn.Conv2d(into, out, 2, 2)]
            self.downsample_layers.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))


def torch_model(encoder: str, classes: int) -> nn.Module:
    """The published network of an encoder's name."""
    if encoder in RESNETS:
        return ResNet(*RESNETS[encoder], classes)
    if encoder in CONVNEXTS:
        return ConvNeXtV2(*CONVNEXTS[encoder], classes)
    if encoder in VITS:
        return ViT(VITS[encoder], classes)
    return {"mobilenet-v2": mobilenet_v2, "efficientnet-b0": efficientnet_b0}[encoder](classes)
