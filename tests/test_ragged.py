"""Images of different sizes, and patches left out: the same as each image alone."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import init_weights, max_relative, outer_steps, quick, recording_sgd, toy_model, toy_params

from patchgd_jax import (
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    build_model,
    eval_step,
    sample_groups,
)
from patchgd_jax.core.patch_ids import unique_padding_ids

KEY = jax.random.key(11)
SIZES = [(13, 9), (5, 18), (4, 4), (16, 20)]
LARGE = PatchGrid(16, 20, 4)
sample = quick(sample_groups, static_argnums=(1, 2, 3))


def masked_toy(params):
    """The toy model with a head that leaves patches out."""
    model = toy_model(params)

    def classify(params, batch_stats, z, mask, *, train, rng):
        p = params["head"]
        z = z.reshape(z.shape[0], -1, z.shape[-1])
        hidden = jax.nn.relu(z @ p["v1"] + p["c1"])
        where = None if mask is None else mask.reshape(z.shape[0], -1, 1)
        return hidden.mean(1, where=where) @ p["v2"] + p["c2"], batch_stats

    return model._replace(classify=classify)


def ragged_batch(seed=0):
    """Images of `SIZES` inside arrays of the largest, with noise around them."""
    rng = np.random.default_rng(seed)
    image = rng.random((len(SIZES), LARGE.height, LARGE.width, 2))
    for i, (height, width) in enumerate(SIZES):
        alone = PatchGrid(height, width, 4)
        # What a grid of that size alone sees of its last, padded patches.
        image[i, height : alone.padded_height, : alone.padded_width] = 0
        image[i, : alone.padded_height, width : alone.padded_width] = 0
    label = rng.integers(3, size=len(SIZES)).astype(np.int32)
    return {"image": image, "label": label, "size": np.array(SIZES, np.int32)}


def listed(batch, slots=None):
    """The same batch with lists of patches instead of sizes, in an order of their own."""
    mask = np.asarray(LARGE.mask(jnp.asarray(batch["size"]))).reshape(len(SIZES), -1)
    slots = slots or int(mask.sum(1).max())
    patches = np.full((len(SIZES), slots), LARGE.num_patches, np.int32)
    for row, used in zip(patches, mask, strict=True):
        ids = np.flatnonzero(used)
        row[: len(ids)] = ids[::-1]
    return {**{k: v for k, v in batch.items() if k != "size"}, "patches": patches}


def gradient(model, grid, config, batch):
    problem = Problem(model, grid, config)
    (_, new), (metrics,) = outer_steps(problem, recording_sgd(0.1), KEY, batch)
    return new.opt_state, float(metrics["loss"])


def images_alone(batch):
    """Each image's grid, and a batch of that image only."""
    for i, (height, width) in enumerate(SIZES):
        image, label = batch["image"][i : i + 1, :height, :width], batch["label"][i : i + 1]
        yield PatchGrid(height, width, 4), {"image": image, "label": label}


@cache
def gradients_alone():
    """The gradient and loss of each image alone, through all of its patches at once."""
    model, config = masked_toy(toy_params(1, pixels=32)), PatchGDConfig(mode="full")
    return [gradient(model, grid, config, one) for grid, one in images_alone(ragged_batch())]


@pytest.mark.parametrize("form", [dict, listed, partial(listed, slots=20)])
@pytest.mark.parametrize(
    "config",
    [
        PatchGDConfig(mode="exact", fill_chunk=3),
        PatchGDConfig(mode="full"),
        PatchGDConfig(mode="full", remat=True, fill_chunk=4),
        PatchGDConfig(mode="accumulate", fraction=0.3, fill_chunk=7),
        PatchGDConfig(mode="accumulate", fraction=0.5, sample_per="image"),
    ],
    ids=["exact", "full", "remat", "accumulate", "per image"],
)
def test_the_gradient_is_the_mean_of_the_images_alone(float64, config, form):
    model = masked_toy(toy_params(1, pixels=32))
    gradients, losses = zip(*gradients_alone(), strict=True)
    wanted = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
    got, loss = gradient(model, LARGE, config, form(ragged_batch()))
    if config.mode == "accumulate":
        # A partition: each patch has its gradient in one of the J inner steps.
        wanted["encoder"] = jax.tree.map(lambda g: g / config.num_inner_steps, wanted["encoder"])
    assert max_relative(got, wanted) < 1e-12
    assert abs(loss - np.mean(losses)) < 1e-12


@pytest.mark.parametrize("form", [dict, listed])
def test_logits_are_those_of_the_images_alone(float64, form):
    model = masked_toy(toy_params(2, pixels=32))
    batch = ragged_batch()
    weights, config = init_weights(model, KEY), PatchGDConfig(fill_chunk=6)
    together = eval_step(Problem(model, LARGE, config), weights, form(batch))
    for got, (grid, one) in zip(together["logits"], images_alone(batch), strict=True):
        logits = eval_step(Problem(model, grid, config), weights, one)["logits"]
        np.testing.assert_allclose(got, logits[0], rtol=1e-12)


@pytest.mark.parametrize("mode", ["patchgd", "accumulate", "exact", "full"])
def test_pixels_of_patches_left_out_change_nothing(mode):
    model = masked_toy(toy_params(3, pixels=32))
    config = PatchGDConfig(mode=mode, fraction=0.5)
    batch = listed(ragged_batch())
    keep = np.array([0, 3, 7, 11, 19])
    batch["patches"] = np.tile(np.append(keep, LARGE.num_patches), (4, 1)).astype(np.int32)
    other = batch["image"].copy()
    for number in set(range(LARGE.num_patches)) - set(keep.tolist()):
        y, x = 4 * (number // LARGE.cols), 4 * (number % LARGE.cols)
        other[:, y : y + 4, x : x + 4] = 1 - other[:, y : y + 4, x : x + 4]
    first, loss = gradient(model, LARGE, config, batch)
    second, again = gradient(model, LARGE, config, {**batch, "image": other})
    assert loss == again
    assert max_relative(first, second) == 0
    kept = other.copy()
    kept[:, 12:16, 16:20] += 0.5
    assert max_relative(gradient(model, LARGE, config, {**batch, "image": kept})[0], first) > 1e-3


NUM_PATCHES, COUNTS = 40, [1, 5, 12, 7]


def valid_lists():
    rng = np.random.default_rng(0)
    rows = np.full((len(COUNTS), max(COUNTS)), NUM_PATCHES, np.int32)
    for row, count in zip(rows, COUNTS, strict=True):
        row[:count] = np.sort(rng.choice(NUM_PATCHES, count, replace=False))
    return jnp.asarray(rows)


@pytest.mark.parametrize("sample_per", ["batch", "image"])
@pytest.mark.parametrize("inner_steps", [1, 2, 3, 7])
def test_a_partition_of_lists_deals_each_images_patches_evenly(inner_steps, sample_per):
    valid = valid_lists()
    config = PatchGDConfig(inner_steps=inner_steps, sample_per=sample_per)
    ids = np.asarray(sample(KEY, config, NUM_PATCHES, 4, valid))
    assert ids.shape == (inner_steps, 4, -(-12 // inner_steps))
    for b, count in enumerate(COUNTS):
        real = ids[:, b] < NUM_PATCHES
        np.testing.assert_array_equal(np.sort(ids[:, b][real]), np.asarray(valid[b])[:count])
        assert real.sum(1).max() - real.sum(1).min() <= 1
        for row in ids[:, b]:
            assert len(set(row.tolist())) == len(row)


def test_uniform_draws_of_lists_are_of_the_list_and_no_more_than_its_share():
    valid = valid_lists()
    config = PatchGDConfig(inner_steps=3, sampling="uniform", sample_per="image")
    seen = [np.zeros(NUM_PATCHES, int) for _ in COUNTS]
    for seed in range(200):
        ids = np.asarray(sample(jax.random.key(seed), config, NUM_PATCHES, 4, valid))
        for b, count in enumerate(COUNTS):
            for row in ids[:, b]:
                drawn = row[row < NUM_PATCHES]
                assert 1 <= len(drawn) <= -(-count // 3)
                assert len(set(row.tolist())) == len(row)
                seen[b][drawn] += 1
    for b, count in enumerate(COUNTS):
        of_list = np.asarray(valid[b])[:count]
        assert seen[b].sum() == seen[b][of_list].sum()
        # A patch's share of 600 groups, with repeats inside a group counted once.
        share = 1 - (1 - 1 / count) ** -(-count // 3)
        assert np.abs(seen[b][of_list] / 600 - share).max() < 0.09


def test_a_group_without_a_patch_changes_nothing():
    """Two inner steps, one patch: the second has nothing to encode."""
    grid = PatchGrid(32, 48, 16)
    model = build_model(
        ModelConfig(latent_dim=8, norm="batch"), grid=grid, channels=1, classes=3, mean=0.1, std=0.3
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 32, 48, 1), dtype=np.uint8)
    batch = {"image": image, "label": np.array([0, 2], np.int32)}
    batch["patches"] = np.array([[4, 6, 6], [1, 6, 6]], np.int32)
    problem = Problem(model, grid, PatchGDConfig(fraction=0.5))
    (first, new), (metrics,) = outer_steps(problem, recording_sgd(0.0), KEY, batch)
    assert np.isfinite(metrics["grad_norm"])
    patches = np.asarray(grid.take(image, jnp.array([[4], [1]])))[:, 0]
    _, once = model.encode(*first.weights, patches, train=True, rng=KEY)
    assert max_relative(new.batch_stats["encoder"], once["encoder"]) < 1e-5


def test_a_weight_is_a_factor_on_an_examples_loss(float64):
    model = masked_toy(toy_params(1, pixels=32))
    weights = np.array([3.0, 0.0, 0.1, 1.0])
    batch = {**ragged_batch(), "weight": weights}
    got, _ = gradient(model, LARGE, PatchGDConfig(mode="exact"), batch)
    gradients = [g for g, _ in gradients_alone()]
    # Zero is padding: it does not count among the examples.
    wanted = jax.tree.map(
        lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)) / 3, *gradients
    )
    assert max_relative(got, wanted) < 1e-12


def test_padding_slots_get_ids_of_their_own():
    ids = unique_padding_ids(jnp.array([[3, 9, 9, 12]]), 9)
    np.testing.assert_array_equal(ids, [[3, 10, 11, 12]])


def test_an_unbiased_scale_for_uniform_draws_of_unequal_lists_is_refused():
    config = PatchGDConfig(sampling="uniform", encoder_grad_scale="unbiased")
    with pytest.raises(ConfigError, match="use partition"):
        gradient(masked_toy(toy_params(1, pixels=32)), LARGE, config, ragged_batch())
