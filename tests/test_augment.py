"""Random changes of patches: what they do to pixels, and who sees the same ones."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import init_weights, max_relative, quick, recording_sgd, toy_batch, toy_problem

from patchgd_jax import (
    AugmentConfig,
    ConfigError,
    PatchGDConfig,
    PatchGrid,
    PatchIds,
    TrainConfig,
    fill,
    init_state,
    train_step,
)
from patchgd_jax.core.augment import augment_patches, augmentation, jitter, turn_and_flip
from patchgd_jax.core.forward import cut, encode, head_loss
from patchgd_jax.core.patch_ids import chunk_patch_ids

KEY = jax.random.key(23)
EVERYTHING = AugmentConfig(flips=True, turns=True, brightness=0.3, contrast=0.4, saturation=0.5)


def pictures(count=1, side=5, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (1, count, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_turns_and_flips_are_numpys_and_can_be_undone(quarter, down, across):
    patch = pictures()[0, 0]
    wanted = np.rot90(patch, quarter)
    wanted = wanted[::-1] if down else wanted
    wanted = wanted[:, ::-1] if across else wanted
    got = turn_and_flip(jnp.asarray(patch), *map(jnp.asarray, (quarter, down, across)))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)
    # Flips come last, so undoing them comes first.
    still = jnp.asarray(0), jnp.asarray(down), jnp.asarray(across)
    turned = turn_and_flip(got, *still)
    back = turn_and_flip(turned, *map(jnp.asarray, (-quarter % 4, False, False)))
    np.testing.assert_array_equal(back, patch)


@pytest.mark.parametrize(
    ("config", "pictures_made"),
    [(AugmentConfig(flips=True), 4), (AugmentConfig(turns=True), 4),
     (AugmentConfig(flips=True, turns=True), 8)],
)  # fmt: skip
def test_every_arrangement_comes_up_equally_often(config, pictures_made):
    count = 2000
    patches = np.tile(pictures(), (1, count, 1, 1, 1))
    ids = jnp.arange(count)[None]
    draw = quick(partial(augment_patches, key=KEY, config=config))
    out = np.asarray(draw(patches, ids))[0]
    seen = {}
    for picture in out:
        seen[picture.tobytes()] = seen.get(picture.tobytes(), 0) + 1
    assert len(seen) == pictures_made
    share = np.array(list(seen.values())) / count
    assert np.abs(share - 1 / pictures_made).max() < 5 * np.sqrt(0.25 / count)
    wanted = np.sort(pictures().ravel())
    for picture in out[:50]:
        np.testing.assert_array_equal(np.sort(picture.ravel()), wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_the_formula(channels):
    patch = pictures(channels=channels)[0, 0]
    luma = np.array([0.299, 0.587, 0.114]) if channels == 3 else np.ones(1)
    b, c, s = 1.2, 0.7, 1.4
    wanted = np.clip(patch / 255 * b, 0, 1)
    mean = (wanted @ luma).mean()
    wanted = np.clip(mean + c * (wanted - mean), 0, 1)
    if channels == 3:
        grey = (wanted @ luma)[..., None]
        wanted = np.clip(grey + s * (wanted - grey), 0, 1)
    got = jitter(jnp.asarray(patch), jnp.array([b, c, s]))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    same = jitter(jnp.asarray(patch), jnp.ones(3))
    np.testing.assert_allclose(same, patch / 255, rtol=1e-5, atol=1e-6)


def test_a_draw_is_a_function_of_key_image_and_patch():
    patches = np.tile(pictures(), (3, 4, 1, 1, 1))
    ids = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 7]])
    draw = quick(partial(augment_patches, config=EVERYTHING))
    out = np.asarray(draw(patches, ids, key=KEY))
    assert out.min() >= 0
    assert out.max() <= 1
    # The same patch elsewhere in the row is the same; another image, patch or key is not.
    again = np.asarray(draw(patches, ids[:, ::-1], key=KEY))
    np.testing.assert_array_equal(again, out[:, ::-1])
    flat = out.reshape(12, -1)
    assert len(np.unique(flat, axis=0)) == 12
    assert (np.asarray(draw(patches, ids, key=jax.random.key(1))) != out).any((2, 3, 4)).all()


def test_nothing_to_change_is_nothing():
    assert augmentation(None, KEY) is None
    assert augmentation(AugmentConfig(same_draw=True), KEY) is None


def test_the_fill_sees_what_the_inner_step_sees():
    """Whatever chunks and groups a patch is in."""
    grid = PatchGrid(13, 18, 4)
    problem, batch = toy_problem(grid, PatchGDConfig()), toy_batch(0, grid)
    weights, chunks = init_weights(problem.model, KEY), chunk_patch_ids(batch, grid, 3)
    augment = augmentation(EVERYTHING, KEY)
    filled = quick(partial(fill, problem, augment=augment))
    z, _ = filled(weights, batch, chunks, KEY)
    group = PatchIds(jnp.array([[7, 2, 19], [0, 11, 7]]), padded=False)
    patches = quick(lambda images: cut(problem, images, group, augment))(batch["image"])
    fresh, _ = encode(problem, weights, patches, group, batch, KEY, train=True)
    wanted = np.take_along_axis(np.asarray(z), np.asarray(group.ids)[..., None], 1)
    np.testing.assert_allclose(fresh, wanted, rtol=1e-5, atol=1e-6)
    plain, _ = fill(problem, weights, batch, chunks, KEY)
    assert (np.asarray(plain) != np.asarray(z)).any(-1).mean() > 0.9


def outer_step(augment, step=0, **config):
    """The problem, the batch, and the states before and after one outer step, with its metrics."""
    grid, optimizer = PatchGrid(13, 9, 4), recording_sgd(0.0)
    problem = toy_problem(grid, PatchGDConfig(**config), augment=augment)
    batch = toy_batch(0, grid)
    state = init_state(problem, optimizer, KEY)._replace(step=jnp.asarray(step))
    after, metrics = quick(partial(train_step, problem, optimizer))(state, batch, KEY)
    return problem, batch, state, after, metrics


@pytest.mark.parametrize("same", [False, True])
def test_the_same_draw_when_asked(float64, same):
    """With parameters that stay, each inner step has the loss of the fill's Z."""
    augment = AugmentConfig(flips=True, turns=True, contrast=0.5, same_draw=same)
    problem, batch, state, _, metrics = outer_step(augment, mode="patchgd", fraction=0.5)
    changes = problem.augmentation(jax.random.fold_in(KEY, 0), "augment", 2)
    chunks = chunk_patch_ids(batch, problem.grid, 4)
    z, _ = fill(problem, state.weights, batch, chunks, KEY, augment=changes)
    loss, _ = head_loss(problem, state.weights, z, batch, KEY)
    difference = abs(float(metrics["loss"] - loss))
    assert difference < 1e-12 if same else difference > 1e-6


@pytest.mark.parametrize("same", [False, True])
def test_the_whole_image_gradients_agree_under_augmentation(float64, same):
    """Modes exact and full draw alike, whatever is asked of fill and inner steps."""
    augment = AugmentConfig(flips=True, turns=True, brightness=0.2, same_draw=same)
    runs = [outer_step(augment, mode=mode)[3] for mode in ("exact", "full")]
    assert max_relative(runs[0].opt_state, runs[1].opt_state) < 1e-12
    if same:
        other = outer_step(augment, mode="exact", step=1)[3]
        assert max_relative(other.opt_state, runs[0].opt_state) > 1e-6, "another step's draw"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentConfig(brightness=-0.1), r"augment.brightness is -0.1; it must be in \[0"),
        (lambda: AugmentConfig(contrast=1.5), "augment.contrast is 1.5"),
        (
            lambda: TrainConfig(augment=AugmentConfig(saturation=0.2)),
            "augment.saturation needs data.channels 3",
        ),
    ],
)
def test_strengths_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
