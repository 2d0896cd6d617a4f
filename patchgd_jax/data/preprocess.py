"""Preprocessing that belongs to a model's weights: channel statistics, background and classes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchgd_jax.data.protocols import as_regions
from patchgd_jax.data.run_data import RunData
from patchgd_jax.errors import CheckpointError, DataError

_STATISTICS_EXAMPLES = 64
_WHOLE_PIXELS = 2**24
"""Larger images are measured on `_SAMPLES` x `_SAMPLES` windows of `_WINDOW` px a side."""
_SAMPLES, _WINDOW = 4, 256


def _moments(image: np.ndarray) -> np.ndarray:
    """Mean and mean square of each channel of `uint8 [H, W, C]` over 255, `float64 [2, C]`."""
    # From the histogram: a float64 copy of a large image would be eight times its size.
    values, pixels = np.arange(256) / 255, image.shape[0] * image.shape[1]
    channels = np.moveaxis(image, -1, 0)
    counts = np.stack([np.bincount(c.reshape(-1), minlength=256) for c in channels]) / pixels
    return np.stack([counts @ values, counts @ values**2])


def _example_moments(data: RunData, index: int) -> np.ndarray:
    """Moments of an example without its padding; of evenly spread windows if it is large."""
    source = data.train
    if data.regions_level is None or max(h * w for h, w in data.shapes) <= _WHOLE_PIXELS:
        example = source[index]
        height, width = example.get("size", example["image"].shape[:2])
        return _moments(example["image"][:height, :width])
    with closing(as_regions(source).open(index)) as image:
        levels = len(image.level_shapes)
        if data.regions_level >= levels:
            raise DataError(
                f"it has {levels} levels, but data.level is {data.regions_level} (counted from 0)"
            )
        height, width = image.level_shapes[data.regions_level]
        rows, cols = min(_WINDOW, height), min(_WINDOW, width)
        windows = [
            _moments(image.read(int(y), int(x), rows, cols, data.regions_level))
            for y in np.linspace(0, height - rows, _SAMPLES)
            for x in np.linspace(0, width - cols, _SAMPLES)
        ]
    return np.mean(windows, axis=0)


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of a model's input; it is stored with the weights."""

    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    background: int
    """uint8 value outside an image and under transparent pixels."""
    class_names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Padded heights and widths of the training images."""

    @classmethod
    def measure(cls, data: RunData, *, leave_out_bad: bool = False) -> Preprocess:
        """Measures mean and std on up to 64 evenly spread training examples, without padding.

        Args:
            data: of the run.
            leave_out_bad: whether to skip examples that cannot be read.

        Raises:
            DataError: if an example cannot be read; with `leave_out_bad`, if none can.
        """
        source = data.train
        count = min(_STATISTICS_EXAMPLES, len(source))
        moments = []
        for i in range(count) if data.generated else np.linspace(0, len(source) - 1, count):
            try:
                moments.append(_example_moments(data, int(i)))
            except DataError as error:
                if leave_out_bad:
                    continue
                raise DataError(f"{source.describe(int(i))}: {error}") from error
        if not moments:
            raise DataError(
                f"none of {count} sampled training images can be read; run: patchgd-jax data check"
            )
        mean, square = np.mean(moments, axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 1e-6))
        # Rounded, so that a last bit of difference between NumPy versions does not matter.
        return cls(
            mean=tuple(round(float(m), 6) for m in mean),
            std=tuple(round(float(s), 6) for s in std),
            background=data.background,
            class_names=source.class_names,
            shapes=data.shapes,
        )

    @classmethod
    def from_dict(cls, values: Any) -> Preprocess:
        """Inverts `dataclasses.asdict`, from JSON.

        Raises:
            CheckpointError: if a field is missing or of another type.
        """
        try:
            return cls(
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                background=int(values["background"]),
                class_names=tuple(map(str, values["class_names"])),
                shapes=tuple((int(height), int(width)) for height, width in values["shapes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the run's preprocess.json is damaged: {error!r}") from error
