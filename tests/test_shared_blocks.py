"""Blocks traced once for each form give the figures of blocks that are traced one by one."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from patchgd_jax import ModelConfig, PatchGDConfig
from patchgd_jax.planner import Formula, PlanRequest, formula
from patchgd_jax.planner.shared_blocks import shared_blocks


def rows(encoder: str, remat: str, platform: str):
    request = PlanRequest(
        image=(128, 128, 3),
        batch=4,
        model=ModelConfig(encoder=encoder, remat=remat),
        patchgd=PatchGDConfig(patch=64, fraction=0.5),
    )
    table = Formula(request, platform)
    return [table.row(method) for method in ("gd", "gd-remat", "patchwise", "patchgd", "full")]


@pytest.mark.parametrize(
    ("encoder", "remat", "platform"),
    [
        ("small-cnn", "dots", "cpu"),
        ("resnet18", "none", "cpu"),
        ("resnet18", "everything", "cuda"),
        ("deit-tiny", "dots", "cpu"),
        ("convnext-v2-atto", "blocks", "cuda"),
    ],
)
def test_figures_are_those_of_blocks_traced_one_by_one(encoder, remat, platform, monkeypatch):
    shared = rows(encoder, remat, platform)
    monkeypatch.setattr(formula, "shared_blocks", lambda platform: nullcontext())
    monkeypatch.setattr(formula, "traced_for", lambda platform: nullcontext())
    assert shared == rows(encoder, remat, platform)


class Scale(nn.Module):
    """A number times what another module returns."""

    of: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.param("scale", nn.initializers.ones_init(), ()) * self.of(x)


class Borrowing(nn.Module):
    """A layer has a module of its parent's, and is called twice."""

    @nn.compact
    def __call__(self, x):
        scale = Scale(nn.Dense(4))
        x = scale(scale(x))
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def test_modules_and_variables_of_the_parent_stay_its_own():
    x = jax.random.normal(jax.random.key(1), (16, 4))
    network = Borrowing()
    variables = network.init(jax.random.key(0), x)

    def gradient(variables):
        def loss(params):
            given = {**variables, "params": params}
            out, changed = network.apply(given, x, mutable=["batch_stats"])
            return (out**2 * jnp.arange(4)).sum(), changed

        return jax.grad(loss, has_aux=True)(variables["params"])

    alone = gradient(variables)
    with shared_blocks("cpu"):
        shared = gradient(variables)
    assert jax.tree.structure(alone) == jax.tree.structure(shared)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
        assert jnp.allclose(a, b, rtol=1e-3, atol=1e-4)
