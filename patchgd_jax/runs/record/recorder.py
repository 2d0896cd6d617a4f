"""Records a run: metrics, checkpoints, the best evaluation, the summary."""

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

from patchgd_jax._version import __version__
from patchgd_jax.config import SCHEMA
from patchgd_jax.core.update import TrainState
from patchgd_jax.engine.distributed import broadcast_from_first, is_first, raise_together
from patchgd_jax.errors import DivergedError
from patchgd_jax.io.files import disk_errors, write_json
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.folder import CURVES, METRICS, SUMMARY, RunFolder
from patchgd_jax.runs.record.metrics_log import MetricsLog
from patchgd_jax.runs.record.plots import plot_curves
from patchgd_jax.runs.run import Run


class Recorder:
    """Logs the metrics of a run, shows them, and writes its checkpoints and summary.

    Every process keeps the same log in memory; only process 0 writes files. Checkpoints are written
    by all. `upto` is the step after which the run continues; 0 for a new one.
    """

    def __init__(self, run: Run, folder: RunFolder, upto: int) -> None:
        self._run, self._folder, self._progress = run, folder, run.progress
        self._patches_per_image = run.data.mean_patches([p.grid for p in run.setup.problems])
        self._checkpoints = Checkpoints(folder.checkpoints, run.progress.warn)
        with raise_together():
            # The others read the log before process 0 rewrites it.
            if not is_first():
                self._log = MetricsLog(folder.path / METRICS, upto, writes=False)
        with raise_together():
            if is_first():
                self._checkpoints.discard_after(upto)
                self._log = MetricsLog(folder.path / METRICS, upto)
        self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
        self._last = time.monotonic()
        # The time continues from the last line of the log.
        self._begun = self._last - max((x["perf"]["seconds"] for x in self._log.lines), default=0)
        self._waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time of the body as data wait."""
        begun = time.monotonic()
        yield
        self.add_wait(time.monotonic() - begun)

    def add_wait(self, seconds: float) -> None:
        """Counts seconds as data wait."""
        self._waited += seconds

    def log_train(self, step: int, ids: np.ndarray, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, which the device may still be computing, for `flush`."""
        self._pending = (step, ids, metrics)

    def flush(self) -> None:
        """Logs the pending step's metrics; raises `DivergedError` if they are not finite."""
        if self._pending is None:
            return
        step, ids, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            figures = ", ".join(f"{name} {value:g}" for name, value in values.items())
            examples = ", ".join(map(str, ids.tolist()))
            raise self._diverged(f"step {step}: {figures} (batch {step - 1}: examples {examples})")
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        images = self._run.config.images_per_step / seconds
        perf = {
            "seconds": round(now - self._begun, 3),
            "images_per_s": float(f"{images:.4g}"),
            "patches_per_s": float(f"{images * self._patches_per_image:.4g}"),
            "data_wait": round(min(1.0, waited / seconds), 4),
            "memory_mib": round(memory_in_use(self._run.device) / 2**20, 1),
        }
        self._log.append({"kind": "train", "step": step, **values, "perf": perf})
        self._progress.log_train(step, values, perf)

    def log_eval(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs an evaluation; raises `DivergedError` if its loss is not finite."""
        if not math.isfinite(metrics["loss"]):
            raise self._diverged(f"step {step}: validation loss {metrics['loss']:g}")
        perf = {"seconds": round(time.monotonic() - self._begun, 3)}
        self._log.append({"kind": "eval", "step": step, **metrics, "perf": perf})
        self._progress.log_eval(step, metrics)
        # The next step's speed must not include the evaluation.
        self._last = time.monotonic()

    def _diverged(self, what: str) -> DivergedError:
        self._log.sync()
        return DivergedError(
            f"{what}. The last checkpoint is from before; try a lower --optimizer.learning-rate, "
            "or --optimizer.clip-norm 1"
        )

    def _evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self._log.lines if line["kind"] == "eval"]

    def has_score(self, step: int) -> bool:
        """Tells whether that step was evaluated."""
        return any(line["step"] == step for line in self._evaluations())

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint, after the log is on disk."""
        self._log.sync()
        if step not in broadcast_from_first(self._checkpoints.steps):
            meta = {**self._run.identity, "version": __version__, "schema": SCHEMA}
            self._checkpoints.save(step, state, meta)
        with raise_together():
            if is_first():
                self._mark_best()
                self._checkpoints.prune()
        self._last = time.monotonic()

    def _best(self) -> dict[str, Any] | None:
        """Finds the best evaluation by the task's metric, the earliest of several."""
        return max(self._evaluations(), key=self._run.setup.task.rank, default=None)

    def _mark_best(self) -> None:
        best = self._best()
        # At every save, because a kill may prevent the mark of an earlier best.
        if best is not None and best["step"] in self._checkpoints.steps():
            self._checkpoints.mark_best(best["step"])

    def finish(self, state: TrainState, step_bytes: int | None) -> dict[str, Any]:
        """Writes the summary and the curves, and returns the summary.

        `state` is that after the last step, `step_bytes` the device memory of the compiled training
        step if known.
        """
        lines, shortcuts = self._log.lines, self._run.data.trivial_baselines
        best, last = (
            {k: v for k, v in (line or {}).items() if k not in ("kind", "perf")}
            for line in (self._best(), self._evaluations()[-1])
        )
        speeds = [line["perf"]["images_per_s"] for line in lines if line["kind"] == "train"]
        summary = {
            "best": best,
            "last": last,
            "shortcuts": shortcuts,
            "parameters": {
                part: sum(leaf.size for leaf in jax.tree.leaves(tree))
                for part, tree in state.params.items()
            },
            "perf": {
                "seconds": round(time.monotonic() - self._begun, 1),
                "images_per_s": float(np.median(speeds)),
                "peak_memory_mib": round(peak_memory(self._run.device) / 2**20, 1),
                "step_memory_mib": None if step_bytes is None else round(step_bytes / 2**20, 1),
            },
        }
        with raise_together():
            if is_first():
                self._mark_best()
                write_json(self._folder.path / SUMMARY, summary)
                curves = self._folder.path / CURVES
                with disk_errors(f"cannot write {curves}"):
                    plot_curves(lines, shortcuts, curves)
        self._progress.finished(summary, self._folder.path)
        return summary


def memory_in_use(device: jax.Device) -> int:
    """Reads the bytes in use: by the device's allocator if it counts them, else by this process."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def peak_memory(device: jax.Device) -> int:
    """Reads the peak of the bytes in use so far, counted as in `memory_in_use`."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(stats["peak_bytes_in_use"])
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * (1 if sys.platform == "darwin" else 1024)
