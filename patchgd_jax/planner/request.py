"""What is planned: the settings that decide how much memory a step takes, and a step's shapes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from patchgd_jax.config import (
    AugmentConfig,
    BaselineConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    TrainConfig,
)
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.sampling import group_size
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class PlanRequest:
    """The settings of a run that memory depends on.

    Raises:
        ConfigError: for sizes that are not positive.
    """

    image: tuple[int, int, int]
    """Height, width and channels of the images the model sees."""
    batch: int = 16
    """Images per outer step."""
    eval_batch: int = 16
    """Images per evaluation step."""
    classes: int = 10
    """Number of logits."""
    model: ModelConfig = field(default_factory=ModelConfig)
    patchgd: PatchGDConfig = field(default_factory=PatchGDConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    slots: int | None = None
    """The most patches of an image that count; None: all of the grid's."""

    def __post_init__(self) -> None:
        if len(self.image) != 3 or min(self.image) < 1:
            raise ConfigError(
                f"the image to plan for is {self.image}; it must be height, width and channels, "
                "all positive"
            )
        for name in ("batch", "eval_batch", "classes", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"the {name} to plan for is {value}; at least 1")

    @classmethod
    def from_config(cls, config: TrainConfig) -> PlanRequest:
        """What `train` would do with a config's generated images, whose size is known from it.

        Raises:
            ConfigError: for a batch size that is still auto.
        """
        return cls(
            image=config.data.image_shape,
            batch=config.images_per_step,
            eval_batch=config.eval_batch_size,
            classes=config.data.classes,
            model=config.model,
            patchgd=config.patchgd,
            optimizer=config.optimizer,
            augment=config.augment,
            baseline=config.baseline,
        )

    @property
    def grid(self) -> PatchGrid:
        """The patch grid of the images.

        Raises:
            ConfigError: if the patch is larger than the image.
        """
        height, width, _ = self.image
        return PatchGrid(height, width, self.patchgd.patch, self.patchgd.stride or 0)

    @property
    def patches(self) -> int:
        """N, the most patches of an image that are encoded."""
        return self.slots or self.grid.num_patches

    @property
    def sampled(self) -> int:
        """k, the patches of an image that one inner step encodes.

        Raises:
            ConfigError: if there are more inner steps than patches, or the fraction is still auto.
        """
        return group_size(self.patches, self.patchgd.num_inner_steps)


def with_inner_steps(request: PlanRequest, inner: int) -> PlanRequest:
    """The request with so many inner steps, by its sampling fraction."""
    patchgd = request.patchgd
    epsilon = patchgd.epsilon if inner % patchgd.epsilon == 0 else 1
    patchgd = dataclasses.replace(patchgd, fraction=1 / inner, inner_steps=None, epsilon=epsilon)
    return dataclasses.replace(request, patchgd=patchgd)


def with_sampled(request: PlanRequest, sampled: int) -> PlanRequest:
    """The request with at most that many patches in an inner step."""
    return with_inner_steps(request, max(1, math.ceil(request.patches / sampled)))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or their shapes) in a tree."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an array or of its shape and dtype; a typed PRNG key counts its words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)
