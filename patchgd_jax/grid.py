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
        return max(0, -(-(length - self.patch) // self.stride)) + 1

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
        return (self.rows - 1) * self.stride + self.patch

    @property
    def padded_width(self) -> int:
        """Width that the windows cover, at least `width`."""
        return (self.cols - 1) * self.stride + self.patch

    def mask(self, sizes: jax.Array) -> jax.Array:
        """Which patches belong to the grid of an image that is smaller than this one's.

        Args:
            sizes: `int [B, 2]`, the true height and width of each image inside the array.

        Returns:
            `bool [B, rows, cols]`, True for the patches that the image would have alone.
        """

        def used(number: jax.Array, length: jax.Array) -> jax.Array:
            # As many windows as a grid of that length alone has: the last one may be padded.
            return (number == 0) | ((number - 1) * self.stride < length - self.patch)

        row_used = used(jnp.arange(self.rows), sizes[:, :1])
        col_used = used(jnp.arange(self.cols), sizes[:, 1:])
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

        def one(image: jax.Array, patch_id: jax.Array) -> jax.Array:
            return self._window(
                image, (patch_id // self.cols) * self.stride, (patch_id % self.cols) * self.stride
            )

        return jax.vmap(lambda image, row: jax.vmap(lambda i: one(image, i))(row))(images, ids)

    def _window(self, image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
        side = (self.patch, self.patch, image.shape[-1])
        window = lax.dynamic_slice(image, (y, x, jnp.zeros_like(y)), side)
        # A slice that would leave the image is moved back inside by dynamic_slice. Undoing the
        # move costs one patch; padding the image instead would cost a second image.
        for axis, start, length, padded in (
            (0, y, self.height, self.padded_height),
            (1, x, self.width, self.padded_width),
        ):
            if padded == length:
                continue
            pixel = start + jnp.arange(self.patch)
            moved = jnp.minimum(start, length - self.patch)
            window = jnp.take(window, pixel - moved, axis=axis, mode="clip")
            shape = [1, 1, 1]
            shape[axis] = self.patch
            floats = jnp.issubdtype(image.dtype, jnp.floating)
            value = self.background / 255 if floats else self.background
            inside = (pixel < length).reshape(shape)
            window = jnp.where(inside, window, jnp.asarray(value, image.dtype))
        return window
