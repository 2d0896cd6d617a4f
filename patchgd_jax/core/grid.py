"""Grids: which pixels belong to which patch, and where a patch's latent stands in Z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.errors import ConfigError


class Grid(Protocol):
    """All that a step needs to know of patches; nothing of it depends on the data's dimension.

    A grid is hashable and holds no arrays: it is a static argument of the jitted step.
    """

    def __hash__(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows of Z."""
        ...

    @property
    def cols(self) -> int:
        """Columns of Z."""
        ...

    @property
    def num_patches(self) -> int:
        """N = rows * cols."""
        ...

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Shape of a patch without its channels."""
        ...

    def mask(self, sizes: jax.Array) -> jax.Array:
        """Which patches examples of true sizes `int [B, dims]` have: `bool [B, rows, cols]`."""
        ...

    def take(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """The patches `ids int [B, k]` of a batch, `[B, k, *patch_shape, C]`."""
        ...


def _windows(length: int, patch: int, stride: int) -> int:
    """Windows along an axis; one shorter than a window has one."""
    return max(0, -(-(length - patch) // stride)) + 1


def _covered(length: int, patch: int, stride: int) -> int:
    """How far the windows along an axis reach, at least its length."""
    return (_windows(length, patch, stride) - 1) * stride + patch


def _used(length: int, patch: int, stride: int, lengths: jax.Array) -> jax.Array:
    """Which windows examples of lengths `int [B, 1]` along an axis have: `bool [B, n]`."""
    number = jnp.arange(_windows(length, patch, stride))
    # As many windows as a grid of that length alone has: the last one may be padded.
    return (number == 0) | ((number - 1) * stride < lengths - patch)


def _window(
    array: jax.Array, starts: tuple[jax.Array, ...], patch: int, stride: int, outside: float
) -> jax.Array:
    """A window of an array `[*lengths, C]`: `patch` long along each axis but the last.

    `starts` are of the window's first element along each of these axes, and `outside` is the value
    beyond the array.
    """
    lengths = array.shape[:-1]
    size = (*[patch] * len(lengths), array.shape[-1])
    window = lax.dynamic_slice(array, (*starts, jnp.zeros_like(starts[0])), size)
    # A slice that would leave the array is moved back inside by dynamic_slice. Undoing the move
    # costs one patch; padding the array instead would cost a second array.
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if _covered(length, patch, stride) == length:
            continue
        place = start + jnp.arange(patch)
        moved = jnp.minimum(start, length - patch)
        window = jnp.take(window, place - moved, axis=axis, mode="clip")
        shape = [1] * array.ndim
        shape[axis] = patch
        inside = (place < length).reshape(shape)
        window = jnp.where(inside, window, jnp.asarray(outside, array.dtype))
    return window


def _cut(
    arrays: jax.Array, starts: tuple[jax.Array, ...], patch: int, stride: int, outside: float
) -> jax.Array:
    """Windows of a batch `[B, *lengths, C]` whose `starts` are `int [B, k]`, one for each axis."""

    def one(array: jax.Array, starts: tuple[jax.Array, ...]) -> jax.Array:
        return _window(array, starts, patch, stride, outside)

    return jax.vmap(jax.vmap(one, (None, 0)))(arrays, starts)


@dataclass(frozen=True)
class WholeImage:
    """The grid of one patch that is the whole image, of any shape: how a plain network sees it.

    Args:
        height: image height in pixels.
        width: image width in pixels.
    """

    height: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of Z: 1."""
        return 1

    @property
    def cols(self) -> int:
        """Columns of Z: 1."""
        return 1

    @property
    def num_patches(self) -> int:
        """N = 1."""
        return 1

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Height and width in pixels."""
        return self.height, self.width

    def mask(self, sizes: jax.Array) -> jax.Array:
        """True for every image: `bool [B, 1, 1]`."""
        return jnp.ones((sizes.shape[0], 1, 1), bool)

    def take(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """The images `[B, H, W, C]` themselves, as `[B, k, H, W, C]` for `ids int [B, k]`."""
        return jnp.broadcast_to(images[:, None], (*ids.shape, *images.shape[1:]))


@dataclass(frozen=True)
class PatchGrid:
    """Windows of one side and stride over an image, numbered row by row.

    Patch `i` stands at row `i // cols` and column `i % cols` of Z, and its top-left pixel is
    `(row * stride, col * stride)`. An image that the windows do not tile is continued with
    `background` to the right and below, so every pixel is in at least one patch.

    The grid is hashable and holds no arrays: it is a static argument of the jitted step.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        patch: patch side in pixels.
        stride: pixels between neighbouring patches, at most `patch`; 0, the default, becomes
            `patch`.
        background: uint8 value of pixels outside the image; 1/255 of it in images of floats.

    Raises:
        ConfigError: if the patch is larger than the image, or the stride larger than the patch.
    """

    height: int
    width: int
    patch: int
    stride: int = 0
    background: int = 0

    def __post_init__(self) -> None:
        if self.stride == 0:
            object.__setattr__(self, "stride", self.patch)
        if self.patch < 1 or not 1 <= self.stride <= self.patch:
            raise ConfigError(
                f"patch side {self.patch} and stride {self.stride}: the stride must be between "
                "1 and the patch side"
            )
        if self.patch > min(self.height, self.width):
            raise ConfigError(
                f"patch side {self.patch} is larger than the image ({self.height} x {self.width} "
                "px, height x width); use a smaller patch or a larger image"
            )

    def windows(self, length: int) -> int:
        """Patches along a side of so many pixels; an image smaller than a patch has one."""
        return _windows(length, self.patch, self.stride)

    @property
    def rows(self) -> int:
        """Rows of Z."""
        return self.windows(self.height)

    @property
    def cols(self) -> int:
        """Columns of Z."""
        return self.windows(self.width)

    @property
    def num_patches(self) -> int:
        """N = rows * cols."""
        return self.rows * self.cols

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Height and width of a patch in pixels."""
        return self.patch, self.patch

    @property
    def padded_height(self) -> int:
        """Height that the windows cover, at least `height`."""
        return _covered(self.height, self.patch, self.stride)

    @property
    def padded_width(self) -> int:
        """Width that the windows cover, at least `width`."""
        return _covered(self.width, self.patch, self.stride)

    def mask(self, sizes: jax.Array) -> jax.Array:
        """Which patches belong to the grid of an image that is smaller than this one's.

        Args:
            sizes: `int [B, 2]`, the true height and width of each image inside the array.

        Returns:
            `bool [B, rows, cols]`, True for the patches that the image would have alone.
        """
        row_used = _used(self.height, self.patch, self.stride, sizes[:, :1])
        col_used = _used(self.width, self.patch, self.stride, sizes[:, 1:])
        return row_used[:, :, None] & col_used[:, None, :]

    def take(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Cuts patches out of a batch of images.

        Args:
            images: `[B, height, width, C]`, any dtype.
            ids: `int [B, k]`, patch numbers; those outside `0..N-1` are clipped into it.

        Returns:
            `[B, k, patch, patch, C]`, of the images' dtype.
        """
        if images.shape[1:3] != (self.height, self.width):
            raise ConfigError(
                f"the images are {images.shape[1]} x {images.shape[2]} px, but the grid is for "
                f"{self.height} x {self.width} px"
            )
        ids = jnp.clip(ids, 0, self.num_patches - 1)

        floats = jnp.issubdtype(images.dtype, jnp.floating)
        outside = self.background / 255 if floats else self.background
        starts = ((ids // self.cols) * self.stride, (ids % self.cols) * self.stride)
        return _cut(images, starts, self.patch, self.stride, outside)


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
        return _windows(self.length, self.patch, self.stride)

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
        return _used(self.length, self.patch, self.stride, sizes)[:, None, :]

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
        return _cut(images, (ids * self.stride,), self.patch, self.stride, 0)
