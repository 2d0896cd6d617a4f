"""A table of image files and their labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchgd_jax.data.tables.image_paths import described_by
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import printable

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Image files and their labels; sequences except `class_names` have an entry for each image."""

    paths: tuple[Path, ...]
    labels: np.ndarray
    """`int64 [n]` class index; `float32 [n, K]` of 0 and 1 for multi-label; `float32 [n]` for
    regression."""
    class_names: tuple[str, ...]
    """The K names by class index; empty for regression."""
    groups: tuple[str, ...] | None
    """Units to keep in one split, such as patients."""
    splits: tuple[str, ...] | None
    """A name of `SPLITS` for each image, if the user gave them."""
    weights: np.ndarray | None
    """`float32 [n]`, factor on the training loss."""
    rows: tuple[int, ...]
    """First line of the image's row in the CSV file, with the header's as 1; or 0."""
    fingerprint: str
    """SHA-256 that changes with any path below the root, file size, time of change or column."""
    strata: np.ndarray | None = None
    """`int64 [n]`: every fold gets an equal share of each. None: from the labels."""
    background: int | None = None
    """uint8 value outside the images, if their format determines it."""

    def __len__(self) -> int:
        return len(self.paths)


def make_table(
    paths: Sequence[Path],
    root: Path,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    weights: np.ndarray | None = None,
    rows: Sequence[int] | None = None,
) -> ImageTable:
    """Makes an `ImageTable` of existing files from its fields, with its fingerprint.

    The fingerprint leaves `root` out of the paths, so that the folder may be moved.

    Raises:
        DataError: if a file does not exist.
    """
    files = []
    for path in paths:
        try:
            stat = described_by(path).stat()
        except OSError as error:
            raise DataError(f"cannot read {printable(str(path))}: {error.strerror}") from error
        name = path.absolute()
        if name.is_relative_to(root.absolute()):
            name = name.relative_to(root.absolute())
        files.append([name.as_posix(), stat.st_size, stat.st_mtime_ns])
    columns = [labels.tolist(), list(class_names), groups and list(groups), splits and list(splits)]
    return ImageTable(
        paths=tuple(paths),
        labels=labels,
        class_names=tuple(class_names),
        groups=None if groups is None else tuple(groups),
        splits=None if splits is None else tuple(splits),
        weights=weights,
        rows=(0,) * len(paths) if rows is None else tuple(rows),
        fingerprint=hashlib.sha256(
            json.dumps([files, *columns, None if weights is None else weights.tolist()]).encode()
        ).hexdigest(),
    )
