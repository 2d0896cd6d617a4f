"""Reads prepared image classification sets of tensorflow-datasets; needs no TensorFlow."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.safe_image import decode_image
from patchgd_jax.errors import ConfigError, DataError

Split = Literal["train", "validation", "test"]

_INFO = "dataset_info.json"


class TfdsSource:
    """A split of a prepared set; stateless, and safe to read from several threads.

    Nothing is ever downloaded. The set must have exactly one image and one class label per example,
    of any names, in a format with random access (array_record). `tfds_splits` lists its splits.

    Args:
        name_or_dir: a prepared set's folder, or NAME, NAME/CONFIG or NAME/CONFIG/VERSION within
            `data_dir`; the defaults are the newest version and the only config.
        split: `train`, `validation` or `test`.
        channels: 1 for grey, 3 for RGB.
        size: height and width to shrink and pad images to. None: their own.
        background: uint8 value under transparent pixels and in the padding.
        data_dir: tfds' folder of all sets. None: TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
        ConfigError: if there is no such prepared set or split, or its features or format differ.
        DataError: if its files are damaged or missing.
    """

    def __init__(
        self,
        name_or_dir: str | Path,
        split: Split,
        *,
        channels: Literal[1, 3],
        size: tuple[int, int] | None = None,
        background: int = 0,
        data_dir: str | Path | None = None,
    ) -> None:
        self._channels: Literal[1, 3] = channels
        self._size = size
        self._background = background
        folder = find_prepared(name_or_dir, data_dir)
        info = _read_info(folder)
        self._image, self._label = _image_and_label(info)
        self.class_names = tuple(str(name) for name in info.features[self._label].names)
        self._name = info.full_name
        parts = _splits(info)
        if split not in parts:
            raise ConfigError(f"{self._name} has no split {split!r} besides its validation images")
        self._split = parts[split]
        self._records = _open_records(folder, info, self._split, self._image)
        self.buckets = (np.arange(len(self)),)
        self.fingerprint = (
            f"tfds {self._name} {self._split} records={len(self)} info={_info_hash(folder)} "
            f"channels={channels} background={background}"
            + ("" if size is None else f" size={size} background={background}")
        )

    def describe(self, index: int) -> str:
        """Names an example in messages."""
        return f"record {index} of {self._name}, split {self._split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example.

        Returns:
            `image` `uint8 [H, W, C]`; `label` and `id` (the position in the split) as int64
            scalars; with `size` also the image's own height and width, `size` `int32 [2]`.

        Raises:
            IndexError: if there is no such example.
            DataError: if its record, label or image is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in 0..{len(self) - 1}")
        name = self.describe(index)
        try:
            record = self._records[index]
        except Exception as error:
            # The reader's C++ and protobuf raise errors of their own classes.
            raise DataError(f"cannot read {name}: {error}") from error
        label, classes = int(record[self._label]), len(self.class_names)
        if not 0 <= label < classes:
            raise DataError(f"{name} has the label {label}, which is not in 0..{classes - 1}")
        image = decode_image(
            record[self._image], name, channels=self._channels, background=self._background
        )
        example = {"image": image, "label": np.int64(label), "id": np.int64(index)}
        if self._size is None:
            return example
        regions = ArrayRegions(image, background=self._background)
        image, shape = read_resized(regions, self._size, self._background)
        return {**example, "image": image, "size": np.array(shape, np.int32)}


def stored_channels(name_or_dir: str | Path, data_dir: str | Path | None = None) -> Literal[1, 3]:
    """Reads the channels of a prepared set's images, without transparency, from its metadata.

    The arguments and errors are those of `TfdsSource`.

    Raises:
        ConfigError: also if the set does not state its channels.
    """
    info = _read_info(find_prepared(name_or_dir, data_dir))
    image, _ = _image_and_label(info)
    channels = info.features[image].shape[-1]
    if channels not in (1, 3, 4):
        raise ConfigError(
            f"{info.full_name} does not say whether its images are grey; set --data.channels 1 or 3"
        )
    return 1 if channels == 1 else 3


def tfds_splits(name_or_dir: str | Path, data_dir: str | Path | None = None) -> dict[Split, str]:
    """Maps the splits of a run to those of a prepared set.

    `validation` and `test` are the set's own. Without a `validation` of its own it is the set's
    `test`, or else the last fifth of `train` in stored order, which `train` then leaves out. The
    arguments and errors are those of `TfdsSource`.
    """
    return _splits(_read_info(find_prepared(name_or_dir, data_dir)))


def find_prepared(name_or_dir: str | Path, data_dir: str | Path | None = None) -> Path:
    """Finds the folder of a prepared set on disk; the arguments are those of `TfdsSource`.

    Raises:
        ConfigError: if there is none, with the command to prepare it, or there are several.
        DataError: if a folder cannot be read.
    """
    name = os.fspath(name_or_dir)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    for place in (Path(name).expanduser(), root / name.replace(":", "/")):
        try:
            found = _prepared_in(place)
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror}") from error
        if len(found) == 1:
            return found[0]
        if found:
            configs = ", ".join(path.parent.name for path in found)
            raise ConfigError(f"{place} holds several configs; name one, {name}/...: {configs}")
    raise ConfigError(
        f"no prepared tensorflow-datasets set {name!r}: {root / name} holds no {_INFO}. "
        f"{_near(name, root)}Prepare it once, which may download it:\n"
        f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={os.fspath(root)!r}).download_and_prepare(file_format='array_record')\""
    )


def _prepared_in(folder: Path) -> list[Path]:
    """The newest prepared version of each config in a set's folder, or the folder itself."""
    if not folder.is_dir():
        return []
    if (folder / _INFO).is_file():
        return [folder]
    newest = _newest_version(folder)
    if newest is not None:
        return [newest]
    configs = (_newest_version(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [path for path in configs if path is not None]


def _newest_version(folder: Path) -> Path | None:
    # Other folders, such as the remains of a killed process, are no versions.
    versions = [
        path
        for path in folder.iterdir()
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / _INFO).is_file()
    ]
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def _near(name: str, root: Path) -> str:
    if not root.is_dir():
        return ""
    there = [
        path.parent.relative_to(root).as_posix()
        for folder in sorted(root.iterdir())
        for path in _prepared_in(folder)
    ]
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}? "
    return f"Prepared there: {', '.join(there[:10])}. " if there else ""


def _read_info(folder: Path) -> Any:
    """The set's `tfds.core.DatasetInfo`, from its files."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(os.fspath(folder)).info
    except Exception as error:
        # tfds raises undocumented classes of errors for damaged folders.
        raise DataError(f"{folder} cannot be read as a prepared data set: {error}") from error


def _image_and_label(info: Any) -> tuple[str, str]:
    """Names of the only image feature and the only class label."""
    import tensorflow_datasets as tfds

    kinds = tfds.features.Image, tfds.features.ClassLabel
    names = [[name for name, f in info.features.items() if isinstance(f, kind)] for kind in kinds]
    if any(len(found) != 1 for found in names):
        features = ", ".join(f"{n} ({type(f).__name__})" for n, f in sorted(info.features.items()))
        raise ConfigError(
            f"{info.full_name} has {len(names[0])} images and {len(names[1])} class labels per "
            f"example; a set with one of each is needed. Its features: {features}"
        )
    return names[0][0], names[1][0]


def _splits(info: Any) -> dict[Split, str]:
    if "train" not in info.splits:
        raise ConfigError(
            f"{info.full_name} has no split 'train'; its splits: {', '.join(info.splits) or 'none'}"
        )
    if "validation" in info.splits:
        own: dict[Split, str] = {"train": "train", "validation": "validation"}
        return own | ({"test": "test"} if "test" in info.splits else {})
    if "test" in info.splits:
        return {"train": "train", "validation": "test"}
    return {"train": "train[:80%]", "validation": "train[80%:]"}


def _open_records(folder: Path, info: Any, split: str, image: str) -> Any:
    """Opens a split's records for random access, with encoded images."""
    import tensorflow_datasets as tfds

    part = info.splits[split]
    if part.num_examples == 0:
        raise DataError(f"{info.full_name}: the split {split} is empty")
    try:
        # A new builder, as opening it for random access changes its info.
        records = tfds.builder_from_directory(os.fspath(folder)).as_data_source(
            split, decoders={image: tfds.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        kind = info.file_format.value if info.file_format else "an unknown format"
        raise ConfigError(
            f"{folder} is stored as {kind}, which has no random access; prepare the set into "
            "another data_dir with download_and_prepare(file_format='array_record')"
        ) from error
    except Exception as error:
        raise DataError(f"{folder} cannot be opened: {error}") from error
    for instruction in part.file_instructions:
        if not Path(instruction.filename).is_file():
            raise DataError(
                f"{instruction.filename} is missing; copy it there, or prepare the set anew"
            )
    return records


def _info_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.txt")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
