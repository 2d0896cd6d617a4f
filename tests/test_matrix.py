"""Every encoder with every head: an outer step compiles and lowers the loss on a fixed batch."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
import pytest
from toy import outer_steps

from patchgd_jax import ENCODERS, HEADS, PatchGDConfig, PatchGrid, Problem, from_linen
from patchgd_jax.models.encoders.convnext_v2 import ConvNeXtV2
from patchgd_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResNet
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.models.encoders.vit import ViT

KEY = jax.random.key(29)
GRID = PatchGrid(64, 96, 32)
ARCHITECTURES = {
    "small-cnn": partial(SmallCNN, widths=(16, 16), norm="batch"),
    "resnet-basic": partial(ResNet, blocks=(1, 1), block=BasicBlock, norm="batch"),
    "resnet-bottleneck": partial(ResNet, blocks=(1, 1), block=Bottleneck, norm="batch"),
    "convnext-v2": partial(ConvNeXtV2, blocks=(1, 1, 1, 1), widths=(8, 16, 32, 64)),
    "vit": partial(ViT, width=32, heads=2, depth=2),
    "mobilenet-v2": ENCODERS["mobilenet-v2"].build,
    "efficientnet-b0": ENCODERS["efficientnet-b0"].build,
}
"""Each architecture, in a small size where it has sizes; the last two have one."""
ONE_SIZE = ("mobilenet-v2", "efficientnet-b0")
HEADS_OF_ONE_SIZE = ("attention", "cnn-original")
"""An encoder knows nothing of heads; these compile for long."""
QUICK_HEADS = ("attention", "linear", "transformer", "adaptive-cnn", "cnn-original")


def pairs():
    """Each kind of head, a ResNet and a transformer; the rest is for `-m slow`."""
    for encoder in ARCHITECTURES:
        for head in HEADS_OF_ONE_SIZE if encoder in ONE_SIZE else sorted(HEADS):
            quick = (encoder == "small-cnn" and head in QUICK_HEADS) or (
                encoder in ("resnet-basic", "vit") and head == "attention"
            )
            yield pytest.param(encoder, head, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("encoder", "head"), list(pairs()))
def test_an_outer_step_lowers_the_loss(encoder, head):
    dropout = {"dropout": 0.0} if head.startswith("cnn") else {}
    model = from_linen(
        ARCHITECTURES[encoder](latent_dim=8),
        HEADS[head].build(classes=4, **dropout),
        grid=GRID,
        channels=3,
        mean=0.5,
        std=0.3,
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 64, 96, 3), dtype=np.uint8),
        "label": np.arange(4, dtype=np.int32),
    }
    # Adam's first steps are of full size, which is much for a transformer.
    optimizer = optax.adam(3e-4 if encoder == "vit" else 1e-3)
    # Deep BatchNorm: a fill by running statistics that have not moved yet gives another Z.
    policy = "paper" if encoder in ONE_SIZE else "inner"
    config = PatchGDConfig(fraction=0.5, fill_chunk=3, norm_policy=policy)
    _, metrics = outer_steps(Problem(model, GRID, config), optimizer, KEY, *[batch] * 4)
    losses = [float(m["loss"]) for m in metrics]
    assert np.isfinite(losses).all()
    assert min(losses[1:]) < losses[0]
