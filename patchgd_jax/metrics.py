"""What an evaluation reports, from per-example results gathered on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Results:
    """Per-example results of an evaluation, added up exactly: no mean of means."""

    losses: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    predictions: list[np.ndarray] = field(default_factory=list)

    def add(
        self, *, loss: np.ndarray, label: np.ndarray, prediction: np.ndarray, weight: np.ndarray
    ) -> None:
        """Adds a batch, all `[B]`; examples of weight 0 are padding and left out."""
        real = weight > 0
        self.losses.append(np.asarray(loss, np.float64)[real])
        self.labels.append(np.asarray(label)[real])
        self.predictions.append(np.asarray(prediction)[real])

    def summary(self, num_classes: int) -> dict[str, Any]:
        """The metrics.

        Returns:
            `loss` (mean cross-entropy in nats), `accuracy`, `balanced_accuracy` (mean recall of the
            classes that occur), `quadratic_weighted_kappa` (None where it is undefined: all labels
            and predictions alike), `confusion_matrix` (rows: label, columns: prediction) and
            `examples`.
        """
        from sklearn.metrics import cohen_kappa_score, confusion_matrix

        loss = np.concatenate(self.losses)
        label, prediction = np.concatenate(self.labels), np.concatenate(self.predictions)
        classes = np.arange(num_classes)
        confusion = confusion_matrix(label, prediction, labels=classes)
        occurs = confusion.sum(1) > 0
        recall = confusion.diagonal()[occurs] / confusion.sum(1)[occurs]
        kappa: float | None = None
        if len(np.union1d(label, prediction)) > 1:
            kappa = float(cohen_kappa_score(label, prediction, labels=classes, weights="quadratic"))
        return {
            "loss": float(loss.sum() / len(loss)),
            "accuracy": float((label == prediction).sum() / len(label)),
            "balanced_accuracy": float(recall.mean()),
            "quadratic_weighted_kappa": kappa,
            "confusion_matrix": confusion.tolist(),
            "examples": len(label),
        }
