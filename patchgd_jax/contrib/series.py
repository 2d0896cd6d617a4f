"""A patch grid in one dimension, for series: PatchGD does not depend on the data's dimension."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from patchgd_jax.core.grid import cut_windows, used_windows, windows
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class SeriesGrid:
    """Windows of one length and stride over a series, numbered in order: the grid in one dimension.

    Patch `i` begins at step `i * stride`, and stands in row 0 and column `i` of Z. A series that
    the windows do not tile is continued with zeros, so every step is in at least one patch.

    Args:
        length: steps of a series; with `patch` as long, its only patch is the whole series.
        patch: steps of a patch.
        stride: steps between neighbouring patches, at most `patch`; 0 becomes `patch`.

    Raises:
        ConfigError: if the patch is longer than the series, or the stride longer than the patch.
    """

    length: int
    patch: int
    stride: int = 0

    def __post_init__(self) -> None:
        if self.stride == 0:
            object.__setattr__(self, "stride", self.patch)
        if self.patch < 1 or not 1 <= self.stride <= self.patch:
            raise ConfigError(
                f"patch length {self.patch} and stride {self.stride}: the stride must be between "
                "1 and the patch length"
            )
        if self.patch > self.length:
            raise ConfigError(
                f"patch length {self.patch} is longer than the series ({self.length} steps); use a "
                "shorter patch or longer series"
            )

    @property
    def rows(self) -> int:
        """Rows of Z: 1."""
        return 1

    @property
    def cols(self) -> int:
        """Columns of Z: N."""
        return windows(self.length, self.patch, self.stride)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.cols

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Steps of a patch."""
        return (self.patch,)

    def mask(self, sizes: Array) -> Array:
        """Marks the patches `bool [B, 1, N]` of series of `sizes int [B, 1]` steps."""
        return used_windows(self.length, self.patch, self.stride, sizes)[:, None, :]

    def take(self, images: Array, ids: Array) -> Array:
        """Cuts patches `ids int [B, k]` out of series `[B, length, C]`: `[B, k, patch, C]`.

        Ids outside `0..N-1` are clipped into it.
        """
        if images.ndim != 3 or images.shape[1] != self.length:
            raise ConfigError(
                f"the series are {list(images.shape)}, but the grid is for series of {self.length} "
                f"steps: [B, {self.length}, C]"
            )
        ids = jnp.clip(ids, 0, self.num_patches - 1)
        return cut_windows(images, (ids * self.stride,), self.patch, self.stride, 0)
