"""`PlanRequest`: the settings of a run to plan, with the size of its images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from patchgd_jax.config import ModelConfig, PatchGDConfig, StreamConfig, TaskConfig, TrainConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.sampling import group_size
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class PlanRequest:
    """A run on one device, with the size of its images; `ConfigError` if that is not positive."""

    config: TrainConfig
    """Without settings that are auto."""
    size: tuple[int, int]
    """Height and width of the images."""
    classes: int = 10
    """Number of logits."""
    slots: int | None = None
    """Most valid patches of an image. None: all of the grid."""

    def __post_init__(self) -> None:
        if min(*self.size, self.classes) < 1:
            raise ConfigError(
                f"images of {self.size} px in {self.classes} classes cannot be planned for; all "
                "must be positive"
            )

    @classmethod
    def from_config(cls, config: TrainConfig) -> PlanRequest:
        """Plans for a config's generated images, whose size is known without drawing any."""
        # The memory of the loss is negligible, so any task will do.
        plain = {"mesh": None, "stream": StreamConfig(), "task": TaskConfig()}
        config = dataclasses.replace(config, **plain)  # type: ignore[arg-type]
        return cls(config, config.data.image_shape[:2], config.data.classes)

    def changed(self, **settings: Any) -> PlanRequest:
        """Returns the request with other settings of the run."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    @property
    def image(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return (*self.size, self.config.data.num_channels)

    @property
    def batch(self) -> int:
        """Images per outer step."""
        return self.config.images_per_step

    @property
    def model(self) -> ModelConfig:
        """The run's."""
        return self.config.model

    @property
    def patchgd(self) -> PatchGDConfig:
        """The run's."""
        return self.config.patchgd

    @property
    def grid(self) -> PatchGrid:
        """The patch grid of the images; `ConfigError` if the patch is larger than the image."""
        return PatchGrid(*self.size, self.patchgd.patch, self.patchgd.stride or 0)

    @property
    def patches(self) -> int:
        """N, the most patches of an image that are encoded."""
        return self.slots or self.grid.num_patches

    @property
    def sampled(self) -> int:
        """k, the patches of an image that one inner step encodes.

        Raises `ConfigError` if there are more inner steps than patches, or the fraction is auto.
        """
        return group_size(self.patches, self.patchgd.num_inner_steps)


def with_inner_steps(request: PlanRequest, inner: int) -> PlanRequest:
    """Changes the sampling fraction to that of `inner` inner steps."""
    patchgd = request.patchgd
    epsilon = patchgd.epsilon if inner % patchgd.epsilon == 0 else 1
    patchgd = dataclasses.replace(patchgd, fraction=1 / inner, inner_steps=None, epsilon=epsilon)
    return request.changed(patchgd=patchgd)


def with_sampled(request: PlanRequest, sampled: int) -> PlanRequest:
    """Changes the sampling fraction to at most `sampled` patches in an inner step."""
    return with_inner_steps(request, max(1, math.ceil(request.patches / sampled)))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or their shapes) in a tree."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an array or of its shape and dtype; a typed PRNG key counts its words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)
