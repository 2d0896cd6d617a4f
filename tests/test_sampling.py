"""Sampling: exact groups for every grid and fraction."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import quick

from patchgd_jax import ConfigError, PatchGDConfig, sample_groups
from patchgd_jax.core.sampling import group_size

KEY = jax.random.key(3)
sample = quick(sample_groups, static_argnums=(1, 2, 3))
PER = st.sampled_from(["batch", "image"])


def draw(num_patches, inner_steps, key=KEY, batch=3, **options):
    config = PatchGDConfig(inner_steps=inner_steps, **options)
    return np.asarray(sample(key, config, num_patches, batch))


@given(st.integers(1, 49).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), PER)
def test_a_partition_has_each_patch_once_in_groups_of_nearly_one_size(numbers, sample_per):
    num_patches, inner_steps = numbers
    ids = draw(num_patches, inner_steps, sample_per=sample_per)
    assert ids.shape == (inner_steps, 3, group_size(num_patches, inner_steps))
    for b in range(3):
        real = ids[:, b] < num_patches
        np.testing.assert_array_equal(np.sort(ids[:, b][real]), np.arange(num_patches))
        sizes = real.sum(-1)
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1
        for row in ids[:, b]:
            assert len(set(row.tolist())) == len(row)


@given(st.integers(1, 400), st.floats(0.003, 1) | st.integers(1, 400).map(lambda n: 1 / n))
def test_every_fraction_gives_exactly_j_groups(num_patches, fraction):
    inner_steps = PatchGDConfig(fraction=fraction).num_inner_steps
    assert inner_steps == int(np.ceil(np.round(1 / fraction, 6)))
    if inner_steps > num_patches:
        with pytest.raises(ConfigError, match=f"{inner_steps} inner steps .* {num_patches}"):
            group_size(num_patches, inner_steps)
    else:
        k = group_size(num_patches, inner_steps)
        assert inner_steps * k >= num_patches > inner_steps * (k - 1)


def test_the_batch_shares_positions_or_each_image_has_its_own():
    shared = draw(30, 5, sample_per="batch")
    own = draw(30, 5, sample_per="image")
    assert (shared[:, 0] == shared[:, 1]).all()
    assert (own[:, 0] != own[:, 1]).any()


@pytest.mark.parametrize("sample_per", ["batch", "image"])
def test_uniform_draws_with_replacement_and_counts_a_patch_once(sample_per):
    ids = draw(6, 2, sampling="uniform", sample_per=sample_per)
    assert ids.shape == (2, 3, 3)
    for row in ids.reshape(-1, 3):
        assert len(set(row.tolist())) == 3
    frequency = np.zeros(6)
    for seed in range(300):
        drawn = draw(6, 2, jax.random.key(seed), batch=1, sampling="uniform")
        frequency += np.bincount(drawn[drawn < 6], minlength=6)
    # Each of 600 groups holds a given patch with probability 1 - (5/6)^3.
    wanted = 600 * (1 - (5 / 6) ** 3)
    assert np.abs(frequency - wanted).max() < 5 * np.sqrt(wanted)


def test_another_key_gives_other_groups():
    a, b = (draw(30, 5, jax.random.key(seed)) for seed in (1, 2))
    assert (a != b).any()
