"""Scores a model on a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from patchgd_jax.data.pipeline import ExampleSource, eval_batches
from patchgd_jax.metrics import Results
from patchgd_jax.patch_model import Parts
from patchgd_jax.tasks import SINGLE_LABEL, Task

EvalStep = Callable[[Parts, Parts, Mapping[str, jax.Array]], dict[str, jax.Array]]


def evaluate(
    eval_step: EvalStep,
    params: Parts,
    model_state: Parts,
    source: ExampleSource,
    *,
    batch_size: int,
    task: Task = SINGLE_LABEL,
    on_batch: Callable[[int], bool] = lambda done: True,
) -> dict[str, Any] | None:
    """Evaluates every example of the source once.

    Args:
        eval_step: jitted `patchgd_jax.step.eval_step`, of params, model state and batch.
        params: of both parts.
        model_state: of both parts.
        source: the examples.
        batch_size: B of the compiled step; the last batch is padded to it.
        task: that of the step; it has the metrics.
        on_batch: called with the number of examples done; False stops the evaluation.

    Returns:
        `Results.summary`, or None if it was stopped.
    """
    results = Results()
    waiting: tuple[dict[str, np.ndarray], dict[str, jax.Array]] | None = None

    def collect(batch: dict[str, np.ndarray], out: dict[str, Any]) -> None:
        # device_get, not np.asarray: the latter would hold back a Ctrl-C until the step is done.
        out = jax.device_get(out)
        results.add(
            loss=out["loss"],
            label=batch["label"],
            prediction=out["prediction"],
            outputs=out["logits"],
            weight=batch["weight"],
        )

    done = 0
    for batch in eval_batches(source, batch_size):
        out = eval_step(params, model_state, jax.device_put(batch))
        if waiting is not None:
            collect(*waiting)
        waiting = (batch, out)
        done += int(batch["weight"].sum())
        if not on_batch(done):
            return None
    assert waiting is not None
    collect(*waiting)
    return results.summary(task, source.num_classes)
