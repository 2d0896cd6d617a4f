"""The age and the drift of Z that a step reports, against loops over the slow reference."""

from __future__ import annotations

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_step import GRIDS, real_groups, run_toy, step_once
from toy import recording_sgd, toy_batch, toy_problem

from patchgd_jax import AugmentConfig, PatchGDConfig, PatchGrid
from patchgd_jax.core.staleness import drift, mean_age, squared_change


def slow_age(groups, num_patches):
    """The mean over inner steps, images and patches, of `groups[j][b]`."""
    ages = []
    for j in range(len(groups)):
        for b in range(len(groups[0])):
            for n in range(num_patches):
                seen = [i for i in range(j + 1) if n in groups[i][b]]
                ages.append(j - max(seen, default=-1))
    return np.mean(ages)


@pytest.mark.parametrize(("sampling", "epsilon"), [("partition", 1), ("uniform", 2)])
def test_age_and_drift_are_the_slow_references(float64, sampling, epsilon):
    grid = GRIDS[1]
    config = PatchGDConfig(
        mode="patchgd", fraction=0.25, epsilon=epsilon, sampling=sampling, sample_per="image"
    )
    params, batch, _, metrics = run_toy(grid, config)
    groups = real_groups(grid, config, 2)
    z = reference.fill(params, batch["image"], 4, 4)
    drifts, total = [], reference.zeros(params)
    for j, group in enumerate(groups):
        old = copy.deepcopy(z)
        _, grads = reference.gradient(params, batch["image"], batch["label"], z, group, 4, 4)
        entries = [(b, n) for b in range(2) for n in group[b]]
        change = sum(((z[b][n] - old[b][n]) ** 2).sum() for b, n in entries)
        drifts.append(np.sqrt(change / sum((old[b][n] ** 2).sum() for b, n in entries)))
        for part in grads:
            reference.add(total, part, grads[part], 0.1 / epsilon)
        if (j + 1) % epsilon == 0:
            params = {p: {k: v - total[p][k] for k, v in params[p].items()} for p in params}
            total = reference.zeros(params)
    assert drifts[:epsilon] == [0] * epsilon, "before the first update nothing has moved"
    assert drifts[-1] > 1e-3
    assert abs(float(metrics["z_drift"]) - np.mean(drifts)) < 1e-12
    assert abs(float(metrics["z_age"]) - slow_age(groups, grid.num_patches)) < 1e-5


def test_ages_of_a_partition_are_known():
    ids = jnp.arange(4)[:, None, None]
    # 0 of 4 patches are fresh before the first step, and one more after each.
    assert float(mean_age(ids, 4)) == np.mean([3 / 4, 5 / 4, 6 / 4, 6 / 4])


def test_padding_slots_and_examples_have_no_age():
    ids = jnp.array([[[0, 4], [1, 5]], [[3, 1], [4, 5]]])
    real = np.array([[True, True, False, True], [False] * 4])
    # Image 0, patches 0, 1, 3: ages 0, 1, 1, then 1, 0, 0.
    assert float(mean_age(ids, 4, real)) == pytest.approx(3 / 6)


def test_padding_slots_and_examples_do_not_drift():
    old, new = np.ones((2, 3, 2)), np.ones((2, 3, 2))
    new[0, 1], new[1, 2] = 4, 100
    ids = jnp.array([[1, 3], [2, 0]])
    change, size = squared_change(jnp.array(old), jnp.array(new), ids, jnp.array([1.0, 0.0]))
    assert (change, size) == (18, 2)


def test_entries_that_were_zero_count_as_no_drift():
    assert float(drift(jnp.array([[3.0, 0.0], [8.0, 2.0]]))) == 1


def test_accumulate_drifts_by_what_is_drawn_anew_only(float64):
    grid, optimizer = PatchGrid(8, 12, 4), recording_sgd(0.1)
    config = PatchGDConfig(mode="accumulate", fraction=0.5)
    anew = AugmentConfig(flips=True, same_draw=False)
    augments = (None, dataclasses.replace(anew, same_draw=True), anew)
    problems = [toy_problem(grid, config, augment=augment) for augment in augments]
    drifts = [
        float(step_once(problem, toy_batch(0, grid), optimizer)[-1]["z_drift"])
        for problem in problems
    ]
    assert max(drifts[:2]) < 1e-12
    assert drifts[2] > 0.01
