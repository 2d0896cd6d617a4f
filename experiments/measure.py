"""Memory and speed of a run's training step, without training it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import jax

from patchgd_jax import TrainConfig
from patchgd_jax.baselines.registry import resolve_method
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.io.files import write_json
from patchgd_jax.runs.folder import SUMMARY
from patchgd_jax.runs.out_of_memory import explain_oom
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.record.recorder import peak_memory
from patchgd_jax.runs.run import Run
from patchgd_jax.runs.signals import StopRequest

STEPS = 5
"""Steps that are timed, after one that is not."""


def measure(config: TrainConfig, folder: Path, progress: Progress) -> None:
    """Compiles a run, takes a few steps on one batch, and writes `perf` as a run's summary has it.

    Args:
        config: the run.
        folder: gets `summary.json`.
        progress: shows how it goes.
    """
    config = resolve_method(resolve_channels(config))
    with StopRequest() as stop, stop.immediate(), explain_oom(config, folder):
        run = Run(config, None, progress, None)
        state = run.first_state()
        progress.message(run.executor.compile(state))
        with run.executor.train_batches(0, lambda index, path, reason: None) as batches:
            batch = next(batches)
        seconds = []
        for _ in range(1 + STEPS):
            begun = time.monotonic()
            state, metrics = run.executor.train(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - begun)
        step_bytes = run.executor.compiled_bytes()
        perf = {
            "images_per_s": float(f"{config.images_per_step / statistics.median(seconds[1:]):.4g}"),
            "peak_memory_mib": round(peak_memory(run.device) / 2**20, 1),
            "step_memory_mib": None if step_bytes is None else round(step_bytes / 2**20, 1),
        }
    folder.mkdir(exist_ok=True)
    write_json(folder / SUMMARY, {"perf": perf})
