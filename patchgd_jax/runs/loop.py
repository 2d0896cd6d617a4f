"""The host loop: batches, train steps, metrics, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from patchgd_jax.core.update import TrainState, ema_params
from patchgd_jax.data.loading.bad_images import BadImages
from patchgd_jax.data.loading.pipeline import TrainBatches
from patchgd_jax.engine.distributed import StopConsensus, is_multiprocess, watchdog
from patchgd_jax.errors import DataError
from patchgd_jax.runs.evaluate import evaluate
from patchgd_jax.runs.folder import CONFIG, RunFolder
from patchgd_jax.runs.record.recorder import Recorder
from patchgd_jax.runs.run import Run
from patchgd_jax.runs.signals import StopRequest, interrupted

OnStep = Callable[[int], None]
"""Called with the number of outer steps done, after each."""


class Loop:
    """The loop over a run's outer steps, from `state` after `step` steps, until done or `stop`."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        state: TrainState,
        step: int,
        stop: StopRequest,
        on_step: OnStep | None,
    ) -> None:
        config = run.config
        self._run, self._folder, self._stop, self._on_step = run, folder, stop, on_step
        self._state, self._step = state, step
        self._agreement = StopConsensus() if is_multiprocess() else None
        self._eval_every = config.eval_every or config.steps_per_epoch(len(run.data.train))
        self._save_every = config.save_every or self._eval_every
        self._bad_images = BadImages(folder.path, process=jax.process_index())

    def run(self) -> dict[str, Any]:
        """Runs to the end, or to a signal.

        Returns:
            The content of `summary.json`.

        Raises:
            Interrupted: on a signal, after saving.
            DataError: for an image that cannot be read, after saving.
            DivergedError: if the loss or a gradient is not finite.
        """
        run = self._run
        with self._stop.immediate():
            run.progress.message(run.executor.compile(self._state))
            step_bytes = run.executor.compiled_bytes()
            run.progress.shortcuts(run.data.trivial_baselines)
        # Its clock leaves compiling out.
        self._recorder = recorder = Recorder(run, self._folder, self._step)
        for record in self._bad_images.records:
            run.progress.warn(f"known as unreadable: {record}")
        batches = run.executor.train_batches(self._step, self._on_bad)
        with batches, recorder, run.progress.running(self._step, run.total_steps):
            try:
                self._catch_up()
                while self._step < run.total_steps:
                    self._next(batches)
            except DataError as error:
                if self._agreement is not None:
                    # A checkpoint is collective, and the others are in the middle of a step.
                    raise
                raise self._saved(error) from error
        return recorder.finish(self._state, step_bytes)

    def _catch_up(self) -> None:
        """Makes up an evaluation during which a run was stopped."""
        step, recorder = self._step, self._recorder
        if step and self._due(self._eval_every) and not recorder.has_score(step):
            self._evaluate()
            recorder.save(step, self._state)
            self._end_if_stopped(0 if recorder.has_score(step) else self._stop.signal_number or 0)

    def _next(self, batches: TrainBatches) -> None:
        """Trains one outer step, and evaluates and saves if due."""
        run, recorder = self._run, self._recorder
        with recorder.data_wait():
            batch = next(batches)
        read_wait = run.executor.read_wait
        with watchdog():
            self._state, metrics = run.executor.train(self._state, batch)
            recorder.add_wait(run.executor.read_wait - read_wait)
            # Reading the metrics of the step before keeps the device busy meanwhile.
            recorder.flush()
            self._step += 1
            recorder.log_train(self._step, batch["id"], metrics)
            # Read once: a signal that comes after the save waits for the next step.
            stopping = self._signal()
        if self._due(self._eval_every) and not stopping:
            recorder.flush()
            self._evaluate()
            stopping = self._signal()
        if stopping or self._due(self._eval_every) or self._due(self._save_every):
            recorder.flush()
            recorder.save(self._step, self._state)
        if self._on_step is not None:
            self._on_step(self._step)
        self._end_if_stopped(stopping)

    def _evaluate(self) -> None:
        run, source = self._run, self._run.data.validation
        weights = self._state.weights._replace(params=ema_params(self._state))

        def keep_evaluating(done: int) -> bool:
            run.progress.evaluating(done, len(source))
            # Processes that must agree do so between steps only.
            return self._stop.signal_number is None or self._agreement is not None

        metrics = evaluate(run.executor, source, weights, self._on_bad, keep_evaluating)
        if metrics is not None:
            self._recorder.log_eval(self._step, metrics)

    def _due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._run.total_steps

    def _on_bad(self, index: int, path: str, reason: str) -> None:
        self._bad_images.add(index, path, reason)
        self._run.progress.warn(f"left out: {path}: {reason}; see {self._bad_images.path}")

    def _signal(self) -> int:
        """Returns the stop signal that all processes agree on; 0 for none."""
        number = self._stop.signal_number or 0
        return number if self._agreement is None else self._agreement.exchange(number)

    def _end_if_stopped(self, signal_number: int) -> None:
        step = self._step
        if signal_number and not (step == self._run.total_steps and self._recorder.has_score(step)):
            advice = f"saved. Continue with: patchgd-jax resume {self._folder.path}"
            raise interrupted(signal_number, f"after step {step}; {advice}")

    def _saved(self, error: DataError) -> DataError:
        """Saves the run after an image that cannot be read; adds the next step to the error."""
        self._recorder.flush()
        if self._step:
            self._recorder.save(self._step, self._state)
        substitute = f", or set data.bad_images to substitute in {self._folder.path / CONFIG}"
        if self._run.config.stream.enabled:
            substitute = ""
        return DataError(
            f"{error}\nThe run is saved after step {self._step}. Repair the image{substitute}; "
            f"then: patchgd-jax resume {self._folder.path} --accept-changed-data"
        )
