"""Examples from image files and slides, resized to one size or at native size."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.sources.file_layout import Layout
from patchgd_jax.data.sources.file_reader import FileReader
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import DataError


class FileImages:
    """The examples of some rows of a table; stateless.

    Args:
        table: paths and labels.
        rows: `int64 [n]`, the row of each example.
        layout: of the whole table.
        reader: of its files.
    """

    def __init__(
        self, table: ImageTable, rows: np.ndarray, layout: Layout, reader: FileReader
    ) -> None:
        self.table = table
        self.rows = np.asarray(rows, np.int64)
        self.class_names = table.class_names
        self._layout = layout
        self._reader = reader

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Changes whenever any example does."""
        rows = hashlib.sha256(self.rows.tobytes())
        for patches in self._layout.patches or ():
            rows.update(patches.tobytes())
        config = self._reader.config
        look = (config.size, config.fit, config.level, config.num_channels, self._reader.background)
        return (
            f"files table={self.table.fingerprint} rows={rows.hexdigest()[:16]} "
            f"shapes={self._layout.shapes} look={look} panda={config.panda_options}"
        )

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """Indices by padded size, `int64 [n]` each, without unused sizes."""
        member = self._layout.member[self.rows]
        every = (np.flatnonzero(member == i) for i in range(len(self._layout.shapes)))
        return tuple(indices for indices in every if len(indices))

    def describe(self, index: int) -> str:
        """Names an example by its path, and its line of the CSV file if any."""
        row = int(self.rows[index])
        line = self.table.rows[row]
        return f"{self.table.paths[row]}{f' (line {line})' if line else ''}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example.

        Returns:
            `image` `uint8 [H, W, C]` of its padded size, `size` `int32 [2]`, `label`, `id`
            (int64), `patches` `int32 [M]` unless all are valid, and `weight` `float32 []` if the
            table has weights.

        Raises:
            DataError: if the file cannot be read, or has become larger than its padded size.
        """
        row = int(self.rows[index])
        image, size = self._reader.read(self.table.paths[row])
        height, width = self._layout.shapes[self.padded_size(index)]
        if image.shape[:2] != (height, width):
            if image.shape[0] > height or image.shape[1] > width:
                raise DataError(
                    f"image {self.describe(index)} is {image.shape[0]} x {image.shape[1]} px, more "
                    f"than the {height} x {width} when the run began; restart the run"
                )
            padded = np.full((height, width, image.shape[2]), self._reader.background, np.uint8)
            padded[: image.shape[0], : image.shape[1]] = image
            image = padded
        return {"image": image, "size": np.array(size, np.int32), **self.entry(index)}

    def entry(self, index: int) -> dict[str, Any]:
        """Returns an example without `image` and `size`."""
        row = int(self.rows[index])
        example: dict[str, Any] = {"label": self.table.labels[row], "id": np.int64(index)}
        slots = self._layout.slots[self.padded_size(index)]
        if slots is not None:
            assert self._layout.patches is not None
            numbers = self._layout.patches[row]
            example["patches"] = np.full(slots, np.iinfo(np.int32).max, np.int32)
            example["patches"][: len(numbers)] = numbers
        if self.table.weights is not None:
            example["weight"] = np.float32(self.table.weights[row])
        return example

    def padded_size(self, index: int) -> int:
        """Index of an example's padded size in `Layout.shapes`."""
        return int(self._layout.member[self.rows[index]])

    def open(self, index: int) -> RegionSource:
        """Opens an example's image; the caller closes it."""
        return self._reader.open(self.table.paths[int(self.rows[index])])
