"""PatchGD in PyTorch, with the semantics of the papers' official code: what ours is compared with.

Written from the published algorithm (arXiv 2301.13817, Algorithm 1, and its TMLR 2024 version), as
a PyTorch user would write it today: eager, channels-last and `torch.compile` are all open to the
caller. Image batches stay uint8; only the sampled patches become floats. Needs `torch` and nothing
of patchgd_jax; `load_flax` takes its parameter trees as plain dicts of NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    expansion = 1

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, features, 3, stride, 1, bias=False),
                nn.Conv2d(features, features, 3, 1, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(features), nn.BatchNorm2d(features)])
        self.shortcut = _shortcut(channels, features, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _residual(self, x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection; the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        wide = features * self.expansion
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, features, 1, bias=False),
                nn.Conv2d(features, features, 3, stride, 1, bias=False),
                nn.Conv2d(features, wide, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(features), nn.BatchNorm2d(features), nn.BatchNorm2d(wide)]
        )
        self.shortcut = _shortcut(channels, wide, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _residual(self, x)


def _shortcut(channels: int, features: int, stride: int) -> nn.Module:
    if channels == features and stride == 1:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
    )


def _residual(block: BasicBlock | Bottleneck, x: torch.Tensor) -> torch.Tensor:
    y = x
    last = len(block.convs) - 1
    for index, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
        y = norm(conv(y))
        if index < last:
            y = functional.relu(y, inplace=True)
    return functional.relu(y + block.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet v1.5 up to global average pooling, then a linear layer to the latent vector."""

    def __init__(
        self,
        depth: Literal[18, 34, 50],
        latent_dim: int,
        channels: int = 3,
        side: int | None = None,
    ) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = Bottleneck if depth == 50 else BasicBlock
        self.conv = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        width = 64
        for stage, count in enumerate((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(width, 64 * 2**stage, stride))
                width = 64 * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.dense = nn.Linear(width, latent_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(x)), inplace=True)
        x = functional.max_pool2d(x, 3, 2, 1)
        return self.dense(self.blocks(x).mean((2, 3)))


class CNNHead(nn.Module):
    """Blocks of [3x3 conv, ReLU, BatchNorm, Dropout2d] over Z, then a linear layer."""

    def __init__(
        self,
        latent_dim: int,
        classes: int,
        grid: tuple[int, int],
        strides: Sequence[int] = (1, 2, 2, 2),
        features: int = 256,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        rows, cols = grid
        width = latent_dim
        for stride in strides:
            self.convs.append(nn.Conv2d(width, features, 3, stride, 1))
            self.norms.append(nn.BatchNorm2d(features))
            rows, cols, width = (rows - 1) // stride + 1, (cols - 1) // stride + 1, features
        self.dropout = nn.Dropout2d(dropout)
        self.dense = nn.Linear(rows * cols * features, classes)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            z = self.dropout(norm(functional.relu(conv(z))))
        # Rows, columns, channels: the order in which the dense layer of ours reads the map.
        return self.dense(z.permute(0, 2, 3, 1).flatten(1))


@dataclass(frozen=True)
class PatchGD:
    """Settings of an outer step."""

    patch: int
    mode: Literal["patchgd", "accumulate"] = "accumulate"
    norm_policy: Literal["paper", "inner"] = "paper"
    """paper: the fill runs in train mode, as in the official code; inner: in eval mode."""
    mean: float = 0.0
    std: float = 1.0
    channels_last: bool = False
    autocast: torch.dtype | None = None
    """The dtype of the encoder's and the head's autocast, or None."""


class Trainer:
    """One model under training; `step` is one outer step.

    Args:
        encoder: patches `[M, C, p, p]` to latents `[M, D]`.
        head: Z `[B, D, rows, cols]` to logits `[B, classes]`.
        optimizer: over the parameters of both.
        settings: see `PatchGD`.
        compiler: wraps encoder and head; `torch.compile` or nothing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: PatchGD,
        compiler: Callable[[nn.Module], Any] = lambda module: module,
    ) -> None:
        self.encoder, self.head = encoder, head
        if settings.channels_last:
            encoder.to(memory_format=torch.channels_last)
            head.to(memory_format=torch.channels_last)
        self.optimizer = optimizer
        self.settings = settings
        self._encode, self._classify = compiler(encoder), compiler(head)

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed-precision context of a forward pass."""
        dtype = self.settings.autocast
        device = next(self.encoder.parameters()).device.type
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    def patches(self, images: torch.Tensor, group: Sequence[int]) -> torch.Tensor:
        """The patches `group` of every image, normalised: `[B * k, C, p, p]`."""
        side = self.settings.patch
        cols = images.shape[2] // side
        windows = [images[:, i // cols * side :, i % cols * side :][:, :side, :side] for i in group]
        dtype = next(self.encoder.parameters()).dtype
        x = torch.stack(windows, 1).flatten(0, 1).to(dtype).div_(255)
        x = x.sub_(self.settings.mean).div_(self.settings.std).permute(0, 3, 1, 2)
        # [M, p, p, C] seen as [M, C, p, p] is channels-last already.
        return x if self.settings.channels_last else x.contiguous()

    def encode(self, images: torch.Tensor, group: Sequence[int]) -> torch.Tensor:
        """Latents `[B, k, D]` of the patches `group` of every image."""
        with self.autocast():
            latents = self._encode(self.patches(images, group))
        return latents.unflatten(0, (images.shape[0], len(group)))

    @torch.no_grad()
    def fill(self, images: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
        """Z, `[B, N, D]`, group by group."""
        self.encoder.train(self.settings.norm_policy == "paper")
        parts = [self.encode(images, group) for group in groups]
        z = parts[0].new_zeros(images.shape[0], sum(map(len, groups)), parts[0].shape[-1])
        for group, part in zip(groups, parts, strict=True):
            z[:, list(group)] = part
        self.encoder.train()
        return z

    def classify(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Logits of Z `[B, N, D]`."""
        with self.autocast():
            return self._classify(z.transpose(1, 2).unflatten(2, grid))

    def inner_losses(
        self, images: torch.Tensor, labels: torch.Tensor, z: torch.Tensor, groups: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Backpropagates one inner step after another and yields its loss and logits."""
        grid = (images.shape[1] // self.settings.patch, images.shape[2] // self.settings.patch)
        share = len(groups) if self.settings.mode == "accumulate" else 1
        for group in groups:
            fresh = self.encode(images, group)
            z = z.detach().clone()
            z[:, list(group)] = fresh.to(z.dtype)
            logits = self.classify(z, grid)
            loss = functional.cross_entropy(logits.to(z.dtype), labels)
            (loss / share).backward()
            yield loss.detach(), logits.detach()

    def step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        fill_groups: Sequence[Sequence[int]],
        inner_groups: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """One outer step.

        Args:
            images: uint8 `[B, H, W, C]`.
            labels: `[B]`.
            fill_groups: patch numbers that the fill encodes at a time; together all of them.
            inner_groups: patch numbers of each inner step.

        Returns:
            The loss of each inner step.
        """
        self.encoder.train()
        self.head.train()
        z = self.fill(images, fill_groups)
        losses = []
        self.optimizer.zero_grad()
        for loss, _ in self.inner_losses(images, labels, z, inner_groups):
            losses.append(loss)
            if self.settings.mode == "patchgd":
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.settings.mode == "accumulate":
            self.optimizer.step()
        return losses


def load_flax(
    encoder: ResNet,
    head: CNNHead,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
) -> None:
    """Copies weights and statistics of the equally built patchgd_jax model, in place."""
    for name, array in flax_tensors(params, batch_stats).items():
        part, _, key = name.partition(".")
        module = encoder if part == "encoder" else head
        target = module.state_dict(keep_vars=True)[key]
        if tuple(target.shape) != array.shape:
            raise ValueError(f"{name} is {tuple(target.shape)} in torch, {array.shape} in flax")
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.ascontiguousarray(array)))


def flax_tensors(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """A patchgd_jax tree of a ResNet and a CNN head under the names and layouts of this file.

    Args:
        params: parameters, or gradients of their shape, with the parts `encoder` and `head`.
        batch_stats: batch statistics, if they are wanted.
    """
    tensors: dict[str, np.ndarray] = {}
    for part in ("encoder", "head"):
        statistics = (batch_stats or {}).get(part, {}).get("batch_stats", {})
        tensors.update(_walk(params[part], statistics, f"{part}."))
    return tensors


def _walk(params: Mapping[str, Any], stats: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    blocks = [name for name in params if name.startswith(("BasicBlock", "Bottleneck"))]
    tensors: dict[str, Any] = {}
    # A block's third (fourth) convolution and norm are its shortcut's.
    main = 3 if "Bottleneck" in prefix else 2
    for name, value in params.items():
        kind, _, number = name.partition("_")
        index = int(number)
        if name in blocks:
            inner = _walk(value, stats.get(name, {}), f"{kind}.")
            own = f"{prefix}blocks.{index}."
            tensors.update({own + k.removeprefix(f"{kind}."): v for k, v in inner.items()})
            continue
        in_block = prefix.startswith(("BasicBlock", "Bottleneck"))
        if in_block and index >= main:
            place = f"{prefix}shortcut.{0 if kind == 'Conv' else 1}"
        elif kind == "Dense":
            place = f"{prefix}dense"
        elif in_block or prefix == "head.":
            place = f"{prefix}{'convs' if kind == 'Conv' else 'norms'}.{index}"
        else:
            place = f"{prefix}{'conv' if kind == 'Conv' else 'norm'}"
        tensors.update(_layer(kind, value, stats.get(name, {}), place))
    return tensors


def _layer(kind: str, value: Any, stats: Any, place: str) -> dict[str, np.ndarray]:
    order = {"Conv": (3, 2, 0, 1), "Dense": (1, 0)}
    tensors = {}
    # Normalize wraps a layer of its own.
    if kind == "Normalize" and "scale" not in value:
        (inner,) = value
        value, stats = value[inner], stats.get(inner, {})
    for name, array in {**value, **stats}.items():
        array = np.asarray(array)
        match name:
            case "kernel":
                tensors[f"{place}.weight"] = array.transpose(order[kind])
            case "scale":
                tensors[f"{place}.weight"] = array
            case "bias":
                tensors[f"{place}.bias"] = array
            case "mean":
                tensors[f"{place}.running_mean"] = array
            case "var":
                tensors[f"{place}.running_var"] = array
    return tensors
