"""A patch grid in one dimension, for series: PatchGD does not depend on the data's dimension."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from patchgd_jax.core.grid import cut_windows, used_windows, windows
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class SeriesGrid:
    """Windows of one length and stride over a series, numbered in order: the grid in one dimension.

    Patch `i` begins at step `i * stride`, and stands in row 0 and column `i` of Z. A series that
    the windows do not tile is continued with zeros, so every step is in at least one patch.

    The grid is hashable and holds no arrays: it is a static argument of the jitted step.

    Args:
        length: steps of a series; with `patch` as long, its only patch is the whole series.
        patch: steps of a patch.
        stride: steps between the beginnings of neighbouring patches, at most `patch`; 0, the
            default, becomes `patch`.

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

    def mask(self, sizes: jax.Array) -> jax.Array:
        """Which patches belong to the grid of a series that is shorter than this one's.

        Args:
            sizes: `int [B, 1]`, the true number of steps of each series inside the array.

        Returns:
            `bool [B, 1, N]`, True for the patches that the series would have alone.
        """
        return used_windows(self.length, self.patch, self.stride, sizes)[:, None, :]

    def take(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Cuts patches out of a batch of series.

        Args:
            images: the series, `[B, length, C]`, any dtype.
            ids: `int [B, k]`, patch numbers; those outside `0..N-1` are clipped into it.

        Returns:
            `[B, k, patch, C]`, of the series' dtype.

        Raises:
            ConfigError: if the series are not of the grid's length, or not `[B, length, C]`.
        """
        if images.ndim != 3 or images.shape[1] != self.length:
            raise ConfigError(
                f"the series are {list(images.shape)}, but the grid is for series of {self.length} "
                f"steps: [B, {self.length}, C]"
            )
        ids = jnp.clip(ids, 0, self.num_patches - 1)
        return cut_windows(images, (ids * self.stride,), self.patch, self.stride, 0)
