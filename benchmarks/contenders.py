"""Runs contenders, each in its own process, in turns: A B A B, so that both meet the same noise."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worker import Task

_WORKER = Path(__file__).parent / "worker.py"


class Contender:
    """A worker process, started and warmed up; `failure` says why not, if it is not.

    Args:
        task: what to run.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.failure, self.seconds = task, "", list[float]()
        # A file, since a full pipe would stop the worker.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.started = self._answer() or {}

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().strip().splitlines()
        memory = ("memory", "alloc", "resource_exhausted")
        reasons = [line for line in errors if any(word in line.lower() for word in memory)]
        self.failure = (reasons or errors or [""])[-1][:200] or f"ended with {code}"
        return None

    def ask(self, request: str) -> dict[str, Any] | None:
        """Sends a request and returns the answer, or None if the process ended."""
        if self.failure:
            return None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except OSError:
            pass
        return self._answer()

    def run(self, count: int = 1) -> None:
        """Runs steps and notes their seconds."""
        answer = self.ask(f"run {count}")
        if answer is not None:
            self.seconds += answer["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def figures(self) -> dict[str, Any]:
        """What was measured; only `failure` if it could not run."""
        task = {k: v for k, v in asdict(self.task).items() if k != "limit_bytes"}
        peak = self.ask("peak")
        if peak is None or not self.seconds:
            return {"task": task, "failure": self.failure or "no step ran"}
        low, median, high = quartiles(self.seconds)
        started = {k: v for k, v in self.started.items() if k != "task"}
        return {
            "task": task,
            "step_s": {"median": median, "quartiles": [low, high], "all": self.seconds},
            "images_per_s": self.task.batch / median,
            "patches_per_s": self.task.batch * self.task.patches / median,
            **started,
            **peak,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def compare(tasks: Sequence[Task], *, rounds: int, steps: int = 1, at_once: int = 1) -> list[Any]:
    """Runs tasks in turns, round after round, and returns the figures of each.

    Args:
        tasks: the contenders.
        rounds: times each has its turn.
        steps: steps a turn.
        at_once: contenders that start at a time; more than one disturbs their compile times.
    """
    with ThreadPoolExecutor(at_once) as pool:
        contenders = list(pool.map(Contender, tasks))
    try:
        for _ in range(rounds):
            for contender in contenders:
                contender.run(steps)
        return [contender.figures() for contender in contenders]
    finally:
        for contender in contenders:
            contender.close()
