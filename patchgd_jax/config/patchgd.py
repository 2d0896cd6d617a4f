"""Settings of the method: the patch grid, and how the model is updated from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from patchgd_jax.config.checks import UNRESOLVED, require
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class PatchGDConfig:
    """The patch grid and how the model is updated from it."""

    patch: int = 64
    """Side p of a patch in pixels."""
    stride: int | None = None
    """Pixels between neighbouring patches; less than the patch side makes them overlap. None:
    the patch side."""
    fraction: float | Literal["auto"] = 0.25
    """Sampling fraction: the share of an image's patches one inner step re-encodes, rounded to
    1 / ceil(1 / fraction), so that J groups cover the image (0.3 becomes 1/4). auto: the largest
    that fits the memory. --fraction for short."""
    inner_steps: int | None = None
    """Inner steps J per outer step. None: ceil(1 / fraction), so that each patch gets exactly
    one gradient."""
    mode: Literal["patchgd", "accumulate", "exact", "full"] = "accumulate"
    """Gradient. patchgd: the paper's algorithm, an update every epsilon inner steps. accumulate:
    one update per outer step (the papers' default setting). exact: the whole-image gradient at
    the memory of one chunk. full: plain autodiff through all patches at once."""
    epsilon: int = 1
    """Inner steps per update in mode patchgd; must divide J."""
    sampling: Literal["partition", "uniform"] = "partition"
    """partition: each patch once per outer step (the paper). uniform: with replacement."""
    sample_per: Literal["batch", "image"] = "batch"
    """Whether all images of a batch share the sampled positions."""
    importance: Literal["none", "loss", "attention", "staleness"] = "none"
    """Importance sampling: which patches inner steps draw more often; their part of the encoder's
    gradient is weighted down, so that it is unbiased. loss: by the norm of the loss gradient of
    their latents after the fill. attention: by the head's attention. staleness: by the time since
    they were encoded. Needs sampling uniform."""
    importance_mix: float = 0.2
    """Share of the draws that stay uniform; no weight exceeds 1 / importance_mix."""
    strata: int = 1
    """Number of equal runs of patches of which each sample takes an equal share. The mesh's patch
    axis must divide it, since devices share an image by strata."""
    norm_policy: Literal["inner", "paper", "frozen"] = "inner"
    """When the encoder's batch statistics move. inner: in inner steps. paper: in the fill as well,
    which runs in train mode, in shuffled groups of the inner steps' size, as in the official code.
    frozen: never; the encoder runs in eval mode, without dropout."""
    encoder_grad_scale: float | Literal["unbiased"] = 1.0
    """Factor on the encoder's gradient. unbiased: one over a patch's share of the inner steps,
    which undoes the paper's 1 / J."""
    fill_chunk: int = 4
    """Patches of an image encoded at a time without gradient (not with norm_policy paper), and in
    mode exact."""
    remat: bool = False
    """Mode full: recompute activations chunk by chunk instead of keeping them."""

    def __post_init__(self) -> None:
        require(self.patch >= 1, f"patchgd.patch is {self.patch}; at least 1")
        require(
            self.stride is None or 1 <= self.stride <= self.patch,
            f"patchgd.stride is {self.stride}; it must be in 1..{self.patch}, the patch side",
        )
        if isinstance(self.fraction, str):
            require(
                self.inner_steps is None,
                f"patchgd.inner_steps {self.inner_steps} and patchgd.fraction auto both decide how "
                "many patches are sampled; leave one out",
            )
            require(
                self.mode in ("patchgd", "accumulate"),
                f"patchgd.mode {self.mode} samples no patches, so patchgd.fraction cannot be auto; "
                "set batch_size auto",
            )
        else:
            require(
                0 < self.fraction <= 1, f"patchgd.fraction is {self.fraction}; it must be in (0, 1]"
            )
        require(
            self.inner_steps is None or self.inner_steps >= 1,
            f"patchgd.inner_steps is {self.inner_steps}; at least 1",
        )
        require(self.strata >= 1, f"patchgd.strata is {self.strata}; at least 1")
        require(self.fill_chunk >= 1, f"patchgd.fill_chunk is {self.fill_chunk}; at least 1")
        require(self.epsilon >= 1, f"patchgd.epsilon is {self.epsilon}; at least 1")
        require(
            0 < self.importance_mix <= 1,
            f"patchgd.importance_mix is {self.importance_mix}; it must be in (0, 1]",
        )
        if self.importance != "none":
            self._check_importance()
        if self.mode == "patchgd" and self.fraction != "auto":
            require(
                self.num_inner_steps % self.epsilon == 0,
                f"patchgd.epsilon {self.epsilon} does not divide the {self.num_inner_steps} inner "
                f"steps that fraction {self.fraction} gives",
            )

    def _check_importance(self) -> None:
        setting = f"patchgd.importance {self.importance}"
        require(
            self.mode in ("patchgd", "accumulate"),
            f"{setting} decides which patches are sampled, but patchgd.mode {self.mode} takes the "
            "gradient of all; use mode patchgd or accumulate",
        )
        require(
            self.sampling == "uniform",
            f"{setting} draws with replacement, and patchgd.sampling {self.sampling} does not; add "
            "--patchgd.sampling uniform",
        )
        require(
            self.strata == 1,
            f"{setting} draws from the whole image, but patchgd.strata {self.strata} needs equal "
            "shares of its parts; use strata 1 (and one device per image)",
        )

    @property
    def num_inner_steps(self) -> int:
        """J, the inner steps of one outer step; raises `ConfigError` while the fraction is auto."""
        if isinstance(self.fraction, str):
            raise ConfigError(UNRESOLVED.format("patchgd.fraction"))
        # 1 / (1 / 49) is 49.00000000000001 in floating point; the ceiling must be 49.
        return self.inner_steps or math.ceil(1 / self.fraction - 1e-9)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one outer step."""
        return self.num_inner_steps // self.epsilon if self.mode == "patchgd" else 1
