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
from patchgd_jax.core.latents import chunked_ids, write_latents
from toy import max_relative, recording_sgd, toy_batch, toy_model, toy_params

from patchgd_jax import (
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    build_model,
    eval_step,
    fill,
    from_linen,
    init_state,
    sample_groups,
    train_step,
)
from patchgd_jax.core.gradients import (
    exact_gradient,
    full_gradient,
    inner_gradient,
    listed_patches,
    stream,
)
from patchgd_jax.core.step import global_norm

KEY = jax.random.key(7)
GRIDS = [
    PatchGrid(12, 20, 4),
    PatchGrid(13, 9, 4),
    PatchGrid(11, 14, 5, 3),
    PatchGrid(6, 6, 6),
]


def run_toy(grid, config, seed=0, rate=0.1):
    params = toy_params(seed, pixels=grid.patch**2 * 2)
    model, batch = toy_model(params), toy_batch(seed, grid)
    optimizer = recording_sgd(rate)
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer))(KEY)
    new, metrics = jax.jit(
        partial(train_step, model=model, optimizer=optimizer, grid=grid, patchgd=config)
    )(state, batch, KEY)
    return params, batch, new, metrics


def real_groups(grid, config, batch_size, step=0, patches=None):
    """The groups that a step draws, without the slots that hold no patch."""
    ids = sample_groups(
        stream(jax.random.fold_in(KEY, step), "sampling"),
        num_patches=grid.num_patches,
        inner_steps=config.num_inner_steps,
        batch=batch_size,
        sampling=config.sampling,
        sample_per=config.sample_per,
        patches=patches,
    )
    return [
        [[int(n) for n in row if n < grid.num_patches] for row in group]
        for group in np.asarray(ids)
    ]


def whole(params, batch, grid):
    return reference.whole_image_gradient(
        params, batch["image"], batch["label"], grid.patch, grid.stride
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_exact_is_the_whole_image_gradient(float64, grid, chunk):
    config = PatchGDConfig(patch=grid.patch, stride=grid.stride, mode="exact", fill_chunk=chunk)
    params, batch, new, metrics = run_toy(grid, config)
    loss, grads = whole(params, batch, grid)
    assert max_relative(new.opt_state, grads) < 1e-12
    assert abs(float(metrics["loss"]) - loss) < 1e-12


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("remat", [False, True])
def test_full_is_the_whole_image_gradient(float64, grid, remat):
    config = PatchGDConfig(
        patch=grid.patch, stride=grid.stride, mode="full", remat=remat, fill_chunk=2
    )
    params, batch, new, _ = run_toy(grid, config)
    assert max_relative(new.opt_state, whole(params, batch, grid)[1]) < 1e-12


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.2])
@pytest.mark.parametrize("sample_per", ["batch", "image"])
def test_accumulate_is_exact_for_the_head_and_one_jth_for_the_encoder(
    float64, grid, fraction, sample_per
):
    config = PatchGDConfig(
        patch=grid.patch,
        stride=grid.stride,
        mode="accumulate",
        fraction=fraction,
        sample_per=sample_per,
        fill_chunk=5,
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


@pytest.mark.parametrize("fraction", [0.2, 0.3])
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_unbiased_scale_makes_accumulate_exact(float64, grid, fraction):
    """Also where J does not divide N, so that N / k is not J."""
    config = PatchGDConfig(
        patch=grid.patch,
        stride=grid.stride,
        mode="accumulate",
        fraction=fraction,
        encoder_grad_scale="unbiased",
    )
    params, batch, new, _ = run_toy(grid, config)
    assert max_relative(new.opt_state, whole(params, batch, grid)[1]) < 1e-12


def test_unbiased_scale_is_right_on_average_for_sampling_with_replacement(float64):
    grid = PatchGrid(8, 12, 4)
    params = toy_params(0, pixels=32)
    model, batch = toy_model(params), toy_batch(0, grid)
    config = PatchGDConfig(
        patch=4, mode="accumulate", fraction=0.5, sampling="uniform", encoder_grad_scale="unbiased"
    )
    optimizer = recording_sgd(0.0)
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer))(KEY)
    step = partial(train_step, model=model, optimizer=optimizer, grid=grid, patchgd=config)
    keys = jax.random.split(KEY, 4000)
    grads = jax.jit(jax.vmap(lambda key: step(state, batch, key)[0].opt_state["encoder"]))(keys)
    wanted = whole(params, batch, grid)[1]["encoder"]
    for name, samples in grads.items():
        error = np.abs(samples.mean(0) - wanted[name])
        assert (error < 5 * samples.std(0) / np.sqrt(len(keys)) + 1e-12).all(), name


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize(("fraction", "epsilon"), [(0.5, 1), (0.5, 2), (0.25, 2), (0.17, 3)])
@pytest.mark.parametrize(
    ("sampling", "sample_per"),
    [("partition", "batch"), ("partition", "image"), ("uniform", "image")],
)
def test_patchgd_equals_the_slow_reference(float64, grid, fraction, epsilon, sampling, sample_per):
    config = PatchGDConfig(
        patch=grid.patch,
        stride=grid.stride,
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
    sizes = {"patch": grid.patch, "stride": grid.stride}
    _, _, plain, _ = run_toy(grid, PatchGDConfig(mode="full", **sizes))
    _, _, patchgd, _ = run_toy(grid, PatchGDConfig(mode="patchgd", fraction=1.0, **sizes))
    assert max_relative(patchgd.params, plain.params) < 1e-12


def test_the_steps_differ_from_step_to_step(float64):
    grid, config = GRIDS[0], PatchGDConfig(patch=4, fraction=0.2)
    assert real_groups(grid, config, 2, step=0) != real_groups(grid, config, 2, step=1)


def test_encoder_grad_scale_scales_the_encoder_only(float64):
    grid = GRIDS[1]
    plain = run_toy(grid, PatchGDConfig(patch=4, mode="exact"))[2]
    scaled = run_toy(grid, PatchGDConfig(patch=4, mode="exact", encoder_grad_scale=2.5))[2]
    wanted = jax.tree.map(lambda g: 2.5 * g, plain.opt_state["encoder"])
    assert max_relative(scaled.opt_state["encoder"], wanted) < 1e-12
    assert max_relative(scaled.opt_state["head"], plain.opt_state["head"]) < 1e-12


def test_gradient_flows_through_the_sampled_patches_only(float64):
    grid = PatchGrid(13, 9, 4)
    params = toy_params(0, pixels=32)
    model, batch = toy_model(params), toy_batch(0, grid)
    state = {"encoder": {}, "head": {}}
    chunks = chunked_ids(grid, 4, 2)
    z, _ = fill(params, state, batch["image"], KEY, model=model, grid=grid, ids=chunks)
    ids = jnp.array([[0, 5], [7, grid.num_patches]])

    def loss(image):
        out, _ = inner_gradient(
            params,
            state,
            z,
            ids,
            {**batch, "image": image},
            KEY,
            model=model,
            grid=grid,
            train_encoder=True,
        )
        return out.loss

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
    params, state = jax.jit(model.init)(KEY)
    for y, x in [(0, 0), (19, 30), (5, 10), (12, 28), (4, 26)]:
        image = np.zeros((1, 20, 31, 1), np.uint8)
        image[0, y, x] = 255
        ids = chunked_ids(grid, 4, 1)
        z, _ = fill(params, state, image, KEY, model=model, grid=grid, ids=ids)
        seen = np.asarray(z).reshape(grid.rows, grid.cols) > 0
        wanted = np.array(
            [
                [r * 5 <= y < r * 5 + 6 and c * 5 <= x < c * 5 + 6 for c in range(grid.cols)]
                for r in range(grid.rows)
            ]
        )
        np.testing.assert_array_equal(seen, wanted)
        logits, _ = model.classify(
            params, state, z.reshape(1, grid.rows, grid.cols, 1), None, train=False, rng=KEY
        )
        np.testing.assert_array_equal(np.asarray(logits[0] > 0).reshape(wanted.shape), wanted)


def shipped(grid, dropout=None, **names):
    config = ModelConfig(latent_dim=16, dropout=dropout, **names)
    return build_model(config, grid=grid, channels=1, classes=10, mean=0.1, std=0.3)


def digits_batch(grid, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch, grid.height, grid.width, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(10, size=batch).astype(np.int32)}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fill_does_not_depend_on_the_chunk_in_eval_mode(norm):
    grid = PatchGrid(40, 56, 16, 12)
    model, batch = shipped(grid, norm=norm), digits_batch(grid)
    params, state = jax.jit(model.init)(KEY)

    def filled(chunk):
        ids = chunked_ids(grid, chunk, 4)
        return fill(params, state, batch["image"], KEY, model=model, grid=grid, ids=ids)[0]

    z = [np.asarray(filled(chunk)) for chunk in (1, 3, 7, 1000)]
    assert z[0].shape == (4, grid.num_patches, 16)
    for other in z[1:]:
        np.testing.assert_allclose(other, z[0], rtol=2e-5, atol=2e-5)


def test_images_are_normalised_after_the_gather():
    """uint8 pixels and the same pixels as floats in [0, 1] give the same latents."""
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid), digits_batch(grid)
    params, state = jax.jit(model.init)(KEY)
    arguments = {"model": model, "grid": grid, "ids": chunked_ids(grid, 2, 4)}
    from_bytes, _ = fill(params, state, batch["image"], KEY, **arguments)
    from_floats, _ = fill(params, state, np.float32(batch["image"]) / 255, KEY, **arguments)
    np.testing.assert_allclose(from_bytes, from_floats, rtol=1e-5, atol=1e-5)


def step_once(model, grid, config, batch, optimizer=None):
    optimizer = optimizer or optax.sgd(0.01)
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer))(KEY)
    step = partial(train_step, model=model, optimizer=optimizer, grid=grid, patchgd=config)
    return state, *jax.jit(step)(state, batch, KEY)


@pytest.mark.parametrize(
    ("policy", "fill_moves", "inner_moves"),
    [("inner", False, True), ("paper", True, True), ("frozen", False, False)],
)
def test_norm_policy_says_when_statistics_move(policy, fill_moves, inner_moves):
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)
    config = PatchGDConfig(patch=16, fraction=0.5, norm_policy=policy)
    # A rate of zero: only the statistics can change.
    before, after, _ = step_once(model, grid, config, batch, optax.sgd(0.0))
    moved = max_relative(after.model_state["encoder"], before.model_state["encoder"]) > 0
    assert moved == inner_moves
    alone = PatchGDConfig(patch=16, fraction=0.5, norm_policy="inner")
    _, inner_only, _ = step_once(model, grid, alone, batch, optax.sgd(0.0))
    differs = max_relative(after.model_state["encoder"], inner_only.model_state["encoder"]) > 0
    assert differs == (fill_moves or not inner_moves)


@pytest.mark.parametrize("padding", ["slots", "weight", "size"])
def test_what_is_no_patch_does_not_count_in_batch_statistics(padding):
    """Spare slots, padding examples and padding patches, against encoding the real ones only."""
    grid = PatchGrid(32, 48, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)
    real = np.ones((4, 6), bool)
    # 4 inner steps over 6 patches: two of the eight slots are spare.
    config = PatchGDConfig(patch=16, fraction=0.25)
    if padding == "weight":
        batch["weight"] = np.array([1, 1, 0, 1], np.float32)
        real[2] = False
    elif padding == "size":
        batch["size"] = np.array([[32, 48], [32, 32], [16, 48], [32, 48]], np.int32)
        real[1, [2, 5]] = real[2, 3:] = False
    before, after, _ = step_once(model, grid, config, batch, optax.sgd(0.0))
    state = before.model_state
    patches = np.asarray(grid.take(batch["image"], jnp.tile(jnp.arange(6), (4, 1))))
    listed = listed_patches(batch, grid)
    for group in real_groups(grid, config, 4, patches=listed):
        rows = [patches[b, n] for b in range(4) for n in group[b] if real[b, n]]
        _, state = model.encode(before.params, state, np.stack(rows), train=True, rng=KEY)
    assert max_relative(after.model_state["encoder"], state["encoder"]) < 1e-4


@pytest.mark.parametrize("fraction", [0.5, 0.25])
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_accumulate_does_not_depend_on_the_chunk(float64, fraction, chunk):
    grid = PatchGrid(13, 9, 4)
    config = PatchGDConfig(patch=4, mode="accumulate", fraction=fraction, fill_chunk=chunk)
    params, batch, new, _ = run_toy(grid, config)
    assert max_relative(new.opt_state["head"], whole(params, batch, grid)[1]["head"]) < 1e-12


def test_exact_and_full_agree_in_single_precision():
    """Gradients of the default encoder and head, to 1e-5 of their norm, step by step."""
    grid, config = PatchGrid(64, 64, 16), ModelConfig(latent_dim=8)
    model = build_model(config, grid=grid, channels=1, classes=3, mean=0.1, std=0.3)
    optimizer, states = recording_sgd(0.05), {}
    for mode in ("exact", "full"):
        states[mode] = init_state(KEY, model=model, optimizer=optimizer)
    rng = np.random.default_rng(0)
    for _ in range(3):
        batch = {
            "image": rng.integers(0, 255, (2, 64, 64, 1), np.uint8),
            "label": rng.integers(3, size=2).astype(np.int32),
        }
        for mode, state in states.items():
            patchgd = PatchGDConfig(patch=16, mode=mode, norm_policy="frozen", fill_chunk=4)
            states[mode], _ = train_step(
                state, batch, KEY, model=model, optimizer=optimizer, grid=grid, patchgd=patchgd
            )
        exact, full = (states[mode].opt_state for mode in ("exact", "full"))
        apart = jax.tree.map(lambda a, b: a - b, exact, full)
        assert global_norm(apart) <= 1e-5 * global_norm(full)


def test_exact_refuses_moving_batch_statistics():
    grid = PatchGrid(32, 32, 16)
    model, batch = shipped(grid, norm="batch"), digits_batch(grid)
    with pytest.raises(ConfigError, match="batch statistics"):
        step_once(model, grid, PatchGDConfig(patch=16, mode="exact"), batch)
    frozen = PatchGDConfig(patch=16, mode="exact", norm_policy="frozen")
    _, _, metrics = step_once(model, grid, frozen, batch)
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
    params, state = jax.jit(model.init)(KEY)
    batch = toy_batch(0, grid)
    arguments = {"model": model, "grid": grid, "chunk": 5, "train_encoder": True}
    exact = exact_gradient(params, state, batch, KEY, **arguments)
    full = full_gradient(params, state, batch, KEY, **arguments, remat=True)
    assert max_relative(exact.grads, full.grads) < 1e-12
    other = exact_gradient(params, state, batch, jax.random.key(8), **arguments)
    assert abs(float(other.loss - exact.loss)) > 1e-6, "dropout must depend on the key"


def test_examples_of_weight_zero_change_nothing(float64):
    grid = PatchGrid(12, 20, 4)
    params = toy_params(0, pixels=32)
    model, batch = toy_model(params), toy_batch(0, grid, batch=3)
    config = PatchGDConfig(patch=4, mode="accumulate", fraction=0.5)
    two = {k: v[:2] for k, v in batch.items()}
    padded = {**batch, "weight": np.array([1.0, 1.0, 0.0])}
    _, alone, _ = step_once(model, grid, config, two, recording_sgd(0.1))
    _, with_padding, _ = step_once(model, grid, config, padded, recording_sgd(0.1))
    assert max_relative(with_padding.opt_state, alone.opt_state) < 1e-12


@pytest.mark.parametrize("stride", [16, 8])
def test_patches_beyond_an_images_true_size_are_masked(stride):
    """A batch padded to a larger grid gives each image the logits it has alone."""
    small, large = PatchGrid(32, 48, 16, stride), PatchGrid(48, 80, 16, stride)
    batch = digits_batch(small)
    model, wide = shipped(small, norm="group"), shipped(large, norm="group")
    params, state = jax.jit(model.init)(KEY)
    alone = eval_step(params, state, batch, model=model, grid=small, fill_chunk=2)
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (4, 48, 80, 1), dtype=np.uint8)
    image[:, :32, :48] = batch["image"]
    sizes = np.tile(np.array([[32, 48]], np.int32), (4, 1))
    padded = {"image": image, "label": batch["label"], "size": sizes}
    inside = eval_step(params, state, padded, model=wide, grid=large, fill_chunk=2)
    np.testing.assert_allclose(inside["logits"], alone["logits"], rtol=1e-5, atol=1e-5)


def test_second_call_compiles_nothing():
    grid = PatchGrid(32, 32, 16)
    model, config = shipped(grid), PatchGDConfig(patch=16, fraction=0.5)
    optimizer = optax.adam(1e-3)
    traces = []

    def counted(state, batch, key):
        traces.append(1)
        return train_step(
            state, batch, key, model=model, optimizer=optimizer, grid=grid, patchgd=config
        )

    step = jax.jit(counted, donate_argnums=0)
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer))(KEY)
    for seed in range(3):
        state, _ = step(state, digits_batch(grid, seed=seed), KEY)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_the_state_is_donated():
    grid = PatchGrid(32, 32, 16)
    model, config = shipped(grid), PatchGDConfig(patch=16, fraction=0.5)
    optimizer = optax.adam(1e-3)
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer))(KEY)
    step = partial(train_step, model=model, optimizer=optimizer, grid=grid, patchgd=config)
    compiled = jax.jit(step, donate_argnums=0).lower(state, digits_batch(grid), KEY).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize(
    "mode", ["accumulate", *(pytest.param(m, marks=pytest.mark.slow) for m in ("patchgd", "exact"))]
)
def test_memory_grows_by_no_more_than_the_image_and_z(mode):
    """At a fixed k, from 512 to 2048 px a side (nothing is allocated, only compiled)."""
    temporary, allowed = [], []
    for side in (512, 2048):
        grid = PatchGrid(side, side, 64)
        model = shipped(grid, norm="group")
        config = PatchGDConfig(
            patch=64,
            fraction=1.0,
            inner_steps=grid.num_patches // 16,
            mode=mode,
            fill_chunk=16,
        )
        optimizer = optax.adam(1e-3)
        state = jax.eval_shape(partial(init_state, model=model, optimizer=optimizer), KEY)
        batch = {
            "image": jax.ShapeDtypeStruct((2, side, side, 1), np.uint8),
            "label": jax.ShapeDtypeStruct((2,), np.int32),
        }
        step = partial(train_step, model=model, optimizer=optimizer, grid=grid, patchgd=config)
        memory = (
            jax.jit(step, donate_argnums=0).lower(state, batch, KEY).compile().memory_analysis()
        )
        temporary.append(memory.temp_size_in_bytes)
        allowed.append(2 * side * side + 2 * grid.num_patches * 16 * 4)
    assert temporary[1] - temporary[0] <= allowed[1] - allowed[0]
    assert temporary[0] > 2**20, "a step that needs no memory was not measured"


def test_bfloat16_encoder_trains():
    grid = PatchGrid(32, 32, 16)
    model = shipped(grid, dtype="bfloat16")
    _, after, metrics = step_once(
        model, grid, PatchGDConfig(patch=16, fraction=0.5), digits_batch(grid)
    )
    assert np.isfinite(metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype("float32")}


def test_the_wrong_image_size_is_named():
    grid = PatchGrid(32, 32, 16)
    model = shipped(grid)
    params, state = jax.jit(model.init)(KEY)
    batch = digits_batch(PatchGrid(32, 48, 16))
    with pytest.raises(ConfigError, match="32 x 48 px, but the grid is for 32 x 32"):
        eval_step(params, state, batch, model=model, grid=grid, fill_chunk=2)
