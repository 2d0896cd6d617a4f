"""Regions of slides in vendors' formats (MIRAX, DICOM, Ventana, Leica, ...), through OpenSlide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchgd_jax.data.images.pixels import to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.errors import ConfigError


class OpenSlideRegions(RegionSource):
    """Regions of any slide that OpenSlide reads.

    OpenSlide takes positions in pixels of level 0 only. Where a level's downsample is no whole
    number, a region of that level can therefore be off by less than one pixel of level 0.

    Args:
        path: the slide's file.
        channels: 1 or 3. None: 3, as slides have.
        background: uint8 value outside the image and where the slide holds no tile.
        cache_bytes: bytes of decoded tiles to keep.

    Raises:
        ImageReadError: if OpenSlide cannot read the file.
        ConfigError: if it is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        channels: Literal[1, 3] | None,
        background: int = 0,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        try:
            import openslide
        except ImportError as error:
            raise ConfigError(
                f"{path} needs OpenSlide; install it with: pip install 'patchgd-jax[openslide]'"
            ) from error
        self.path = Path(path)
        try:
            self._slide: Any = openslide.OpenSlide(self.path)
        except (openslide.OpenSlideError, OSError) as error:
            reason = str(error) or "OpenSlide does not know its format"
            raise ImageReadError(path, reason) from error
        self._slide.set_cache(openslide.OpenSlideCache(cache_bytes))
        numbers = [
            _number(self._slide.properties.get(name))
            for name in (
                openslide.PROPERTY_NAME_MPP_X,
                "openslide.level[0].tile-height",
                "openslide.level[0].tile-width",
            )
        ]
        mpp, rows, cols = numbers
        super().__init__(
            [(height, width) for width, height in self._slide.level_dimensions],
            channels=channels or 3,
            background=background,
            mpp=mpp or None,
            tile=(int(rows), int(cols)) if rows and cols else None,
        )
        # Its own: positions are in units of it.
        self.downsamples = tuple(map(float, self._slide.level_downsamples))

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        if self._slide is None:
            raise ValueError(f"{self.path} is closed")
        scale = self.downsamples[level]
        try:
            image = self._slide.read_region(
                (round(x * scale), round(y * scale)), level, (width, height)
            )
        except Exception as error:
            raise ImageReadError(
                self.path,
                f"{height} x {width} px at row {y}, column {x} of level {level}: {error}",
            ) from error
        return to_uint8(
            np.asarray(image), channels=self.channels, background=self.background, alpha="straight"
        )

    def close(self) -> None:
        """Closes the slide; reading afterwards is an error."""
        if self._slide is not None:
            self._slide.close()
            self._slide = None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
