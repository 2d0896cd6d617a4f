"""Starts and resumes runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optax

from patchgd_jax.baselines.registry import resolve_method
from patchgd_jax.config import TrainConfig
from patchgd_jax.data.run_data import ImageFiles, read_files
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.engine.build import check_settings
from patchgd_jax.engine.distributed import (
    broadcast_from_first,
    check_same,
    is_first,
    raise_together,
)
from patchgd_jax.planner.auto_settings import resolve_auto
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.folder import RunFolder
from patchgd_jax.runs.loop import Loop, OnStep
from patchgd_jax.runs.out_of_memory import explain_oom
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.run import Run
from patchgd_jax.runs.signals import StopRequest


def resolve(
    config: TrainConfig, budget: str | None, progress: Progress
) -> tuple[TrainConfig, ImageFiles | None]:
    """Resolves the settings that depend on the method, the images or the memory, and checks them.

    Returns the config, and its image files if it names any. `budget` is as `train`'s. Raises the
    `PatchGDError` that fits, for wrong names and numbers before reading any data.
    """
    config = resolve_method(config)
    check_settings(config)
    files = read_files(config)
    config = resolve_channels(config, files)
    return resolve_auto(config, budget, progress.message, files), files


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    progress: Progress | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
    budget: str | None = None,
) -> dict[str, Any]:
    """Trains a model from the start.

    Args:
        config: the run.
        run_dir: its folder, which must not hold anything yet.
        progress: shows the progress; silent by default.
        optimizer: replaces the config's, of which freezing and the EMA stay.
        on_step: called after each outer step.
        budget: memory that `auto` settings must fit, such as 8GiB. None: the device's free memory.

    Returns:
        The content of `summary.json`.

    Raises:
        PatchGDError: of the subclass that fits, with its `exit_code`.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    progress = progress or Progress()
    with StopRequest() as stop:
        with stop.immediate():
            # Errors of the config are raised before the folder is made.
            with raise_together():
                RunFolder.check_free(run_dir)
                config, files = resolve(config, budget, progress)
                run = Run(config, None, progress, optimizer, files)
            check_same(run.shared)
            with explain_oom(config, run_dir):
                state = run.first_state()
            with raise_together():
                if is_first():
                    folder = RunFolder.create(run_dir, config, dataclasses.asdict(run.preprocess))
                    run.write_examples(folder)
            with raise_together():
                folder = RunFolder(run_dir)
        with explain_oom(config, run_dir):
            return Loop(run, folder, state, 0, stop, on_step).run()


def resume(
    run_dir: str | Path,
    *,
    progress: Progress | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
    accept_changed_data: bool = False,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Continues a run from its newest intact checkpoint, or from the start if it has none.

    On the CPU the run ends with the same parameters and metrics, bit for bit, as one that was
    never interrupted, unless it reuses latents (`stream.max_age`) or the mesh is another. With
    `accept_changed_data` it continues although images, labels or splits have changed; `mesh`
    replaces the run's (the result is the same up to rounding). Other arguments, result and errors
    are those of `train`.
    """
    progress = progress or Progress()
    with StopRequest() as stop:
        with stop.immediate():
            with raise_together():
                folder = RunFolder(run_dir)
                config = folder.config()
                if mesh is not None:
                    config = dataclasses.replace(config, mesh=mesh)
                run = Run(config, folder.preprocess(), progress, optimizer)
            check_same(run.shared)
            checkpoints = Checkpoints(folder.checkpoints, progress.warn)
            if broadcast_from_first(checkpoints.steps):
                step = broadcast_from_first(checkpoints.newest_intact)
                with raise_together():
                    meta = checkpoints.meta(step)
                    run.check_identity(meta, step, accept_changed_data=accept_changed_data)
                state = checkpoints.restore(step, run.state_spec())
            else:
                state, step = run.first_state(), 0
            progress.message(f"Resuming {folder.path} after step {step}")
        with explain_oom(run.config, run_dir):
            return Loop(run, folder, state, step, stop, on_step).run()
