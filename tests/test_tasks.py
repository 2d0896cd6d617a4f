"""Losses, predictions and metrics of each kind of label, against their formulas."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from toy import max_relative, outer_steps, quick, recording_sgd, toy_problem

from patchgd_jax import (
    ConfigError,
    PatchGDConfig,
    PatchGrid,
    Problem,
    TaskConfig,
    TrainConfig,
    Weights,
    eval_step,
    from_linen,
    make_task,
)
from patchgd_jax.core.tasks import MultiLabel, Ordinal, Regression, SingleLabel
from patchgd_jax.models.heads.simple import LinearHead
from patchgd_jax.runs.evaluate import Results

KEY = jax.random.key(11)
WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)


def logits_and(labels, outputs=5, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(len(labels), outputs)), np.asarray(labels)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(float64, smoothing, weights):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.CrossEntropyLoss")
    logits, labels = logits_and([0, 4, 2, 1, 3, 1])
    got = SingleLabel(smoothing, weights).loss(jnp.asarray(logits), labels)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
        reduction="none",
    )
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-12, atol=1e-12)


def test_smoothed_cross_entropy_is_the_formula(float64):
    """-sum_c q_c w_c log p_c with q = (1 - e) one-hot + e / K."""
    logits, labels = logits_and([3, 0, 4])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = []
    for row, label in zip(p, labels, strict=True):
        q = [0.8 * (c == label) + 0.2 / 5 for c in range(5)]
        wanted.append(-sum(q[c] * WEIGHTS[c] * np.log(row[c]) for c in range(5)))
    got = SingleLabel(0.2, WEIGHTS).loss(jnp.asarray(logits), labels)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_multi_label_is_pytorchs(float64, weights):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.BCEWithLogitsLoss")
    logits = logits_and(range(4))[0]
    labels = np.random.default_rng(1).random((4, 5)) < 0.4
    got = MultiLabel(0.0, weights).loss(jnp.asarray(logits), labels)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits),
        torch.tensor(labels, dtype=torch.float64),
        pos_weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        reduction="none",
    )
    np.testing.assert_allclose(got, wanted.mean(-1).numpy(), rtol=1e-12, atol=1e-12)
    # Smoothing is a target in between.
    got = MultiLabel(0.2, weights).loss(jnp.asarray(logits), labels)
    soft = MultiLabel(0.0, weights).loss(jnp.asarray(logits), 0.8 * labels + 0.1)
    np.testing.assert_allclose(got, soft, rtol=1e-12)


def test_the_ordinal_loss_is_minus_the_log_of_the_grades_chance(float64):
    """With CORN's conditional chances multiplied out by hand."""
    logits, labels = logits_and([0, 4, 2, 1, 3, 4], outputs=4)
    f = 1 / (1 + np.exp(-logits))
    chance = np.zeros((6, 5))
    for i in range(6):
        for grade in range(5):
            chance[i, grade] = np.prod(f[i, :grade]) * (1 - f[i, grade] if grade < 4 else 1)
    task = Ordinal()
    np.testing.assert_allclose(chance.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(task.probabilities(logits), chance, rtol=1e-10, atol=1e-15)
    wanted = -np.log(chance[np.arange(6), labels])
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), labels), wanted, rtol=1e-12)
    weighted = Ordinal(0.0, WEIGHTS).loss(jnp.asarray(logits), labels)
    np.testing.assert_allclose(weighted, wanted * np.array(WEIGHTS)[labels], rtol=1e-12)


def test_the_ordinal_loss_is_the_papers_over_examples(float64):
    """Section 3.3 of arXiv 2111.08851: conditional subsets, question by question."""
    logits, labels = logits_and([0, 3, 2, 1, 3], outputs=3)
    total = 0.0
    for j in range(3):
        for i in np.flatnonzero(labels > j - 1):
            log_f = -np.log1p(np.exp(-logits[i, j]))
            total -= log_f if labels[i] > j else log_f - logits[i, j]
    got = Ordinal().loss(jnp.asarray(logits), labels)
    np.testing.assert_allclose(got.sum(), total, rtol=1e-12)
    smooth = Ordinal(0.2).loss(jnp.asarray(logits), labels)
    by_hand = 0.0
    for i, label in enumerate(labels):
        for j in range(min(label, 2) + 1):
            f = 1 / (1 + np.exp(-logits[i, j]))
            target = 0.9 if label > j else 0.1
            by_hand -= target * np.log(f) + (1 - target) * np.log(1 - f)
    np.testing.assert_allclose(smooth.sum(), by_hand, rtol=1e-12)


def test_ordinal_predictions_are_medians():
    logits = np.log(np.array([[9.0, 9, 9], [9, 0.1, 9], [0.1, 9, 9], [2, 2, 2], [9, 4, 0.5]]))
    above = np.cumprod(1 / (1 + np.exp(-logits)), axis=1)
    np.testing.assert_array_equal(Ordinal().predict(jnp.asarray(logits)), (above > 0.5).sum(1))
    np.testing.assert_array_equal(Ordinal().predict(jnp.asarray(logits)), [3, 1, 0, 1, 2])


def test_regression_is_squared_error():
    outputs, labels = np.array([[1.5], [-2.0]], np.float32), np.array([1.0, 1.0], np.float32)
    np.testing.assert_allclose(Regression().loss(outputs, labels), [0.25, 9])
    np.testing.assert_allclose(Regression().score(outputs, labels), [0.5, 3])


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("single-label", 6), ("multi-label", 6), ("ordinal", 5), ("regression", 1)],
)
def test_number_of_outputs(name, outputs):
    assert make_task(TaskConfig(name), 6).num_outputs(6) == outputs


def summary(task, outputs, labels, classes):
    results = Results()
    outputs = jnp.asarray(outputs)
    plain = task.for_evaluation()
    out = {"loss": plain.loss(outputs, labels), "prediction": task.predict(outputs)}
    results.add({**out, "logits": outputs, "label": labels, "weight": np.ones(len(labels))})
    return results.summary(task, classes)


def test_multi_label_metrics_equal_the_loops():
    rng = np.random.default_rng(2)
    outputs, labels = rng.normal(size=(30, 4)).astype(np.float32), rng.random((30, 4)) < 0.3
    labels[:, 3] = False
    got = summary(MultiLabel(), outputs, labels, 4)
    precisions, f1s = [], []
    for label in range(3):
        order = np.argsort(-outputs[:, label])
        hits, found = 0, []
        for rank, example in enumerate(order, 1):
            if labels[example, label]:
                hits += 1
                found.append(hits / rank)
        precisions.append(np.mean(found))
        said = outputs[:, label] > 0
        right = (said & labels[:, label]).sum()
        p, r = right / said.sum(), right / labels[:, label].sum()
        f1s.append(2 * p * r / (p + r))
    assert got["average_precision"][3] is None
    assert got["f1"][3] is None
    np.testing.assert_allclose(got["average_precision"][:3], precisions, rtol=1e-12)
    np.testing.assert_allclose(got["f1"][:3], f1s, rtol=1e-12)
    np.testing.assert_allclose(got["mean_average_precision"], np.mean(precisions))
    np.testing.assert_allclose(got["mean_f1"], np.mean(f1s))
    np.testing.assert_allclose(got["accuracy"], ((outputs > 0) == labels).mean())
    assert MultiLabel().rank(got) == got["mean_average_precision"]
    nothing = summary(MultiLabel(), outputs, np.zeros_like(labels), 4)
    assert nothing["mean_f1"] is None
    assert MultiLabel().rank(nothing) == -np.inf


def test_regression_and_ordinal_metrics():
    outputs, labels = np.array([[1.5], [-2], [0]], np.float32), np.float32([1, 1, 0])
    got = summary(Regression(), outputs, labels, 1)
    np.testing.assert_allclose([got["mae"], got["rmse"]], [3.5 / 3, np.sqrt(9.25 / 3)], rtol=1e-6)
    assert Regression().rank({"mae": 1.0}) > Regression().rank({"mae": 2.0})
    grades = np.log(np.array([[9.0, 9, 9], [9, 0.1, 9], [0.1, 9, 9]]))
    got = summary(Ordinal(), grades, np.array([1, 1, 0]), 4)
    np.testing.assert_allclose(got["mae"], 2 / 3)
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert Ordinal().rank(got) == got["quadratic_weighted_kappa"]


LABELS = {
    "single-label": np.array([2, 0, 1, 3], np.int32),
    "ordinal": np.array([2, 0, 1, 3], np.int32),
    "multi-label": np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool),
    "regression": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
}


class _Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.tanh(nn.Dense(6)(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize("name", LABELS)
def test_every_task_trains_and_is_evaluated(name):
    task = make_task(TaskConfig(name), 4)
    grid = PatchGrid(8, 12, 4)
    model = from_linen(_Encoder(), LinearHead(task.num_outputs(4)), grid=grid, channels=1)
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (4, 8, 12, 1), dtype=np.uint8),
        "label": LABELS[name],
        "weight": np.array([1, 1, 1, 0], np.float32),
    }
    assert task.label_spec(4, 4).shape == batch["label"].shape
    problem = Problem(model, grid, PatchGDConfig(fraction=0.5, mode="patchgd"), task)
    states, metrics = outer_steps(problem, optax.adam(0.05), KEY, *[batch] * 8)
    common = {"loss", "grad_norm", "param_norm", "z_age", "z_drift"}
    assert set(metrics[-1]) == {*common, task.training_metric}
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    out = quick(partial(eval_step, problem))(states[-1].weights, batch)
    assert out["prediction"].shape == batch["label"].shape
    assert out["loss"].shape == (4,)
    np.testing.assert_allclose(out["loss"], task.loss(out["logits"], batch["label"]), rtol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "full", "accumulate"])
def test_the_loss_is_the_tasks_in_every_mode(float64, mode):
    """The gradient against finite differences of the loss written out."""
    grid = PatchGrid(8, 8, 4)
    rng = np.random.default_rng(3)
    batch = {"image": rng.random((2, 8, 8, 2)), "label": rng.random((2, 3)) < 0.5}
    task = MultiLabel(0.1, (1.0, 2.0, 0.5))
    config = PatchGDConfig(mode=mode, fraction=0.5, encoder_grad_scale="unbiased")
    problem = toy_problem(grid, config, task=task)
    (state, after), _ = outer_steps(problem, recording_sgd(0.0), KEY, batch)
    params = state.params

    @quick
    def loss(params):
        out = eval_step(problem, Weights(params, state.batch_stats), batch)
        return task.loss(out["logits"], batch["label"]).mean()

    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    ahead, behind = (
        jax.tree.map(lambda p, d, s=sign: p + s * 1e-6 * d, params, direction) for sign in (1, -1)
    )
    slope = (loss(ahead) - loss(behind)) / 2e-6
    parts = jax.tree.map(lambda g, d: (g * d).sum(), after.opt_state, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), slope, rtol=1e-7)


def test_evaluation_is_without_smoothing_and_weights():
    task = SingleLabel(0.3, (1.0, 5.0, 1.0, 1.0))
    assert task.for_evaluation() == SingleLabel()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task(TaskConfig("singel-label"), 3), "did you mean 'single-label'"),
        (lambda: make_task(TaskConfig(label_smoothing=1.0), 3), "task.label_smoothing is 1.0"),
        (
            lambda: make_task(TaskConfig(class_weights=(1.0, 2.0)), 3),
            "task.class_weights has 2 values, but the data have 3 classes",
        ),
        (lambda: make_task(TaskConfig(class_weights=(1.0, -2.0)), 2), "not negative"),
        (lambda: make_task(TaskConfig(class_weights=(0.0, 0.0)), 2), "not all 0"),
        (lambda: make_task(TaskConfig("ordinal"), 1), "at least 2 classes, not 1"),
        (lambda: make_task(TaskConfig("regression", 0.1), 1), "the task regression has none"),
        (lambda: TrainConfig(task=TaskConfig("multi-label")), "these images have one class each"),
        (lambda: Regression().probabilities(np.zeros((1, 1))), "gives no probabilities"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "message"),
    [
        (SingleLabel(), 4, np.zeros(3), r"shape \[3\], integers; these are float64 of shape \[3\]"),
        (SingleLabel(), 4, np.zeros((3, 4), int), r"these are int64 of shape \[3, 4\]"),
        (SingleLabel(0, (1.0, 1.0)), 4, np.zeros(3, int), "2 values, but the data have 4"),
        (Ordinal(), 3, np.zeros(3), "the task ordinal needs labels of shape"),
        (Ordinal(0, (1.0, 1.0)), 3, np.zeros(3, int), "2 values, but the data have 4"),
        (MultiLabel(), 4, np.zeros(3, int), r"shape \[3, 4\], 0 and 1"),
        (MultiLabel(), 4, np.zeros((3, 5), int), r"of shape \[3, 5\]"),
        (Regression(), 1, np.zeros(3, int), "the task regression needs labels of shape"),
        (Regression(), 1, np.zeros((3, 1)), r"float64 of shape \[3, 1\]"),
    ],
)
def test_labels_of_another_kind_are_named(task, outputs, labels, message):
    with pytest.raises(ConfigError, match=message):
        task.loss(jnp.zeros((3, outputs)), labels)


def test_the_default_is_plain_cross_entropy():
    logits, labels = logits_and([1, 2, 0])
    logits = jnp.asarray(logits, jnp.float32)
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert max_relative(SingleLabel().loss(logits, labels), wanted) == 0
