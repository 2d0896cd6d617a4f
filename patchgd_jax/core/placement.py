"""Where the images, the patches and the parameters of a step are: here, all on one device.

A step is written once. What it must not take for granted, since several devices may share the
work, it asks a `Placement`; `sharding.MeshPlacement` is the one for a mesh of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import PyTree

Kind = Literal["params", "same", "batch", "images", "groups", "gradient", "sum"]
"""What an argument or result of a local function is, for each device.

`params`: the parameters, or a tree like them. `same`: equal on all. `batch`: its part of a batch.
`images`: its images, along the first axis. `groups`: its images, along the second axis.
`gradient`: its part of the gradient of `params`, to be summed. `sum`: its images' part of a sum."""


class Placement:
    """A step on one device alone: every part is the whole."""

    def spread(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], results: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """A function of whole arrays from one of the parts that a device has.

        Args:
            function: of the parts; the methods below may be called only in it.
            arguments: the kind of each argument, or a tree of kinds.
            results: the kind of each result.
        """
        return function

    def vary(self, params: PyTree) -> PyTree:
        """Constant parameters, for use beside those that a local function was given."""
        return params

    def take(self, grid: Grid, images: jax.Array, ids: jax.Array) -> jax.Array:
        """`grid.take` of this device's part of the images; `ids` are from `own_slots`."""
        return grid.take(images, ids)

    def own_slots(self, ids: jax.Array) -> jax.Array:
        """This device's slots of patch numbers `[..., k]`."""
        return ids

    def all_slots(self, latents: jax.Array) -> jax.Array:
        """Latents `[..., k, D]` of all devices, from those of this one's slots."""
        return latents

    def sum_images(self, value: jax.Array) -> jax.Array:
        """The sum over all devices' images, of one that is over this device's."""
        return value

    def first_image(self, count: int) -> int | jax.Array:
        """The place in the batch of the first of this device's `count` images."""
        return 0

    def patches_key(self, key: jax.Array) -> jax.Array:
        """A key for what is random in this device's patches."""
        return key

    def images_key(self, key: jax.Array) -> jax.Array:
        """A key for what is random in this device's images, apart from its patches."""
        return key


ALONE = Placement()
"""The default of every function that takes a placement."""
