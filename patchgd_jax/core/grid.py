"""Patch grids: the pixels of each patch, and its place in Z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.errors import ConfigError


class Grid(Protocol):
    """Patches in any number of dimensions; hashable, without arrays: static in the jitted step."""

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

    def mask(self, sizes: Array) -> Array:
        """Marks the patches of examples of true sizes `int [B, dims]`: `bool [B, rows, cols]`."""
        ...

    def take(self, images: Array, ids: Array) -> Array:
        """Cuts the patches `ids int [B, k]` out of a batch: `[B, k, *patch_shape, C]`."""
        ...


def windows(length: int, patch: int, stride: int) -> int:
    """Counts the windows along an axis; one shorter than a window has one."""
    return max(0, -(-(length - patch) // stride)) + 1


def covered(length: int, patch: int, stride: int) -> int:
    """Returns how far the windows along an axis reach, at least its length."""
    return (windows(length, patch, stride) - 1) * stride + patch


def used_windows(length: int, patch: int, stride: int, lengths: Array) -> Array:
    """Marks the windows of examples of lengths `int [B, 1]` along an axis: `bool [B, n]`."""
    number = jnp.arange(windows(length, patch, stride))
    # As many windows as a grid of that length alone has: the last one may be padded.
    return (number == 0) | ((number - 1) * stride < lengths - patch)


def _window(
    array: Array, starts: tuple[Array, ...], patch: int, stride: int, outside: float
) -> Array:
    """Cuts the window from `starts` on out of `[*lengths, C]`; beyond it stands `outside`."""
    lengths = array.shape[:-1]
    size = (*[patch] * len(lengths), array.shape[-1])
    window = lax.dynamic_slice(array, (*starts, jnp.zeros_like(starts[0])), size)
    # A slice that would leave the array is moved back inside by dynamic_slice. Undoing the move
    # costs one patch; padding the array instead would cost a second array.
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if covered(length, patch, stride) == length:
            continue
        place = start + jnp.arange(patch)
        moved = jnp.minimum(start, length - patch)
        window = jnp.take(window, place - moved, axis=axis, mode="clip")
        shape = [1] * array.ndim
        shape[axis] = patch
        inside = (place < length).reshape(shape)
        window = jnp.where(inside, window, jnp.asarray(outside, array.dtype))
    return window


def cut_windows(
    arrays: Array, starts: tuple[Array, ...], patch: int, stride: int, outside: float
) -> Array:
    """Cuts windows out of a batch `[B, *lengths, C]`; `starts` are `int [B, k]` for each axis."""

    def one(array: Array, starts: tuple[Array, ...]) -> Array:
        return _window(array, starts, patch, stride, outside)

    return jax.vmap(jax.vmap(one, (None, 0)))(arrays, starts)


@dataclass(frozen=True)
class WholeImage:
    """The grid of one patch, the whole image (sides in pixels), as a plain network sees it."""

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

    def mask(self, sizes: Array) -> Array:
        """Marks the one patch of every image: `bool [B, 1, 1]`."""
        return jnp.ones((sizes.shape[0], 1, 1), bool)

    def take(self, images: Array, ids: Array) -> Array:
        """Returns the images `[B, H, W, C]` as `[B, k, H, W, C]` for `ids int [B, k]`."""
        return jnp.broadcast_to(images[:, None], (*ids.shape, *images.shape[1:]))


@dataclass(frozen=True)
class PatchGrid:
    """The grid of square windows over an image, numbered row by row.

    Patch `i` stands at row `i // cols` and column `i % cols` of Z, and its top-left pixel is `(row
    * stride, col * stride)`. An image that the windows do not tile is continued with `background`
    to the right and below, so every pixel is in at least one patch.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        patch: patch side in pixels.
        stride: pixels between neighbouring patches, at most `patch`; 0 becomes `patch`.
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
        """Counts the patches along a side of `length` pixels; at least one."""
        return windows(length, self.patch, self.stride)

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
        return covered(self.height, self.patch, self.stride)

    @property
    def padded_width(self) -> int:
        """Width that the windows cover, at least `width`."""
        return covered(self.width, self.patch, self.stride)

    def mask(self, sizes: Array) -> Array:
        """Marks the patches `bool [B, rows, cols]` of grids of the images' own `sizes`."""
        row_used = used_windows(self.height, self.patch, self.stride, sizes[:, :1])
        col_used = used_windows(self.width, self.patch, self.stride, sizes[:, 1:])
        return row_used[:, :, None] & col_used[:, None, :]

    def take(self, images: Array, ids: Array) -> Array:
        """Cuts patches `ids int [B, k]` out of images: `[B, k, patch, patch, C]`, of their dtype.

        Ids outside `0..N-1` are clipped into it.
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
        return cut_windows(images, starts, self.patch, self.stride, outside)
