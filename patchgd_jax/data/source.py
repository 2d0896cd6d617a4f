"""What the pipeline expects of a data set."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class ExampleSource(Protocol):
    """Random access to examples; stateless, picklable, and safe to read from several threads."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        ...

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
