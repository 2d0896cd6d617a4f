"""The host loop: data, step, metrics, checkpoint; it starts runs and continues them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from patchgd_jax._version import __version__
from patchgd_jax.checkpoint import Checkpoints
from patchgd_jax.compiling import compiler_options, release_memory, use_compilation_cache
from patchgd_jax.config import TrainConfig, flatten, to_dict
from patchgd_jax.data.pipeline import TrainBatches
from patchgd_jax.data.shortcuts import shortcut_scores
from patchgd_jax.errors import CheckpointError, DiskError, Interrupted
from patchgd_jax.evaluate import evaluate
from patchgd_jax.experiment import (
    frozen_entries,
    make_model,
    make_run_optimizer,
    make_run_task,
    make_source,
    select_device,
    training_grid,
)
from patchgd_jax.optimizer import with_average
from patchgd_jax.preprocess import Preprocess
from patchgd_jax.pretrained import starting_point
from patchgd_jax.progress import Progress
from patchgd_jax.recorder import Recorder
from patchgd_jax.run_folder import EXAMPLES, RunFolder
from patchgd_jax.signals import StopRequest
from patchgd_jax.step import TrainState, eval_step, evaluated_params, init_state, train_step

OnStep = Callable[[int], None]
"""Called with the number of outer steps done, after each."""


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    progress: Progress | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Trains a model from the start.

    Args:
        config: the run.
        run_dir: its folder, which must not hold anything yet.
        progress: shows how it goes; silent by default.
        optimizer: used instead of the config's, of which freezing and averaging stay.
        on_step: called after each outer step.

    Returns:
        What `summary.json` holds.

    Raises:
        PatchGDError: of the kind that fits; `exit_code` says which.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    with StopRequest() as stop:
        with stop.immediate():
            # Whatever is wrong with the config shows before the folder is made.
            RunFolder.check_free(run_dir)
            run = _Run(config, None, progress or Progress(), optimizer)
            state = run.first_state()
            folder = RunFolder.create(run_dir, config, dataclasses.asdict(run.preprocess))
            run.write_examples(folder)
        return run.loop(folder, state, 0, stop, on_step)


def resume(
    run_dir: str | Path,
    *,
    progress: Progress | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Continues a run from its newest intact checkpoint, or from the start if it has none.

    On the CPU the run ends with the same parameters and metrics, bit for bit, as one that was
    never interrupted. Arguments, result and errors are those of `train`.
    """
    progress = progress or Progress()
    with StopRequest() as stop:
        with stop.immediate():
            folder = RunFolder(run_dir)
            preprocess = folder.preprocess()
            run = _Run(folder.config(), preprocess, progress, optimizer)
            checkpoints = Checkpoints(folder.checkpoints, progress.warn)
            if checkpoints.steps():
                step = checkpoints.newest_intact()
                run.check_identity(checkpoints.meta(step), step)
                state = checkpoints.restore(step, jax.eval_shape(run.init, run.key))
            else:
                state, step = run.first_state(), 0
            progress.message(f"Resuming {folder.path} after step {step}")
        return run.loop(folder, state, step, stop, on_step)


class _Run:
    """What stays the same during a run, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        preprocess: Preprocess | None,
        progress: Progress,
        optimizer: optax.GradientTransformation | None,
    ) -> None:
        self.config = config
        self.progress = progress
        self.grid = training_grid(config)
        self.task = make_run_task(config)
        self.device = select_device(config.device)
        cache = use_compilation_cache()
        progress.message(
            f"Device: {self.device.device_kind} ({self.device.platform}). "
            f"Compiled programs are {cache}."
        )
        self.source = make_source(config, "train")
        self.validation = make_source(config, "validation")
        if preprocess is None:
            preprocess = Preprocess.measure(self.source)
            start = starting_point(config, progress)
            if start is not None:
                # The encoder's input must be scaled as it was when the encoder was trained.
                preprocess = dataclasses.replace(preprocess, mean=start.mean, std=start.std)
        self.preprocess = preprocess
        self.shortcuts = shortcut_scores(self.source, self.validation)
        self.model = make_model(config, self.grid, self.preprocess)
        self.frozen = frozen_entries(config)
        self.optimizer = (
            make_run_optimizer(config)
            if optimizer is None
            else with_average(optimizer, config.optimizer.ema_decay)
        )
        self.key = jax.random.key(config.seed)
        self.init = jax.jit(
            partial(init_state, model=self.model, optimizer=self.optimizer, frozen=self.frozen)
        )

    def first_state(self) -> TrainState:
        """The state before the first step, with the weights that the config names."""
        state: TrainState = self.init(jax.random.fold_in(self.key, 0))
        start = starting_point(self.config, self.progress)
        if start is None:
            return state
        params, model_state = start.into(state.params, state.model_state)
        return state._replace(params=params, model_state=model_state)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and a resume, besides the tree."""
        settings = {k: v for k, v in flatten(to_dict(self.config)).items() if k != "run_dir"}
        return {
            "settings": settings,
            "preprocess": to_dict(self.preprocess),
            "data": {"fingerprint": self.source.fingerprint},
        }

    def check_identity(self, meta: dict[str, Any], step: int) -> None:
        """Refuses a checkpoint that other settings or other data led to."""
        lines = []
        for kind, now in self.identity.items():
            then = meta.get(kind, {})
            lines += [
                f"{kind}: {name} was {then.get(name)!r}, is {now.get(name)!r}"
                for name in sorted(then.keys() | now.keys())
                if then.get(name) != now.get(name)
            ]
        if lines:
            changed = "\n  ".join(lines[:10])
            raise CheckpointError(
                f"the run has changed since its checkpoint {step} was written; change it back, or "
                f"start a new run:\n  {changed}"
            )
        if meta.get("version") != __version__:
            self.progress.warn(
                f"checkpoint {step} was written by version {meta.get('version')}, this is "
                f"{__version__}"
            )

    def write_examples(self, folder: RunFolder) -> None:
        """A few validation images as files, to look at and to try `predict` on."""
        from PIL import Image

        where = folder.path / EXAMPLES
        try:
            where.mkdir()
            for index in range(min(4, len(self.validation))):
                # As a user has them: at full size, before any down-scaling.
                pixels = self.validation.read(index, 0, 0, *self.config.data.size)
                name = self.preprocess.class_names[self.validation.plan(index).label]
                Image.fromarray(pixels).save(where / f"{index}_label_{name}.png")
        except OSError as error:
            raise DiskError(f"cannot write {where}: {error.strerror or error}") from error

    def compile(self, state: TrainState) -> tuple[Any, Any]:
        """Compiles the training and the evaluation step before the first batch needs them."""
        config = self.config
        step = partial(
            train_step,
            model=self.model,
            optimizer=self.optimizer,
            grid=self.grid,
            patchgd=config.patchgd,
            task=self.task,
            augment=config.augment,
            frozen=self.frozen,
        )
        score = partial(
            eval_step,
            model=self.model,
            grid=self.grid,
            fill_chunk=config.patchgd.fill_chunk,
            task=self.task,
        )

        def batch(size: int, **more: Any) -> dict[str, Any]:
            return {
                "image": jax.ShapeDtypeStruct((size, *config.data.image_shape), np.uint8),
                "label": self.task.label_spec(size, self.source.num_classes),
                **more,
            }

        weight = jax.ShapeDtypeStruct((config.eval_batch_size,), np.float32)
        begun = time.monotonic()
        train_fn = (
            jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
            .lower(state, batch(config.batch_size), self.key)
            .compile()
        )
        eval_fn = (
            jax.jit(score)
            .lower(state.params, state.model_state, batch(config.eval_batch_size, weight=weight))
            .compile()
        )
        release_memory()
        self.progress.message(f"Compiled 2 programs in {time.monotonic() - begun:.1f} s.")
        return train_fn, eval_fn

    def loop(
        self,
        folder: RunFolder,
        state: TrainState,
        step: int,
        stop: StopRequest,
        on_step: OnStep | None,
    ) -> dict[str, Any]:
        """Runs from `step` to the end, or to a signal."""
        config, progress = self.config, self.progress
        with stop.immediate():
            train_fn, eval_fn = self.compile(state)
            progress.shortcuts(self.shortcuts)
        recorder = Recorder(
            folder,
            progress,
            upto=step,
            batch_size=config.batch_size,
            patches_per_image=self.grid.num_patches,
            identity={**self.identity, "version": __version__},
            device=self.device,
            task=self.task,
        )
        eval_every = config.eval_every or config.steps_per_epoch
        batches = TrainBatches(
            self.source,
            batch_size=config.batch_size,
            seed=config.seed,
            start=step,
            threads=config.reader_threads,
        )

        def due(every: int) -> bool:
            return step % every == 0 or step == config.total_steps

        def score() -> None:
            metrics = evaluate(
                eval_fn,
                evaluated_params(state),
                state.model_state,
                self.validation,
                task=self.task,
                batch_size=config.eval_batch_size,
                on_batch=keep_evaluating,
            )
            if metrics is not None:
                recorder.scored(step, metrics)

        def keep_evaluating(done: int) -> bool:
            progress.evaluating(done, len(self.validation))
            return stop.signal_number is None

        def end_if_stopped(stopping: bool) -> None:
            if stopping and not (step == config.total_steps and recorder.has_score(step)):
                advice = f"saved. Continue with: patchgd-jax resume {folder.path}"
                text = stop.message(f"after step {step}; {advice}")
                raise Interrupted(stop.signal_number or 0, text)

        with batches, recorder, progress.running(step, config.total_steps):
            # A run that was stopped during an evaluation makes up for it first.
            if step and due(eval_every) and not recorder.has_score(step):
                score()
                recorder.save(step, state)
                end_if_stopped(not recorder.has_score(step))
            while step < config.total_steps:
                with recorder.data_wait():
                    batch = next(batches)
                arrays = jax.device_put({"image": batch["image"], "label": batch["label"]})
                state, metrics = train_fn(state, arrays, self.key)
                # Reading the metrics of the step before keeps the device busy meanwhile.
                recorder.flush()
                step += 1
                recorder.trained(step, batch["id"], metrics)
                if due(eval_every) and stop.signal_number is None:
                    recorder.flush()
                    score()
                # Read once: a signal that comes after the save waits for the next step.
                stopping = stop.signal_number is not None
                if stopping or due(eval_every) or due(config.save_every or eval_every):
                    recorder.flush()
                    recorder.save(step, state)
                if on_step is not None:
                    on_step(step)
                end_if_stopped(stopping)
        return recorder.finish(state, self.shortcuts)
