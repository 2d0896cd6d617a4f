"""Importance sampling: unbiased by enumeration, drawn by the scores it says, refused where not."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from test_ragged import LARGE, SIZES, masked_toy, ragged_batch
from test_step import KEY, digits_batch, shipped
from toy import max_relative, recording_sgd, toy_batch, toy_model, toy_params

from patchgd_jax import (
    ConfigError,
    PatchGDConfig,
    PatchGrid,
    PatchIds,
    Problem,
    StreamConfig,
    StreamedStep,
    TrainConfig,
    Weights,
    init_state,
    train_step,
)
from patchgd_jax.contrib.importance import importance_groups, probabilities, weighted_group
from patchgd_jax.core.forward import cut, encode_all
from patchgd_jax.core.step import inner_gradient

POLICIES = ["loss", "attention", "staleness"]
GRID = PatchGrid(8, 12, 4)


def attentive_toy(params):
    """The toy model with an attention of its own: the size of the first latent."""

    def attend(params, batch_stats, z, mask):
        return jax.nn.softmax(jnp.abs(z[..., 0]) * 3, axis=(1, 2))

    return toy_model(params)._replace(attend=attend)


def importance(policy, **settings):
    settings = {"mode": "accumulate", "fraction": 0.5, **settings}
    return PatchGDConfig(importance=policy, sampling="uniform", **settings)


def importance_problem(policy, grid=GRID, model=attentive_toy, **settings):
    """A problem on the toy model, and its weights."""
    model = model(toy_params(0, pixels=grid.patch**2 * 2))
    problem = Problem(model, grid, importance(policy, **settings), sampler=importance_groups)
    return problem, Weights(*model.init(KEY))


def groups_of(policy, *, grid=GRID, batch=None, model=attentive_toy, **settings):
    """Weights, batch, Z, and the drawing of groups by a key."""
    problem, weights = importance_problem(policy, grid, model, **settings)
    batch = toy_batch(0, grid, batch=3) if batch is None else batch
    z = jax.jit(partial(encode_all, problem))(weights, batch)
    draw = jax.jit(partial(importance_groups, problem, weights, z, batch))
    return weights, batch, np.asarray(z), draw


def gradient_of(problem, weights, z, batch, ids, factors):
    group = PatchIds(ids, True, factors)
    patches = cut(problem, batch["image"], group)
    return inner_gradient(problem, weights, z, patches, group, batch, KEY)


@pytest.mark.parametrize(("seed", "k", "missing"), [(0, 1, False), (1, 3, False), (2, 2, True)])
def test_the_expected_gradient_is_that_of_uniform_draws_whatever_the_scores(
    float64, seed, k, missing
):
    """All N^k draws of a group, each with its probability: no sampling error is left."""
    grid = PatchGrid(8, 8, 4)
    problem = Problem(masked_toy(toy_params(seed, pixels=32)), grid, PatchGDConfig())
    weights, batch = Weights(*problem.model.init(KEY)), toy_batch(seed, grid, batch=1)
    counted = np.ones((1, 4), bool)
    if missing:
        batch["patches"] = np.array([[0, 1, 3]])
        counted[0, 2] = False
    z = encode_all(problem, weights, batch)
    # From a patch that hardly ever comes to one that nearly always does.
    scores = jnp.asarray(np.random.default_rng(seed).random((1, 4)) ** 6)
    chance = probabilities(scores, counted, 0.1)
    assert chance.max() > 3 * chance[counted].min()

    def gradient(ids, factors):
        return gradient_of(problem, weights, z, batch, ids, factors)[0].grads

    def of_draw(drawn):
        group = weighted_group(drawn[None], chance, counted, jnp.array([k]))
        return jnp.prod(chance[0, drawn]), gradient(*group)

    every = jnp.array(list(itertools.product(np.flatnonzero(counted), repeat=k)))
    likely, grads = jax.jit(jax.vmap(of_draw))(every)
    assert abs(likely.sum() - 1) < 1e-12
    expected = jax.tree.map(lambda g: jnp.tensordot(likely, g, 1), grads)
    whole = gradient(jnp.arange(4)[None], counted.astype(float))
    count = counted.sum()
    inside = 1 - (1 - 1 / count) ** k
    wanted = {name: inside * g for name, g in whole["encoder"].items()}
    assert max_relative(expected["encoder"], wanted) < 1e-12
    assert max_relative(expected["head"], whole["head"]) < 1e-12


def reference_scores(policy, params, batch, z, ids, number):
    """`[B, N]` of the inner step, in loops."""
    scores = np.zeros(z.shape[:2])
    for b in range(len(z)):
        dz = reference.head(params, z[b], batch["label"][b])[2]
        attention = np.exp(3 * np.abs(z[b, :, 0]))
        for n in range(z.shape[1]):
            if policy == "loss":
                scores[b, n] = np.sqrt((dz[n] ** 2).sum())
            elif policy == "attention":
                scores[b, n] = attention[n] / attention.sum()
            else:
                seen = [j for j in range(number) if n in ids[j, b]]
                scores[b, n] = number - max(seen, default=-1)
    return scores


@pytest.mark.parametrize("sample_per", ["batch", "image"])
@pytest.mark.parametrize("policy", POLICIES)
def test_weights_are_one_over_the_chance_to_be_in_the_group(float64, policy, sample_per):
    """By the slow reference's scores; drawn once for a batch, by their sum over the images."""
    weights, batch, z, draw = groups_of(policy, fraction=0.25, sample_per=sample_per)
    drawn = draw(KEY)
    ids, factors = np.asarray(drawn.ids), np.asarray(drawn.weights)
    count = GRID.num_patches
    assert ids.shape == factors.shape == (4, 3, 2)
    assert (ids[:, :1] == ids).all() == (sample_per == "batch")
    for j, b in np.ndindex(4, 3):
        scores = reference_scores(policy, weights.params, batch, z, ids, j)
        own = scores.sum(0) if sample_per == "batch" else scores[b]
        chance = 0.2 / count + 0.8 * own / own.sum()
        for n, factor in zip(ids[j, b], factors[j, b], strict=True):
            if n < count:
                wanted = (1 - (1 - 1 / count) ** 2) / (1 - (1 - chance[n]) ** 2)
                assert abs(factor - wanted) < 1e-9
        assert len(set(ids[j, b])) == 2


def test_patches_are_drawn_as_often_as_the_weights_say():
    *_, draw = groups_of("attention", sample_per="image")
    drawn = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 3000))
    ids, factors = (np.asarray(x)[:, :, 0].reshape(6000, -1) for x in (drawn.ids, drawn.weights))
    uniform = 1 - (1 - 1 / GRID.num_patches) ** 3
    shares = []
    for n in range(GRID.num_patches):
        wanted = uniform / factors[ids == n].mean()
        share = (ids == n).any(1).mean()
        assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 6000)
        shares.append(share)
    assert max(shares) > 1.2 * min(shares)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_is_unbiased_on_average(float64, policy):
    """The whole outer step: mode accumulate with the factor that undoes the sampling."""
    problem, weights = importance_problem(policy, encoder_grad_scale="unbiased")
    batch, optimizer = toy_batch(0, GRID), recording_sgd(0.0)
    step = partial(train_step, problem, optimizer, init_state(problem, optimizer, KEY), batch)
    keys = jax.random.split(KEY, 4000)
    grads = jax.jit(jax.vmap(lambda key: step(key)[0].opt_state))(keys)
    _, wanted = reference.whole_image_gradient(weights.params, batch["image"], batch["label"], 4, 4)
    for name, samples in grads["encoder"].items():
        error = np.abs(samples.mean(0) - wanted["encoder"][name])
        assert (error < 5 * samples.std(0) / np.sqrt(len(keys)) + 1e-12).all(), name
    for name, samples in grads["head"].items():
        assert np.abs(samples - wanted["head"][name]).max() < 1e-12


def test_weights_change_nothing_but_the_encoders_gradient(float64):
    problem = Problem(toy_model(toy_params(0, pixels=32)), GRID, PatchGDConfig())
    weights, batch = Weights(*problem.model.init(KEY)), toy_batch(0, GRID)
    z = encode_all(problem, weights, batch) + 1
    run = partial(gradient_of, problem, weights, z, batch, jnp.array([[0, 5], [2, 3]]))
    plain, fresh = run(None)
    weighted, same = run(jnp.full((2, 2), 2.5))
    np.testing.assert_array_equal(fresh, same)
    assert weighted.loss == plain.loss
    assert max_relative(weighted.grads["head"], plain.grads["head"]) == 0
    wanted = jax.tree.map(lambda g: 2.5 * g, plain.grads["encoder"])
    assert max_relative(weighted.grads["encoder"], wanted) < 1e-12


def test_weights_are_bounded_by_the_share_of_uniform_draws():
    scores = jnp.array([[0.0, 0.0, 1e9, 1e-9, 3.0]])
    everyone = np.ones((1, 5), bool)
    for mix, k in itertools.product((0.1, 0.5, 1.0), (1, 3, 50)):
        chance = probabilities(scores, everyone, mix)
        _, weights = weighted_group(jnp.arange(5)[None], chance, everyone, jnp.array([k]))
        assert weights.max() <= 1 / mix + 1e-5
        if mix == 1:
            np.testing.assert_allclose(weights, 1, rtol=1e-5)


def test_scores_that_are_all_zero_draw_uniformly():
    chance = probabilities(jnp.zeros((2, 4)), np.array([[True] * 4, [True, False] * 2]), 0.2)
    np.testing.assert_allclose(chance, [[0.25] * 4, [0.5, 0, 0.5, 0]], rtol=1e-6)


@pytest.mark.parametrize("policy", ["loss", "staleness"])
def test_images_with_patches_of_their_own_draw_from_these(policy):
    batch = ragged_batch()
    *_, draw = groups_of(
        policy, grid=LARGE, batch=batch, model=masked_toy, sample_per="image", fraction=0.25
    )
    drawn = draw(KEY)
    ids = np.asarray(drawn.ids)
    mask = np.asarray(LARGE.mask(jnp.asarray(batch["size"]))).reshape(len(SIZES), -1)
    assert np.isfinite(drawn.weights).all()
    for j, b in np.ndindex(ids.shape[:2]):
        real = ids[j, b][ids[j, b] < LARGE.num_patches]
        assert mask[b][real].all()
        assert 1 <= len(real) <= -(-mask[b].sum() // 4)


def test_padding_examples_do_not_choose_shared_patches(float64):
    whole = toy_batch(0, GRID, batch=3)
    padded = {**whole, "weight": np.array([1.0, 1.0, 0.0])}
    two = {name: values[:2] for name, values in whole.items()}
    every, weighted, alone = (
        np.asarray(groups_of("attention", batch=batch)[-1](KEY).weights)
        for batch in (whole, padded, two)
    )
    np.testing.assert_allclose(weighted[:, :2], alone, rtol=1e-12)
    assert (weighted != every).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_second_call_compiles_nothing(float64, policy):
    problem, optimizer = importance_problem(policy, mode="patchgd")[0], recording_sgd(0.1)
    state = jax.jit(partial(init_state, problem, optimizer))(KEY)
    step = jax.jit(partial(train_step, problem, optimizer))
    for seed in range(3):
        state, _ = step(state, toy_batch(seed, GRID), KEY)
    assert step._cache_size() == 1


def traced(head, config):
    """The shapes of a step of a shipped model, which shows what it refuses."""
    grid, optimizer = PatchGrid(32, 32, 16), optax.sgd(0.1)
    problem = Problem(shipped(grid, head=head), grid, config, sampler=importance_groups)
    state = jax.eval_shape(partial(init_state, problem, optimizer), KEY)
    step = partial(train_step, problem, optimizer)
    return jax.eval_shape(step, state, digits_batch(grid), KEY)


def test_heads_without_attention_are_refused():
    config = importance("attention")
    for head in ("attention", "transformer"):
        assert traced(head, config)[1]["loss"].shape == ()
    with pytest.raises(ConfigError, match=r"importance attention: the head .*use --model\.head"):
        traced("linear", config)
    with pytest.raises(ConfigError, match="`attend` is None; give it one, or use --patchgd"):
        groups_of("attention", model=toy_model)[-1](KEY)


def test_what_does_not_go_with_importance_is_refused():
    with pytest.raises(ConfigError, match=r"these images differ .* add --patchgd.sample-per image"):
        groups_of("loss", grid=LARGE, batch=ragged_batch(), model=masked_toy)[-1](KEY)
    with pytest.raises(ConfigError, match="importance loss draws patches when Z is filled"):
        StreamedStep(importance_problem("loss")[0], optax.sgd(1.0))
    with pytest.raises(ConfigError, match="importance loss needs a sampler; pass sampler=contrib"):
        Problem(toy_model({}), GRID, importance("loss"))
    with pytest.raises(ConfigError, match=r"stream\.enabled reads ahead .* leave one of them out"):
        TrainConfig(patchgd=importance("loss"), stream=StreamConfig(enabled=True))
    with pytest.raises(ConfigError, match="method gd has none; use --method patchgd"):
        TrainConfig(patchgd=importance("loss"), method="gd")
