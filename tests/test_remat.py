"""Rematerialisation: what is kept changes, what is computed does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import max_relative

from patchgd_jax import ModelConfig, PatchGrid, build_model, compiler_options

KEY = jax.random.key(0)
POLICIES = ("none", "dots", "blocks", "everything")
GRID = PatchGrid(64, 64, 32)


def build(encoder, remat, norm="batch"):
    config = ModelConfig(encoder=encoder, norm=norm, latent_dim=8, remat=remat)
    return build_model(config, grid=GRID, channels=3, classes=3, mean=0.5, std=0.25)


def loss_of(model, state, patches):
    def loss(params):
        latents, new_state = model.encode(params, state, patches, train=True, rng=KEY)
        return jnp.square(latents).mean(), new_state

    return loss


def residual_bytes(model, count=4):
    """Bytes that `jax.vjp` of the encoder keeps, parameters and input left out."""
    params, state = jax.eval_shape(model.init, KEY)
    patches = jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.float32)

    def pull_back(params, state, patches):
        def encode(params):
            return model.encode(params, state, patches, train=True, rng=KEY)[0]

        return jax.vjp(encode, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, params, state, patches))
    given = {leaf.shape for leaf in jax.tree.leaves(params)} | {patches.shape}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in given)


@pytest.mark.parametrize(
    ("encoder", "norm"),
    [("small-cnn", "group"), pytest.param("resnet18", "batch", marks=pytest.mark.slow)],
)
def test_a_policy_changes_neither_tree_nor_values(encoder, norm):
    patches = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    results = []
    for remat in POLICIES:
        model = build(encoder, remat, norm)
        params, state = jax.jit(model.init)(KEY)
        run = jax.jit(
            jax.value_and_grad(loss_of(model, state, patches), has_aux=True),
            compiler_options=compiler_options(),
        )
        results.append((params, run(params)))
    # The maps of the last stage are one pixel, and batch statistics of four enlarge rounding.
    for params, result in results[1:]:
        assert jax.tree.structure(params) == jax.tree.structure(results[0][0])
        assert max_relative(params, results[0][0]) == 0
        assert max_relative(result, results[0][1]) < 1e-3


@pytest.mark.parametrize(
    "encoder", ["small-cnn", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]
)
def test_each_policy_keeps_less_than_the_one_before(encoder):
    kept = [residual_bytes(build(encoder, remat)) for remat in POLICIES]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    # Of each convolution, norm and ReLU, only the convolution's result.
    assert kept[1] < 0.7 * kept[0]


def test_the_cpus_compiler_keeps_what_the_policy_says():
    """Left to itself, jax 0.10 undoes jax.checkpoint on the CPU."""

    def temporary(remat):
        model = build("resnet18", remat)
        params, state = jax.eval_shape(model.init, KEY)
        patches = jax.ShapeDtypeStruct((16, 32, 32, 3), np.uint8)

        def gradient(params, state, patches):
            return jax.grad(lambda p: loss_of(model, state, patches)(p)[0])(params)

        jitted = jax.jit(gradient, compiler_options=compiler_options())
        compiled = jitted.lower(params, state, patches).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("blocks") < 0.9 * temporary("none")
