"""The folder of a run: its files, and how they are read and written."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from patchgd_jax.config import SCHEMA, TrainConfig, from_dict, migrate, nest, to_dict
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.errors import CheckpointError, ConfigError, PatchGDError
from patchgd_jax.io.files import disk_errors, write_json

CONFIG, ENVIRONMENT, PREPROCESS = "config.json", "environment.json", "preprocess.json"
METRICS, SUMMARY, CURVES = "metrics.jsonl", "summary.json", "curves.png"
EXAMPLES = "examples"


class RunFolder:
    """An existing run folder; raises `CheckpointError` if `path` holds no run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if (self.path / CONFIG).is_file():
                return
            there = "is empty or holds no run" if self.path.is_dir() else "does not exist"
        except OSError as error:
            there = f"cannot be read: {error.strerror}"
        raise CheckpointError(f"run folder {self.path} {there}: it has no {CONFIG}")

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig, preprocess: dict[str, Any]) -> RunFolder:
        """Makes the folder of a new run and writes its constant files.

        Raises:
            ConfigError: if the folder holds anything already.
            DiskError: if it cannot be written.
        """
        path = Path(path)
        cls.check_free(path)
        with disk_errors(f"cannot write run folder {path}"):
            path.mkdir(parents=True, exist_ok=True)
        write_json(path / ENVIRONMENT, _environment())
        write_json(path / PREPROCESS, preprocess)
        # Last, because with it the folder is a run.
        write_json(path / CONFIG, {"schema": SCHEMA, **to_dict(config)})
        return cls(path)

    @staticmethod
    def check_free(path: str | Path) -> None:
        """Checks that the folder is free for a new run.

        Files of a run that was killed before it had a config do not count.

        Raises:
            ConfigError: if it holds anything else.
            DiskError: if it cannot be listed.
        """
        path = Path(path)
        with disk_errors(f"cannot write run folder {path}"):
            names = [p.name for p in path.iterdir()] if path.exists() else []
        free = all(
            name in (ENVIRONMENT, PREPROCESS) or re.fullmatch(r"\..*\.tmp", name) for name in names
        )
        if not free:
            raise ConfigError(
                f"run folder {path} is in use; choose another with --run-dir, or continue that "
                f"run with: patchgd-jax resume {path}"
            )

    def config(self) -> TrainConfig:
        """Reads the run's resolved config; `ConfigError` if damaged or of an unknown version."""
        path = str(self.path / CONFIG)
        return from_dict(TrainConfig, nest(migrate(self.read(CONFIG, ConfigError), path)), path)

    def preprocess(self) -> Preprocess:
        """Reads the preprocessing of the run's images; raises as `read`."""
        return Preprocess.from_dict(self.read(PREPROCESS))

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's `Checkpoints`."""
        return self.path / "checkpoints"

    def read(self, name: str, failure: type[PatchGDError] = CheckpointError) -> Any:
        """Reads a JSON file; raises `failure` if it is missing or damaged."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise failure(f"cannot read {path}: {error}") from error


def _environment() -> dict[str, Any]:
    packages = ("patchgd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
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
