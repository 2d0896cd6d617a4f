"""Shows how a run goes: a live line in a terminal, plain lines elsewhere, or nothing."""

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
    """What the training loop tells; this base class keeps silent."""

    def message(self, text: str) -> None:
        """One line of information."""

    def warn(self, text: str) -> None:
        """One line about something that went wrong but does not stop the run."""

    @contextmanager
    def running(self, done: int, total: int) -> Iterator[None]:
        """Encloses the training steps."""
        yield

    def log_train(self, step: int, values: Values, perf: Values) -> None:
        """A step's `loss`, `grad_norm` and training metric, and its speed."""

    def evaluating(self, done: int, total: int) -> None:
        """Examples evaluated so far."""

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """An evaluation's metrics."""

    def shortcuts(self, scores: Mapping[str, float]) -> None:
        """What simple guesses reach on this data."""

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None:
        """The run's summary and where it is."""


class ConsoleProgress(Progress):
    """Progress on standard output: rich's live line if that is a terminal, else plain lines.

    Args:
        line_seconds: the least time between two plain lines about training steps.
    """

    def __init__(self, line_seconds: float = 10.0) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Any = None
        self._task: Any = None
        self._line_seconds = line_seconds
        self._printed = 0.0
        self._mean = _RunningMean()
        self._first = self._total = 0
        self._begun = 0.0

    def message(self, text: str) -> None:
        # Names and paths may hold brackets, which are not meant as markup.
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
        from rich.progress import (
            Progress as Bar,
        )

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
        self._mean.add({**values, **perf})
        mean = self._mean.values
        info = (
            f"loss {mean['loss']:.3f}  {_describe_training(mean)}  "
            f"{mean['images_per_s']:.1f} img/s  "
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
    """An evaluation in one line."""
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


# What an evaluation shows, in this order: its short name, and whether it is a share.
_SHOWN = {
    "accuracy": ("accuracy", True),
    "balanced_accuracy": ("balanced", True),
    "quadratic_weighted_kappa": ("kappa", False),
    "mean_average_precision": ("mean average precision", False),
    "mean_f1": ("mean F1", False),
    "mae": ("mean absolute error", False),
    "rmse": ("root mean square error", False),
}


def _figure(value: float | None) -> str:
    return "undefined" if value is None else format(value, ".3f")


def _describe_training(values: Values) -> str:
    if "accuracy" in values:
        return f"acc {100 * values['accuracy']:.1f}%"
    return f"mae {values['mae']:.3f}"


class _RunningMean:
    """Exponential means, so that a line does not jump with every batch."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, values: Values) -> None:
        for name, value in values.items():
            self.values[name] = 0.95 * self.values.get(name, value) + 0.05 * value
