"""Regions of a generated image of digits, of any size; nothing but the region is rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patchgd_jax.data.images.region_base import ClippedRegions
from patchgd_jax.data.images.shrink import shrink

if TYPE_CHECKING:
    from patchgd_jax.data.synthetic.ultramnist import UltraMnist


class DigitRegions(ClippedRegions):
    """Regions of one example; its pixels are those of `source[index]["image"]`.

    Args:
        source: the data set.
        index: number of the example.
    """

    def __init__(self, source: UltraMnist, index: int) -> None:
        self._source, self._plan = source, source.plan(index)
        height, width, channels = source.config.image_shape
        arguments = {"source": source, "index": index}
        super().__init__(arguments, [(height, width)], channels=channels, background=0)

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        by = self._source.config.downscale
        window = self._source.render(self._plan, y * by, x * by, height * by, width * by)
        return np.repeat(shrink(window[..., None], by), self.channels, axis=-1)

    def close(self) -> None:
        """Does nothing: there is no file."""
