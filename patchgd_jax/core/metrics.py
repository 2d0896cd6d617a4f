"""Metrics of an evaluation, from the labels and predictions of all its examples on the host."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification(label: np.ndarray, prediction: np.ndarray, classes: int) -> dict[str, Any]:
    """Computes metrics of one class per example; label and prediction are `int [n]`.

    Returns:
        `accuracy`, `balanced_accuracy` (mean recall of the classes that occur),
        `quadratic_weighted_kappa` (None where it is undefined: all labels and predictions alike)
        and `confusion_matrix` (rows: label, columns: prediction).
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    every = np.arange(classes)
    confusion = confusion_matrix(label, prediction, labels=every)
    occurs = confusion.sum(1) > 0
    recall = confusion.diagonal()[occurs] / confusion.sum(1)[occurs]
    kappa: float | None = None
    if len(np.union1d(label, prediction)) > 1:
        kappa = float(cohen_kappa_score(label, prediction, labels=every, weights="quadratic"))
    return {
        "accuracy": float((label == prediction).sum() / len(label)),
        "balanced_accuracy": float(recall.mean()),
        "quadratic_weighted_kappa": kappa,
        "confusion_matrix": confusion.tolist(),
    }


def multi_label(label: np.ndarray, prediction: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Computes metrics of K yes-or-no labels, `bool [n, K]`, with `score float [n, K]`.

    Returns:
        `accuracy` (share of right answers), `average_precision` and `f1` per label (None for a
        label that no example has), and their means over the other labels, `mean_average_precision`
        and `mean_f1` (None if there are none).
    """
    from sklearn.metrics import average_precision_score

    precision: list[float | None] = []
    f1: list[float | None] = []
    for wanted, got, ranked in zip(label.T, prediction.T, score.T, strict=True):
        if not wanted.any():
            precision.append(None)
            f1.append(None)
            continue
        precision.append(float(average_precision_score(wanted, ranked)))
        f1.append(float(2 * (wanted & got).sum() / (wanted.sum() + got.sum())))

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return {
        "accuracy": float((label == prediction).mean()),
        "average_precision": precision,
        "mean_average_precision": mean(precision),
        "f1": f1,
        "mean_f1": mean(f1),
    }


def regression(label: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
    """Metrics of one number per example, `float [n]` each: `mae` and `rmse`, in its unit."""
    error = prediction.astype(np.float64) - label
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt(np.square(error).mean()))}
