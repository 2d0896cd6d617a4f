"""The steps against mathematics and against the slow reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from micro import ENCODER
from toy import (
    covering,
    init_weights,
    max_relative,
    outer_steps,
    recording_sgd,
    toy_batch,
    toy_params,
    toy_problem,
)

from patchgd_jax import (
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    PatchIds,
    Problem,
    build_model,
    eval_step,
    fill,
    from_linen,
    init_state,
    sample_groups,
    train_step,
)
from patchgd_jax.core.forward import cut, write_latents
from patchgd_jax.core.gradients import exact_gradient, full_gradient
from patchgd_jax.core.patch_ids import chunk_patch_ids, valid_ids
from patchgd_jax.core.problem import named_key
from patchgd_jax.core.step import inner_gradient
from patchgd_jax.core.update import global_norm

KEY = jax.random.key(7)
GRIDS = [
    PatchGrid(12, 20, 4),
    PatchGrid(13, 9, 4),
    PatchGrid(11, 14, 5, 3),
    PatchGrid(6, 6, 6),
]


def run_toy(grid, config):
    """The first parameters, the batch, and the state and metrics after one outer step."""
    batch = toy_batch(0, grid)
    problem = toy_problem(grid, config)
    (first, last), (metrics,) = outer_steps(problem, recording_sgd(0.1), KEY, batch)
    return jax.tree.map(np.asarray, first.params), batch, last, metrics


def real_groups(grid, config, batch_size, step=0, valid=None):
    """The groups that a step draws, without padding slots."""
    key = named_key(jax.random.fold_in(KEY, step), "sampling")
    ids = np.asarray(sample_groups(key, config, grid.num_patches, batch_size, valid))
    return [[[int(n) for n in row if n < grid.num_patches] for row in group] for group in ids]


def whole(params, batch, grid):
    return reference.whole_image_gradient(
        params, batch["image"], batch["label"], grid.patch, grid.stride
    )


@pytest.mark.parametrize(
    ("grid", "chunk"), covering(lambda g, c: c == g % 3, GRIDS, (1, 3, 100)), ids=str
)
def test_exact_is_the_whole_image_gradient(float64, grid, chunk):
    params, batch, new, metrics = run_toy(grid, PatchGDConfig(mode="exact", fill_chunk=chunk))
    loss, grads = whole(params, batch, grid)
    assert max_relative(new.opt_state, grads) < 1e-12
    assert abs(float(metrics["loss"]) - loss) < 1e-12


@pytest.mark.parametrize(
    ("grid", "remat"), covering(lambda g, r: r == g % 2, GRIDS, (False, True)), ids=str
)
def test_full_is_the_whole_image_gradient(float64, grid, remat):
    params, batch, new, _ = run_toy(grid, PatchGDConfig(mode="full", remat=remat, fill_chunk=2))
    assert max_relative(new.opt_state, whole(params, batch, grid)[1]) < 1e-12


@pytest.mark.parametrize(
    ("grid", "fraction", "sample_per"),
    covering(lambda g, f, s: f == (g + s) % 3, GRIDS, (0.5, 0.3, 0.2), ("batch", "image")),
    ids=str,
)
def test_accumulate_is_exact_for_the_head_and_one_jth_for_the_encoder(
    float64, grid, fraction, sample_per
):
    config = PatchGDConfig(
        mode="accumulate", fraction=fraction, sample_per=sample_per, fill_chunk=5
    )
    if config.num_inner_steps > grid.num_patches:
        with pytest.raises(ConfigError, match="inner steps for a grid of"):
            run_toy(grid, config)
        return
    params, batch, new, _ = run_toy(grid, config)
    _, grads = whole(params, batch, grid)
    assert max_relative(new.opt_state["head"], grads["head"]) < 1e-12
    scaled = {k: v / config.num_inner_steps for k, v in grads["encoder"].items()}
    assert max_relative(new.opt_state["encoder"], scaled) < 1e-12


@pytest.mark.parametrize(
    ("grid", "fraction"), covering(lambda g, f: f == g % 2, GRIDS[:3], (0.3, 0.2)), ids=str
)
def test_unbiased_scale_makes_accumulate_exact(float64, grid, fraction):
    """Also where J does not divide N, so that N / k is not J."""
    config = PatchGDConfig(mode="accumulate", fraction=fraction, encoder_grad_scale="unbiased")
    params, batch, new, _ = run_toy(grid, config)
    assert max_relative(new.opt_state, whole(params, batch, grid)[1]) < 1e-12


def test_unbiased_scale_is_right_on_average_for_sampling_with_replacement(float64):
    grid = PatchGrid(8, 12, 4)
    batch, optimizer = toy_batch(0, grid), recording_sgd(0.0)
    config = PatchGDConfig(
        mode="accumulate", fraction=0.5, sampling="uniform", encoder_grad_scale="unbiased"
    )
    problem = toy_problem(grid, config)
    state = init_state(problem, optimizer, KEY)
    step = partial(train_step, problem, optimizer, state, batch)
    keys = jax.random.split(KEY, 4000)
    grads = jax.jit(jax.vmap(lambda key: step(key)[0].opt_state["encoder"]))(keys)
    wanted = whole(toy_params(0, pixels=32), batch, grid)[1]["encoder"]
    for name, samples in grads.items():
        error = np.abs(samples.mean(0) - wanted[name])
        assert (error < 5 * samples.std(0) / np.sqrt(len(keys)) + 1e-12).all(), name


@pytest.mark.parametrize(
    ("grid", "steps", "sampling"),
    # Each pair of values is in one of the quick ones.
    covering(
        lambda g, f, s: s == (g + f) % 3,
        GRIDS[:3],
        ((0.5, 1), (0.5, 2), (0.25, 2), (0.17, 3)),
        (("partition", "batch"), ("partition", "image"), ("uniform", "image")),
    ),
    ids=str,
)
def test_patchgd_equals_the_slow_reference(float64, grid, steps, sampling):
    (fraction, epsilon), (sampling, sample_per) = steps, sampling
    config = PatchGDConfig(
        mode="patchgd",
        fraction=fraction,
        epsilon=epsilon,
        sampling=sampling,
        sample_per=sample_per,
        fill_chunk=4,
    )
    params, batch, new, metrics = run_toy(grid, config)
    wanted, loss, applied = reference.outer_step(
        params,
        batch["image"],
        batch["label"],
        real_groups(grid, config, len(batch["label"])),
        patch=grid.patch,
        stride=grid.stride,
        epsilon=epsilon,
        rate=0.1,
    )
    assert len(applied) == config.updates_per_step
    assert max_relative(new.opt_state, applied[-1]) < 1e-12
    assert max_relative(new.params, wanted) < 1e-12
    assert abs(float(metrics["loss"]) - loss) < 1e-12


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_inner_step_over_everything_is_a_plain_step(float64, grid):
    _, _, plain, _ = run_toy(grid, PatchGDConfig(mode="full"))
    _, _, patchgd, _ = run_toy(grid, PatchGDConfig(mode="patchgd", fraction=1.0))
    assert max_relative(patchgd.params, plain.params) < 1e-12


def test_the_steps_differ_from_step_to_step(float64):
    grid, config = GRIDS[0], PatchGDConfig(fraction=0.2)
    assert real_groups(grid, config, 2, step=0) != real_groups(grid, config, 2, step=1)


def test_encoder_grad_scale_scales_the_encoder_only(float64):
    grid = GRIDS[1]
    plain = run_toy(grid, PatchGDConfig(mode="exact"))[2]
    scaled = run_toy(grid, PatchGDConfig(mode="exact", encoder_grad_scale=2.5))[2]
    wanted = jax.tree.map(lambda g: 2.5 * g, plain.opt_state["encoder"])
    assert max_relative(scaled.opt_state["encoder"], wanted) < 1e-12
    assert max_relative(scaled.opt_state["head"], plain.opt_state["head"]) < 1e-12


def test_gradient_flows_through_the_sampled_patches_only(float64):
    grid = PatchGrid(13, 9, 4)
    problem, batch = toy_problem(grid, PatchGDConfig()), toy_batch(0, grid)
    weights = init_weights(problem.model, KEY)
    z, _ = fill(problem, weights, batch, chunk_patch_ids(batch, grid, 4), KEY)
    group = PatchIds(jnp.array([[0, 5], [7, grid.num_patches]]), padded=True)

    def loss(image):
        patches = cut(problem, image, group)
        return inner_gradient(problem, weights, z, patches, group, batch, KEY)[0].loss

    flow = np.asarray(jax.grad(loss)(batch["image"]))
    sampled = np.zeros_like(flow, bool)
    for b, row in enumerate([[0, 5], [7]]):
        for n in row:
            y, x = n // grid.cols * 4, n % grid.cols * 4
            sampled[b, y : y + 4, x : x + 4] = True
    assert np.all(flow[~sampled] == 0)
    assert np.all(flow[sampled] != 0)


def test_writing_leaves_every_other_entry_bit_for_bit():
    z = jax.random.normal(KEY, (2, 9, 4))
    ids = jnp.array([[0, 8], [3, 9]])
    fresh = write_latents(z, ids, jnp.ones((2, 2, 4)))
    written = np.zeros((2, 9), bool)
    written[0, [0, 8]] = written[1, 3] = True
    np.testing.assert_array_equal(np.asarray(fresh)[~written], np.asarray(z)[~written])
    assert np.all(np.asarray(fresh)[written] == 1)


def test_z_of_a_bright_pixel_is_where_the_pixel_is():
    """Z[b, r, c] belongs to the patch whose top-left pixel is (r * stride, c * stride)."""
    grid = PatchGrid(20, 31, 6, 5)

    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return x.sum((1, 2))

    class Seen(nn.Module):
        @nn.compact
        def __call__(self, z, mask, *, train):
            return z.reshape(z.shape[0], -1)

    model = from_linen(Sum(), Seen(), grid=grid, channels=1)
    problem, weights = Problem(model, grid, PatchGDConfig()), init_weights(model, KEY)
    for y, x in [(0, 0), (19, 30), (5, 10), (12, 28), (4, 26)]:
        image = np.zeros((1, 20, 31, 1), np.uint8)
        image[0, y, x] = 255
        batch = {"image": image}
        z, _ = fill(problem, weights, batch, chunk_patch_ids(batch, grid, 4), KEY)
        seen = np.asarray(z).reshape(grid.rows, grid.cols) > 0
        wanted = np.array(
            [
                [r * 5 <= y < r * 5 + 6 and c * 5 <= x < c * 5 + 6 for c in range(grid.cols)]
                for r in range(grid.rows)
            ]
        )
        np.testing.assert_array_equal(seen, wanted)
        z = z.reshape(1, grid.rows, grid.cols, 1)
        logits, _ = model.classify(*weights, z, None, train=False, rng=KEY)
        np.testing.assert_array_equal(np.asarray(logits[0] > 0).reshape(wanted.shape), wanted)


def shipped(grid, encoder=ENCODER, **names):
    config = ModelConfig(encoder, latent_dim=16, **names)
    return build_model(config, grid=grid, channels=1, classes=10, mean=0.1, std=0.3)


def digits_batch(grid, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch, grid.height, grid.width, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(10, size=batch).astype(np.int32)}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fill_does_not_depend_on_the_chunk_in_eval_mode(norm):
    grid = PatchGrid(40, 56, 16, 12)
    model, batch = shipped(grid, norm=norm), digits_batch(grid)
    problem, weights = Problem(model, grid, PatchGDConfig()), init_weights(model, KEY)

    def filled(chunk):
        return fill(problem, weights, batch, chunk_patch_ids(batch, grid, chunk), KEY)[0]

    z = [np.asarray(filled(chunk)) for chunk in (1, 3, 7, 1000)]
    assert z[0].shape == (4, grid.num_patches, 16)
    for other in z[1:]:
        np.testing.assert_allclose(other, z[0], rtol=2e-5, atol=2e-5)


def test_images_are_normalised_after_the_gather():
    """uint8 pixels and the same pixels as floats in [0, 1] give the same latents."""
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid), digits_batch(grid)
    problem, weights = Problem(model, grid, PatchGDConfig()), init_weights(model, KEY)
    groups = chunk_patch_ids(batch, grid, 2)
    from_bytes, _ = fill(problem, weights, batch, groups, KEY)
    floats = {**batch, "image": np.float32(batch["image"]) / 255}
    from_floats, _ = fill(problem, weights, floats, groups, KEY)
    np.testing.assert_allclose(from_bytes, from_floats, rtol=1e-5, atol=1e-5)


def step_once(problem, batch, optimizer=None):
    """The states before and after one outer step, and its metrics."""
    states, (metrics,) = outer_steps(problem, optimizer or optax.sgd(0.01), KEY, batch)
    return *states, metrics


@pytest.mark.parametrize(
    ("policy", "fill_moves", "inner_moves"),
    [("inner", False, True), ("paper", True, True), ("frozen", False, False)],
)
def test_norm_policy_says_when_statistics_move(policy, fill_moves, inner_moves):
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)

    def statistics(policy):
        problem = Problem(model, grid, PatchGDConfig(fraction=0.5, norm_policy=policy))
        # A rate of zero: only the statistics can change.
        states = step_once(problem, batch, optax.sgd(0.0))[:2]
        return [state.batch_stats["encoder"] for state in states]

    before, after = statistics(policy)
    assert (max_relative(after, before) > 0) == inner_moves
    differs = max_relative(after, statistics("inner")[1]) > 0
    assert differs == (fill_moves or not inner_moves)


@pytest.mark.parametrize("padding", ["slots", "weight", "size"])
def test_what_is_no_patch_does_not_count_in_batch_statistics(padding):
    """Padding slots, examples and patches, against encoding the real ones only."""
    grid = PatchGrid(32, 48, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)
    real = np.ones((4, 6), bool)
    # 4 inner steps over 6 patches: two of the eight slots are padding.
    config = PatchGDConfig(fraction=0.25)
    if padding == "weight":
        batch["weight"] = np.array([1, 1, 0, 1], np.float32)
        real[2] = False
    elif padding == "size":
        batch["size"] = np.array([[32, 48], [32, 32], [16, 48], [32, 48]], np.int32)
        real[1, [2, 5]] = real[2, 3:] = False
    before, after, _ = step_once(Problem(model, grid, config), batch, optax.sgd(0.0))
    batch_stats = before.batch_stats
    patches = np.asarray(grid.take(batch["image"], jnp.tile(jnp.arange(6), (4, 1))))
    for group in real_groups(grid, config, 4, valid=valid_ids(batch, grid)):
        rows = np.stack([patches[b, n] for b in range(4) for n in group[b] if real[b, n]])
        _, batch_stats = model.encode(before.params, batch_stats, rows, train=True, rng=KEY)
    assert max_relative(after.batch_stats["encoder"], batch_stats["encoder"]) < 1e-4


@pytest.mark.parametrize("fraction", [0.5, 0.25])
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_accumulate_does_not_depend_on_the_chunk(float64, fraction, chunk):
    grid = PatchGrid(13, 9, 4)
    config = PatchGDConfig(mode="accumulate", fraction=fraction, fill_chunk=chunk)
    params, batch, new, _ = run_toy(grid, config)
    assert max_relative(new.opt_state["head"], whole(params, batch, grid)[1]["head"]) < 1e-12


def test_exact_and_full_agree_in_single_precision():
    """Gradients of the default encoder and head, to 1e-5 of their norm, step by step."""
    grid, config = PatchGrid(64, 64, 16), ModelConfig(latent_dim=8)
    model = build_model(config, grid=grid, channels=1, classes=3, mean=0.1, std=0.3)
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 255, (2, 64, 64, 1), np.uint8),
            "label": rng.integers(3, size=2).astype(np.int32),
        }
        for _ in range(3)
    ]
    gradients = []
    for mode in ("exact", "full"):
        patchgd = PatchGDConfig(mode=mode, norm_policy="frozen", fill_chunk=4)
        problem = Problem(model, grid, patchgd)
        states, _ = outer_steps(problem, recording_sgd(0.05), KEY, *batches, jit=jax.jit)
        gradients.append([state.opt_state for state in states[1:]])
    for exact, full in zip(*gradients, strict=True):
        apart = jax.tree.map(lambda a, b: a - b, exact, full)
        assert global_norm(apart) <= 1e-5 * global_norm(full)


def test_exact_refuses_moving_batch_statistics():
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)
    with pytest.raises(ConfigError, match="batch statistics"):
        step_once(Problem(model, grid, PatchGDConfig(mode="exact")), batch)
    frozen = PatchGDConfig(mode="exact", norm_policy="frozen")
    _, _, metrics = step_once(Problem(model, grid, frozen), batch)
    assert np.isfinite(metrics["loss"])


class _Dropping(nn.Module):
    """An encoder with dropout in double precision."""

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(12, dtype=x.dtype, param_dtype=x.dtype)(x))
        x = nn.Dropout(0.4, deterministic=not train)(x)
        return nn.Dense(5, dtype=x.dtype, param_dtype=x.dtype)(x)


class _Mean(nn.Module):
    @nn.compact
    def __call__(self, z, mask, *, train):
        z = nn.Dropout(0.3, deterministic=not train)(z.mean((1, 2)))
        return nn.Dense(3, dtype=z.dtype, param_dtype=z.dtype)(z)


def test_exact_equals_autodiff_with_dropout(float64):
    grid = PatchGrid(13, 9, 4)
    model = from_linen(_Dropping(), _Mean(), grid=grid, channels=2, dtype=jnp.float64)
    weights, batch = init_weights(model, KEY), toy_batch(0, grid)
    problem = Problem(model, grid, PatchGDConfig(mode="exact", fill_chunk=5))
    remat = Problem(model, grid, PatchGDConfig(mode="full", remat=True, fill_chunk=5))
    exact = exact_gradient(problem, weights, batch, KEY)
    full = full_gradient(remat, weights, batch, KEY)
    assert max_relative(exact.grads, full.grads) < 1e-12
    other = exact_gradient(problem, weights, batch, jax.random.key(8))
    assert abs(float(other.loss - exact.loss)) > 1e-6, "dropout must depend on the key"


def test_examples_of_weight_zero_change_nothing(float64):
    grid = PatchGrid(12, 20, 4)
    batch = toy_batch(0, grid, batch=3)
    problem = toy_problem(grid, PatchGDConfig(mode="accumulate", fraction=0.5))
    two = {k: v[:2] for k, v in batch.items()}
    padded = {**batch, "weight": np.array([1.0, 1.0, 0.0])}
    _, alone, _ = step_once(problem, two, recording_sgd(0.1))
    _, with_padding, _ = step_once(problem, padded, recording_sgd(0.1))
    assert max_relative(with_padding.opt_state, alone.opt_state) < 1e-12


def test_the_training_metric_is_a_mean_by_weight():
    """Also for weights of less than one in all; without any weight it is 0."""
    grid = PatchGrid(8, 8, 4)
    problem, batch = toy_problem(grid, PatchGDConfig(mode="exact")), toy_batch(0, grid)
    guess = eval_step(problem, init_weights(problem.model, KEY), batch)["prediction"]
    batches = [
        {"image": batch["image"], "label": (guess + wrong) % 3, "weight": np.float32(weight)}
        for wrong, weight in (
            (np.array([0, 0]), [0.01, 0.01]),
            (np.array([0, 1]), [0.01, 0.03]),
            (np.array([0, 0]), [0, 0]),
        )
    ]
    _, metrics = outer_steps(problem, optax.sgd(0.0), KEY, *batches)
    np.testing.assert_allclose([m["accuracy"] for m in metrics], [1, 0.25, 0], rtol=1e-6)


@pytest.mark.parametrize("stride", [16, 8])
def test_patches_beyond_an_images_true_size_are_masked(stride):
    """A batch padded to a larger grid gives each image the logits it has alone."""
    small, large = PatchGrid(32, 48, 16, stride), PatchGrid(48, 80, 16, stride)
    batch = digits_batch(small)
    model, wide = shipped(small, norm="group"), shipped(large, norm="group")
    weights, config = init_weights(model, KEY), PatchGDConfig(fill_chunk=2)
    alone = eval_step(Problem(model, small, config), weights, batch)
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (4, 48, 80, 1), dtype=np.uint8)
    image[:, :32, :48] = batch["image"]
    sizes = np.tile(np.array([[32, 48]], np.int32), (4, 1))
    padded = {"image": image, "label": batch["label"], "size": sizes}
    inside = eval_step(Problem(wide, large, config), weights, padded)
    np.testing.assert_allclose(inside["logits"], alone["logits"], rtol=1e-5, atol=1e-5)


def test_second_call_compiles_nothing():
    grid = PatchGrid(32, 32, 16)
    problem, optimizer = Problem(shipped(grid), grid, PatchGDConfig(fraction=0.5)), optax.adam(1e-3)
    traces = []

    def counted(state, batch, key):
        traces.append(1)
        return train_step(problem, optimizer, state, batch, key)

    step = jax.jit(counted, donate_argnums=0)
    state = jax.jit(partial(init_state, problem, optimizer))(KEY)
    for seed in range(3):
        state, _ = step(state, digits_batch(grid, seed=seed), KEY)
    assert len(traces) == 1
    assert step._cache_size() == 1


def compiled_memory(problem, optimizer, state, batch):
    step = jax.jit(partial(train_step, problem, optimizer), donate_argnums=0)
    return step.lower(state, batch, KEY).compile().memory_analysis()


def test_the_state_is_donated():
    grid = PatchGrid(32, 32, 16)
    problem, optimizer = Problem(shipped(grid), grid, PatchGDConfig(fraction=0.5)), optax.adam(1e-3)
    state = jax.eval_shape(partial(init_state, problem, optimizer), KEY)
    memory = compiled_memory(problem, optimizer, state, digits_batch(grid))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize(
    "mode", ["accumulate", *(pytest.param(m, marks=pytest.mark.slow) for m in ("patchgd", "exact"))]
)
def test_memory_grows_by_no_more_than_the_image_and_z(mode):
    """At a fixed k, from 512 to 2048 px a side (nothing is allocated, only compiled)."""
    temporary, allowed = [], []
    for side in (512, 2048):
        grid = PatchGrid(side, side, 64)
        inner_steps = grid.num_patches // 16
        config = PatchGDConfig(inner_steps=inner_steps, mode=mode, fill_chunk=16)
        problem, optimizer = (
            Problem(shipped(grid, "small-cnn", norm="group"), grid, config),
            optax.adam(1e-3),
        )
        state = jax.eval_shape(partial(init_state, problem, optimizer), KEY)
        batch = {
            "image": jax.ShapeDtypeStruct((2, side, side, 1), np.uint8),
            "label": jax.ShapeDtypeStruct((2,), np.int32),
        }
        memory = compiled_memory(problem, optimizer, state, batch)
        temporary.append(memory.temp_size_in_bytes)
        allowed.append(2 * side * side + 2 * grid.num_patches * 16 * 4)
    assert temporary[1] - temporary[0] <= allowed[1] - allowed[0]
    assert temporary[0] > 2**20, "a step that needs no memory was not measured"


def test_bfloat16_encoder_trains():
    grid = PatchGrid(32, 32, 16)
    problem = Problem(shipped(grid, dtype="bfloat16"), grid, PatchGDConfig(fraction=0.5))
    _, after, metrics = step_once(problem, digits_batch(grid))
    assert np.isfinite(metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype("float32")}


def test_the_wrong_image_size_is_named():
    grid = PatchGrid(32, 32, 16)
    problem = Problem(shipped(grid), grid, PatchGDConfig())
    weights, batch = init_weights(problem.model, KEY), digits_batch(PatchGrid(32, 48, 16))
    with pytest.raises(ConfigError, match="32 x 48 px, but the grid is for 32 x 32"):
        eval_step(problem, weights, batch)
