"""What an image goes through before it reaches a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from patchgd_jax.data.pipeline import ExampleSource
from patchgd_jax.errors import CheckpointError

_STATISTICS_EXAMPLES = 64


@dataclass(frozen=True)
class Preprocess:
    """What a model's input must go through; it belongs to the weights and stays with them."""

    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    background: int
    """uint8 value outside an image and under transparent pixels."""
    class_names: tuple[str, ...]

    @classmethod
    def measure(cls, source: ExampleSource) -> Preprocess:
        """Statistics over the first training examples."""
        images = [source[i]["image"] / 255 for i in range(min(_STATISTICS_EXAMPLES, len(source)))]
        mean = np.mean([image.mean((0, 1)) for image in images], axis=0)
        square = np.mean([(image**2).mean((0, 1)) for image in images], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 1e-6))
        # Rounded, so that a last bit of difference between NumPy versions does not matter.
        return cls(
            mean=tuple(round(float(m), 6) for m in mean),
            std=tuple(round(float(s), 6) for s in std),
            background=0,
            class_names=tuple(str(c) for c in range(source.num_classes)),
        )

    @classmethod
    def from_dict(cls, values: Any) -> Preprocess:
        """The inverse of `dataclasses.asdict`, from JSON.

        Raises:
            CheckpointError: if anything is missing.
        """
        try:
            return cls(
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                background=int(values["background"]),
                class_names=tuple(map(str, values["class_names"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the run's preprocess.json is damaged: {error!r}") from error
