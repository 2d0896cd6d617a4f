"""Generated images as a tensorflow-datasets set named `ultra_mnist`; needs no TensorFlow.

Importing this module registers the set with tensorflow-datasets (and takes two seconds):
`tfds.builder("ultra_mnist/512px-10classes-sklearn").download_and_prepare()` makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tensorflow_datasets as tfds

from patchgd_jax.config import DataConfig
from patchgd_jax.data.synthetic.digits import Split
from patchgd_jax.data.synthetic.png_folder import (
    EncodedExample,
    OnExample,
    encoded_examples,
    require_generated,
)
from patchgd_jax.data.synthetic.ultramnist import GENERATOR_VERSION, UltraMnist
from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.io.files import atomic_folder, unfinished_folders

NAME = "ultra_mnist"

_SHARD_BYTES = 256 * 2**20

_LOOK = (
    "task", "classes", "size", "channels", "digits", "digit_count", "label_share", "object_ratio",
    "scale", "noise", "downscale", "train_size", "val_size",
)  # fmt: skip
"""Settings that determine the pixels."""

_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass
class UltraMnistConfig(tfds.core.BuilderConfig):
    """Contents of a set.

    Attributes:
        data: look and number of the images.
        seed: of the whole data set.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    seed: int = 0


def _published(side: int, classes: int, digits: Any) -> UltraMnistConfig:
    return UltraMnistConfig(
        name=f"{side}px-{classes}classes-{digits}",
        description=f"UltraMNIST, {side} px, {classes} classes, digits of {digits}",
        data=DataConfig(
            task="digit-sum",
            classes=classes,
            size=(side, side),
            noise=classes == 28,
            digits=digits,
            train_size=28_000,
            val_size=2_800,
        ),
    )


# Reloading this module would register a second class of the same name, which tfds refuses.
_REGISTERED = any(
    vars(cls).get("name") == NAME for cls in tfds.core.GeneratorBasedBuilder.__subclasses__()
)


class UltraMnistBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=_REGISTERED):  # type: ignore[call-arg]
    """Stores the examples of `UltraMnist`: equal pixels, labels and boxes, in index order.

    Its configs are named SIDEpx-CLASSESclasses-DIGITS. They all have 28,000 training and 2,800
    validation images whose digits grow with the image; those of 28 classes have the benchmark's
    background. An `UltraMnistConfig` of your own stores any other settings of the generator.

    Each example has `image` (PNG), `label`, `index` (the generator's, and the position in the
    split), and for each digit in `boxes` its value `digit` and its `bbox`: top, left, bottom and
    right as shares of the image's height and width.
    """

    name = NAME
    VERSION = tfds.core.Version(f"{GENERATOR_VERSION}.0.0")
    RELEASE_NOTES = {f"{GENERATOR_VERSION}.0.0": "pixels of the generator's version of that number"}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        _published(side, classes, digits)
        for classes, sides in ((10, (512, 1024, 2048, 4096)), (28, (2000, 4000)))
        for side in sides
        for digits in ("sklearn", "font")
    ]

    def __init__(self, *, file_format: Any = None, **arguments: Any) -> None:
        # tfds' own default needs TensorFlow to be written or read at random.
        super().__init__(file_format=file_format or "array_record", **arguments)

    def source(self, split: Split) -> UltraMnist:
        """Makes the generator of a split."""
        return UltraMnist(self.builder_config.data, split, self.builder_config.seed)

    def _info(self) -> Any:
        config: DataConfig = self.builder_config.data
        features = tfds.features
        box = {"digit": features.ClassLabel(num_classes=10), "bbox": features.BBoxFeature()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of handwritten digits of very different sizes (arXiv 2206.12681).",
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=config.image_shape, encoding_format="png"),
                    "label": features.ClassLabel(names=[str(i) for i in range(config.classes)]),
                    "index": np.int64,
                    "boxes": features.Sequence(box),
                }
            ),
            supervised_keys=("image", "label"),
            # In index order, so that a set does not depend on its number of files.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                generator=GENERATOR_VERSION, seed=self.builder_config.seed, data=_look(config)
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(
        self, split: Split, on_example: OnExample = lambda *counts: None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for example in encoded_examples(self.source(split), on_example):
            yield example.index, _features(self.builder_config.data, example)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        self.write_records(Path(self.data_dir), limit=download_config.max_examples_per_split)

    def write_records(
        self,
        folder: Path,
        *,
        limit: int | None = None,
        on_example: OnExample = lambda *counts: None,
    ) -> None:
        """Streams the examples of all splits to record files and adds these to `info`.

        tfds' own writer keeps a gigabyte of records in memory, and fails beyond that without
        TensorFlow.

        Args:
            folder: an existing folder.
            limit: largest number of examples per split. None: all.
            on_example: called with the number of examples done and the split's total.

        Raises:
            DiskError: if the files cannot be written.
        """
        splits = []
        for split in _SPLITS:
            size = len(self.source(split))
            count = min(size, limit or size)
            examples = islice(self._generate_examples(split, on_example), count)
            features = self.info.features
            records = (features.serialize_example(features.encode_example(e)) for _, e in examples)
            template = tfds.core.ShardedFileTemplate(
                dataset_name=NAME,
                data_dir=folder,
                split=split,
                filetype_suffix=self.info.file_format.file_suffix,
            )
            lengths, size = self._write_shards(records, count, template)
            info = {"shard_lengths": lengths, "num_bytes": size, "filename_template": template}
            splits.append(tfds.core.SplitInfo(name=split, **info))
        self.info.set_splits(tfds.core.SplitDict(splits))

    def _write_shards(
        self, records: Iterator[bytes], count: int, template: Any
    ) -> tuple[list[int], int]:
        """Writes files of about `_SHARD_BYTES`; returns their lengths and total bytes."""
        first = next(records)
        records = chain([first], records)
        per_shard = max(1, _SHARD_BYTES // len(first))
        lengths = [min(per_shard, count - start) for start in range(0, count, per_shard)]
        sizes: list[int] = []

        def take(length: int) -> Iterator[tuple[int, bytes]]:
            for key, record in enumerate(islice(records, length)):
                sizes.append(len(record))
                yield key, record

        for number, length in enumerate(lengths):
            path = template.sharded_filepath(shard_index=number, num_shards=len(lengths))
            try:
                self._example_writer().write(os.fspath(path), take(length))
            except ImportError as error:
                raise ConfigError(
                    f"cannot write a data set: {error}; install the missing package, or write PNG "
                    "files instead"
                ) from error
            except RuntimeError as error:
                raise DiskError(f"cannot write {path}: {error}") from error
        return lengths, sum(sizes)


def make_dataset(
    config: DataConfig,
    seed: int,
    data_dir: str | Path | None = None,
    *,
    on_example: OnExample = lambda *counts: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Path:
    """Writes generated images as a prepared tensorflow-datasets set.

    Args:
        config: as for `make_folder`.
        seed: as for `make_folder`.
        data_dir: tfds' folder of all sets. None: TFDS_DATA_DIR or ~/tensorflow_datasets.
        on_example: as for `make_folder`.
        on_note: as for `make_folder`.

    Returns:
        The set's folder, `DATA_DIR/ultra_mnist/CONFIG/VERSION`, for `data.tfds`. It appears when
        it is complete. CONFIG ends in a hash of all settings, so sets never share a folder.

    Raises:
        ConfigError: if the set exists already, or the config names existing images.
        DiskError: if it cannot be written.
    """
    require_generated(config)
    with _quiet_absl():
        builder = UltraMnistBuilder(
            config=UltraMnistConfig(name=config_name(config, seed), data=config, seed=seed),
            data_dir=None if data_dir is None else os.fspath(data_dir),
        )
    final = Path(builder.data_dir)
    if (final / "dataset_info.json").exists():
        raise ConfigError(
            f"{final} holds this data set already; use it with --data.tfds {final}, or delete it "
            "to make it anew"
        )
    for path in unfinished_folders(final):
        on_note(f"{path} is unfinished work; delete it if no other process is writing it")
    try:
        with atomic_folder(final) as work:
            builder.write_records(work, on_example=on_example)
            builder.info.write_to_directory(os.fspath(work))
    except ConfigError:
        # Another process may have made the same set meanwhile; equal settings, equal pixels.
        if not (final / "dataset_info.json").exists():
            raise
    return final


def config_name(config: DataConfig, seed: int) -> str:
    """Names a set by its settings and their hash: `512px-10classes-sklearn-HASH`."""
    height, width = config.size
    side = f"{height}px" if height == width else f"{height}x{width}px"
    kind = f"{config.classes}classes" if config.task == "digit-sum" else config.task
    settings = json.dumps([GENERATOR_VERSION, seed, _look(config)], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return f"{side}-{kind}-{config.digits}-{digest}"


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silences tfds' warning about configs that the class does not list."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _look(config: DataConfig) -> dict[str, Any]:
    look = {name: getattr(config, name) for name in _LOOK}
    return {**look, "channels": config.num_channels}


def _features(config: DataConfig, example: EncodedExample) -> dict[str, Any]:
    height, width = config.size
    boxes = [
        tfds.features.BBox(
            ymin=digit.y / height,
            xmin=digit.x / width,
            ymax=(digit.y + digit.side) / height,
            xmax=(digit.x + digit.side) / width,
        )
        for digit in example.digits
    ]
    digits = [digit.value for digit in example.digits]
    return {
        "image": example.png,
        "label": example.label,
        "index": example.index,
        "boxes": [{"digit": d, "bbox": b} for d, b in zip(digits, boxes, strict=True)],
    }
