"""A dry run: tries each part of a run once, and leaves no run folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np

from patchgd_jax.config import TrainConfig
from patchgd_jax.core.update import TrainState, ema_params
from patchgd_jax.data.run_data import ImageFiles
from patchgd_jax.errors import CheckpointError, ConfigError
from patchgd_jax.planner import PeakMeter, show_size
from patchgd_jax.planner.run_plan import plan_of
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.out_of_memory import explain_oom
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.run import Run
from patchgd_jax.runs.signals import StopRequest
from patchgd_jax.runs.train import resolve

_STEPS = 2


def dry_run(
    config: TrainConfig, progress: Progress | None = None, *, budget: str | None = None
) -> dict[str, int | None]:
    """Compiles a run, trains two steps, evaluates a batch, saves, restores and compares.

    Args:
        config: the run.
        progress: shows the progress; silent by default.
        budget: as `train`'s.

    Returns:
        Bytes of a training step: `estimated`, `compiled` (the largest of the run's own programs, by
        XLA), `expected` (that with the calibration), and `measured`, None where the system does
        not count it.

    Raises:
        PatchGDError: as `train`, and if the restored state differs from the saved one.
    """
    progress = progress or Progress()
    with StopRequest() as stop, stop.immediate(), tempfile.TemporaryDirectory() as folder:
        config, files = resolve(config, budget, progress)
        with explain_oom(config, folder):
            return _rehearse(config, files, progress, Path(folder))


def _rehearse(
    config: TrainConfig, files: ImageFiles | None, progress: Progress, folder: Path
) -> dict[str, int | None]:
    run = Run(config, None, progress, None, files)
    state = run.first_state()
    executor, data = run.executor, run.data
    progress.message(executor.compile(state))

    with executor.train_batches(0, progress.left_out) as reader:
        batches = [next(reader) for _ in range(_STEPS)]
    # The meter counts only memory beyond the state and the batches.
    held = sum(leaf.nbytes for leaf in (*jax.tree.leaves(state), *batches[0].values()))
    meter = PeakMeter(run.device)
    for batch in batches:
        state, metrics = executor.train(state, batch)
        jax.block_until_ready(metrics)
    peak = meter.peak()
    if peak is not None and run.device.platform == "cpu":
        peak += held
    batch = next(executor.eval_batches(data.validation, progress.left_out))
    weights = state.weights._replace(params=ema_params(state))
    jax.block_until_ready(executor.evaluate(data.validation, weights, batch))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(_STEPS, state, {})
    count = _compare(state, checkpoints.restore(_STEPS, run.state_spec()))
    progress.message(
        f"{_STEPS} training steps and an evaluation of {len(batch['id'])} images ran; {count} "
        "arrays were saved and restored, equal bit for bit."
    )
    return _report_memory(config, files, executor.compiled_bytes(), peak, progress)


def _report_memory(
    config: TrainConfig,
    files: ImageFiles | None,
    compiled: int | None,
    peak: int | None,
    progress: Progress,
) -> dict[str, int | None]:
    """Reports the measured memory beside the plan."""
    measured = "not counted by this system" if peak is None else show_size(peak)
    figures = {"estimated": None, "compiled": compiled, "expected": None, "measured": peak}
    try:
        plan = plan_of(config, files)
        request = plan.requests[0]
        estimated = plan.estimated(request)
    except ConfigError as error:
        progress.message(f"Memory of training: {measured} measured; no plan: {error}.")
        return figures
    text = f"{show_size(estimated)} estimated"
    expected = None
    if compiled is not None:
        expected = plan.expected(request, compiled)
        text += (
            f", {show_size(expected)} by XLA ({show_size(compiled)} x "
            f"{plan.calibration.factor:.2f} and the needs of the process)"
        )
    progress.message(f"Memory of training: {text}; {measured} measured.")
    return {**figures, "estimated": estimated, "expected": expected}


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
