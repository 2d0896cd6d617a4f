"""Regions of slides in vendors' formats (MIRAX, DICOM, Ventana, Leica, ...) with OpenSlide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchgd_jax.data.images.pixels import to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.errors import ConfigError


class OpenSlideRegions(RegionSource):
    """Regions of a slide of any format that OpenSlide reads.

    OpenSlide takes positions in pixels of level 0 only. Where a level's downsample is no whole
    number, a region of that level can therefore be off by less than one pixel of level 0. Missing
    tiles are background. The arguments are those of `open_regions`; channels None is 3.

    Raises:
        ImageReadError: if OpenSlide cannot read the file.
        ConfigError: if it is not installed.
    """

    def __init__(
        self, path: Path, channels: Literal[1, 3] | None, background: int, cache_bytes: int
    ) -> None:
        try:
            import openslide
        except ImportError as error:
            raise ConfigError(
                f"{path} needs OpenSlide; install it with: pip install 'patchgd-jax[openslide]'"
            ) from error
        self.path = path
        try:
            self._slide: Any = openslide.OpenSlide(path)
        except (openslide.OpenSlideError, OSError) as error:
            reason = str(error) or "OpenSlide does not know its format"
            raise ImageReadError(path, reason) from error
        self._slide.set_cache(openslide.OpenSlideCache(cache_bytes))
        rows = self._number("openslide.level[0].tile-height")
        cols = self._number("openslide.level[0].tile-width")
        super().__init__(
            [(height, width) for width, height in self._slide.level_dimensions],
            channels or 3,
            background,
            mpp=self._number(openslide.PROPERTY_NAME_MPP_X),
            tile=(int(rows), int(cols)) if rows and cols else None,
        )
        # OpenSlide's own, as it converts positions with them.
        self.downsamples = tuple(map(float, self._slide.level_downsamples))

    def _number(self, name: str) -> float | None:
        """A property that is a number other than 0; None for others."""
        try:
            return float(self._slide.properties.get(name, "")) or None
        except ValueError:
            return None

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        if self._slide is None:
            raise ValueError(f"{self.path} is closed")
        scale = self.downsamples[level]
        corner = round(x * scale), round(y * scale)
        try:
            image = np.asarray(self._slide.read_region(corner, level, (width, height)))
        except Exception as error:
            where = f"{height} x {width} px at row {y}, column {x} of level {level}"
            raise ImageReadError(self.path, f"{where}: {error}") from error
        return to_uint8(image, channels=self.channels, background=self.background, alpha="straight")

    def close(self) -> None:
        """Closes the slide; reading afterwards is an error."""
        if self._slide is not None:
            self._slide.close()
            self._slide = None
