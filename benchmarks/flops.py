"""Floating-point operations of a step by the textbook formula, the same for every contender."""

from __future__ import annotations

import torch
import torch_reference as reference
from torch import nn
from worker import Task


def _forward(module: nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Multiplications and additions of the convolutions and linear layers, on the meta device."""
    total = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        total += 2 * out.numel() * (weight.numel() // weight.shape[0])

    hooks = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    out = module.to("meta").eval()(x)
    for hook in hooks:
        hook.remove()
    return total, out


def step_flops(task: Task) -> int:
    """FLOPs of one step: a backward pass is two forwards, and padding counts as pixels do."""
    side = task.side if task.method == "gd" else task.patch
    encoder = reference.ResNet(task.depth, task.latent)
    once, _ = _forward(encoder, torch.empty(1, 3, side, side, device="meta"))
    if task.method == "gd":
        return 3 * task.batch * once
    rows = task.side // task.patch
    head = reference.CNNHead(task.latent, 10, (rows, rows))
    z = torch.empty(task.batch, task.latent, rows, rows, device="meta")
    reads = 1 if task.method == "exact" else task.inner_steps
    # Every patch is encoded twice and its gradient taken once.
    return 4 * task.batch * task.patches * once + 3 * reads * _forward(head, z)[0]
