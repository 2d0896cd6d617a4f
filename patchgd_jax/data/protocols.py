"""Interfaces of example sources, and wrappers of a source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from patchgd_jax.data.images.region_base import RegionSource


class ExampleSource(Protocol):
    """Random access to examples; stateless, and safe to read from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever any example does."""
        ...

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """A partition of the indices, `int64 [n]` each, into examples of equal shapes."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example.

        Returns:
            `image` `uint8 [H, W, C]`, `label`, and `id` (int64). Where a source has them also
            `size` `int32 [2]` (the image's own height and width), `patches` `int32 [M]` (valid
            patch ids), and `weight` `float32 []` (a factor on the training loss).
        """
        ...

    def describe(self, index: int) -> str:
        """Names an example in messages, by path or number; needs no readable file."""
        ...


class RegionExamples(ExampleSource, Protocol):
    """Examples whose images can also be read by regions."""

    def entry(self, index: int) -> dict[str, Any]:
        """Returns the fields of `__getitem__` except `image` and `size`."""
        ...

    def padded_size(self, index: int) -> int:
        """Index of an example's padded size in `RunData.shapes`."""
        ...

    def open(self, index: int) -> RegionSource:
        """Opens an example's image; the caller closes it.

        Raises:
            DataError: if it cannot be opened.
        """
        ...


def as_regions(source: ExampleSource) -> RegionExamples:
    """Narrows a source, whose images must be readable by regions, to `RegionExamples`."""
    assert hasattr(source, "entry")
    assert hasattr(source, "open")
    return cast(RegionExamples, source)


class ReadOtherwise:
    """Wraps a source; a subclass defines how an example is read.

    Args:
        source: the examples.
    """

    def __init__(self, source: ExampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.source.class_names

    @property
    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self.source.fingerprint

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """The source's buckets, `int64 [n]` each."""
        return self.source.buckets

    def describe(self, index: int) -> str:
        """Names an example in messages."""
        return self.source.describe(index)


class Unread(ReadOtherwise):
    """The examples of a source without their pixels.

    Args:
        source: the examples.
    """

    source: RegionExamples

    def __init__(self, source: RegionExamples) -> None:
        super().__init__(source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example's `entry`."""
        return self.source.entry(index)


class Band(NamedTuple):
    """Pixel rows of an image, over its whole width; they may reach beyond it."""

    top: int
    height: int
    width: int


class BandExamples(Unread):
    """The examples of a source, with a band of pixel rows of each image; stateless.

    Args:
        source: the examples.
        bands: by padded size, in pixels of `level`.
        level: pyramid level to read.
    """

    def __init__(self, source: RegionExamples, bands: Sequence[Band], level: int) -> None:
        super().__init__(source)
        self._bands, self._level = tuple(bands), level

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example's `entry`, and `image` `uint8 [height, width, C]` of its band."""
        band = self._bands[self.source.padded_size(index)]
        with closing(self.source.open(index)) as image:
            pixels = image.read(band.top, 0, band.height, band.width, self._level)
        return {"image": pixels, **self.source.entry(index)}
