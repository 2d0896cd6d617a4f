"""The host loop: data, step, metrics, checkpoint; it starts runs and continues them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from patchgd_jax._version import __version__
from patchgd_jax.baselines.registry import settled_method
from patchgd_jax.config import TrainConfig, flatten, to_dict
from patchgd_jax.core.step import TrainState, evaluated_params, init_state
from patchgd_jax.data.loading.bad_images import BadImages
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import make_data
from patchgd_jax.data.sources.channels import with_channels
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.engine.compiling import use_compilation_cache
from patchgd_jax.engine.distributed import (
    Agreement,
    all_or_none,
    check_same,
    from_first,
    is_first,
    several,
    watched,
)
from patchgd_jax.engine.registry import check_execution, make_execution
from patchgd_jax.engine.setup import make_run_task, make_setup, select_device, training_grids
from patchgd_jax.errors import CheckpointError, DataError, DiskError
from patchgd_jax.planner.auto_settings import settled
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.evaluate import evaluate
from patchgd_jax.runs.folder import CONFIG, EXAMPLES, RunFolder
from patchgd_jax.runs.out_of_memory import out_of_memory_told
from patchgd_jax.runs.progress import Progress
from patchgd_jax.runs.recorder import Recorder
from patchgd_jax.runs.signals import StopRequest, interrupted
from patchgd_jax.weights.matching import starting_point

_MAY_CHANGE = (
    "run_dir",
    "device",
    "data.bad_images",
    "data.bad_limit",
    "reader_threads",
    "reader_mib",
    "mesh",
    "param_rules",
    "stream.enabled",
    "stream.buffers",
    "stream.readers",
    "stream.store_mib",
    "stream.store_dir",
)
"""Settings that a resumed run may have different."""

_OWN = ("run_dir", "reader_threads", "reader_mib", "stream.store_dir")
"""Settings that each process of a run may have its own of."""

_EXAMPLE_PIXELS = 2**24
"""Pixels of generated images up to which some are written to the run folder."""

OnStep = Callable[[int], None]
"""Called with the number of outer steps done, after each."""


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
        progress: shows how it goes; silent by default.
        optimizer: used instead of the config's, of which freezing and averaging stay.
        on_step: called after each outer step.
        budget: what settings that are auto must fit, 8GiB say; None: what is free on the device.

    Returns:
        What `summary.json` holds.

    Raises:
        PatchGDError: of the kind that fits; `exit_code` says which.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    progress = progress or Progress()
    with StopRequest() as stop:
        with stop.immediate():
            # Whatever is wrong with the config shows before the folder is made.
            with all_or_none():
                RunFolder.check_free(run_dir)
                config = settled(settled_method(with_channels(config)), budget, progress)
                run = Run(config, None, progress, optimizer)
            check_same(run.shared)
            with out_of_memory_told(config, run_dir):
                state = run.first_state()
            with all_or_none():
                if is_first():
                    folder = RunFolder.create(run_dir, config, dataclasses.asdict(run.preprocess))
                    run.write_examples(folder)
            with all_or_none():
                folder = RunFolder(run_dir)
        with out_of_memory_told(config, run_dir):
            return run.loop(folder, state, 0, stop, on_step)


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
    never interrupted, unless it reuses latents (`stream.max_age`) or the mesh is another. Other
    arguments, result and errors are those of `train`.

    Args:
        run_dir: its folder.
        progress: as `train`'s.
        optimizer: as `train`'s.
        on_step: as `train`'s.
        accept_changed_data: go on although the images, labels or splits are no longer the same.
        mesh: of devices, instead of the run's; the result is the same up to rounding.
    """
    progress = progress or Progress()
    with StopRequest() as stop:
        with stop.immediate():
            with all_or_none():
                folder = RunFolder(run_dir)
                config = folder.config()
                if mesh is not None:
                    config = dataclasses.replace(config, mesh=mesh)
                run = Run(config, folder.preprocess(), progress, optimizer)
            check_same(run.shared)
            checkpoints = Checkpoints(folder.checkpoints, progress.warn)
            if from_first(checkpoints.steps):
                step = from_first(checkpoints.newest_intact)
                with all_or_none():
                    meta = checkpoints.meta(step)
                    run.check_identity(meta, step, accept_changed_data=accept_changed_data)
                state = checkpoints.restore(step, run.state_spec())
            else:
                state, step = run.first_state(), 0
            progress.message(f"Resuming {folder.path} after step {step}")
        with out_of_memory_told(run.config, run_dir):
            return run.loop(folder, state, step, stop, on_step)


class Run:
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
        # First, because processes wait for each other's devices.
        self.device = select_device(config.device, shared=config.mesh is not None)
        self.data = make_data(config)
        for note in self.data.notes:
            progress.message(note)
        # What does not fit shows before any image is read.
        check_execution(config, training_grids(config, self.data))
        make_run_task(config, self.data.num_classes)
        self.total_steps = config.total_steps(len(self.data.train))
        cache = use_compilation_cache()
        progress.message(
            f"Device: {self.device.device_kind} ({self.device.platform}). "
            f"Compiled programs are {cache}."
        )
        if preprocess is None:
            bear = config.data.bad_images == "substitute"
            preprocess = Preprocess.measure(self.data, leave_out_bad=bear)
            start = starting_point(config, progress)
            if start is not None:
                # The encoder's input must be scaled as it was when the encoder was trained.
                preprocess = dataclasses.replace(preprocess, mean=start.mean, std=start.std)
        self.preprocess = preprocess
        self.setup = make_setup(config, self.data, preprocess, optimizer)
        self.execution = make_execution(self.setup)
        self.init = jax.jit(
            partial(
                init_state,
                model=self.setup.models[0],
                optimizer=self.setup.optimizer,
                frozen=self.setup.frozen,
            )
        )

    def first_state(self) -> TrainState:
        """The state before the first step, with the weights that the config names."""
        state: TrainState = self.init(jax.random.fold_in(self.setup.key, 0))
        start = starting_point(self.config, self.progress)
        if start is not None:
            params, model_state = start.into(state.params, state.model_state)
            state = state._replace(params=params, model_state=model_state)
        with watched():
            return self.execution.place(state)

    def state_spec(self) -> TrainState:
        """Shapes, dtypes and, on several devices, shardings of the state."""
        return self.execution.layout(jax.eval_shape(self.init, self.setup.key))

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and a resume, besides the tree."""
        settings = flatten(to_dict(self.config))
        # What does not change the result of a run that meets no obstacle.
        for name in _MAY_CHANGE:
            del settings[name]
        return {
            "settings": settings,
            "preprocess": to_dict(self.preprocess),
            "data": {
                "fingerprint": self.data.train.fingerprint,
                "validation": self.data.validation.fingerprint,
            },
        }

    @property
    def shared(self) -> dict[str, Any]:
        """What must be the same for all processes of the run."""
        settings = flatten(to_dict(self.config))
        for name in _OWN:
            del settings[name]
        return {**flatten(self.identity), **flatten({"settings": settings})}

    def check_identity(
        self, meta: dict[str, Any], step: int, *, accept_changed_data: bool = False
    ) -> None:
        """Refuses a checkpoint that other settings or other data led to."""
        lines = []
        for kind, now in self.identity.items():
            then = meta.get(kind, {})
            if kind == "data" and then != now:
                changed = (
                    "the images have changed (a file, its time or size, a label, or the split)"
                )
                if not accept_changed_data:
                    lines.append(f"{changed}; to go on with them, use --accept-changed-data")
                    continue
                self.progress.warn(changed)
                continue
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
        """A few generated validation images as files, to look at and to try `predict` on."""
        from PIL import Image

        source = self.data.validation
        pixels_of_one = self.config.data.size[0] * self.config.data.size[1]
        if not isinstance(source, UltraMnist) or pixels_of_one > _EXAMPLE_PIXELS:
            return
        where = folder.path / EXAMPLES
        try:
            where.mkdir()
            for index in range(min(4, len(source))):
                # As a user has them: at full size, before any down-scaling.
                pixels = source.read(index, 0, 0, *self.config.data.size)
                name = self.preprocess.class_names[source.plan(index).label]
                Image.fromarray(pixels).save(where / f"{index}_label_{name}.png")
        except OSError as error:
            raise DiskError(f"cannot write {where}: {error.strerror or error}") from error

    def loop(
        self,
        folder: RunFolder,
        state: TrainState,
        step: int,
        stop: StopRequest,
        on_step: OnStep | None,
    ) -> dict[str, Any]:
        """Runs from `step` to the end, or to a signal."""
        config, progress, execution = self.config, self.progress, self.execution
        with stop.immediate():
            progress.message(execution.compile(state))
            step_bytes = execution.compiled_bytes()
            progress.shortcuts(self.data.shortcuts)
        recorder = Recorder(
            folder,
            progress,
            upto=step,
            batch_size=config.images_per_step,
            patches_per_image=self.setup.data.mean_patches(self.setup.grids),
            identity={**self.identity, "version": __version__},
            device=self.device,
            task=self.setup.task,
        )
        agreement = Agreement() if several() else None
        eval_every = config.eval_every or config.steps_per_epoch(len(self.data.train))
        bad_images = BadImages(folder.path, process=jax.process_index() if several() else 0)
        for record in bad_images.records:
            progress.warn(f"known as unreadable: {record}")

        def on_bad(index: int, path: str, reason: str) -> None:
            bad_images.add(index, path, reason)
            progress.warn(f"left out: {path}: {reason}; see {bad_images.path}")

        batches = execution.train_batches(step, on_bad)

        def due(every: int) -> bool:
            return step % every == 0 or step == self.total_steps

        def score() -> None:
            metrics = evaluate(
                partial(execution.score, self.data.validation),
                evaluated_params(state),
                state.model_state,
                self.data.validation,
                execution.eval_batches(self.data.validation, on_bad),
                task=self.setup.task,
                on_batch=keep_evaluating,
            )
            if metrics is not None:
                recorder.scored(step, metrics)

        def keep_evaluating(done: int) -> bool:
            progress.evaluating(done, len(self.data.validation))
            # Processes that must agree do so between steps only.
            return stop.signal_number is None or agreement is not None

        def asked_to_stop() -> int:
            """The signal that came, and that all processes know of; 0 if none did."""
            number = stop.signal_number or 0
            return number if agreement is None else agreement.exchange(number)

        def end_if_stopped(signal_number: int) -> None:
            if signal_number and not (step == self.total_steps and recorder.has_score(step)):
                advice = f"saved. Continue with: patchgd-jax resume {folder.path}"
                raise interrupted(signal_number, f"after step {step}; {advice}")

        with batches, recorder, progress.running(step, self.total_steps):
            try:
                # A run that was stopped during an evaluation makes up for it first.
                if step and due(eval_every) and not recorder.has_score(step):
                    score()
                    recorder.save(step, state)
                    end_if_stopped(0 if recorder.has_score(step) else stop.signal_number or 0)
                while step < self.total_steps:
                    with recorder.data_wait():
                        batch = next(batches)
                    read_wait = execution.read_wait
                    with watched():
                        state, metrics = execution.train(state, batch)
                        recorder.waited(execution.read_wait - read_wait)
                        # Reading the metrics of the step before keeps the device busy meanwhile.
                        recorder.flush()
                        step += 1
                        recorder.trained(step, batch["id"], metrics)
                        # Read once: a signal that comes after the save waits for the next step.
                        stopping = asked_to_stop()
                    if due(eval_every) and not stopping:
                        recorder.flush()
                        score()
                        stopping = asked_to_stop()
                    if stopping or due(eval_every) or due(config.save_every or eval_every):
                        recorder.flush()
                        recorder.save(step, state)
                    if on_step is not None:
                        on_step(step)
                    end_if_stopped(stopping)
            except DataError as error:
                if agreement is not None:
                    # The others are in the middle of a step that this one cannot join.
                    raise
                recorder.flush()
                if step:
                    recorder.save(step, state)
                otherwise = (
                    ""
                    if config.stream.enabled
                    else f", or set data.bad_images to substitute in {folder.path / CONFIG}"
                )
                raise DataError(
                    f"{error}\nThe run is saved after step {step}. Mend the image{otherwise}; "
                    f"then: patchgd-jax resume {folder.path} --accept-changed-data"
                ) from error
        return recorder.finish(state, self.data.shortcuts, step_bytes)
