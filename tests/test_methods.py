"""The methods that PatchGD is compared with: against mathematics, and through the training loop."""

from __future__ import annotations

import dataclasses
import json
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from micro import ENCODER, changed
from toy import init_weights, max_relative, quick, recording_sgd, toy_batch, toy_params, toy_problem

from patchgd_jax import (
    AugmentConfig,
    BaselineConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    PatchGrid,
    PatchIds,
    Problem,
    TaskConfig,
    TrainConfig,
    WholeImage,
    build_encoder,
    build_model,
    from_linen,
    init_state,
    make_task,
)
from patchgd_jax.baselines.fully_conv import fully_conv_gradient
from patchgd_jax.baselines.ips import restrict_to_patches, select_patches
from patchgd_jax.baselines.patch_logits import patch_loss, pool_logits
from patchgd_jax.baselines.patchwise import patchwise_eval, patchwise_gradient
from patchgd_jax.baselines.registry import make_algorithm, resolve_method
from patchgd_jax.config import METHODS, BackgroundConfig, SplitConfig
from patchgd_jax.core.forward import encode_all
from patchgd_jax.core.gradients import full_gradient
from patchgd_jax.core.problem import named_key
from patchgd_jax.models.layers.conv import stem_side
from patchgd_jax.models.layers.pool import max_pool, mean_pool
from patchgd_jax.models.registry import map_side
from patchgd_jax.planner.auto_settings import resolve_auto
from patchgd_jax.planner.run_plan import plan_of
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.cross_validation import cross_validate
from patchgd_jax.runs.dry_run import dry_run
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.train import resume, train

KEY = jax.random.key(3)
BASELINES = [name for name in METHODS if name != "patchgd"]


# Mathematics


def toy_parts(grid, **options):
    problem = toy_problem(grid, PatchGDConfig(), **options)
    return problem, init_weights(problem.model, KEY), toy_batch(0, grid)


def every_patch(problem):
    numbers = jnp.arange(problem.grid.num_patches)
    return PatchIds(jnp.tile(numbers, (2, 1)), padded=False)


def algorithm_of(config):
    return make_algorithm(config.method, config.baseline, config.patchgd)


def one_step(problem, batch, **settings):
    """The state, with the gradient, and the metrics after a step of a method."""
    config = resolve_method(TrainConfig(**settings))
    problem, optimizer = dataclasses.replace(problem, config=config.patchgd), recording_sgd(0.1)
    state = quick(partial(init_state, problem, optimizer))(KEY)
    step = partial(algorithm_of(config).train_step, problem, optimizer)
    return quick(step)(state, batch, KEY)


def patchwise(problem, *arguments):
    return quick(partial(patchwise_gradient, problem, pooling="mean"))(*arguments)


def fully_conv(problem, *arguments, **options):
    return quick(partial(fully_conv_gradient, problem, pooling="mean", **options))(*arguments)


def cross_entropy(logits, labels):
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def every_patch_loss(params, batch, grid):
    """Written out: each patch through both nets alone, and its image's label."""
    losses = []
    for image, label in zip(batch["image"], batch["label"], strict=True):
        for number in range(grid.num_patches):
            y, x = divmod(number, grid.cols)
            y, x = y * grid.stride, x * grid.stride
            patch = jnp.zeros((grid.patch, grid.patch, image.shape[-1]))
            piece = image[y : y + grid.patch, x : x + grid.patch]
            patch = patch.at[: piece.shape[0], : piece.shape[1]].set(piece)
            p, q = params["encoder"], params["head"]
            z = jnp.tanh(patch.reshape(-1) @ p["w1"] + p["b1"]) @ p["w2"]
            logits = jax.nn.relu(z @ q["v1"] + q["c1"]) @ q["v2"] + q["c2"]
            losses.append(cross_entropy(logits, jnp.asarray(label)))
    return jnp.stack(losses).mean()


@pytest.mark.parametrize("grid", [PatchGrid(12, 20, 4), PatchGrid(11, 14, 5, 3)])
def test_patchwise_is_the_loss_of_every_patch(float64, grid):
    problem, weights, batch = toy_parts(grid)
    got = patchwise(problem, weights, every_patch(problem), batch, KEY)
    loss, grads = jax.value_and_grad(every_patch_loss)(weights.params, batch, grid)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-12)
    assert max_relative(got.grads, grads) < 1e-12


def test_a_patchwise_step_sums_its_groups(float64):
    """15 patches in 5 equal groups: the mean gradient of the groups is that of all patches."""
    grid = PatchGrid(12, 20, 4)
    problem, weights, batch = toy_parts(grid)
    new, metrics = one_step(
        problem, batch, method="patchwise", patchgd=PatchGDConfig(inner_steps=5)
    )
    loss, grads = jax.value_and_grad(every_patch_loss)(weights.params, batch, grid)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    assert max_relative(new.opt_state, grads) < 1e-12
    assert int(new.step) == 1


def test_patches_that_are_padding_have_no_loss(float64):
    """An image of 2 of 4 patches beside a whole one: as if it were alone."""
    grid = PatchGrid(4, 16, 4)
    problem, weights, batch = toy_parts(grid)
    batch["patches"] = np.array([[0, 1, 2, 3], [0, 1, 4, 5]], np.int32)
    group = PatchIds(jnp.asarray(batch["patches"]), padded=True)
    got = patchwise(problem, weights, group, batch, KEY)
    small = PatchGrid(4, 8, 4)
    first = {"image": batch["image"][:1], "label": batch["label"][:1]}
    second = {"image": batch["image"][1:, :, :8], "label": batch["label"][1:]}

    def loss(params):
        first_loss = every_patch_loss(params, first, grid)
        return (4 * first_loss + 2 * every_patch_loss(params, second, small)) / 6

    assert max_relative(got.grads, jax.grad(loss)(weights.params)) < 1e-12
    scored = quick(partial(patchwise_eval, problem))(weights, batch)
    alone = dataclasses.replace(problem, grid=small)
    alone = quick(partial(patchwise_eval, alone))(weights, second)
    np.testing.assert_allclose(scored["logits"][1], alone["logits"][0], rtol=1e-12)


def test_whole_image_is_plain_training(float64):
    """Method gd on an image that is not square: encoder, dense layer, cross-entropy."""
    model_config = ModelConfig(latent_dim=3, norm="group", head="linear", remat="none")
    grid = WholeImage(16, 24)
    model = build_model(model_config, grid=grid, channels=1, classes=3, mean=0.0, std=1.0)
    weights = jax.tree.map(lambda x: x.astype(float), quick(model.init)(KEY))
    problem = Problem(model._replace(init=lambda key: weights), grid, PatchGDConfig())
    batch = {"image": np.random.default_rng(0).random((2, 16, 24, 1)), "label": np.array([0, 2])}
    new, _ = one_step(problem, batch, method="gd")
    encoder = build_encoder(model_config, 16)

    def loss(params):
        z = encoder.apply({"params": params["encoder"]}, batch["image"], train=True)
        dense = params["head"]["Dense_0"]
        logits = z @ dense["kernel"] + dense["bias"]
        return cross_entropy(logits, jnp.asarray(batch["label"])).mean()

    # The network computes in float32.
    assert max_relative(new.opt_state, quick(jax.grad(loss))(weights[0])) < 1e-5


class Valid(nn.Module):
    """Convolutions without padding, so that no position reaches beyond its patch."""

    latent_dim: int
    window: int | None = None

    @nn.compact
    def __call__(self, x, *, train):
        for features, stride in ((4, 2), (5, 1)):
            x = nn.Conv(features, (2, 2), (stride, stride), "VALID", param_dtype=float)(x)
            x = nn.tanh(x)
        x = jnp.concatenate([mean_pool(x, self.window), max_pool(x, self.window)], -1)
        return nn.Dense(self.latent_dim, param_dtype=float)(x)


class Linear(nn.Module):
    """A dense layer on the mean of Z."""

    classes: int

    @nn.compact
    def __call__(self, z, mask, *, train):
        return nn.Dense(self.classes, param_dtype=float)(z.mean((1, 2)))


def valid_problems(seed):
    """One network on patches of 6 px and on whole images; its last map has 2 x 2 of a patch."""
    by_patch, at_once = (
        Problem(
            from_linen(Valid(4, window), Linear(3), grid=grid, channels=2, dtype=float),
            grid,
            PatchGDConfig(),
        )
        for grid, window in ((PatchGrid(14, 18, 6, 2), None), (WholeImage(14, 18), 2))
    )
    weights = init_weights(by_patch.model, KEY)
    assert jax.tree.structure(at_once.model.init(KEY)[0]) == jax.tree.structure(weights.params)
    image = np.random.default_rng(seed).random((2, 14, 18, 2))
    return by_patch, at_once, weights, {"image": image, "label": np.array([2, 0], np.int32)}


def test_fully_conv_is_patchwise_where_no_field_reaches_out(float64):
    """Positions 2 px apart are the patches of stride 2: the same latents, loss and gradient."""
    by_patch, at_once, weights, batch = valid_problems(1)
    z = quick(partial(encode_all, by_patch))(weights, batch)
    latents, _ = at_once.model.encode(*weights, batch["image"], train=False, rng=KEY)
    assert latents.shape == (2, by_patch.grid.rows, by_patch.grid.cols, 4)
    np.testing.assert_allclose(latents.reshape(z.shape), z, rtol=1e-12, atol=1e-14)

    each = patchwise(by_patch, weights, every_patch(by_patch), batch, KEY)
    once = fully_conv(at_once, weights, batch, KEY, positions=1.0)
    np.testing.assert_allclose(once.loss, each.loss, rtol=1e-12)
    np.testing.assert_allclose(once.logits, each.logits, rtol=1e-12)
    assert max_relative(once.grads, each.grads) < 1e-11


def test_sampled_positions_are_patchwise_on_those_patches(float64):
    """With a share of the positions, the same ones are drawn as patches: half-way between."""
    by_patch, at_once, weights, batch = valid_problems(2)
    order = jax.random.permutation(named_key(KEY, "sampling"), by_patch.grid.num_patches)
    count = -(-by_patch.grid.num_patches // 4)
    group = PatchIds(jnp.tile(order[:count], (2, 1)), padded=False)
    each = patchwise(by_patch, weights, group, batch, KEY)
    once = fully_conv(at_once, weights, batch, KEY, positions=0.25)
    np.testing.assert_allclose(once.loss, each.loss, rtol=1e-12)
    assert max_relative(once.grads, each.grads) < 1e-11


@pytest.mark.parametrize("encoder", ["small-cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_shipped_encoders_as_fully_convolutional_networks(encoder):
    """On an image that is one patch there is one position, and its latent is the patch's."""
    config = ModelConfig(encoder=encoder, latent_dim=3)
    patch = build_encoder(config, 32)
    image = jax.random.uniform(KEY, (1, 32, 32, 1))
    variables = quick(partial(patch.init, train=False))(KEY, image)

    def encode(image, **options):
        return quick(partial(build_encoder(config, 32, **options).apply, train=False))(
            variables, image
        )

    entries = encode(image, window=1)
    window = entries.shape[1]
    positions = encode(image, window=window)
    assert positions.shape == (1, 1, 1, 3)
    wanted = encode(image)
    np.testing.assert_allclose(positions[0, 0], wanted, rtol=1e-4, atol=1e-5)
    wide = jnp.zeros((1, 64, 96, 1))
    many = encode(wide, window=window)
    assert many.shape[1] > 1
    assert many.shape[2] > many.shape[1]


def test_patch_logits_of_an_image(float64):
    """Mean and vote, and their loss, against loops."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 5, 4))
    counts = rng.random((3, 5)) < 0.7
    counts[:, 0] = True
    mean = np.stack([row[used].mean(0) for row, used in zip(logits, counts, strict=True)])
    np.testing.assert_allclose(pool_logits(jnp.asarray(logits), counts, "mean"), mean, rtol=1e-12)
    shares = [
        np.bincount(row[used].argmax(-1), minlength=4) / used.sum()
        for row, used in zip(logits, counts, strict=True)
    ]
    votes = np.exp(pool_logits(jnp.asarray(logits), counts, "vote"))
    np.testing.assert_allclose(votes, shares, atol=2e-6)
    tied = jnp.asarray([[[3.0, 0, 0], [0, 0, 1]]])
    assert int(pool_logits(tied, None, "vote").argmax()) == 0

    batch = {"label": np.array([0, 3, 1]), "weight": np.array([1.0, 2.0, 0.0])}
    total = number = 0.0
    for row, used, label, weight in zip(
        logits, counts, batch["label"], batch["weight"], strict=True
    ):
        for one in row[used]:
            total += weight * float(cross_entropy(jnp.asarray(one), jnp.asarray(label)))
            number += weight > 0
    problem = toy_problem(PatchGrid(4, 20, 4), PatchGDConfig())
    got = patch_loss(problem, jnp.asarray(logits), batch, jnp.asarray(counts))
    np.testing.assert_allclose(got, total / number, rtol=1e-12)


def attention_parts():
    grid = PatchGrid(8, 12, 4)
    config = ModelConfig(latent_dim=6, norm="group")
    model = build_model(config, grid=grid, channels=1, classes=3, mean=0.0, std=1.0)
    return Problem(model, grid, PatchGDConfig(mode="full")), init_weights(model, KEY)


def test_ips_selects_by_attention_and_trains_nothing_else():
    problem, weights = attention_parts()
    # The shipped head's attention starts uniform.
    weights.params["head"] = jax.tree.map(
        lambda x: x + 0.5 * jax.random.normal(KEY, x.shape), weights.params["head"]
    )
    model = problem.model._replace(init=lambda key: weights)
    problem = dataclasses.replace(problem, model=model)
    batch = {
        "image": np.random.default_rng(5).integers(0, 255, (2, 8, 12, 1), np.uint8),
        "label": np.array([0, 2]),
        "patches": np.array([[0, 1, 2, 3, 4, 5], [5, 1, 6, 7, 8, 9]], np.int32),
    }
    z = quick(partial(encode_all, problem))(weights, batch)
    z_map = z.reshape(2, 2, 3, -1)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1]], bool).reshape(2, 2, 3)
    attention = np.asarray(model.attend(*weights, z_map, mask))
    best = np.sort(np.argsort(-attention[0].reshape(-1))[:3])
    ids = select_patches(problem, weights, z, batch, 3)
    np.testing.assert_array_equal(ids[0], best)
    assert ids[1].tolist()[:2] == [1, 5]
    assert int(ids[1, 2]) >= problem.grid.num_patches
    np.testing.assert_array_equal(select_patches(problem, weights, z, batch, 3, KEY), ids)

    settings = {"method": "ips", "baseline": BaselineConfig(top_patches=3)}
    new, _ = one_step(problem, batch, **settings)
    key = jax.random.fold_in(KEY, 0)
    gradient = quick(partial(full_gradient, problem))
    wanted = gradient(weights, restrict_to_patches(batch, ids), key)
    assert max_relative(new.opt_state, wanted.grads) < 1e-5
    every = gradient(weights, batch, key)
    assert max_relative(new.opt_state, every.grads) > 1e-2
    evaluate = partial(algorithm_of(TrainConfig(**settings)).eval_step, problem)
    scored = quick(evaluate)(weights, batch)
    seen = jnp.zeros((2, 6), bool).at[jnp.arange(2)[:, None], ids].set(True, mode="drop")
    logits, _ = model.classify(*weights, z_map, seen.reshape(2, 2, 3), train=False, rng=KEY)
    np.testing.assert_allclose(scored["logits"], logits, rtol=1e-5)


def test_equal_patches_are_drawn_at_random():
    """The shipped head's attention starts uniform: not always the top left corner."""
    z = jax.random.normal(KEY, (1, 6, 6))
    draw = partial(select_patches, *attention_parts(), z, {"label": np.zeros(1, int)}, 2)
    seen = {int(i) for seed in range(12) for i in draw(key=jax.random.key(seed))[0]}
    assert seen == set(range(6))
    assert draw()[0].tolist() == [0, 1]


def test_mil_is_the_heads_part_of_the_gradient(float64):
    """Also on latents that were kept, without images."""
    grid = PatchGrid(12, 20, 4)
    encoder = frozenset(toy_params(0, pixels=32)["encoder"])
    problem, weights, batch = toy_parts(grid, frozen=encoder)
    new, _ = one_step(problem, batch, method="mil")
    whole = quick(partial(full_gradient, problem))(weights, batch, KEY)
    assert new.opt_state["encoder"] == {}
    assert max_relative(new.opt_state["head"], whole.grads["head"]) < 1e-12
    assert max_relative(new.params["encoder"], weights.params["encoder"]) == 0
    features = {"z": quick(partial(encode_all, problem))(weights, batch), "label": batch["label"]}
    stored, _ = one_step(problem, features, method="mil")
    assert max_relative(stored.params, new.params) < 1e-12


# Model options


@pytest.mark.parametrize(
    ("encoder", "stride"),
    [("small-cnn", 8), ("resnet18", 8), ("mobilenet-v2", 4), ("convnext-v2-atto", 8)],
)
def test_a_large_stride_makes_the_map_smaller(encoder, stride):
    # Wide enough that a coarse map still has a pixel for each of the later strides.
    side = 16 * stride
    config = ModelConfig(encoder=encoder, latent_dim=2)
    usual = 4 if encoder in ("small-cnn", "convnext-v2-atto") else 2
    coarse = map_side(dataclasses.replace(config, stem_stride=stride), side, 1)
    assert coarse == map_side(config, side, 1) * usual // stride


def test_a_large_stride_passes_over_no_pixel():
    assert [stem_side(7, stride) for stride in (2, 4, 7, 8, 16)] == [7, 7, 7, 9, 17]
    network = build_encoder(ModelConfig(latent_dim=2, stem_stride=8), 32, 1)
    image = jax.random.uniform(KEY, (1, 32, 32, 1))
    variables = network.init(KEY, image, train=False)
    slope = jax.grad(lambda image: network.apply(variables, image, train=False).std())
    slope = quick(slope)(image)
    assert (np.asarray(slope) != 0).mean() > 0.95


def test_a_stem_that_is_none():
    with pytest.raises(ConfigError, match="deit-tiny has no stem with a stride"):
        build_encoder(ModelConfig(encoder="deit-tiny", stem_stride=8), 32)


# The training loop


BASE = dataclasses.replace(
    changed({"train_size": 16}),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    batch_size=8,
    epochs=8,
    save_every=8,
)


def run_of(method):
    return dataclasses.replace(BASE, method=method)


class KilledError(Exception):
    """Ends a run as a crash does."""


@pytest.mark.parametrize(
    "method",
    [m if m in ("gd", "mil") else pytest.param(m, marks=pytest.mark.slow) for m in BASELINES],
)
def test_loss_falls_and_a_resumed_run_is_the_same(method, tmp_path):
    config = run_of(method)
    summary = train(config, tmp_path / "straight")
    lines = [json.loads(li) for li in (tmp_path / "straight/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

    def kill(step):
        if step == 10:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_step=kill)
    again = resume(tmp_path / "killed")
    assert again["best"] == summary["best"]
    last = [Checkpoints(tmp_path / name / "checkpoints") for name in ("straight", "killed")]
    assert last[0].steps()[-1] == last[1].steps()[-1] == 16
    a, b = (TrainedModel(tmp_path / name, "last") for name in ("straight", "killed"))
    jax.tree.map(np.testing.assert_array_equal, a.weights.params, b.weights.params)

    # What is trained is scored again as in training, and labels image files.
    scored = a.evaluate()
    assert scored["recorded"]["loss"] == scored["loss"]
    image = sorted((tmp_path / "straight/examples").glob("*.png"))[0]
    assert sum(a.predict_files([image])[0]["probabilities"].values()) == pytest.approx(1)


def test_the_largest_batch_of_a_method():
    """Of gd on images of 128 px: by the planner's figure for it, not for PatchGD."""
    data = dataclasses.replace(BASE.data, size=(128, 128), train_size=4096)
    config = dataclasses.replace(BASE, data=data, method="gd", batch_size="auto", device="cpu")
    chosen = resolve_auto(resolve_method(config), "80MiB")
    plan = plan_of(chosen)
    (request,) = plan.requests
    assert plan.method == "gd"
    larger = request.changed(batch_size=request.batch + 1)
    assert plan.compiled(request) <= 80 * 2**20 < plan.compiled(larger)
    assert chosen.patchgd.mode == "full"


@pytest.mark.parametrize("method", ["gd", "downscale", "mil"])
def test_a_rehearsal_of_a_method(method):
    """Also where the images have fewer patches than PatchGD would have inner steps."""
    config = dataclasses.replace(run_of(method), patchgd=PatchGDConfig(patch=16, fraction=0.2))
    figures = dry_run(config)
    assert figures["compiled"] > 0


def test_folds_of_a_method_go_on(tmp_path):
    """A second call finds the runs of the first."""
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((32, 32), 40 * index + 60 * (label == "b"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    data = DataConfig(root=str(tmp_path / "images"), size=(32, 32), split=SplitConfig(folds=2))
    config = dataclasses.replace(BASE, data=data, method="gd", batch_size=2, epochs=1)
    first = cross_validate(config, tmp_path / "folds")
    again = cross_validate(config, tmp_path / "folds")
    assert again["mean"] == first["mean"]


def test_patchwise_on_images_with_fewer_patches_than_groups():
    """No group of a small image is without a patch: as a regression its error is a number."""
    task = make_task(TaskConfig(name="regression"), 1)
    problem, _, batch = toy_parts(PatchGrid(4, 32, 4), task=task)
    batch["patches"] = np.array([np.arange(8), [2, 5, 8, 9, 10, 11, 12, 13]], np.int32)
    batch["label"] = np.array([0.5, 1.5], np.float32)
    _, metrics = one_step(problem, batch, method="patchwise", patchgd=PatchGDConfig(inner_steps=4))
    assert np.isfinite(metrics["mae"])
    nothing = pool_logits(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), bool), "mean")
    np.testing.assert_array_equal(nothing, np.zeros((1, 3)))


def test_mil_keeps_features_and_the_encoder(tmp_path, monkeypatch):
    """What is kept is neither encoded nor read again; the encoder is what it was."""
    from patchgd_jax.data.synthetic.ultramnist import UltraMnist
    from patchgd_jax.engine.build import FeatureExecutor

    runs, reads = [], []
    read = UltraMnist.__getitem__

    def counted_read(self, index):
        if self.split == "train" and "read-examples" in threading.current_thread().name:
            reads.append(index)
        return read(self, index)

    monkeypatch.setattr(UltraMnist, "__getitem__", counted_read)
    compile_train = FeatureExecutor._compile_train

    class Counted:
        """A compiled program that counts its calls."""

        def __init__(self, compiled):
            self.compiled = compiled

        def __call__(self, *arguments):
            runs.append(1)
            return self.compiled(*arguments)

        def memory_analysis(self):
            return self.compiled.memory_analysis()

    def counted(self, state, number):
        program = compile_train(self, state, number)
        encode = self._encode[number]
        self._encode[number] = encode._replace(run=Counted(encode.run))
        return program

    monkeypatch.setattr(FeatureExecutor, "_compile_train", counted)
    # With one thread two of the eight batches of an epoch are read ahead.
    few = dataclasses.replace(run_of("mil"), batch_size=2, reader_threads=1, epochs=4)
    train(few, tmp_path / "run")
    assert len(runs) == BASE.data.train_size // few.images_per_step
    assert set(np.bincount(reads)) <= {1, 2}
    train(dataclasses.replace(few, reader_threads=4), tmp_path / "ahead")
    heads = [
        TrainedModel(tmp_path / run, "last").weights.params["head"] for run in ("run", "ahead")
    ]
    jax.tree.map(np.testing.assert_array_equal, *heads)
    first = TrainedModel(tmp_path / "run", "last").weights.params["encoder"]
    train(dataclasses.replace(few, epochs=1), tmp_path / "short")
    short = TrainedModel(tmp_path / "short", "last").weights.params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, first, short)


def test_a_method_on_the_command_line(command, tmp_path):
    options = [
        "--data.digits", "font", "--data.size", "32", "32", "--data.train-size", "8",
        "--data.val-size", "2", "--batch-size", "4", "--eval-batch-size", "2", "--patchgd.patch",
        "16", "--model.encoder", ENCODER, "--model.latent-dim", "4", "--run-dir", "run",
    ]  # fmt: skip
    done = command("train", "tiny", "--method", "downscale", "--baseline.side", "16", *options)
    assert done.returncode == 0, done.stderr
    resolved = json.loads((tmp_path / "run/config.json").read_text())
    assert resolved["data"]["downscale"] == 2
    assert resolved["patchgd"]["mode"] == "full"
    image = sorted((tmp_path / "run/examples").glob("*.png"))[0]
    assert command("predict", "run", image).returncode == 0
    unknown = command("train", "tiny", "--method", "pathwise", *options)
    assert unknown.returncode == 2
    assert "pathwise" in unknown.stderr
    options = [*options[:-1], "vit", "--method", "fully-conv", "--model.encoder", "vit-tiny"]
    vit = command("train", "tiny", *options)
    assert vit.returncode == 2
    assert "vit-tiny is not convolutional" in vit.stderr
    assert not (tmp_path / "vit").exists()


BAD = {
    "patchwise full": (
        {"method": "patchwise", "patchgd": PatchGDConfig(mode="full")},
        "patchgd.mode full with method patchwise",
    ),
    "side that does not divide": (
        {"method": "downscale", "baseline": BaselineConfig(side=48)},
        "baseline.side 48: generated images of 256 x 256 px",
    ),
    "shrunk twice": (
        {"method": "downscale", "data": DataConfig(downscale=2)},
        "data.downscale 2 and baseline.side 64 both shrink",
    ),
    "native": (
        {"method": "downscale", "data": DataConfig(root="x", fit="native", channels=1)},
        "method downscale shrinks all images to one size",
    ),
    "patches left out": (
        {
            "method": "gd",
            "data": DataConfig(root="x", channels=1, empty=BackgroundConfig(method="otsu")),
        },
        "data.empty leaves patches out, but method gd sees the whole image",
    ),
    "mesh": ({"method": "gd", "mesh": "auto"}, "method gd keeps whole images on one device"),
    "a setting of another method": (
        {"method": "gd", "baseline": BaselineConfig(positions=0.5)},
        "baseline.positions is about method fully-conv, not gd",
    ),
    "a scale of another method": (
        {"method": "ips", "patchgd": PatchGDConfig(encoder_grad_scale="unbiased")},
        "patchgd.encoder_grad_scale undoes what PatchGD does",
    ),
    "nothing kept to recompute": (
        {"method": "gd", "patchgd": PatchGDConfig(mode="full", remat=True)},
        "patchgd.remat is about mode full of method patchgd; for gd, use --model.remat",
    ),
    "nothing to freeze": (
        {"method": "mil", "optimizer": OptimizerConfig(freeze_stages=1)},
        "method mil trains no stage",
    ),
    "nothing to sample": (
        {"method": "gd", "patchgd": PatchGDConfig(fraction="auto")},
        "patchgd.fraction cannot be auto",
    ),
    "augmented features": (
        {"method": "mil", "augment": AugmentConfig(flips=True)},
        "method mil keeps the features",
    ),
    "votes of numbers": (
        {
            "method": "patchwise", "baseline": BaselineConfig(pooling="vote"),
            "task": TaskConfig(name="ordinal"),
        },
        "baseline.pooling vote is for task.name single-label",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_settings_that_a_method_cannot_have(name):
    settings, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        resolve_method(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ips", "model": ModelConfig(encoder="micro", head="linear")}, "no attention"),
        ({"method": "gd", "augment": AugmentConfig(turns=True),
          "data": dataclasses.replace(BASE.data, size=(32, 48))}, "cannot be turned"),
    ],
)  # fmt: skip
def test_what_shows_before_a_run_folder_is_made(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(BASE, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
