"""Streamed steps against the resident ones, mathematics and a slow reference."""

from __future__ import annotations

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from streamed_images import ArrayImage, images_of
from test_ragged import masked_toy
from test_step import real_groups, shipped
from toy import init_weights, max_relative, outer_steps, recording_sgd, toy_params

from patchgd_jax import (
    AugmentConfig,
    ConfigError,
    DataError,
    DiskError,
    PatchGDConfig,
    PatchGrid,
    Problem,
    StreamConfig,
    StreamedStep,
    compiler_options,
    eval_step,
    from_linen,
    init_state,
    with_ema,
)
from patchgd_jax.engine.streaming.feed import ChunkIds, PatchFeed, PatchReader
from patchgd_jax.engine.streaming.latent_store import LatentStore

KEY = jax.random.key(7)
GRID = PatchGrid(13, 18, 5, 3, background=9)


def pixel_toy(grid=GRID):
    """The toy model on bytes, with a head that leaves patches out."""
    toy = masked_toy(toy_params(0, pixels=grid.patch**2 * 2))

    def encode(params, batch_stats, patches, **rest):
        pixels = patches.astype(params["encoder"]["w1"].dtype) / 255
        return toy.encode(params, batch_stats, pixels, **rest)

    return toy._replace(encode=encode)


def pixel_problem(grid=GRID, augment=None, **settings):
    return Problem(pixel_toy(grid), grid, PatchGDConfig(**settings), augment=augment)


def pixel_batch(grid=GRID, *, images=2, channels=2, classes=3, sizes=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (images, grid.height, grid.width, channels)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(classes, size=images).astype(np.int32),
    }
    if sizes is not None:
        batch["size"] = np.array(sizes, np.int32)
        for image, (height, width) in zip(batch["image"], sizes, strict=True):
            image[height:] = image[:, width:] = grid.background
    return batch


def listed(batch, grid, seed=0):
    """The batch with a list of some patches of each image."""
    rng = np.random.default_rng(seed)
    n = grid.num_patches
    patches = np.full((len(batch["label"]), n // 2), n, np.int32)
    for row, count in zip(patches, rng.integers(3, n // 2, len(patches)), strict=True):
        row[:count] = rng.choice(n, count, replace=False)
    return {**batch, "patches": patches}


def started(problem, optimizer):
    return jax.jit(partial(init_state, problem, optimizer))(KEY)


def resident(problem, optimizer, batch, steps=2):
    jit = partial(jax.jit, compiler_options=compiler_options())
    states, metrics = outer_steps(problem, optimizer, KEY, *[batch] * steps, jit=jit)
    return states[-1], metrics[-1]


def step_of(problem, optimizer, *, level=0, store=None, **settings):
    stream = StreamConfig(enabled=True, **settings)
    return StreamedStep(problem, optimizer, stream, level=level, store=store)


def streamed(problem, optimizer, batch, *, steps=2, **settings):
    state, step = started(problem, optimizer), step_of(problem, optimizer, **settings)
    images, labels = images_of(batch)
    for _ in range(steps):
        state, metrics = step.train(state, images, labels, KEY)
    return state, metrics


def assert_same_bits(got, wanted):
    def same(path, a, b):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(same, got, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "patchgd", "fraction": 0.3, "fill_chunk": 4},
        {"mode": "patchgd", "fraction": 0.5, "sampling": "uniform", "sample_per": "image"},
        {"mode": "accumulate", "fraction": 0.3, "sample_per": "image", "fill_chunk": 100},
        {"mode": "accumulate", "fraction": 0.25, "norm_policy": "frozen", "fill_chunk": 1},
        {"mode": "exact", "fill_chunk": 7},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_streamed_is_resident_bit_for_bit(options):
    """On a grid of overlapping patches, the last of which leave the image."""
    arguments = (pixel_problem(**options), optax.sgd(0.1), pixel_batch())
    assert_same_bits(streamed(*arguments), resident(*arguments))


class Normalised(nn.Module):
    """An encoder with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.tanh(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(4)(nn.Dropout(0.3, deterministic=not train)(x))


class Pooled(nn.Module):
    """A head with dropout."""

    @nn.compact
    def __call__(self, z, mask, *, train):
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(nn.tanh(z).mean((1, 2))))


def test_bits_of_statistics_dropout_augmentation_frozen_layers_and_average():
    grid = PatchGrid(12, 16, 4)
    model = from_linen(Normalised(), Pooled(), grid=grid, channels=2)
    config = PatchGDConfig(mode="patchgd", fraction=0.25, norm_policy="paper")
    augment = AugmentConfig(flips=True, turns=True, brightness=0.2)
    problem = Problem(model, grid, config, augment=augment, frozen=frozenset({"Dense_0"}))
    arguments = (problem, with_ema(optax.sgd(0.1), 0.9), pixel_batch(grid))
    assert_same_bits(streamed(*arguments), resident(*arguments))


@pytest.fixture
def optimized():
    """Compiles as users do: without optimizations XLA rounds a large program otherwise."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["accumulate", "exact"])
def test_bits_of_a_shipped_encoder(optimized, mode):
    grid = PatchGrid(40, 56, 16, 12)
    model = shipped(grid, "small-cnn", norm="group", dropout=0.2)
    problem = Problem(model, grid, PatchGDConfig(mode=mode, fraction=0.34))
    arguments = (problem, optax.adam(1e-3), pixel_batch(grid, channels=1, classes=10))
    if mode == "accumulate":
        assert_same_bits(streamed(*arguments), resident(*arguments))
    else:
        # XLA fuses the head's gradient otherwise in one large program: last bits differ.
        assert max_relative(streamed(*arguments), resident(*arguments)) < 1e-6


@pytest.mark.parametrize("mode", ["patchgd", "exact"])
@pytest.mark.parametrize("form", ["size", "patches"])
def test_ragged_batches_are_as_resident(float64, mode, form):
    batch = pixel_batch(images=3, sizes=[(13, 18), (7, 6), (5, 14)])
    batch["weight"] = np.array([1, 0.5, 0])
    if form == "patches":
        batch = listed(pixel_batch(images=3), GRID)
    problem = pixel_problem(mode=mode, fraction=0.5, fill_chunk=3)
    arguments = (problem, recording_sgd(0.1), batch)
    assert max_relative(streamed(*arguments), resident(*arguments)) < 1e-12


def test_evaluation_is_as_resident():
    problem = pixel_problem()
    step, weights = step_of(problem, optax.sgd(0.1)), init_weights(problem.model, KEY)
    for batch in (pixel_batch(), listed(pixel_batch(), GRID)):
        wanted = jax.jit(partial(eval_step, problem))(weights, batch)
        assert_same_bits(step.evaluate(weights, *images_of(batch)), wanted)


def test_exact_is_the_whole_image_gradient(float64):
    grid = PatchGrid(13, 9, 4)
    batch = pixel_batch(grid)
    problem = pixel_problem(grid, mode="exact", fill_chunk=5)
    state, metrics = streamed(problem, recording_sgd(0.0), batch, steps=1)
    loss, grads = reference.whole_image_gradient(
        toy_params(0, pixels=32), batch["image"] / 255, batch["label"], 4, 4
    )
    assert max_relative(state.opt_state, grads) < 1e-12
    assert abs(float(metrics["loss"]) - loss) < 1e-12


@pytest.mark.parametrize(("mode", "size"), [("patchgd", 1), ("accumulate", 2), ("exact", 1)])
def test_micro_batches_add_up_to_the_batch(float64, mode, size):
    batch = pixel_batch(images=4)
    batch["weight"] = np.array([1, 0.25, 0, 0.5])
    augment = AugmentConfig(flips=True, turns=True)
    problem = pixel_problem(augment=augment, mode=mode, fraction=0.5, sample_per="image")
    arguments = (problem, recording_sgd(0.1), batch)
    assert max_relative(streamed(*arguments, micro_batch=size), streamed(*arguments)) < 1e-12


def test_micro_batches_are_evaluated_alike():
    problem, batch = pixel_problem(), images_of(pixel_batch(images=4))
    weights = init_weights(problem.model, KEY)
    whole, parts = (
        step_of(problem, optax.sgd(0.1), micro_batch=size).evaluate(weights, *batch)
        for size in (None, 2)
    )
    np.testing.assert_allclose(parts["logits"], whole["logits"], rtol=1e-5)
    assert parts["prediction"].shape == (4,)


@pytest.mark.parametrize("mode", ["accumulate", "exact"])
def test_each_patch_that_counts_is_read_twice_and_no_other_pixel_is(mode):
    batch = listed(pixel_batch(), GRID)
    images, labels = images_of(batch)
    problem, optimizer = pixel_problem(mode=mode, fraction=0.5, fill_chunk=3), optax.sgd(0.1)
    step_of(problem, optimizer).train(started(problem, optimizer), images, labels, KEY)
    for image, ids in zip(images, batch["patches"], strict=True):
        wanted = []
        for n in ids[ids < GRID.num_patches]:
            y, x = n // GRID.cols * 3, n % GRID.cols * 3
            wanted += 2 * [(y, x, min(5, 13 - y), min(5, 18 - x))]
        assert sorted(image.reads) == sorted(wanted)


def test_device_memory_grows_by_what_the_head_keeps_of_z_and_by_no_pixels():
    """Compiled, not run."""
    needed, sides = {}, (256, 4096)
    for side in sides:
        grid = PatchGrid(side, side, 32)
        labels, optimizer = {"label": jax.ShapeDtypeStruct((1,), np.int32)}, optax.adam(0.1)
        for mode in ("accumulate", "exact"):
            steps = grid.num_patches // 16
            problem = pixel_problem(grid, mode=mode, inner_steps=steps, fill_chunk=16)
            state = jax.eval_shape(partial(init_state, problem, optimizer), KEY)
            lowered = step_of(problem, optimizer).lower(state, labels, 2)
            for name in set(lowered) & {"fill", "inner", "back"}:
                memory = lowered[name].compile().memory_analysis()
                own = memory.temp_size_in_bytes + memory.argument_size_in_bytes
                # Z, or the gradient with respect to it.
                needed[mode, name, side] = own - grid.num_patches * 4 * 4
    patches = [(side // 32) ** 2 for side in sides]
    for mode, name in {key[:2] for key in needed}:
        small, large = (needed[mode, name, side] for side in sides)
        # Of each patch the head keeps its 4 latents, 6 features, and the gradients of both.
        kept = 128 if name == "inner" else 0
        assert large - small <= 0.02 * small + kept * (patches[1] - patches[0])


class Result:
    """Stands for a computation's result."""

    def __init__(self, wait=lambda: None):
        self.block_until_ready = wait


def chunked_plan(count):
    return [ChunkIds(0, np.array([[2 * i, 2 * i + 1]])) for i in range(count)]


@pytest.mark.parametrize("buffers", [2, 3, 5])
def test_no_more_chunks_are_alive_than_there_are_buffers(buffers):
    image = ArrayImage(np.zeros((80, 4, 1), np.uint8))
    reader = PatchReader([image], ["a"], PatchGrid(80, 4, 4))
    done = []

    def finish():
        assert len(image.reads) <= 2 * (len(done) + buffers)
        done.append(1)

    with PatchFeed(reader, chunked_plan(10), buffers=buffers, readers=3) as feed:
        for _ in range(10):
            feed.take()
            feed.used(Result(finish))
            assert len(image.reads) <= 2 * (len(done) + buffers)
    assert len(image.reads) == 20


def test_reading_goes_on_while_the_device_computes():
    """A chunk's computation ends only after a later one is read, whose read waits for its start."""
    begun = [threading.Event() for _ in range(8)]
    read = [threading.Event() for _ in range(8)]
    for event in read[6:]:
        event.set()

    class Slow(ArrayImage):
        def read(self, y, x, height, width, level=0):
            chunk = y // 8
            if chunk >= 2:
                assert begun[chunk - 2].wait(20), "the device waits for the reader"
            read[chunk].set()
            return super().read(y, x, height, width, level)

    image = Slow(np.zeros((48, 4, 1), np.uint8))
    reader = PatchReader([image], ["a"], PatchGrid(48, 4, 4))

    def finish(chunk):
        assert read[chunk + 2].wait(20), "the reader waits for the device"

    with PatchFeed(reader, chunked_plan(6), buffers=3, readers=1) as feed:
        for chunk in range(6):
            feed.take()
            begun[chunk].set()
            feed.used(Result(partial(finish, chunk)))


class Broken(ArrayImage):
    """Raises once it has been read some times."""

    def __init__(self, pixels, error, after):
        super().__init__(pixels)
        self.error, self.after = error, after

    def read(self, y, x, height, width, level=0):
        pixels = super().read(y, x, height, width, level)
        if len(self.reads) > self.after:
            raise self.error
        return pixels


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError("stale handle"), DataError, r"slide-7.*patch \d+ .*stale handle"),
        (ConfigError("no decoder"), ConfigError, "slide-7: no decoder"),
    ],
)
def test_a_reader_that_raises_is_named_and_leaves_no_thread_and_the_state_as_it_was(
    error, kind, says
):
    batch = pixel_batch()
    images, labels = images_of(batch)
    problem = pixel_problem(mode="patchgd", fraction=0.25, fill_chunk=8)
    optimizer = optax.sgd(0.1)
    step, state = step_of(problem, optimizer), started(problem, optimizer)
    # In the last inner step: three updates are done by then.
    images[1] = Broken(images[1].pixels, error, 2 * GRID.num_patches - 2)
    with pytest.raises(kind, match=says):
        step.train(state, images, labels, KEY, ["slide-6", "slide-7"])
    assert not [t for t in threading.enumerate() if t.name.startswith("patch-reader")]
    images[1].after = 10**6
    again, _ = step.train(state, images, labels, KEY)
    assert_same_bits(again, resident(problem, optimizer, batch, steps=1)[0])


def test_a_source_that_returns_something_else_is_named():
    class Grey(ArrayImage):
        def read(self, *where):
            return super().read(*where)[..., :1]

    reader = PatchReader([Grey(np.zeros((8, 8, 3), np.uint8))], ["b.tif"], PatchGrid(8, 8, 4))
    with pytest.raises(
        DataError, match=r"b\.tif, patch 0.*\[4, 4, 1\] instead of uint8 \[4, 4, 3\]"
    ):
        reader.read(0, 0, np.zeros((4, 4, 3), np.uint8))


def slow_visits(params, batch, groups, max_age, rate):
    """PatchGD with reused latents, one patch and one image at a time."""
    images, labels, kept, ages = batch["image"] / 255, batch["label"], {}, []
    for step, inner in enumerate(groups):
        z, seen = [], []
        for b, image in enumerate(images):
            z.append([])
            for n in range(GRID.num_patches):
                latent, when = kept.get((b, n), (None, -1))
                if latent is None or step - when > max_age:
                    patch = reference.cut(image, n, GRID.patch, GRID.stride)
                    latent, when = reference.encode(params, patch)[0], step
                kept[b, n] = latent, when
                z[b].append(latent)
                seen.append(step - when)
        ages.append((np.mean(seen), max(seen)))
        for group in inner:
            _, grads = reference.gradient(params, images, labels, z, group, GRID.patch, GRID.stride)
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
            for b, numbers in enumerate(group):
                for n in numbers:
                    kept[b, n] = z[b][n], step
    return params, ages


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("max_age", [1, 2])
def test_reused_latents_are_those_of_the_slow_reference(
    float64, monkeypatch, tmp_path, max_age, where
):
    # The reference pads with zeros.
    grid = PatchGrid(13, 18, 5, 3)
    monkeypatch.setitem(globals(), "GRID", grid)
    problem = pixel_problem(
        grid, mode="patchgd", fraction=0.34, sampling="uniform", sample_per="image"
    )
    optimizer = recording_sgd(0.1)
    batch = pixel_batch(grid)
    images, labels = images_of(batch)
    groups = [real_groups(grid, problem.config, 2, step=step) for step in range(5)]
    params = toy_params(0, pixels=50)
    wanted, ages = slow_visits(params, batch, groups, max_age, 0.1)
    state = started(problem, optimizer)
    with LatentStore(10**6, tmp_path if where == "file" else None) as store:
        step = step_of(problem, optimizer, max_age=max_age, store=store)
        for mean, oldest in ages:
            state, metrics = step.train(state, images, labels, KEY, ["a", "b"])
            assert float(metrics["z_age_mean"]) == pytest.approx(mean, rel=1e-6)
            assert float(metrics["z_age_max"]) == oldest
        assert store.bytes_used == 2 * grid.num_patches * (4 * 8 + 8)
    assert max_relative(state.params, wanted) < 1e-12
    reads = sum(len(image.reads) for image in images)
    drawn = sum(len(numbers) for inner in groups for group in inner for numbers in group)
    assert max(oldest for _, oldest in ages) == max_age
    assert reads < drawn + 5 * 2 * grid.num_patches, "nothing was reused"


@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_store_keeps_to_its_budget_and_drops_what_was_visited_longest_ago(tmp_path, where):
    rng = np.random.default_rng(0)
    z, when = rng.normal(size=(6, 5, 3)).astype(np.float32), np.arange(30).reshape(6, 5)
    with LatentStore(3 * 5 * 20, tmp_path if where == "file" else None) as store:
        for i in (0, 1, 2, 0):
            store.put(str(i), z[i], when[i])
        assert store.get("1") is not None
        for i in (3, 4):
            store.put(str(i), z[i], when[i])
        assert (len(store), store.bytes_used) == (3, store.budget)
        assert store.get("0") is None
        assert store.get("2") is None
        for i in (1, 3, 4):
            np.testing.assert_array_equal(store.get(str(i)).z, z[i])
            np.testing.assert_array_equal(store.get(str(i)).when, when[i])
        store.get("1").z[:] = 0
        np.testing.assert_array_equal(store.get("1").z, z[1])
        with pytest.raises(ConfigError, match="one store for each grid"):
            store.put("5", z[5, :4], when[5, :4])
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_work_says_so(tmp_path):
    with pytest.raises(DiskError, match="no-such-folder"):
        LatentStore(10, tmp_path / "no-such-folder")
    with pytest.raises(ConfigError, match="one image's latents take 100"):
        LatentStore(99).put("a", np.zeros((5, 3), np.float32), np.zeros(5))
    with pytest.raises(ConfigError, match="budget"):
        LatentStore(0)


@pytest.mark.parametrize(
    ("options", "rest", "says"),
    [
        ({"mode": "full"}, {}, "mode exact has the same gradient"),
        ({}, {"buffers": 1}, "stream.buffers is 1; at least 2"),
        ({}, {"micro_batch": 0}, "stream.micro_batch is 0; at least 1"),
        ({}, {"max_age": 3}, "needs a latent store"),
        ({"mode": "exact"}, {"max_age": 3, "store": LatentStore(99)}, "fresh"),
        ({"norm_policy": "paper"}, {"max_age": 3, "store": LatentStore(99)}, "inner or frozen"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, rest, says):
    with pytest.raises(ConfigError, match=says):
        step_of(pixel_problem(**options), optax.sgd(0.1), **rest)


def test_batches_that_do_not_fit_are_refused_before_anything_is_read():
    problem, optimizer = pixel_problem(), optax.sgd(0.1)
    state, (images, labels) = started(problem, optimizer), images_of(pixel_batch())

    def refused(kind, says, images=images, labels=labels, problem=problem, state=state, **settings):
        step = step_of(problem, optimizer, **settings)
        with pytest.raises(kind, match=says):
            step.train(state, images, labels, KEY)

    refused(ConfigError, "1 images, 1 names and 2 labels", images[:1])
    refused(ConfigError, "micro_batch 3 does not divide", micro_batch=3)
    for kind, height in ((ConfigError, 16), (DataError, 12)):
        other = pixel_problem(PatchGrid(height, 18, 5, 3))
        refused(kind, "image 0 of the batch is 13 x 18 px", problem=other)
    refused(DataError, "no level 1", level=1)
    refused(ConfigError, "needs the names", max_age=1, store=LatentStore(9999))
    unbiased = pixel_problem(sampling="uniform", encoder_grad_scale="unbiased")
    ragged = {**labels, "size": np.array([[13, 18]] * 2)}
    refused(ConfigError, "use partition", labels=ragged, problem=unbiased)
    statistics = state._replace(batch_stats={"encoder": {"mean": jnp.zeros(1)}, "head": {}})
    exact = pixel_problem(mode="exact")
    refused(ConfigError, "batch statistics", problem=exact, state=statistics)
    assert not any(image.reads for image in images)
