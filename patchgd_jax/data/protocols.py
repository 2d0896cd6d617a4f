"""What the pipeline expects of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from patchgd_jax.data.images.region_base import RegionSource


class ExampleSource(Protocol):
    """Random access to examples; stateless, and safe to read from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that changes whenever an example would."""
        ...

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """A partition of the indices, `int64 [n]` each; examples of one have equal shapes."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example.

        Returns:
            `image` `uint8 [H, W, C]`, `label`, and `id` (int64). Where a source has them also
            `size` `int32 [2]` (the image's own height and width), `patches` `int32 [M]`, and
            `weight` `float32 []` (a factor on the training loss).
        """
        ...

    def describe(self, index: int) -> str:
        """A path or name of an example for messages; needs no readable file."""
        ...


class RegionExamples(ExampleSource, Protocol):
    """Examples whose images can also stay where they are, and be read by regions."""

    def entry(self, index: int) -> dict[str, Any]:
        """An example without its pixels.

        Returns:
            What `__getitem__` does, but for `image` and `size`.
        """
        ...

    def padded_size(self, index: int) -> int:
        """The number of an example's padded size, in the order of `RunData.shapes`."""
        ...

    def open(self, index: int) -> RegionSource:
        """An example's image; the caller closes it.

        Raises:
            DataError: if it cannot be opened.
        """
        ...


def as_regions(source: ExampleSource) -> RegionExamples:
    """The source, which must be one whose images can be read by regions."""
    assert hasattr(source, "entry")
    assert hasattr(source, "open")
    return cast(RegionExamples, source)


class ReadOtherwise:
    """The examples of a source, of which a subclass reads in another way.

    Args:
        source: the examples.
    """

    def __init__(self, source: ExampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.source.class_names

    @property
    def fingerprint(self) -> str:
        """Changes whenever an example would."""
        return self.source.fingerprint

    @property
    def buckets(self) -> tuple[np.ndarray, ...]:
        """As of the source: `int64 [n]` each."""
        return self.source.buckets

    def describe(self, index: int) -> str:
        """The source's name of the example."""
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
        """The example's `entry`."""
        return self.source.entry(index)
