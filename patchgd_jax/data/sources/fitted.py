"""Brings images that are stored in records to one size."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.sources.tfds_source import TfdsSource


class Fitted:
    """The examples of a source, with images shrunk into a size and filled up with background.

    Args:
        source: the examples, of any sizes.
        size: height and width in pixels.
        background: uint8 value of what an image does not cover.
    """

    def __init__(self, source: TfdsSource, size: tuple[int, int], background: int) -> None:
        self._source = source
        self._size = size
        self._background = background

    def __len__(self) -> int:
        return len(self._source)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self._source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self._source.class_names

    @property
    def fingerprint(self) -> str:
        """Changes whenever an example would."""
        return f"{self._source.fingerprint} size={self._size} background={self._background}"

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """One: all images have the same size."""
        return (np.arange(len(self)),)

    def describe(self, index: int) -> str:
        """The source's name of the example."""
        return self._source.describe(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The source's example, with `image` `uint8 [*size, C]` and `size` `int32 [2]`."""
        example = self._source[index]
        regions = ArrayRegions(example["image"], background=self._background)
        image, size = read_resized(regions, self._size, self._background)
        return {**example, "image": image, "size": np.array(size, np.int32)}
