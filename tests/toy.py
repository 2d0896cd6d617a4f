"""The model of `reference.py` as a PatchModel, and what tests of steps share."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchgd_jax import PatchGrid, PatchModel, Problem, Weights, init_state, train_step

# Compiling is nearly all of most tests' time; this shortens it, and the numbers stay what they are.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def toy_params(seed, *, pixels, hidden=5, latent=4, features=6, classes=3):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape) / np.sqrt(shape[0])

    return {
        "encoder": {
            "w1": normal(pixels, hidden),
            "b1": normal(hidden),
            "w2": normal(hidden, latent),
        },
        "head": {
            "v1": normal(latent, features),
            "c1": normal(features),
            "v2": normal(features, classes),
            "c2": normal(classes),
        },
    }


def toy_model(params) -> PatchModel:
    def init(key):
        return jax.tree.map(jnp.asarray, params), {"encoder": {}, "head": {}}

    def encode(params, batch_stats, patches, *, train, rng, mask=None):
        p = params["encoder"]
        hidden = jnp.tanh(patches.reshape(len(patches), -1) @ p["w1"] + p["b1"])
        return hidden @ p["w2"], batch_stats

    def classify(params, batch_stats, z, mask, *, train, rng):
        p = params["head"]
        z = z.reshape(z.shape[0], -1, z.shape[-1])
        return jax.nn.relu(z @ p["v1"] + p["c1"]).mean(1) @ p["v2"] + p["c2"], batch_stats

    return PatchModel(init, encode, classify)


def toy_problem(grid, config, seed=0, **options) -> Problem:
    return Problem(toy_model(toy_params(seed, pixels=grid.patch**2 * 2)), grid, config, **options)


def toy_batch(seed, grid: PatchGrid, *, batch=2, channels=2, classes=3):
    rng = np.random.default_rng([seed, 1])
    return {
        "image": rng.random((batch, grid.height, grid.width, channels)),
        "label": rng.integers(classes, size=batch).astype(np.int32),
    }


def recording_sgd(rate: float) -> optax.GradientTransformation:
    """Plain gradient descent whose state is the last gradient it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(lambda g: -rate * g, grads), grads),
    )


def init_weights(model, key) -> Weights:
    return Weights(*quick(model.init)(key))


def outer_steps(problem, optimizer, key, *batches, jit=quick):
    """All states, from the first on, and the metrics of each outer step."""
    step = jit(partial(train_step, problem, optimizer))
    states, metrics = [jit(partial(init_state, problem, optimizer))(key)], []
    for batch in batches:
        state, measured = step(states[-1], batch, key)
        states.append(state)
        metrics.append(measured)
    return states, metrics


def covering(keep, *values):
    """All combinations as parameters; those whose places `keep` refuses are slow tests."""
    for places in itertools.product(*(range(len(v)) for v in values)):
        combination = [v[place] for v, place in zip(values, places, strict=True)]
        yield pytest.param(*combination, marks=[] if keep(*places) else pytest.mark.slow)


def max_relative(got, wanted) -> float:
    """The largest difference of any leaf, over that leaf's largest value."""
    worst = 0.0
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst
