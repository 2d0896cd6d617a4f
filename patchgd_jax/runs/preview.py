"""Examples as training sees them, with the patches of the first inner step, for a contact sheet."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from patchgd_jax.baselines.registry import resolve_method
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.patch_ids import valid_ids
from patchgd_jax.core.problem import named_key
from patchgd_jax.core.sampling import sample_groups
from patchgd_jax.data.inspect.contact_sheet import SheetEntry
from patchgd_jax.data.run_data import make_data
from patchgd_jax.data.sources.channels import with_channels
from patchgd_jax.engine.setup import training_grids
from patchgd_jax.errors import DataError


def preview(
    config: TrainConfig, count: int, split: Literal["train", "validation"]
) -> list[SheetEntry]:
    """The first examples of a split.

    Args:
        config: the run.
        count: examples, at most what there are.
        split: which examples.

    Raises:
        ConfigError: for settings that do not fit together.
        DataError: for images or labels that cannot be used.
    """
    config = resolve_method(with_channels(config))
    data = make_data(config)
    grids = dict(zip(data.shapes, training_grids(config, data), strict=True))
    source = data.train if split == "train" else data.validation
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    entries: list[SheetEntry] = []
    for index in range(len(source)):
        if len(entries) == count:
            break
        try:
            example = source[index]
        except DataError as error:
            if config.data.bad_images == "substitute":
                continue
            raise DataError(f"{source.describe(index)}: {error}") from error
        image = example["image"]
        grid = grids[image.shape[:2]]
        batch: dict[str, Any] = {"image": image[None]}
        if "patches" in example:
            batch["patches"] = example["patches"][None]
        patches = valid_ids(batch, grid)
        every = range(grid.num_patches)
        used = set(every) if patches is None else set(np.asarray(patches[0]).tolist())
        sampled: set[int] = set()
        if config.patchgd.mode in ("patchgd", "accumulate"):
            sampling = named_key(key, "sampling")
            groups = sample_groups(sampling, config.patchgd, grid.num_patches, 1, patches)
            sampled = set(np.asarray(groups[0, 0]).tolist()) & set(every)
        label = example["label"]
        if label.dtype.kind in "iu":
            name = data.train.class_names[int(label)]
        elif label.ndim:
            names = zip(data.train.class_names, label > 0.5, strict=True)
            name = ", ".join(name for name, holds in names if holds) or "none"
        else:
            name = f"{label:g}"
        entries.append(
            SheetEntry(
                image,
                f"{index}: label {name}",
                grid if isinstance(grid, PatchGrid) else None,
                tuple(sorted(sampled)),
                tuple(sorted(set(every) - used)),
            )
        )
    return entries
