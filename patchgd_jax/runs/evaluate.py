"""Scores a model on a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np

from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.engine.distributed import watchdog

EvalStep = Callable[[Mapping[str, np.ndarray]], dict[str, Any]]


class Results:
    """The examples of an evaluation; metrics are computed over all of them at once."""

    def __init__(self) -> None:
        self._batches: list[dict[str, np.ndarray]] = []

    def add(self, out: Mapping[str, np.ndarray]) -> int:
        """Adds a batch without its padding, and returns the number of its examples.

        Args:
            out: what `eval_step` gives per example, and `label` and `weight` of the batch; examples
                of weight 0 are padding.
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
    eval_step: EvalStep,
    source: ExampleSource,
    batches: Generator[dict[str, np.ndarray], None, None],
    *,
    task: Task = SINGLE_LABEL,
    on_batch: Callable[[int], bool] = lambda done: True,
) -> dict[str, Any] | None:
    """Evaluates every example of the source once.

    Args:
        eval_step: `Executor.evaluate` of a batch that is still on the host.
        source: the examples.
        batches: all of them, from `eval_batches`; closed at the end.
        task: that of the step; it has the metrics.
        on_batch: called with the number of examples done; False stops the evaluation.

    Returns:
        `Results.summary`, and `bad_images` if any were left out; or None if it was stopped.
    """
    results = Results()
    waiting: dict[str, Any] | None = None
    done = 0
    # device_get, not np.asarray: the latter would hold back a Ctrl-C until the step is done.
    with closing(batches):
        for batch in batches:
            with watchdog():
                out = eval_step(batch)
                # The batch before, while the device is busy with this one.
                if waiting is not None:
                    done += results.add(jax.device_get(waiting))
            waiting = out
            if not on_batch(done):
                return None
    assert waiting is not None
    with watchdog():
        done += results.add(jax.device_get(waiting))
    on_batch(done)
    summary = results.summary(task, len(source.class_names))
    return summary if done == len(source) else {**summary, "bad_images": len(source) - done}
