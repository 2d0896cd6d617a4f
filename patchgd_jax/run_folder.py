"""The folder of a run: which files are in it and how they are read and written."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from patchgd_jax.checkpoint import fsync_path, write_json
from patchgd_jax.config import TrainConfig, from_dict, to_dict
from patchgd_jax.errors import CheckpointError, ConfigError, DiskError

CONFIG, ENVIRONMENT, PREPROCESS = "config.json", "environment.json", "preprocess.json"
METRICS, SUMMARY, CURVES = "metrics.jsonl", "summary.json", "curves.png"
EXAMPLES = "examples"


class RunFolder:
    """An existing run folder.

    Args:
        path: the folder.

    Raises:
        CheckpointError: if no run is in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            there = "is empty or holds no run" if self.path.is_dir() else "does not exist"
            raise CheckpointError(f"run folder {self.path} {there}: it has no {CONFIG}")

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunFolder:
        """Makes the folder of a new run and writes the resolved config and the environment.

        Raises:
            ConfigError: if the folder holds anything already.
            DiskError: if it cannot be written.
        """
        path = Path(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(
                    f"run folder {path} is in use; choose another with --run-dir, or continue that "
                    f"run with: patchgd-jax resume {path}"
                )
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / ENVIRONMENT, _environment())
            write_json(path / CONFIG, to_dict(config))
        except OSError as error:
            raise DiskError(f"cannot write run folder {path}: {error.strerror or error}") from error
        return cls(path)

    def config(self) -> TrainConfig:
        """The resolved config the run was started with.

        Raises:
            ConfigError: if the file is damaged or from a version with other settings.
        """
        path = self.path / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        config = from_dict(TrainConfig, values, str(path))
        assert isinstance(config, TrainConfig)
        return config

    @property
    def checkpoints(self) -> Path:
        """Where the run's `Checkpoints` stand."""
        return self.path / "checkpoints"

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file of the folder, whole or not at all.

        Raises:
            DiskError: if it cannot be written.
        """
        try:
            write_json(self.path / name, value)
        except OSError as error:
            raise DiskError(
                f"cannot write {self.path / name}: {error.strerror or error}"
            ) from error

    def read(self, name: str) -> Any:
        """Reads a JSON file of the folder.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error


def _environment() -> dict[str, Any]:
    packages = (
        "patchgd-jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    )
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "versions": versions,
    }


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, `kind` `train` or `eval`, with its `step`.

    Wall-clock figures stand under `perf`; everything else is the same for every run of a seed.

    Args:
        path: the file.
        upto: keep the lines of steps up to this one and drop the rest, which a resumed run
            writes again.
    """

    def __init__(self, path: Path, upto: int) -> None:
        self._path = path
        try:
            kept = [line for line in read_metrics(path) if line["step"] <= upto]
            partial = path.with_name(f".{path.name}.tmp")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            fsync_path(partial)
            partial.replace(path)
            # By line, so that whoever follows the file sees every step at once.
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
        self.lines = kept

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        self.lines.append(line)
        self._guard(lambda: self._file.write(json.dumps(line) + "\n"))

    def sync(self) -> None:
        """Puts every line on disk; a checkpoint must not be ahead of its log."""
        self._guard(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Closes the file."""
        self._guard(self._file.close)

    def _guard(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            raise DiskError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
