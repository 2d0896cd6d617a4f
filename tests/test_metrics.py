"""Metrics against loops written out."""

from __future__ import annotations

import numpy as np

from patchgd_jax.core.tasks import SINGLE_LABEL
from patchgd_jax.runs.evaluate import Results


def slow_metrics(labels, predictions, classes):
    confusion = np.zeros((classes, classes), int)
    for a, b in zip(labels, predictions, strict=True):
        confusion[a, b] += 1
    recalls = [confusion[c, c] / confusion[c].sum() for c in range(classes) if confusion[c].sum()]
    disagreement = expected = 0.0
    n = len(labels)
    for a in range(classes):
        for b in range(classes):
            disagreement += (a - b) ** 2 * confusion[a, b] / n
            expected += (a - b) ** 2 * confusion[a].sum() * confusion[:, b].sum() / n**2
    return confusion, np.mean(recalls), 1 - disagreement / expected


def test_summary_equals_the_loops_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(5, size=40), rng.integers(6, size=40)
    losses, weights = rng.random(40).astype(np.float32), np.ones(40, np.float32)
    weights[37:] = 0
    results = Results()
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):
        out = {"loss": losses, "label": labels, "prediction": predictions, "logits": losses}
        results.add({name: values[part] for name, values in {**out, "weight": weights}.items()})
    got = results.summary(SINGLE_LABEL, 6)
    confusion, balanced, kappa = slow_metrics(labels[:37], predictions[:37], 6)
    assert got["confusion_matrix"] == confusion.tolist()
    assert got["examples"] == 37
    np.testing.assert_allclose(got["loss"], np.float64(losses[:37]).mean(), rtol=1e-12)
    np.testing.assert_allclose(got["accuracy"], (labels == predictions)[:37].mean())
    np.testing.assert_allclose(got["balanced_accuracy"], balanced)
    np.testing.assert_allclose(got["quadratic_weighted_kappa"], kappa)


def test_kappa_is_undefined_where_everything_is_alike():
    results = Results()
    ones = np.ones(3, np.int64)
    results.add({"loss": ones, "label": ones, "prediction": ones, "logits": ones, "weight": ones})
    assert results.summary(SINGLE_LABEL, 4)["quadratic_weighted_kappa"] is None
    assert results.summary(SINGLE_LABEL, 4)["accuracy"] == 1
