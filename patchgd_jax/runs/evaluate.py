"""Scores a model on a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np

from patchgd_jax.core.metrics import Results
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.engine.distributed import watched

EvalStep = Callable[[Mapping[str, np.ndarray]], dict[str, Any]]


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

    def collect(out: dict[str, Any]) -> int:
        # device_get, not np.asarray: the latter would hold back a Ctrl-C until the step is done.
        out = jax.device_get(out)
        results.add(
            loss=out["loss"],
            label=out["label"],
            prediction=out["prediction"],
            outputs=out["logits"],
            weight=out["weight"],
        )
        return int(out["weight"].sum())

    with closing(batches):
        for batch in batches:
            with watched():
                out = eval_step(batch)
                # The batch before, while the device is busy with this one.
                if waiting is not None:
                    done += collect(waiting)
            waiting = out
            if not on_batch(done):
                return None
    assert waiting is not None
    with watched():
        done += collect(waiting)
    on_batch(done)
    summary = results.summary(task, source.num_classes)
    return summary if done == len(source) else {**summary, "bad_images": len(source) - done}
