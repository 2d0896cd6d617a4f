"""The same core on series: the grid of one dimension, and the four gradients through it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from toy import max_relative, outer_steps, quick, recording_sgd

from patchgd_jax import (
    AugmentConfig,
    ConfigError,
    PatchGDConfig,
    Problem,
    eval_step,
    from_linen,
    init_state,
    sample_groups,
    train_step,
)
from patchgd_jax.contrib.series import SeriesGrid
from patchgd_jax.core.problem import named_key
from patchgd_jax.models.heads.simple import AttentionHead

ROOT = Path(__file__).parent.parent
KEY = jax.random.key(7)
SHAPES = [(128, 16, 0), (12, 4, 4), (13, 4, 4), (14, 5, 3), (6, 6, 0), (30, 7, 2), (10, 4, 1)]
GRIDS = [SeriesGrid(16, 4), SeriesGrid(17, 5, 3), SeriesGrid(6, 6)]
CLASSES, TAPS = 3, 3


# The grid, against loops.


def cut(series, number, patch, step):
    """The steps `[p, C]` of one patch of a series `[T, C]`, one by one; zero beyond its end."""
    out = np.zeros((patch, series.shape[1]), series.dtype)
    for i in range(patch):
        if number * step + i < len(series):
            out[i] = series[number * step + i]
    return out


def count_patches(length, patch, step):
    count = 1
    while (count - 1) * step + patch < length:
        count += 1
    return count


@pytest.mark.parametrize(("length", "patch", "stride"), SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_take_equals_a_loop_over_the_steps(length, patch, stride, dtype):
    grid = SeriesGrid(length, patch, stride)
    series = np.arange(1, 2 * length * 3 + 1).reshape(2, length, 3).astype(dtype)
    every = np.arange(grid.num_patches)
    got = np.asarray(grid.take(jnp.asarray(series), jnp.asarray([every, every[::-1]])))
    assert got.dtype == dtype
    assert got.shape == (2, grid.num_patches, *grid.patch_shape, 3)
    for b, row in enumerate([every, every[::-1]]):
        for k, number in enumerate(row):
            wanted = cut(series[b], number, patch, stride or patch)
            np.testing.assert_array_equal(got[b, k], wanted)


@pytest.mark.parametrize(("length", "patch", "stride"), SHAPES)
def test_every_step_is_in_a_patch_and_no_patch_is_padding_only(length, patch, stride):
    grid = SeriesGrid(length, patch, stride)
    series = np.arange(1, length + 1, dtype=np.int32).reshape(1, length, 1)
    patches = np.asarray(grid.take(series, np.arange(grid.num_patches)[None]))[0, :, :, 0]
    seen = np.bincount(patches[patches > 0], minlength=length + 1)[1:]
    assert seen.min() == 1
    assert (patches > 0).any(1).all()
    assert (grid.rows, grid.cols) == (1, count_patches(length, patch, stride or patch))
    if grid.stride == patch:
        assert seen.max() == 1


@pytest.mark.parametrize(("length", "patch", "stride"), SHAPES)
def test_mask_is_the_grid_that_a_shorter_series_has_alone(length, patch, stride):
    grid = SeriesGrid(length, patch, stride)
    lengths = np.arange(1, length + 1)
    mask = np.asarray(grid.mask(jnp.asarray(lengths[:, None])))
    assert mask.shape == (length, 1, grid.num_patches)
    for row, short in zip(mask[:, 0], lengths, strict=True):
        used = count_patches(short, patch, stride or patch)
        np.testing.assert_array_equal(row, np.arange(grid.num_patches) < used)


def test_ids_out_of_range_are_clipped():
    grid = SeriesGrid(10, 4)
    series = np.arange(10.0, dtype=np.float32).reshape(1, 10, 1)
    got = grid.take(series, jnp.array([[99, -1]]))
    np.testing.assert_array_equal(got, grid.take(series, jnp.array([[2, 0]])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 9), "patch length 9 is longer than the series .8 steps"),
        ((16, 4, 5), "stride 5"),
        ((16, 0), "patch length 0"),
    ],
)
def test_impossible_grids_are_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SeriesGrid(*arguments)


@pytest.mark.parametrize("shape", [(2, 9, 1), (2, 8, 8, 1)])
def test_series_that_are_not_the_grids_are_errors(shape):
    with pytest.raises(ConfigError, match=r"series of 8 steps: \[B, 8, C\]"):
        SeriesGrid(8, 4).take(jnp.zeros(shape), jnp.zeros((2, 1), jnp.int32))


def test_grids_are_hashable_and_equal_by_value():
    assert hash(SeriesGrid(8, 4)) == hash(SeriesGrid(8, 4, 4))
    assert SeriesGrid(8, 4) == SeriesGrid(8, 4, 4)


# The gradients, against a function of the series that shares no code with the package.


class Encoder(nn.Module):
    """A convolution over the steps, of which every place of a patch is read."""

    @nn.compact
    def __call__(self, x, *, train):
        hidden = nn.tanh(nn.Conv(5, (TAPS,), padding="VALID", param_dtype=x.dtype)(x))
        return nn.Dense(4, param_dtype=x.dtype)(hidden.reshape(len(x), -1))


def encode(params, patch):
    """The encoder again, of one patch `[p, C]`, tap by tap."""
    conv, dense = params["Conv_0"], params["Dense_0"]
    places = len(patch) - TAPS + 1
    summed = sum(patch[tap : tap + places] @ conv["kernel"][tap] for tap in range(TAPS))
    hidden = jnp.tanh(summed + conv["bias"])
    return hidden.reshape(-1) @ dense["kernel"] + dense["bias"]


def classify(params, latents):
    """The attention head again, of a list of latents."""

    def dense(number, x):
        return x @ params[f"Dense_{number}"]["kernel"] + params[f"Dense_{number}"]["bias"]

    read = [jnp.maximum(dense(0, z), 0) for z in latents]
    scores = [dense(3, jnp.tanh(dense(2, x)) / (1 + jnp.exp(-dense(1, x))))[0] for x in read]
    odds = [jnp.exp(score) for score in scores]
    return dense(4, sum(o * x for o, x in zip(odds, read, strict=True)) / sum(odds))


def mean_loss(params, batch, grid, *, stale=None, fresh=None):
    """The mean cross-entropy, patch by patch; those not in `fresh[b]` are read from `stale[b]`."""
    losses = []
    for b, (series, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
        length = int(batch["size"][b, 0]) if "size" in batch else grid.length
        latents = [
            encode(params["encoder"], cut(series, number, grid.patch, grid.stride))
            if fresh is None or number in fresh[b]
            else stale[b][number]
            for number in range(count_patches(length, grid.patch, grid.stride))
        ]
        logits = classify(params["head"], latents)
        losses.append(jnp.log(jnp.exp(logits).sum()) - logits[label])
    return sum(losses) / len(losses)


def setting(grid):
    """A model, its parameters (attention not uniform), and a batch."""
    head = AttentionHead(CLASSES, features=6, dtype=jnp.float64)
    model = from_linen(Encoder(), head, grid=grid, channels=2, dtype=jnp.float64)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), jax.jit(model.init)(KEY)[0])
    batch = {
        "image": rng.normal(size=(2, grid.length, 2)),
        "label": rng.integers(CLASSES, size=2).astype(np.int32),
    }
    return model._replace(init=lambda key: (params, {"encoder": {}, "head": {}})), params, batch


def compared(grads, grid):
    """Without what has no gradient but for rounding, since attention is a softmax.

    That is the bias of its scores and, where there is one patch only, all that the scores are of.
    """
    head = dict(grads["head"])
    scores = head.pop("Dense_3")
    if grid.num_patches == 1:
        del head["Dense_1"], head["Dense_2"]
    else:
        head["score"] = scores["kernel"]
    return {"encoder": grads["encoder"], "head": head}


def run(grid, config, **extra):
    model, params, batch = setting(grid)
    batch |= extra
    (_, new), (metrics,) = outer_steps(Problem(model, grid, config), recording_sgd(0.1), KEY, batch)
    return params, batch, new, metrics


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_full_is_plain_autodiff_and_exact_is_full(float64, grid):
    params, batch, full, metrics = run(grid, PatchGDConfig(mode="full"))
    loss, grads = jax.value_and_grad(mean_loss)(params, batch, grid)
    assert max_relative(compared(full.opt_state, grid), compared(grads, grid)) < 1e-12
    assert abs(float(metrics["loss"]) - float(loss)) < 1e-12
    exact = run(grid, PatchGDConfig(mode="exact", fill_chunk=3))[2]
    assert max_relative(compared(exact.opt_state, grid), compared(full.opt_state, grid)) < 1e-12


def test_shorter_series_are_as_if_alone(float64):
    """Their steps beyond the end are zero, as a padded batch has them."""
    grid, sizes = SeriesGrid(16, 4), np.array([[16], [7]])
    image = setting(grid)[2]["image"]
    image[1, 7:] = 0
    params, batch, new, _ = run(grid, PatchGDConfig(mode="exact"), image=image, size=sizes)
    grads = jax.grad(mean_loss)(params, batch, grid)
    assert max_relative(compared(new.opt_state, grid), compared(grads, grid)) < 1e-12


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_accumulate_is_exact_for_the_head_and_one_jth_for_the_encoder(float64, grid):
    config = PatchGDConfig(mode="accumulate", fraction=0.5)
    params, batch, new, _ = run(grid, config)
    got = compared(new.opt_state, grid)
    grads = compared(jax.grad(mean_loss)(params, batch, grid), grid)
    assert max_relative(got["head"], grads["head"]) < 1e-12
    scaled = jax.tree.map(lambda g: g / config.num_inner_steps, grads["encoder"])
    assert max_relative(got["encoder"], scaled) < 1e-12


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_patchgd_equals_a_slow_loop(float64, grid):
    config = PatchGDConfig(mode="patchgd", fraction=0.5)
    params, batch, new, metrics = run(grid, config)
    key = named_key(jax.random.fold_in(KEY, 0), "sampling")
    groups = sample_groups(key, config, grid.num_patches, 2)

    def latents(params, b, number):
        return encode(params["encoder"], cut(batch["image"][b], number, grid.patch, grid.stride))

    z = [[latents(params, b, number) for number in range(grid.num_patches)] for b in range(2)]
    losses = []
    for group in np.asarray(groups).tolist():
        for b, numbers in enumerate(group):
            for number in numbers:
                if number < grid.num_patches:
                    z[b][number] = latents(params, b, number)
        loss, grads = jax.value_and_grad(mean_loss)(params, batch, grid, stale=z, fresh=group)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        losses.append(float(loss))
    assert max_relative(new.params, params) < 1e-12
    assert abs(float(metrics["loss"]) - np.mean(losses)) < 1e-12


@pytest.mark.parametrize("mode", ["patchgd", "accumulate", "exact", "full"])
def test_a_few_outer_steps_lower_the_loss(float64, mode):
    grid = GRIDS[1]
    model, _, batch = setting(grid)
    problem = Problem(model, grid, PatchGDConfig(mode=mode, fraction=0.5, fill_chunk=2))
    states, _ = outer_steps(problem, optax.adam(0.03), KEY, *[batch] * 5)
    evaluate = quick(partial(eval_step, problem))
    before, after = (evaluate(s.weights, batch)["loss"].mean() for s in (states[0], states[-1]))
    assert after < 0.8 * before


def test_augmentation_of_series_is_an_error(float64):
    model, _, batch = setting(GRIDS[0])
    problem = Problem(model, GRIDS[0], PatchGDConfig(), augment=AugmentConfig(flips=True))
    optimizer = optax.sgd(0.1)
    step = partial(train_step, problem, optimizer)
    with pytest.raises(ConfigError, match="augmentation is for patches of images"):
        jax.eval_shape(step, init_state(problem, optimizer, KEY), batch, KEY)


# The experiment.


@pytest.mark.slow
def test_the_experiment_runs(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "experiments" / "series.py", "--scale", "smoke", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr
    with (tmp_path / "series.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3 + 1
    losses = {(row["label"], row["seed"]): float(row["loss"] or "nan") for row in rows}
    for seed in "012":
        np.testing.assert_allclose(losses["exact", seed], losses["full", seed], rtol=1e-5)
    assert "| exact |" in (tmp_path / "series.md").read_text()
    assert (tmp_path / "series.png").stat().st_size > 10_000
