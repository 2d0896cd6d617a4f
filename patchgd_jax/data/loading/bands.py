"""Examples of whose images only a band of pixel rows is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from patchgd_jax.data.protocols import RegionExamples, Unread


class Band(NamedTuple):
    """Pixel rows of an image, over its whole width; they may reach beyond it."""

    top: int
    height: int
    width: int


class BandExamples(Unread):
    """The examples of a source, each with a band of its image; stateless.

    Args:
        source: the examples.
        bands: by padded size, of images at `level`.
        level: which the source's images are read at.
    """

    def __init__(self, source: RegionExamples, bands: Sequence[Band], level: int) -> None:
        super().__init__(source)
        self._bands, self._level = tuple(bands), level

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example's `entry`, and `image` `uint8 [height, width, C]` of its band."""
        band = self._bands[self.source.padded_size(index)]
        with closing(self.source.open(index)) as image:
            pixels = image.read(band.top, 0, band.height, band.width, self._level)
        return {"image": pixels, **self.source.entry(index)}
