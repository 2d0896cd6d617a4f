"""Builds the data of a run from its settings: sources, splits and padded sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from patchgd_jax.config import DataConfig, TrainConfig
from patchgd_jax.core.grid import Grid
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.sources.file_images import FileImages
from patchgd_jax.data.sources.file_layout import plan_layout
from patchgd_jax.data.sources.file_reader import FileReader, Header, read_headers
from patchgd_jax.data.synthetic.trivial_baselines import label_baselines, plan_baselines
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.data.tables.class_folders import read_class_folders
from patchgd_jax.data.tables.csv_table import read_csv
from patchgd_jax.data.tables.splits import Split, absent_labels, split_table
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import ConfigError, DataError

_WHITE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm"}
"""Suffixes of slide scanners' files, whose background is white."""


@dataclass(frozen=True)
class RunData:
    """The examples of a run and their common properties."""

    train: ExampleSource
    validation: ExampleSource
    test: ExampleSource | None
    """Used neither for training nor to select the best model."""
    background: int
    shapes: tuple[tuple[int, int], ...]
    """Padded heights and widths; each has a program for training and one for evaluation."""
    slots: tuple[int | None, ...]
    """Largest number of patches of an image, by shape; None: the grid's."""
    score_baselines: Callable[[], dict[str, float]] = dict
    """Computes `trivial_baselines`, which can take seconds."""
    mean_slots: float | None = None
    """Mean number of valid patches of an image; None: all."""
    weighted: bool = False
    """Whether training examples have weights."""
    regions_level: int | None = None
    """Pyramid level of the examples' pixels; None: images can only be read whole."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, a line each."""
    generated: bool = False

    @cached_property
    def trivial_baselines(self) -> dict[str, float]:
        """Validation accuracy of untrained guesses by name, with `chance`; may be empty."""
        return self.score_baselines()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train.class_names)

    def mean_patches(self, grids: Sequence[Grid]) -> float:
        """Mean number of encoded patches of an image."""
        return self.mean_slots or grids[0].num_patches


class ImageFiles:
    """The labelled image files of a run.

    Args:
        table: paths and labels.
        split: rows of the table in each split.
    """

    def __init__(self, table: ImageTable, split: Split) -> None:
        self.table = table
        self.split = split

    @cached_property
    def headers(self) -> tuple[Header | DataError, ...]:
        """Header of each file, or the error of opening it; every file is opened once."""
        return read_headers(self.table.paths)


def make_data(config: TrainConfig, files: ImageFiles | None = None) -> RunData:
    """Finds and checks the images and labels of a run.

    Args:
        config: of the run, its channels resolved.
        files: result of `read_files(config)`. None: calls it.

    Raises:
        ConfigError: for settings that do not fit together.
        DataError: for labels or files that cannot be used; it names their rows.
    """
    if config.data.generated:
        data = _generated(config)
    else:
        files = files or read_files(config)
        data = _tfds(config) if files is None else _files(config, files)
    if len(data.train) < config.images_per_step:
        raise ConfigError(
            f"batch_size {config.images_per_step} is more than the {len(data.train)} training "
            f"images; set {'--data.train-size' if data.generated else '--batch-size lower'}"
        )
    return data


def _generated(config: TrainConfig) -> RunData:
    train = UltraMnist(config.data, "train", config.seed)
    validation = UltraMnist(config.data, "validation", config.seed)
    return RunData(
        train,
        validation,
        None,
        background=0,
        shapes=(config.data.image_shape[:2],),
        slots=(None,),
        score_baselines=partial(plan_baselines, train, validation),
        regions_level=0,
        generated=True,
    )


def _tfds(config: TrainConfig) -> RunData:
    from patchgd_jax.data.sources.tfds_source import TfdsSource, tfds_splits

    data = config.data
    assert data.tfds is not None
    background = data.background or 0
    parts = tfds_splits(data.tfds)
    options: dict[str, Any] = {"channels": data.num_channels, "size": data.size}
    sources = {
        split: TfdsSource(data.tfds, split, background=background, **options) for split in parts
    }
    instead = {"validation": None, "test": "its split test"}.get(
        parts["validation"], "the last fifth of its split train"
    )
    note = f"The set has no split validation; {instead} is used to select the best model."
    return RunData(
        sources["train"],
        sources["validation"],
        sources.get("test"),
        background=background,
        shapes=(data.size,),
        slots=(None,),
        score_baselines=lambda: {"chance": 1 / len(sources["train"].class_names)},
        notes=() if instead is None else (note,),
    )


def read_files(config: TrainConfig) -> ImageFiles | None:
    """Reads the labels of a run's image files and splits them; None for other data.

    Raises:
        ConfigError: if both a fold and a column of splits are named.
        DataError: for labels that cannot be used; it names their rows.
    """
    data = config.data
    if data.generated or data.tfds is not None:
        return None
    if data.columns.split is not None and (data.split.fold, data.split.test_fold) != (None, None):
        raise ConfigError(
            "data.split.fold and data.split.test_fold (and cross-validate) choose folds, but "
            "data.columns.split gives the split of each image; leave one of them out"
        )
    if data.panda is not None:
        from patchgd_jax.data.sources.panda import read_panda

        table = read_panda(data.panda, data.panda_options)
    elif data.csv is not None:
        table = read_csv(
            data.csv, data.root, data.columns, config.task.name, class_names=data.class_names
        )
        if len(np.unique(table.labels, axis=0)) == 1:
            raise DataError(f"all labels in {data.csv} are equal: there is nothing to learn")
    else:
        assert data.root is not None
        table = read_class_folders(data.root)
    return ImageFiles(table, split_table(table, data.split))


def file_reader(config: DataConfig, background: int) -> FileReader:
    """Makes the reader of image files, for PANDA or any other."""
    if config.panda is None:
        return FileReader(config, background)
    from patchgd_jax.data.sources.panda import panda_reader

    return panda_reader(config, background)


def file_background(config: DataConfig, table: ImageTable) -> int:
    """Finds the uint8 value outside an image: from the settings, or usual for the files' format.

    Raises:
        ConfigError: if `data.empty` needs the background and neither gives it.
    """
    if config.background is not None:
        return config.background
    if table.background is not None:
        return table.background
    if all(path.suffix.lower() in _WHITE_SUFFIXES for path in table.paths):
        return 255
    if config.empty.method != "none":
        raise ConfigError(
            "data.empty needs the background of these files; set --data.background 255 "
            "(white, as in slides) or 0 (black)"
        )
    return 0


def _files(config: TrainConfig, files: ImageFiles) -> RunData:
    table = files.table
    background = file_background(config.data, table)
    reader = file_reader(config.data, background)
    layout = plan_layout(table, files.headers, reader, config.patchgd)
    split = files.split
    sources = {
        name: FileImages(table, rows, layout, reader) for name, rows in split.items() if len(rows)
    }
    train, validation = (table.labels[split[name]] for name in ("train", "validation"))
    baselines = partial(label_baselines, train, validation, len(table.class_names))
    patches = layout.patches
    return RunData(
        sources["train"],
        sources["validation"],
        sources.get("test"),
        background=background,
        shapes=layout.shapes,
        slots=layout.slots,
        score_baselines=baselines if train.dtype.kind == "i" else dict,
        mean_slots=None if patches is None else float(np.mean([len(ids) for ids in patches])),
        weighted=table.weights is not None,
        regions_level=config.data.level if config.data.fit == "native" else None,
        notes=(*absent_labels(table, split), *layout.notes),
    )
