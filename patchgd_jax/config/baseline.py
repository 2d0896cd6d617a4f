"""Settings of the methods that PatchGD is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from patchgd_jax.config.checks import require

MethodName = Literal[
    "patchgd", "gd", "gd-extended", "downscale", "patchwise", "fully-conv", "mil", "ips"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True)
class BaselineConfig:
    """The methods that PatchGD is compared with (`method`)."""

    side: int | None = None
    """Method downscale: the longer side in pixels that images are shrunk to. None: the patch
    side."""
    pooling: Literal["mean", "vote"] = "mean"
    """Methods patchwise and fully-conv: how patch logits become an image's. mean: their mean. vote:
    each patch votes for its most probable class (single-label only)."""
    positions: float = 1.0
    """Method fully-conv: share of the output positions in the loss, drawn anew in each step; the
    fewer, the closer to patchwise."""
    top_patches: int | None = None
    """Method ips: number of an image's patches with the most attention, which are trained. None: as
    many as an inner step of PatchGD samples."""

    def __post_init__(self) -> None:
        for name in ("side", "top_patches"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"baseline.{name} is {value}; at least 1")
        require(
            0 < self.positions <= 1, f"baseline.positions is {self.positions}; it must be in (0, 1]"
        )
