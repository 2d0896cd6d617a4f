"""Writes down a run: metrics, checkpoints, the best score, the summary."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import jax
import numpy as np
import psutil

from patchgd_jax.core.tasks import Task
from patchgd_jax.core.update import TrainState
from patchgd_jax.engine.distributed import all_or_none, from_first, is_first
from patchgd_jax.errors import DiskError, DivergedError
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.folder import CURVES, METRICS, SUMMARY, RunFolder
from patchgd_jax.runs.metrics_log import MetricsLog
from patchgd_jax.runs.plots import plot_curves
from patchgd_jax.runs.progress import Progress


class Recorder:
    """Writes down what happens in a run, and shows it.

    Of several processes, all keep the same account; only the first one writes files, but for its
    part of a checkpoint.

    Args:
        folder: of the run.
        progress: what shows it.
        upto: the step that the run continues after; 0 for a new one.
        batch_size: images per outer step.
        patches_per_image: N, or the mean over images with fewer that count.
        identity: stored with every checkpoint: what must be the same when it is resumed.
        device: whose memory is reported.
        task: says which evaluation is the best.
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        *,
        upto: int,
        batch_size: int,
        patches_per_image: float,
        identity: dict[str, Any],
        device: jax.Device,
        task: Task,
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._batch_size = batch_size
        self._patches_per_image = patches_per_image
        self._identity = identity
        self._device = device
        self._task = task
        self._checkpoints = Checkpoints(folder.checkpoints, progress.warn)
        self._writes = is_first()
        with all_or_none():
            # The others read the log before the first one writes it anew.
            if not self._writes:
                self._log = MetricsLog(folder.path / METRICS, upto, writes=False)
        with all_or_none():
            if self._writes:
                self._checkpoints.discard_after(upto)
                self._log = MetricsLog(folder.path / METRICS, upto)
        self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
        self._last = time.monotonic()
        # The clock goes on where it stopped.
        self._begun = self._last - max((x["perf"]["seconds"] for x in self._log.lines), default=0)
        self._waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time within it as waiting for data."""
        begun = time.monotonic()
        yield
        self.waited(time.monotonic() - begun)

    def waited(self, seconds: float) -> None:
        """Counts seconds as waiting for data."""
        self._waited += seconds

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
        if not all(map(math.isfinite, values.values())):
            figures = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise self._diverged(
                f"step {step}: {figures} (batch {step - 1}: examples "
                f"{', '.join(map(str, ids.tolist()))})"
            )
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        images = self._batch_size / seconds
        perf = {
            "seconds": round(now - self._begun, 3),
            "images_per_s": float(f"{images:.4g}"),
            "patches_per_s": float(f"{images * self._patches_per_image:.4g}"),
            "data_wait": round(min(1.0, waited / seconds), 4),
            "memory_mib": round(memory_in_use(self._device) / 2**20, 1),
        }
        self._log.append({"kind": "train", "step": step, **values, "perf": perf})
        self._progress.trained(step, values, perf)

    def scored(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs an evaluation.

        Raises:
            DivergedError: if its loss is not finite.
        """
        if not math.isfinite(metrics["loss"]):
            raise self._diverged(f"step {step}: validation loss {metrics['loss']:g}")
        perf = {"seconds": round(time.monotonic() - self._begun, 3)}
        self._log.append({"kind": "eval", "step": step, **metrics, "perf": perf})
        self._progress.scored(step, metrics)
        # The next step's speed must not include the evaluation.
        self._last = time.monotonic()

    def _diverged(self, what: str) -> DivergedError:
        self._log.sync()
        return DivergedError(
            f"{what}. The last checkpoint is from before; try a lower --optimizer.learning-rate, "
            "or --optimizer.clip-norm 1"
        )

    def _scores(self) -> list[dict[str, Any]]:
        return [line for line in self._log.lines if line["kind"] == "eval"]

    def has_score(self, step: int) -> bool:
        """Whether that step was evaluated."""
        return any(line["step"] == step for line in self._scores())

    def best(self) -> dict[str, Any] | None:
        """The best evaluation by the task's metric, the earliest of several."""
        return max(self._scores(), key=self._task.rank, default=None)

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint; the log is on disk before it."""
        self._log.sync()
        if step not in from_first(self._checkpoints.steps):
            self._checkpoints.save(step, state, self._identity)
        with all_or_none():
            if self._writes:
                self._name_best()
                self._checkpoints.prune()
        self._last = time.monotonic()

    def _name_best(self) -> None:
        best = self.best()
        # Not only when it is saved: a kill may have come before an earlier best was named.
        if best is not None and best["step"] in self._checkpoints.steps():
            self._checkpoints.mark_best(best["step"])

    def finish(
        self, state: TrainState, shortcuts: dict[str, float], step_bytes: int | None
    ) -> dict[str, Any]:
        """Writes the summary and the curves.

        Args:
            state: after the last step.
            shortcuts: accuracies of simple guesses.
            step_bytes: what the compiled training step takes of a device; None if not known.
        """
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
            "last": {k: v for k, v in self._scores()[-1].items() if k not in ("kind", "perf")},
            "shortcuts": shortcuts,
            "parameters": count,
            "perf": {
                "seconds": round(time.monotonic() - self._begun, 1),
                "images_per_s": float(np.median(speeds)),
                "peak_memory_mib": round(peak_memory(self._device) / 2**20, 1),
                "step_memory_mib": None if step_bytes is None else round(step_bytes / 2**20, 1),
            },
        }
        with all_or_none():
            if self._writes:
                self._write_summary(summary, shortcuts)
        self._progress.finished(summary, self._folder.path)
        return summary

    def _write_summary(self, summary: dict[str, Any], shortcuts: dict[str, float]) -> None:
        self._name_best()
        self._folder.write(SUMMARY, summary)
        try:
            plot_curves(self._log.lines, shortcuts, self._folder.path / CURVES)
        except OSError as error:
            raise DiskError(f"cannot write {self._folder.path / CURVES}: {error}") from error


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
