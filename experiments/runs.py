"""What an experiment is made of: rows of a table, and a run for each seed of a row."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import patchgd_jax
from patchgd_jax import TrainConfig
from patchgd_jax._version import __version__
from patchgd_jax.config import flatten, to_dict
from patchgd_jax.errors import ConfigError
from patchgd_jax.io.files import write_json
from patchgd_jax.runs.folder import SUMMARY

Scale = Literal["smoke", "cpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

# Inside the folder of a run of the runner; `run` is what `patchgd_jax.runs.train` makes.
TRAINED, ORIGIN, FAILURE = "run", "origin.json", "failure.json"
_FINAL_FAILURES = (4, 5)
"""Exit codes that are a result: it does not fit the memory, it diverged. The same run would only
fail again; what failed for another reason is tried again."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one setting, to be trained with several seeds."""

    label: str
    """Its name; no two rows of an experiment share it."""
    config: TrainConfig
    """The run; its seed is replaced."""
    columns: Mapping[str, str | int | float] = field(default_factory=dict)
    """More columns of the table."""
    start: Row | None = None
    """What to train before, once and with seed 0, for all rows that start from its best encoder."""
    budget: str | None = None
    """Memory that settings that are auto must fit, 16GiB say."""
    task: Literal["train", "measure"] = "train"
    """train: to the end. measure: a few steps, for memory and speed alone."""


@dataclass(frozen=True)
class Run:
    """A row with one seed, and the folder in which it is trained."""

    row: Row
    seed: int
    out: Path
    """Folder of all runs of the experiment."""

    @property
    def name(self) -> str:
        """Of its folder."""
        words = re.sub(r"[^\w.]+", "-", self.row.label).strip("-")
        return f"{words}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """All that it leaves."""
        return self.out / self.name

    @property
    def start(self) -> Run | None:
        """The run whose best encoder it starts from."""
        return None if self.row.start is None else Run(self.row.start, 0, self.out)

    @property
    def wanted(self) -> dict[str, Any]:
        """Everything that its result depends on, but the code, as plain JSON values."""
        return {
            "name": self.name,
            "task": self.row.task,
            "budget": self.row.budget,
            "config": to_dict(replace(self.row.config, seed=self.seed)),
            "start": None if self.start is None else self.start.wanted,
        }

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        if (self.folder / TRAINED / SUMMARY).exists():
            return True
        return self.failure.get("exit_code") in _FINAL_FAILURES

    @property
    def failure(self) -> dict[str, Any]:
        """`exit_code` and `reason` of a run that failed; empty if it did not."""
        path = self.folder / FAILURE
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    @property
    def origin(self) -> dict[str, Any]:
        """What was `wanted` and which `code` trained it; empty if nothing of it is there."""
        path = self.folder / ORIGIN
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def check(self, *, accept_other_commit: bool) -> None:
        """Checks that what lies in its folder is of these settings and this code.

        Raises:
            ConfigError: if not; it says what to do.
        """
        origin = self.origin
        if not origin:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(
                    f"{self.folder} is not of an experiment: it has no {ORIGIN}; choose another "
                    "--out"
                )
            return
        then, now = flatten(origin["wanted"]), flatten(self.wanted)
        changed = [
            f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if changed:
            lines = "\n  ".join([*changed[:5], *(["..."] if len(changed) > 5 else [])])
            raise ConfigError(
                f"{self.folder} is a run with other settings than it has here; choose another "
                f"--out, or delete that folder:\n  {lines}"
            )
        made_by, here = origin["code"][-1], code_identity()
        if made_by["source"] != here["source"] and not accept_other_commit:
            raise ConfigError(
                f"{self.folder} was trained by other code: {told(made_by)}, this is {told(here)}; "
                "choose another --out, delete that folder, or mix them with --accept-other-commit"
            )

    def claim(self) -> None:
        """Writes down that this code is about to train it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        code = self.origin.get("code", [])
        if not code or code[-1] != code_identity():
            code = [*code, code_identity()]
        write_json(self.folder / ORIGIN, {"wanted": self.wanted, "code": code})
        (self.folder / FAILURE).unlink(missing_ok=True)


def runs_of(rows: Sequence[Row], seeds: int, out: Path) -> list[Run]:
    """The runs of the rows, seed by seed, after the runs that they start from.

    A measurement is made once: what it tells does not depend on the seed.
    """
    runs = [
        Run(row, seed, out)
        for seed in range(seeds)
        for row in rows
        if seed == 0 or row.task == "train"
    ]
    starts: list[Run] = []
    for run in runs:
        if run.start is not None and run.start not in starts:
            starts.append(run.start)
    everything = [*starts, *runs]
    assert len({run.name for run in everything}) == len(everything), "two rows share a folder"
    return everything


@cache
def code_identity() -> dict[str, Any]:
    """Which code trains and measures; `source` alone says whether two are the same."""
    package = Path(patchgd_jax.__file__).parent
    digest = hashlib.sha256()
    own = [Path(__file__).with_name(name) for name in ("child.py", "measure.py")]
    for path in [*sorted(package.rglob("*.py")), *own]:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, cwd=package).stdout.strip()

    return {
        "version": __version__,
        "commit": git("log", "-1", "--format=%h") or None,
        "dirty": bool(git("status", "--porcelain")),
        "source": digest.hexdigest()[:16],
    }


def told(code: Mapping[str, Any]) -> str:
    """A `code_identity` in a few words."""
    commit = f"commit {code['commit']}" if code["commit"] else f"version {code['version']}"
    return commit + ("+changes" if code["dirty"] else "")
