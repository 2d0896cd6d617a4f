"""`Problem`: everything static that a step is made of, and the device layout it runs on.

What is traced (weights, Z, patch ids, the batch, the key) stays an argument of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

import jax
from jax import Array

from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.core.augment import Augment, augmentation
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.patch_ids import PatchIds
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.errors import ConfigError

Batch = Mapping[str, Array]
"""`image` `[B, H, W, C]` (uint8, or float in [0, 1]) and `label` (`int [B]`, or the task's format);
optionally `weight` `float [B]` (factor on the loss; 0 for padding examples), and the valid patches:
`patches` `int [B, M]` (ids; N and more are padding), or `size` `int [B, 2]` (true height, width).
Other patches are neither encoded nor sampled, and the head does not see them."""


class Weights(NamedTuple):
    """Parameters and batch statistics, each a pytree with the entries `encoder` and `head`."""

    params: Params
    batch_stats: Params
    """Flax's mutable collections."""


class Spec(Enum):
    """How an argument or result of a function is laid over the devices of a `Layout`."""

    WEIGHTS = auto()
    """`Weights`, laid out as the train state's."""
    SAME = auto()
    """Equal on all devices."""
    BATCH = auto()
    """A `Batch`: each device has its part of the images."""
    IMAGES = auto()
    """Divided by images along the first axis."""
    GROUPS = auto()
    """Divided by images along the second axis."""
    GRADIENT = auto()
    """A device's part of the gradient of the parameters; summed over devices."""
    SUM = auto()
    """A sum over a device's images; summed over devices."""


class Layout:
    """The layout on one device, where every part is the whole; `MeshLayout` is the one for a mesh.

    A step is written once: where several devices share the work, it asks its layout.
    """

    patch_devices: int = 1
    """Devices that share the patches of one image."""

    def spread(self, function: Callable[..., Any], arguments: Any, results: Any) -> Any:
        """Turns a function of one device's parts into one of whole arrays, as `jax.shard_map` does.

        `arguments` and `results` are trees of `Spec`s. The other methods may be called only inside
        the function.
        """
        return function

    def vary(self, params: Any) -> Any:
        """Marks constant parameters for use beside those a spread function was given."""
        return params

    def take(self, grid: Grid, images: Array, ids: Array) -> Array:
        """Cuts patches out of this device's part of the images; `ids` are from `own_slots`."""
        return grid.take(images, ids)

    def own_slots(self, groups: Any) -> Any:
        """Takes this device's slots, along the last axis of each array."""
        return groups

    def all_slots(self, latents: Array) -> Array:
        """Gathers the latents `[..., k, D]` of all devices."""
        return latents

    def sum_images(self, value: Array) -> Array:
        """Sums over all devices' images."""
        return value

    def first_image(self, count: int) -> int | Array:
        """Returns the place in the batch of the first of this device's `count` images."""
        return 0

    def patches_key(self, key: Array) -> Array:
        """Derives the key of this device's patches."""
        return key

    def images_key(self, key: Array) -> Array:
        """Derives the key of this device's images, apart from their patches."""
        return key


ONE_DEVICE = Layout()

Sampler = Callable[["Problem", Weights, Array, Batch, Array], PatchIds]
"""Draws the groups of the inner steps after the fill, from `(problem, weights, z, batch, key)`."""


@dataclass(frozen=True)
class Problem:
    """The static part of a step; jit closes over it.

    Args:
        model: encoder and head as pure functions.
        grid: the patch grid of the images.
        config: gradient mode, sampling and policies.
        task: label format, loss and metrics.
        augment: random changes of the patches.
        layout: of images, patches and parameters over devices.
        frozen: the encoder's top-level entries that are not trained.
        sampler: replaces `sampling.sample_groups` in the inner steps; `config.importance` needs one
            (`contrib.importance.importance_groups`).
    """

    model: PatchModel
    grid: Grid
    config: PatchGDConfig
    task: Task = SINGLE_LABEL
    augment: AugmentConfig | None = None
    layout: Layout = ONE_DEVICE
    frozen: frozenset[str] = frozenset()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        if self.config.importance != "none" and self.sampler is None:
            raise ConfigError(
                f"patchgd.importance {self.config.importance} needs a sampler; pass "
                "sampler=contrib.importance.importance_groups"
            )

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder runs in train mode in inner steps."""
        return self.config.norm_policy != "frozen"

    def augmentation(self, key: Array, name: str, images: int) -> Augment | None:
        """Returns the changes of this device's `images` patches, or None."""
        return augmentation(self.augment, named_key(key, name), self.layout.first_image(images))


def named_key(key: Array, name: str) -> Array:
    """Derives a key for one named use of randomness, independent of every other name's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
