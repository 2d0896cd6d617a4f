"""Cross-validation: a run for each fold of the data, and their mean scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from patchgd_jax.baselines.registry import resolve_method
from patchgd_jax.config import TrainConfig
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.engine.distributed import multiprocess_requested
from patchgd_jax.errors import ConfigError
from patchgd_jax.io.files import write_json
from patchgd_jax.planner.auto_settings import is_resolved, resolve_auto
from patchgd_jax.runs.folder import CONFIG, SUMMARY, RunFolder
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.train import resume, train

RESULT = "cross_validation.json"


def fold_configs(config: TrainConfig, folder: str | Path) -> dict[int, TrainConfig]:
    """Makes the config of each fold but the test fold, by its number.

    Raises `ConfigError` for data without folds.
    """
    if config.data.generated:
        raise ConfigError(
            "generated images have no folds; name your own with --data.csv, --data.root or "
            "--data.panda"
        )
    if config.data.tfds is not None:
        raise ConfigError("data.tfds has its own splits; folds are for --data.csv, root and panda")
    split = config.data.split
    return {
        fold: dataclasses.replace(
            config,
            run_dir=str(Path(folder) / f"fold-{fold}"),
            data=dataclasses.replace(config.data, split=dataclasses.replace(split, fold=fold)),
        )
        for fold in split.validation_folds
    }


def cross_validate(
    config: TrainConfig,
    folder: str | Path,
    *,
    progress: Callable[[], Progress] = Progress,
    budget: str | None = None,
) -> dict[str, Any]:
    """Trains a run for each fold, each into a folder of its own.

    Finished folds are kept and a stopped one is resumed, so the same call continues an interrupted
    cross-validation.

    Args:
        config: the run; its `data.split.fold` is replaced.
        folder: gets `fold-0`, `fold-1`, ... and `cross_validation.json`.
        progress: makes the display of a run.
        budget: as `train`'s; auto settings become the same numbers in every fold.

    Returns:
        `folds`: the best evaluation of each fold by its number, and for each of its single numbers
        `mean` and `std` (over folds, n - 1 degrees of freedom).

    Raises:
        ConfigError: if the images have no folds, or a folder belongs to another run.
        PatchGDError: as `train`.
        DiskError: if the result cannot be written.
    """
    # Read once, with a fold set: that raises for images that have their own splits.
    one = next(iter(fold_configs(config, folder).values()))
    channels = resolve_channels(one).data.channels
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, channels=channels))
    config = resolve_method(config)
    if multiprocess_requested():
        raise ConfigError(
            "cross-validate trains in one process; for several, train each fold by itself with "
            "--data.split.fold"
        )
    configs = fold_configs(_resolved(config, folder, budget, progress()), folder)
    for fold, wanted in configs.items():
        path = Path(wanted.run_dir or "")
        if (path / CONFIG).exists() and RunFolder(path).config() != wanted:
            raise ConfigError(
                f"{path} is a run with other settings than fold {fold} has here; choose another "
                "--run-dir"
            )
    best: dict[int, dict[str, Any]] = {}
    for fold, wanted in configs.items():
        path = Path(wanted.run_dir or "")
        shown = progress()
        shown.message(f"Fold {fold}: {path}")
        if (path / SUMMARY).exists():
            summary = RunFolder(path).read(SUMMARY)
            shown.message("It is finished.")
        elif (path / CONFIG).exists():
            summary = resume(path, progress=shown)
        else:
            summary = train(wanted, path, progress=shown)
        best[fold] = summary["best"]
    result = {"folds": best, **_spread(list(best.values()))}
    write_json(Path(folder) / RESULT, result)
    return result


def _resolved(
    config: TrainConfig, folder: str | Path, budget: str | None, progress: Progress
) -> TrainConfig:
    """Resolves auto settings: to those of the first fold with a config, if there is one."""
    paths = sorted(Path(folder).glob(f"fold-*/{CONFIG}"))
    if is_resolved(config) or not paths:
        return resolve_auto(config, budget, progress.message)
    known = RunFolder(paths[0].parent).config()
    changes: dict[str, Any] = {}
    if config.batch_size == "auto":
        changes = {"batch_size": known.batch_size, "eval_batch_size": known.eval_batch_size}
    if config.patchgd.fraction == "auto":
        fraction = known.patchgd.fraction
        changes["patchgd"] = dataclasses.replace(config.patchgd, fraction=fraction)
    return dataclasses.replace(config, **changes)


def _spread(scores: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    numbers = [
        name
        for name in scores[0]
        if name not in ("step", "examples")
        and all(isinstance(score[name], (int, float)) for score in scores)
    ]
    table = {name: np.array([score[name] for score in scores], np.float64) for name in numbers}
    return {
        "mean": {name: float(values.mean()) for name, values in table.items()},
        "std": {
            name: float(values.std(ddof=1)) if len(values) > 1 else 0.0
            for name, values in table.items()
        },
    }
