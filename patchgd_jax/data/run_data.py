"""The data of a run: which source the settings name, divided into splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchgd_jax.config import DataConfig, TrainConfig
from patchgd_jax.core.grid import Grid
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.sources.file_images import FileImages, FileReader, plan_layout
from patchgd_jax.data.synthetic.shortcuts import majority_scores, shortcut_scores
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.data.tables.class_folders import read_class_folders
from patchgd_jax.data.tables.csv_table import read_csv
from patchgd_jax.data.tables.splits import Split, absent_labels, split_table
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import ConfigError, DataError

WHITE_SUFFIXES = frozenset({".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm"})
"""Files of slide scanners, whose background is white."""


@dataclass(frozen=True)
class RunData:
    """The examples of a run, and what all of them have in common."""

    train: ExampleSource
    validation: ExampleSource
    test: ExampleSource | None
    """What neither training nor the choice of the best model sees."""
    background: int
    shapes: tuple[tuple[int, int], ...]
    """Padded heights and widths; each has a program for training and one for evaluation."""
    slots: tuple[int | None, ...]
    """By shape the most patches that an image has; None: all of the grid's."""
    shortcuts: dict[str, float]
    """Validation accuracy of guesses that need no training, `chance` among them; or nothing."""
    mean_slots: float | None = None
    """Patches of an image that count, on average; None: all."""
    weighted: bool = False
    """Whether training examples have weights."""
    regions_level: int | None = None
    """The level of the examples' images at which regions of them are pixels of theirs; None: they
    can only be read whole."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""
    generated: bool = False

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.train.num_classes

    def mean_patches(self, grids: Sequence[Grid]) -> float:
        """Patches of an image that are encoded, on average."""
        return self.mean_slots or grids[0].num_patches


def make_data(config: TrainConfig) -> RunData:
    """Finds the images and labels that the settings name, and checks them.

    Raises:
        ConfigError: for settings that do not fit together.
        DataError: for labels or files that cannot be used; it names their rows.
    """
    if config.data.generated:
        return _generated(config)
    data = _tfds(config) if config.data.tfds is not None else _files(config)
    batch = config.images_per_step
    if len(data.train) < batch:
        raise ConfigError(
            f"batch_size {batch} is more than the {len(data.train)} training images; "
            "set --batch-size lower"
        )
    return data


def _generated(config: TrainConfig) -> RunData:
    train = UltraMnist(config.data, "train", config.seed)
    validation = UltraMnist(config.data, "validation", config.seed)
    batch = config.images_per_step
    if len(train) < batch:
        raise ConfigError(
            f"batch_size {batch} is more than the {len(train)} training images; set "
            "--data.train-size"
        )
    return RunData(
        train,
        validation,
        None,
        background=0,
        shapes=(config.data.image_shape[:2],),
        slots=(None,),
        shortcuts=shortcut_scores(train, validation),
        regions_level=0,
        generated=True,
    )


def _tfds(config: TrainConfig) -> RunData:
    from patchgd_jax.data.sources.tfds_source import TfdsSource, tfds_splits

    data = config.data
    assert data.tfds is not None
    background = data.background or 0
    parts = tfds_splits(data.tfds)
    sources = {
        split: TfdsSource(
            data.tfds,
            split,
            channels=data.num_channels,
            size=data.size,
            background=background,
        )
        for split in parts
    }
    instead = {"validation": None, "test": "its split test"}.get(
        parts["validation"], "the last fifth of its split train"
    )
    return RunData(
        sources["train"],
        sources["validation"],
        sources.get("test"),
        background=background,
        shapes=(data.size,),
        slots=(None,),
        shortcuts={"chance": 1 / sources["train"].num_classes},
        notes=()
        if instead is None
        else (f"The set has no split validation; {instead} is, and chooses the best model.",),
    )


def read_table(config: TrainConfig) -> tuple[ImageTable, Split]:
    """The labels of the user's files, and the rows of each split.

    Raises:
        ConfigError: if a fold and a column of splits are named.
        DataError: for labels that cannot be used; it names their rows.
    """
    data = config.data
    if data.columns.split is not None and (data.split.fold, data.split.test_fold) != (None, None):
        raise ConfigError(
            "data.split.fold and data.split.test_fold (and cross-validate) are about folds, but "
            "data.columns.split names the split of each image; leave one of them out"
        )
    if data.panda is not None:
        from patchgd_jax.data.sources.panda import panda_strata, read_panda

        slides = read_panda(data.panda, data.panda_options)
        return slides, split_table(slides, data.split, strata=panda_strata(slides))
    if data.csv is not None:
        table = read_csv(
            data.csv, data.root, data.columns, config.task.name, class_names=data.class_names
        )
        if len(np.unique(table.labels, axis=0)) == 1:
            raise DataError(f"all labels in {data.csv} are equal: there is nothing to learn")
    else:
        assert data.root is not None
        table = read_class_folders(data.root)
    return table, split_table(table, data.split)


def file_background(config: DataConfig, table: ImageTable) -> int:
    """The grey value outside an image: what the settings say, or what files of that kind have.

    Raises:
        ConfigError: if empty patches are to be left out of files that may have either background.
    """
    if config.background is not None:
        return config.background
    slides = all(path.suffix.lower() in WHITE_SUFFIXES for path in table.paths)
    if slides or config.panda is not None:
        return 255
    if config.empty.method != "none":
        raise ConfigError(
            "data.empty must know what is background in these files; set --data.background 255 "
            "(white, as slides have) or 0 (black)"
        )
    return 0


def _files(config: TrainConfig) -> RunData:
    table, rows = read_table(config)
    background = file_background(config.data, table)
    reader = FileReader(config.data, background)
    layout = plan_layout(table, reader, config.patchgd)
    sources = {
        split: FileImages(table, of, layout, reader) for split, of in rows.items() if len(of)
    }
    classes = table.labels.dtype.kind == "i"
    return RunData(
        sources["train"],
        sources["validation"],
        sources.get("test"),
        background=background,
        shapes=layout.shapes,
        slots=layout.slots,
        shortcuts=majority_scores(
            sources["train"].labels, sources["validation"].labels, len(table.class_names)
        )
        if classes
        else {},
        mean_slots=None
        if layout.patches is None
        else float(np.mean([len(patches) for patches in layout.patches])),
        weighted=table.weights is not None,
        regions_level=config.data.level if config.data.fit == "native" else None,
        notes=(*absent_labels(table, rows), *layout.notes),
    )
