"""The host loop: data, step, metrics, checkpoint; it starts runs and continues them."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import psutil

from patchgd_jax.checkpoint import Checkpoints, describe_difference, tree_spec
from patchgd_jax.config import TrainConfig
from patchgd_jax.data.pipeline import TrainBatches
from patchgd_jax.data.shortcuts import shortcut_scores
from patchgd_jax.errors import CheckpointError, DivergedError, Interrupted
from patchgd_jax.evaluate import evaluate
from patchgd_jax.experiment import (
    Preprocess,
    make_model,
    make_run_optimizer,
    make_source,
    select_device,
    training_grid,
    use_compilation_cache,
)
from patchgd_jax.plots import plot_curves
from patchgd_jax.progress import Progress
from patchgd_jax.run_folder import (
    CURVES,
    EXAMPLES,
    METRICS,
    PREPROCESS,
    SUMMARY,
    MetricsLog,
    RunFolder,
)
from patchgd_jax.signals import StopRequest
from patchgd_jax.step import TrainState, eval_step, init_state, train_step

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
        optimizer: used instead of the config's.
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
            run = _Run(config, None, progress or Progress(), optimizer)
            state = run.first_state()
            folder = RunFolder.create(run_dir, config)
            folder.write(PREPROCESS, dataclasses.asdict(run.preprocess))
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
            preprocess = Preprocess.from_dict(folder.read(PREPROCESS))
            run = _Run(folder.config(), preprocess, progress, optimizer)
            state, step = run.first_state(), 0
            checkpoints = Checkpoints(folder.checkpoints, progress.warn)
            if checkpoints.steps():
                step = checkpoints.newest_intact()
                run.check_identity(checkpoints.meta(step), step)
                state = checkpoints.restore(step, state)
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
        self.device = select_device(config.device)
        cache = use_compilation_cache()
        progress.message(
            f"Device: {self.device.device_kind} ({self.device.platform}). "
            f"Compiled programs are kept in {cache or 'memory only'}."
        )
        self.source = make_source(config, "train")
        self.validation = make_source(config, "validation")
        self.preprocess = preprocess or Preprocess.measure(self.source)
        self.model = make_model(config, self.grid, self.preprocess)
        self.optimizer = optimizer or make_run_optimizer(config)
        self.key = jax.random.key(config.seed)

    def first_state(self) -> TrainState:
        """The state before the first step, with a pretrained encoder if one is asked for."""
        init = jax.jit(partial(init_state, model=self.model, optimizer=self.optimizer))
        state: TrainState = init(jax.random.fold_in(self.key, 0))
        if self.config.init_encoder is None:
            return state
        encoder = _load_encoder(self.config.init_encoder, state.params["encoder"], self.progress)
        return state._replace(params={**state.params, "encoder": encoder})

    @property
    def identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and a resume, besides the tree."""
        return {"data": self.source.fingerprint}

    def check_identity(self, meta: dict[str, Any], step: int) -> None:
        """Refuses a checkpoint that other data led to."""
        for name, now in self.identity.items():
            if meta.get(name) != now:
                raise CheckpointError(
                    f"the {name} has changed since checkpoint {step} was written:\n"
                    f"  then {meta.get(name)}\n  now  {now}"
                )

    def write_examples(self, folder: RunFolder) -> None:
        """A few validation images as files, to look at and to try `predict` on."""
        from PIL import Image

        (folder.path / EXAMPLES).mkdir()
        for index in range(min(4, len(self.validation))):
            example = self.validation[index]
            image = Image.fromarray(example["image"].squeeze())
            image.save(folder.path / EXAMPLES / f"{index}_label_{int(example['label'])}.png")

    def compile(self, state: TrainState) -> tuple[Any, Any]:
        """Compiles the training and the evaluation step before the first batch needs them."""
        config = self.config
        step = partial(
            train_step,
            model=self.model,
            optimizer=self.optimizer,
            grid=self.grid,
            patchgd=config.patchgd,
        )
        score = partial(
            eval_step, model=self.model, grid=self.grid, fill_chunk=config.patchgd.fill_chunk
        )

        def batch(size: int, **more: Any) -> dict[str, Any]:
            return {
                "image": jax.ShapeDtypeStruct((size, *config.data.image_shape), np.uint8),
                "label": jax.ShapeDtypeStruct((size,), np.int32),
                **more,
            }

        weight = jax.ShapeDtypeStruct((config.eval_batch_size,), np.float32)
        begun = time.monotonic()
        train_fn = (
            jax.jit(step, donate_argnums=0)
            .lower(state, batch(config.batch_size), self.key)
            .compile()
        )
        eval_fn = (
            jax.jit(score)
            .lower(state.params, state.model_state, batch(config.eval_batch_size, weight=weight))
            .compile()
        )
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
            shortcuts = shortcut_scores(self.source, self.validation)
            progress.shortcuts(shortcuts)
        recorder = _Recorder(self, folder, upto=step)
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
                state.params,
                state.model_state,
                self.validation,
                batch_size=config.eval_batch_size,
                on_batch=keep_evaluating,
            )
            if metrics is not None:
                recorder.scored(step, metrics)

        def keep_evaluating(done: int) -> bool:
            progress.evaluating(done, len(self.validation))
            return stop.signal_number is None

        with batches, recorder, progress.running(step, config.total_steps):
            # A run that was stopped during an evaluation makes up for it first.
            if step and due(eval_every) and not recorder.has_score(step):
                score()
                recorder.save(step, state)
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
                if due(config.save_every or eval_every) or due(eval_every) or stop.signal_number:
                    recorder.flush()
                    recorder.save(step, state)
                if on_step is not None:
                    on_step(step)
                if stop.signal_number is not None and not (
                    step == config.total_steps and recorder.has_score(step)
                ):
                    raise Interrupted(
                        stop.signal_number,
                        stop.message(
                            f"after step {step}; saved. Continue with: "
                            f"patchgd-jax resume {folder.path}"
                        ),
                    )
        return recorder.finish(state, shortcuts)


class _Recorder:
    """Writes down what happens: metrics, checkpoints, the best score, the summary."""

    def __init__(self, run: _Run, folder: RunFolder, upto: int) -> None:
        self._run = run
        self._folder = folder
        self._checkpoints = Checkpoints(folder.checkpoints, run.progress.warn)
        self._log = MetricsLog(folder.path / METRICS, upto)
        self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
        self._begun = self._last = time.monotonic()
        self._first_step: int | None = None
        self._waited = 0.0

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time within it as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def trained(self, step: int, ids: np.ndarray, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, which the device may still be computing."""
        self._pending = (step, ids, metrics)

    def flush(self) -> None:
        """Logs the pending step's metrics.

        Raises:
            DivergedError: if they are not finite.
        """
        if self._pending is None:
            return
        step, ids, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._log.sync()
            raise DivergedError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']} (batch "
                f"{step - 1}: examples {', '.join(map(str, ids.tolist()))}). The last checkpoint "
                "is from before; try a lower --optimizer.learning-rate or --optimizer.clip-norm 1"
            )
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        images = self._run.config.batch_size / seconds
        perf = {
            "seconds": round(now - self._begun, 3),
            "images_per_s": round(images, 2),
            "patches_per_s": round(images * self._run.grid.num_patches, 1),
            "data_wait": round(min(1.0, waited / seconds), 4),
            "memory_mib": round(memory_in_use(self._run.device) / 2**20, 1),
        }
        self._log.append({"kind": "train", "step": step, **values, "perf": perf})
        self._run.progress.trained(step, values, perf)

    def scored(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs an evaluation."""
        perf = {"seconds": round(time.monotonic() - self._begun, 3)}
        self._log.append({"kind": "eval", "step": step, **metrics, "perf": perf})
        self._run.progress.scored(step, metrics)
        # The next step's speed must not include the evaluation.
        self._last = time.monotonic()

    def _scores(self) -> list[dict[str, Any]]:
        return [line for line in self._log.lines if line["kind"] == "eval"]

    def has_score(self, step: int) -> bool:
        """Whether that step was evaluated."""
        return any(line["step"] == step for line in self._scores())

    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest accuracy, the earliest of several."""
        return max(self._scores(), key=lambda line: line["accuracy"], default=None)

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint; the log is on disk before it."""
        self._log.sync()
        if step not in self._checkpoints.steps():
            self._checkpoints.save(step, state, self._run.identity)
        best = self.best()
        if best is not None and best["step"] == step:
            self._checkpoints.mark_best(step)
        self._checkpoints.prune()
        self._last = time.monotonic()

    def finish(self, state: TrainState, shortcuts: dict[str, float]) -> dict[str, Any]:
        """Writes the summary and the curves."""
        run, scores = self._run, self._scores()
        speeds = [
            line["perf"]["images_per_s"] for line in self._log.lines if line["kind"] == "train"
        ]
        best = self.best()
        assert best is not None
        count = {
            part: sum(leaf.size for leaf in jax.tree.leaves(tree))
            for part, tree in state.params.items()
        }
        summary = {
            "best": {k: v for k, v in best.items() if k not in ("kind", "perf")},
            "last": {k: v for k, v in scores[-1].items() if k not in ("kind", "perf")},
            "shortcuts": shortcuts,
            "parameters": count,
            "perf": {
                "seconds": round(time.monotonic() - self._begun, 1),
                "images_per_s": float(np.median(speeds)),
                "peak_memory_mib": round(peak_memory(run.device) / 2**20, 1),
            },
        }
        self._folder.write(SUMMARY, summary)
        plot_curves(self._log.lines, shortcuts, self._folder.path / CURVES)
        run.progress.finished(summary, self._folder.path)
        return summary


def memory_in_use(device: jax.Device) -> int:
    """Bytes: of the device's allocator where it counts them, else of this process."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def peak_memory(device: jax.Device) -> int:
    """The most bytes so far, counted as in `memory_in_use`."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(stats["peak_bytes_in_use"])
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * (1 if sys.platform == "darwin" else 1024)


def _load_encoder(run_dir: str, encoder: Any, progress: Progress) -> Any:
    """The encoder's parameters of another run's best checkpoint."""
    folder = RunFolder(run_dir)
    checkpoints = Checkpoints(folder.checkpoints, progress.warn)
    step = checkpoints.best()
    stored = checkpoints.restore_arrays(step)["params"]["encoder"]
    difference = describe_difference(tree_spec(stored), tree_spec(encoder))
    if difference:
        raise CheckpointError(f"the encoder of {run_dir} is another one:\n  {difference}")
    progress.message(f"The encoder starts from {run_dir}, step {step}.")
    return jax.tree.map(jax.numpy.asarray, stored)
