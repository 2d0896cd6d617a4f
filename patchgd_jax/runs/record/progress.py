"""Displays of a run's progress: a live line in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

Values = Mapping[str, float]


class Progress:
    """Receives the events of a run; this base class shows nothing."""

    def message(self, text: str) -> None:
        """Shows one line of information."""

    def warn(self, text: str) -> None:
        """Shows one line about a problem that does not stop the run."""

    def left_out(self, index: int, path: str, reason: str) -> None:
        """Warns of an image that cannot be read; an `OnBad` callback."""
        self.warn(f"left out: {path}: {reason}")

    @contextmanager
    def running(self, done: int, total: int) -> Iterator[None]:
        """Encloses the training steps."""
        yield

    def log_train(self, step: int, values: Values, perf: Values) -> None:
        """Shows a step's `loss`, `grad_norm` and training metric, and its speed."""

    def evaluating(self, done: int, total: int) -> None:
        """Shows the number of examples evaluated so far."""

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of an evaluation."""

    def shortcuts(self, scores: Mapping[str, float]) -> None:
        """Shows the accuracies of trivial baselines."""

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Shows the run's summary and folder."""


class ConsoleProgress(Progress):
    """Progress on standard output: rich's live line if that is a terminal, else plain lines.

    Plain lines about training steps are at least `line_seconds` apart.
    """

    def __init__(self, line_seconds: float = 10.0) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Any = None
        self._task: Any = None
        self._line_seconds = line_seconds
        self._mean: dict[str, float] = {}
        self._first = self._total = 0
        self._begun = self._printed = 0.0

    def message(self, text: str) -> None:
        # Names and paths may hold brackets.
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, style="yellow")

    @contextmanager
    def running(self, done: int, total: int) -> Iterator[None]:
        self._first, self._total, self._begun = done, total, time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
        )
        with Bar(*columns, console=self._console, speed_estimate_period=120) as self._bar:
            self._task = self._bar.add_task("train", completed=done, total=total, info="")
            yield
        self._bar = None

    def log_train(self, step: int, values: Values, perf: Values) -> None:
        mean = self._mean
        for name, value in {**values, **perf}.items():
            # Exponential means, so that a line does not jump with every batch.
            mean[name] = 0.95 * mean.get(name, value) + 0.05 * value
        accuracy = "accuracy" in mean
        metric = f"acc {100 * mean['accuracy']:.1f}%" if accuracy else f"mae {mean['mae']:.3f}"
        info = (
            f"loss {mean['loss']:.3f}  {metric}  {mean['images_per_s']:.1f} img/s  "
            f"{mean['patches_per_s']:.0f} patches/s  "
            f"data wait {100 * mean['data_wait']:.0f}%  {perf['memory_mib']:.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="train", info=info)
            return
        now = time.monotonic()
        if now - self._printed >= self._line_seconds or step == self._total:
            self._printed = now
            left = (self._total - step) * (now - self._begun) / max(1, step - self._first)
            self.message(f"step {step}/{self._total}  {info}  ETA {timedelta(seconds=round(left))}")

    def evaluating(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="evaluate", info=f"{done}/{total} images")

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.message(f"step {step}  validation {describe(metrics)}")

    def shortcuts(self, scores: Mapping[str, float]) -> None:
        if not scores:
            return
        best = max(scores, key=lambda name: scores[name])
        self.message(
            f"Guessing from one simple property scores at most {100 * scores[best]:.1f}% here "
            f"({best}); chance is {100 * scores['chance']:.1f}%."
        )

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None:
        best, shortcuts = summary["best"], summary["shortcuts"]
        lines = [f"\nBest validation, step {best['step']}: {describe(best)}"]
        if shortcuts:
            name = max(shortcuts, key=lambda name: shortcuts[name])
            lines.append(f"Best shortcut: {100 * shortcuts[name]:.1f}% ({name})")
        self.message("\n".join([*lines, f"Run folder: {folder}"]))


class StderrProgress(Progress):
    """Warnings on standard error only, so that standard output stays machine-readable."""

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def describe(metrics: Mapping[str, Any]) -> str:
    """Formats an evaluation in one line."""
    shown = []
    for name, (short, percent) in _SHOWN.items():
        if name in metrics:
            value = metrics[name]
            figure = f"{100 * value:.1f}%" if percent else _figure(value)
            shown.append(f"{short} {figure}")
    bad = metrics.get("bad_images")
    left_out = f", {bad} unreadable ones left out" if bad else ""
    return "  ".join(
        [*shown, f"loss {metrics['loss']:.3f}", f"({metrics['examples']} images{left_out})"]
    )


def _figure(value: float | None) -> str:
    return "undefined" if value is None else format(value, ".3f")


# The metrics shown, in order: short name, and whether to show a percentage.
_SHOWN = {
    "accuracy": ("accuracy", True),
    "balanced_accuracy": ("balanced", True),
    "quadratic_weighted_kappa": ("kappa", False),
    "mean_average_precision": ("mean average precision", False),
    "mean_f1": ("mean F1", False),
    "mae": ("mean absolute error", False),
    "rmse": ("root mean square error", False),
}
