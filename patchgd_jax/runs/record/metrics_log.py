"""The metrics log of a run: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from patchgd_jax.config import SCHEMA
from patchgd_jax.io.files import atomic_file, disk_errors


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, `kind` `train` or `eval`, with its `step`.

    Wall-clock figures stand under `perf`; everything else is the same for every run of a seed. In
    the file, each line also has its `schema`. Lines after step `upto` are dropped: a resumed run
    writes them again. Without `writes` the lines are only kept in memory.
    """

    def __init__(self, path: Path, upto: int, *, writes: bool = True) -> None:
        self._path = path
        self._file: TextIO | None = None
        self.lines = [line for line in read_metrics(path) if line["step"] <= upto]
        if not writes:
            return
        with disk_errors(f"cannot write {path}"):
            with atomic_file(path) as partial:
                partial.write_text("".join(map(_text, self.lines)), encoding="utf-8")
            # Flushed by line, so that every step shows in the file at once.
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        self.lines.append(line)
        self._guard(lambda file: file.write(_text(line)))

    def sync(self) -> None:
        """Syncs every line to disk; a checkpoint must not be ahead of its log."""
        self._guard(lambda file: os.fsync(file.fileno()))

    def close(self) -> None:
        """Closes the file."""
        self._guard(lambda file: file.close())

    def _guard(self, action: Callable[[TextIO], object]) -> None:
        if self._file is not None:
            with disk_errors(f"cannot write {self._path}"):
                action(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file, without one that a kill cut short."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        line.pop("schema", None)
        lines.append(line)
    return lines


def _text(line: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, **line}) + "\n"
