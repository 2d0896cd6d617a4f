"""Evaluates a model on a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np

from patchgd_jax.core.problem import Weights
from patchgd_jax.core.tasks import Task
from patchgd_jax.data.loading.bad_images import OnBad
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.engine.base import Executor
from patchgd_jax.engine.distributed import watchdog


class Results:
    """The examples of an evaluation; metrics are computed over all of them at once."""

    def __init__(self) -> None:
        self._batches: list[dict[str, np.ndarray]] = []

    def add(self, out: Mapping[str, np.ndarray]) -> int:
        """Adds the results of `Executor.evaluate` without padding; returns the number of examples.

        Examples of weight 0 are padding.
        """
        valid = np.asarray(out["weight"]) > 0
        names = ("loss", "label", "prediction", "logits")
        self._batches.append({name: np.asarray(out[name])[valid] for name in names})
        return int(valid.sum())

    def summary(self, task: Task, classes: int) -> dict[str, Any]:
        """Computes `loss` (the mean), the metrics of the task, and `examples`."""
        values = {
            name: np.concatenate([batch[name] for batch in self._batches])
            for name in self._batches[0]
        }
        return {
            "loss": float(values["loss"].astype(np.float64).mean()),
            **task.summary(
                labels=values["label"],
                predictions=values["prediction"],
                outputs=values["logits"],
                classes=classes,
            ),
            "examples": len(values["loss"]),
        }


def evaluate(
    executor: Executor,
    source: ExampleSource,
    weights: Weights,
    on_bad: OnBad,
    on_batch: Callable[[int], bool],
) -> dict[str, Any] | None:
    """Evaluates every example of the source once.

    Args:
        executor: evaluates the batches; its task defines the metrics.
        source: the examples.
        weights: of the model.
        on_bad: called for each example that is left out.
        on_batch: called with the number of examples done; False stops the evaluation.

    Returns:
        `Results.summary`, and `bad_images` if any were left out; or None if it was stopped.
    """
    results = Results()
    waiting: dict[str, Any] | None = None
    done = 0
    # device_get, not np.asarray: the latter would hold back a Ctrl-C until the step is done.
    with closing(executor.eval_batches(source, on_bad)) as batches:
        for batch in batches:
            with watchdog():
                out = executor.evaluate(source, weights, batch)
                # The previous batch, while the device is busy with this one.
                if waiting is not None:
                    done += results.add(jax.device_get(waiting))
            waiting = out
            if not on_batch(done):
                return None
    assert waiting is not None
    with watchdog():
        done += results.add(jax.device_get(waiting))
    on_batch(done)
    summary = results.summary(executor.setup.task, len(source.class_names))
    return summary if done == len(source) else {**summary, "bad_images": len(source) - done}
