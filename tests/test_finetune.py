"""Frozen stages, rates by depth, separate rates and averaged parameters."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from micro import MICRO, Stopped, assert_same_run, stop_at
from toy import max_relative, outer_steps, quick, recording_sgd, toy_batch, toy_problem

from patchgd_jax import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    TaskConfig,
    TrainConfig,
    build_encoder,
    build_model,
    ema_params,
    encoder_layers,
    init_state,
    make_optimizer,
    make_task,
    train_step,
    with_ema,
)
from patchgd_jax.engine.setup import make_run_optimizer, run_frozen
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.starting_point import starting_point
from patchgd_jax.runs.train import resume, train

KEY = jax.random.key(17)
LENGTH = {"total_steps": 9, "steps_per_epoch": 9, "updates_per_step": 1}
UNOPTIMISED = quick.keywords["compiler_options"]


def layers(encoder):
    return encoder_layers(build_encoder(ModelConfig(encoder=encoder), 32), patch=32, channels=3)


def test_depth_and_stage_of_a_resnet():
    found = layers("resnet18")
    stem = {"Conv_0": 0, "Normalize_0": 0}
    blocks = {f"BasicBlock_{i}": i + 1 for i in range(8)}
    assert found.depth == {**stem, **blocks, "Dense_0": 9}
    assert found.depth_of(("BasicBlock_3", "Conv_0", "kernel")) == 4
    assert found.stage == {
        **stem, **{name: (depth + 1) // 2 for name, depth in blocks.items()}, "Dense_0": 5
    }  # fmt: skip
    assert found.until(0) == frozenset()
    assert found.until(1) == {"Conv_0", "Normalize_0", "BasicBlock_0", "BasicBlock_1"}
    assert len(found.until(4)) == 10
    with pytest.raises(ConfigError, match="freeze_stages is 5, but the encoder has 4 stages"):
        found.until(5)


def test_depth_and_stage_of_other_encoders():
    assert layers("small-cnn").depth == {**{f"Stage_{i}": i + 1 for i in range(4)}, "Dense_0": 5}
    many = layers("resnet50")
    assert many.depth["Bottleneck_15"] == 16
    assert [many.stage[f"Bottleneck_{i}"] for i in (2, 3, 6, 7, 12, 13)] == [1, 2, 2, 3, 3, 4]


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1])(x)


class _Staged(nn.Module):
    """Modules between stages, parameters of its own, two norms with one name."""

    blocks: tuple[int, ...] = (1, 2)

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.LayerNorm()(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        x += self.param("position", nn.initializers.zeros_init(), (6,))
        x = _Block(name="Block_0")(x)
        x = nn.Dense(4, name="ADownsample")(x)
        x = _Block(name="Block_1")(x)
        x = _Block(name="Block_2")(x)
        return nn.Dense(3)(nn.LayerNorm()(x))


def test_what_lies_between_blocks_goes_with_the_later_one():
    found = encoder_layers(_Staged(), patch=4, channels=1)
    assert found.depth == {
        "Dense_0": 0, "LayerNorm_0": 0, "position": 0, "Block_0": 1, "ADownsample": 2,
        "Block_1": 2, "Block_2": 3, "LayerNorm_1": 4, "Dense_1": 4,
    }  # fmt: skip
    assert found.stage["ADownsample"] == found.stage["Block_2"] == 2
    assert found.stage["Dense_1"] == 3
    with pytest.raises(ConfigError, match="blocks of the encoder _Staged cannot be identified"):
        encoder_layers(_Staged(blocks=(2, 2)), patch=4, channels=1)


def sgd(**settings):
    return OptimizerConfig(
        name="sgd",
        momentum=0.0,
        schedule="constant",
        warmup_epochs=0,
        learning_rate=0.5,
        **settings,
    )


@pytest.mark.parametrize(("rate", "ratio"), [(None, 1.0), (0.125, 0.25)])
def test_rates_by_depth_are_exact_powers(rate, ratio):
    depth = {"Conv_0": 0, "Block_0": 1, "Block_1": 2, "Dense_0": 3}
    config = sgd(layer_decay=0.5, encoder_learning_rate=rate)
    optimizer = make_optimizer(config, **LENGTH, depth=depth)
    rng = np.random.default_rng(0)

    def leaf():
        return {"kernel": jnp.asarray(rng.normal(size=3), jnp.float32)}

    grads = {"encoder": {name: leaf() for name in depth}, "head": leaf()}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    for name, place in depth.items():
        factor = -0.5 * ratio * 0.5 ** (3 - place)
        wanted = factor * grads["encoder"][name]["kernel"]
        np.testing.assert_array_equal(updates["encoder"][name]["kernel"], wanted)
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.5 * grads["head"]["kernel"])


def test_layer_decay_needs_depths():
    with pytest.raises(ConfigError, match="layer_decay needs the depth"):
        make_optimizer(sgd(layer_decay=0.9), **LENGTH)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_separate_rates_are_two_optimizers(name):
    """The encoder as if alone with its rate, the head with its own; schedule and decay too."""
    both = OptimizerConfig(
        name=name, learning_rate=0.1, encoder_learning_rate=0.01, warmup_epochs=0.3,
        weight_decay=0.2 if name == "adamw" else 0.0,
    )  # fmt: skip
    slow = dataclasses.replace(both, learning_rate=0.01, encoder_learning_rate=None)
    fast = dataclasses.replace(both, encoder_learning_rate=None)
    after = []
    for config in (both, slow, fast):
        optimizer = make_optimizer(config, **LENGTH)
        params = {"encoder": {"w": jnp.array([1.0, -2.0])}, "head": {"v": jnp.array([0.5])}}
        state = optimizer.init(params)
        for _ in range(4):
            updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        after.append(params)
    np.testing.assert_allclose(after[0]["encoder"]["w"], after[1]["encoder"]["w"], rtol=1e-6)
    np.testing.assert_allclose(after[0]["head"]["v"], after[2]["head"]["v"], rtol=1e-6)
    assert max_relative(after[1], after[2]) > 1e-3


def toy_run(steps, optimizer, frozen=frozenset(), **config):
    grid = PatchGrid(13, 9, 4)
    problem = toy_problem(grid, PatchGDConfig(**config), frozen=frozen)
    return outer_steps(problem, optimizer, KEY, *(toy_batch(i, grid) for i in range(steps)))[0]


def test_the_average_is_its_closed_form(float64):
    """d^n p_0 + (1 - d) sum_i d^(n - i) p_i, one update a step."""
    decay, steps = 0.7, 5
    states = toy_run(steps, with_ema(optax.adam(0.05), decay))
    weights = [decay**steps] + [(1 - decay) * decay ** (steps - i) for i in range(1, steps + 1)]
    wanted = jax.tree.map(
        lambda *p: sum(w * x for w, x in zip(weights, p, strict=True)), *(s.params for s in states)
    )
    assert max_relative(ema_params(states[-1]), wanted) < 1e-12
    # It takes no part in the training.
    plain = toy_run(steps, optax.adam(0.05))
    assert max_relative(states[-1].params, plain[-1].params) == 0
    assert ema_params(plain[-1]) is plain[-1].params


def test_the_average_starts_from_parameters_that_were_replaced(float64):
    optimizer = with_ema(optax.sgd(0.1), 0.9)
    before, after = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, -1.0])}
    state = optimizer.init(before)
    _, state = optimizer.update({"w": jnp.ones(2)}, state, after)
    np.testing.assert_allclose(state.average["w"], after["w"] - 0.1 * 0.1, rtol=1e-12)


@pytest.mark.parametrize("mode", ["patchgd", "accumulate", "exact", "full"])
def test_a_frozen_entry_changes_nothing_but_itself(float64, mode):
    """The others get the gradient they have anyway; the frozen one has none and stays."""
    frozen = frozenset({"w1"})
    config = {"mode": mode, "fraction": 0.5}
    free = toy_run(1, recording_sgd(0.0), **config)
    held = toy_run(1, recording_sgd(0.0), frozen, **config)
    assert set(held[1].opt_state["encoder"]) == {"b1", "w2"}
    wanted = free[1].opt_state
    wanted = {**wanted, "encoder": {k: wanted["encoder"][k] for k in ("b1", "w2")}}
    assert max_relative(held[1].opt_state, wanted) < 1e-12
    moved = toy_run(3, with_ema(optax.adam(0.1), 0.5), frozen, **config)
    before, after = moved[0].params["encoder"], moved[3].params["encoder"]
    np.testing.assert_array_equal(after["w1"], before["w1"])
    assert max_relative(after["w2"], before["w2"]) > 0
    average = ema_params(moved[3])
    assert jax.tree.structure(average) == jax.tree.structure(moved[3].params)
    np.testing.assert_array_equal(average["encoder"]["w1"], before["w1"])


def test_freezing_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="the encoder has no w9 to freeze"):
        toy_run(1, optax.sgd(0.1), frozenset({"w9"}))


def tune(**optimizer):
    return TrainConfig(
        data=DataConfig(
            digits="font", size=(32, 32), digit_count=1, label_share=1.0, object_ratio=(0.8, 1.0),
            train_size=64, val_size=10,
        ),
        model=ModelConfig(latent_dim=8, head="transformer"),
        patchgd=PatchGDConfig(patch=16, fraction=0.5, mode="patchgd"),
        optimizer=OptimizerConfig(**optimizer),
        task=TaskConfig("ordinal", 0.1, (1.0,) * 9 + (2.0,)),
        augment=AugmentConfig(flips=True, contrast=0.2, same_draw=True),
        batch_size=8, eval_batch_size=10, eval_every=4, save_every=2,
    )  # fmt: skip


def test_everything_at_once_compiles_once_and_keeps_frozen_stages():
    config = tune(freeze_stages=2, layer_decay=0.7, ema_decay=0.9, encoder_learning_rate=1e-2)
    grid = PatchGrid(32, 32, 16)
    model = build_model(config.model, grid=grid, channels=1, classes=9, mean=0.5, std=0.3)
    optimizer, frozen = make_run_optimizer(config, config.data.train_size), run_frozen(config)
    assert frozen == {"Stage_0", "Stage_1"}
    task = make_task(config.task, 10)
    problem = Problem(model, grid, config.patchgd, task, config.augment, frozen=frozen)
    state = jax.jit(partial(init_state, problem, optimizer))(KEY)
    first = jax.device_get(state)
    stored = set(state.opt_state.average["encoder"]) | set(
        next(s for s in jax.tree.leaves(state.opt_state.inner, is_leaf=lambda s: hasattr(s, "mu"))
             if hasattr(s, "mu")).mu["encoder"]
    )  # fmt: skip
    assert stored == {"Stage_2", "Stage_3", "Dense_0"}
    traces = []

    def counted(state, batch, key):
        traces.append(1)
        return train_step(problem, optimizer, state, batch, key)

    step = quick(counted, donate_argnums=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        image = rng.integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
        batch = {"image": image, "label": rng.integers(10, size=4).astype(np.int32)}
        state, metrics = step(state, batch, KEY)
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for name, before in first.params["encoder"].items():
        change = max_relative(state.params["encoder"][name], before)
        assert change == 0 if name in frozen else change > 0, name


def test_an_averaged_run_is_evaluated_by_its_average_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("patchgd_jax.engine.resident.compiler_options", lambda: UNOPTIMISED)
    config = tune(freeze_stages=1, ema_decay=0.8, learning_rate=3e-3)
    # Less to compile.
    model = ModelConfig(latent_dim=8, remat="none")
    config = dataclasses.replace(config, model=model, patchgd=PatchGDConfig(patch=16, fraction=0.5))
    summary = train(config, tmp_path / "straight")

    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", on_step=stop_at(6))
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")

    model = TrainedModel(tmp_path / "straight", "last")
    metrics = model.evaluate()
    assert {k: v for k, v in metrics.items() if k != "recorded"} == summary["last"]
    assert metrics["mae"] >= 0
    checkpoints = Checkpoints(tmp_path / "straight" / "checkpoints")
    arrays = checkpoints.restore_arrays(model.step)
    average = arrays["opt_state"]["average"]
    params = model.weights.params
    assert max_relative(params["head"], average["head"]) == 0
    assert max_relative(params["head"], arrays["params"]["head"]) > 1e-4
    assert "Stage_0" not in average["encoder"]
    first = arrays["params"]["encoder"]["Stage_0"]
    assert max_relative(params["encoder"]["Stage_0"], first) == 0

    # Another run may start from it, and starts from the average.
    start = starting_point(TrainConfig(init_encoder=str(tmp_path / "straight")), Progress())
    like = jax.tree.map(jnp.zeros_like, params)
    taken, _ = start.into(like, model.weights.batch_stats)
    arrays = checkpoints.restore_arrays(checkpoints.best())
    wanted = {**arrays["params"]["encoder"], **arrays["opt_state"]["average"]["encoder"]}
    assert max_relative(taken["encoder"], wanted) == 0


@pytest.mark.slow
def test_the_command_line_tunes_and_predicts(command, tmp_path):
    """New flags: grades, frozen stages, rates, averages, augmentation."""
    flags = [
        "--data.task", "digit-sum", "--data.size", 64, 64, "--data.object-ratio", 0.1, 0.3,
        "--model.head", "transformer", "--task.name", "ordinal", "--task.label-smoothing", 0.05,
        "--task.class-weights", *[1] * 9, 2, "--optimizer.freeze-stages", 1,
        "--optimizer.layer-decay", 0.8, "--optimizer.encoder-learning-rate", 5e-4,
        "--optimizer.ema-decay", 0.5, "--augment.flips", "--augment.brightness", 0.1,
        "--augment.same-draw", "--data.train-size", 32, "--model.remat", "none",
    ]  # fmt: skip
    result = command("train", *MICRO, *flags, "--run-dir", "tuned")
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["task"]["class_weights"] == [1.0] * 9 + [2.0]
    summary = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert {"mae", "quadratic_weighted_kappa"} <= set(summary["best"])
    model = TrainedModel(tmp_path / "tuned")
    assert model.weights.params["head"]["Dense_9"]["bias"].shape == (9,)
    (answer,) = model.predict_files([tmp_path / "tuned" / "examples" / "0_label_0.png"])
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-9
    assert len(answer["probabilities"]) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(layer_decay=-0.5), r"layer_decay is -0.5; it must be in \(0, 1\]"),
        (lambda: OptimizerConfig(layer_decay=1.5), "layer_decay is 1.5"),
        (lambda: OptimizerConfig(encoder_learning_rate=0.0), "encoder_learning_rate is 0.0"),
        (lambda: OptimizerConfig(ema_decay=1.0), "ema_decay is 1.0"),
        (lambda: OptimizerConfig(freeze_stages=-1), "freeze_stages is -1"),
        (lambda: run_frozen(tune(freeze_stages=5)), "is 5, but the encoder has 4 stages"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
