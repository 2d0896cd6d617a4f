"""A rehearsal of a run: everything that can fail is tried once, and no run folder is left."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patchgd_jax.auto_settings import settled
from patchgd_jax.checkpoint import Checkpoints
from patchgd_jax.config import TrainConfig
from patchgd_jax.errors import CheckpointError
from patchgd_jax.experiment import evaluation_batches, training_batches
from patchgd_jax.memory import PeakMeter, show_size
from patchgd_jax.out_of_memory import out_of_memory_told
from patchgd_jax.progress import Progress
from patchgd_jax.run_plan import plan_of
from patchgd_jax.signals import StopRequest
from patchgd_jax.step import TrainState, evaluated_params
from patchgd_jax.train import Run

_STEPS = 2


def dry_run(
    config: TrainConfig, progress: Progress | None = None, *, budget: str | None = None
) -> dict[str, int | None]:
    """Compiles a run, trains two steps, evaluates a batch, saves, restores and compares.

    Args:
        config: the run.
        progress: shows how it goes; silent by default.
        budget: as `train`'s.

    Returns:
        Bytes of a training step: `formula`, `compiled` (the largest of the run's own programs, by
        XLA), `expected` (that with the calibration), and `measured`, None where the system does
        not tell.

    Raises:
        PatchGDError: as `train`, and if what is restored is not what was saved.
    """
    progress = progress or Progress()
    with StopRequest() as stop, stop.immediate(), tempfile.TemporaryDirectory() as folder:
        config = settled(config, budget, progress)
        with out_of_memory_told(config, folder):
            return _rehearse(config, progress, Path(folder))


def _rehearse(config: TrainConfig, progress: Progress, folder: Path) -> dict[str, int | None]:
    plan = plan_of(config)
    formula = plan.by_formula(plan.requests[0])
    run = Run(config, None, progress, None)
    state = run.first_state()
    programs = run.compile(state)
    compiled = max(_total(p.train) for p in programs.values())
    expected = plan.expected(plan.requests[0], compiled)

    def on_bad(index: int, path: str, reason: str) -> None:
        progress.warn(f"left out: {path}: {reason}")

    with training_batches(config, run.data.train, 0, on_bad) as reader:
        batches = [next(reader) for _ in range(_STEPS)]
    # State and batches are there already; the meter counts what comes on top of them.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + batches[0]["image"].nbytes
    meter = PeakMeter(run.device)
    for batch in batches:
        state, metrics = programs[batch["image"].shape[1:3]].step(state, batch, run.key)
        jax.block_until_ready(metrics)
    peak = meter.peak()
    if peak is not None and run.device.platform == "cpu":
        peak += held
    batch = next(evaluation_batches(config, run.data.validation, on_bad))
    scores = programs[batch["image"].shape[1:3]].evaluate(
        evaluated_params(state), state.model_state, batch
    )
    jax.block_until_ready(scores)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(_STEPS, state, {})
    count = _compare(state, checkpoints.restore(_STEPS, jax.eval_shape(run.init, run.key)))
    progress.message(
        f"{_STEPS} training steps and an evaluation of {len(batch['id'])} images ran; {count} "
        "arrays were saved and restored, equal bit for bit."
    )
    told = "the system does not tell" if peak is None else show_size(peak)
    progress.message(
        f"Memory of training: {show_size(formula)} planned by formula, {show_size(expected)} by "
        f"XLA ({show_size(compiled)} x {plan.calibration.factor:.2f} and what surrounds it); "
        f"measured: {told}."
    )
    return {"formula": formula, "compiled": compiled, "expected": expected, "measured": peak}


def _total(program: Any) -> int:
    """Bytes of a compiled program with its arguments."""
    analysis = program.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def _compare(saved: TrainState, restored: TrainState) -> int:
    """Checks that all arrays are equal bit for bit, and counts them."""
    pairs = list(zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True))
    for a, b in pairs:
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise CheckpointError(
                "a checkpoint is not restored as it was saved: the folder for temporary files may "
                "be on a faulty disk"
            )
    return len(pairs)
