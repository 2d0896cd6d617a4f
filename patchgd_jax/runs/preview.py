"""Examples as training sees them, with the patches of the first inner step, for a contact sheet."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from patchgd_jax.baselines.registry import resolve_method
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.patch_ids import valid_ids
from patchgd_jax.core.problem import Problem
from patchgd_jax.core.step import draw
from patchgd_jax.data.inspect.contact_sheet import SheetEntry
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.run_data import RunData, make_data, read_files
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.engine.setup import make_problem, make_run_task, training_grids
from patchgd_jax.errors import DataError

IMPORTANCE_NOTE = (
    "patchgd.importance draws by the model's state; shown are the first step's uniform draws."
)


def preview(
    config: TrainConfig, count: int, split: Literal["train", "validation"]
) -> list[SheetEntry]:
    """Reads the first `count` examples of a split, or all, and draws patches for them.

    The examples of each size form batches of the run's size; the draws are those of the first outer
    step. Raises `ConfigError` for conflicting settings, `DataError` for unusable images or labels.
    """
    files = read_files(config)
    config = resolve_method(resolve_channels(config, files))
    data = make_data(config, files)
    grids = training_grids(config, data)
    problems = {
        shape: _problem(config, data, grid) for shape, grid in zip(data.shapes, grids, strict=True)
    }
    source = data.train if split == "train" else data.validation
    examples = _read(source, count, leave_out_bad=config.data.bad_images == "substitute")
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, example in examples.items():
        by_shape.setdefault(example["image"].shape[:2], []).append(index)
    entries = {}
    size = config.images_per_step
    for shape, indices in by_shape.items():
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            drawn = _draw(config, problems[shape], [examples[index] for index in chosen])
            for index, (sampled, skipped) in zip(chosen, drawn, strict=True):
                grid, example = problems[shape].grid, examples[index]
                entries[index] = SheetEntry(
                    example["image"],
                    f"{index}: label {_label(data.train.class_names, example['label'])}",
                    grid if isinstance(grid, PatchGrid) else None,
                    sampled,
                    skipped,
                )
    return [entries[index] for index in examples]


def _read(source: ExampleSource, count: int, *, leave_out_bad: bool) -> dict[int, dict[str, Any]]:
    """Reads the first examples, by index."""
    examples: dict[int, dict[str, Any]] = {}
    for index in range(len(source)):
        if len(examples) == count:
            break
        try:
            examples[index] = source[index]
        except DataError as error:
            if not leave_out_bad:
                raise DataError(f"{source.describe(index)}: {error}") from error
    return examples


def _problem(config: TrainConfig, data: RunData, grid: Grid) -> Problem:
    """Makes the run's problem for a grid, without importance sampling, which needs a state."""
    plain = dataclasses.replace(config.patchgd, importance="none")
    channels = config.data.num_channels
    return make_problem(
        dataclasses.replace(config, patchgd=plain),
        grid,
        Preprocess(
            (0.5,) * channels, (1.0,) * channels, data.background, data.train.class_names,
            data.shapes,
        ),
        make_run_task(config, data.num_classes),
    )  # fmt: skip


def _draw(
    config: TrainConfig, problem: Problem, examples: list[dict[str, Any]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Draws, for each example, the patches of the first inner step; lists those not valid too."""
    size = config.images_per_step
    rows = [examples[min(row, len(examples) - 1)] for row in range(size)]
    batch: dict[str, Any] = {"label": np.empty(size)}
    if "patches" in rows[0]:
        batch["patches"] = np.stack([row["patches"] for row in rows])
    valid, every = valid_ids(batch, problem.grid), set(range(problem.grid.num_patches))
    groups: Any = [[]] * size
    if config.patchgd.mode in ("patchgd", "accumulate"):
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        groups = np.asarray(draw(problem, batch, key)[1].ids[0]).tolist()
    used = [every] * size if valid is None else [every & set(ids) for ids in valid.tolist()]
    return [
        (tuple(sorted(every & set(groups[row]))), tuple(sorted(every - used[row])))
        for row in range(len(examples))
    ]


def _label(class_names: tuple[str, ...], label: np.ndarray) -> str:
    if label.dtype.kind in "iu":
        return class_names[int(label)]
    if label.ndim:
        names = zip(class_names, label > 0.5, strict=True)
        return ", ".join(name for name, holds in names if holds) or "none"
    return f"{label:g}"
