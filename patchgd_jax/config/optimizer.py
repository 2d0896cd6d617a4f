"""Settings of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from patchgd_jax.config.checks import require


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, which counts outer steps."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay after the warm-up: linear is the paper's and ends near 1 - 1 / decay_factor of the
    peak; cosine ends at zero."""
    decay_factor: float = 2.0
    """Linear: the run's length is multiplied by this before the rate would reach zero."""
    warmup_epochs: float = 0.05
    """Epochs of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw only)."""
    momentum: float = 0.9
    """Momentum (sgd only)."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm."""
    encoder_learning_rate: float | None = None
    """Peak learning rate of the encoder. None: learning_rate, which is always the head's."""
    layer_decay: float = 1.0
    """Factor on the encoder's learning rate for each block between a layer and the latents: 1 for
    the last layer, the decay for the last block, its square for the one before."""
    freeze_stages: int = 0
    """Number of the encoder's first stages, with the stem, whose parameters are frozen. Their batch
    statistics follow patchgd.norm_policy."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the parameters, which is then evaluated and
    exported. None: the parameters themselves are."""

    def __post_init__(self) -> None:
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite",
        )
        require(
            self.decay_factor >= 1, f"optimizer.decay_factor is {self.decay_factor}; at least 1"
        )
        require(self.warmup_epochs >= 0, "optimizer.warmup_epochs must not be negative")
        require(
            self.weight_decay == 0 or self.name == "adamw",
            f"optimizer.weight_decay needs optimizer.name adamw, not {self.name}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm is {self.clip_norm}; it must be positive",
        )
        rate = self.encoder_learning_rate
        require(
            rate is None or (rate > 0 and math.isfinite(rate)),
            f"optimizer.encoder_learning_rate is {rate}; it must be positive and finite; "
            "to keep an encoder unchanged, freeze its stages",
        )
        require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay is {self.layer_decay}; it must be in (0, 1]",
        )
        require(
            self.freeze_stages >= 0,
            f"optimizer.freeze_stages is {self.freeze_stages}; it must not be negative",
        )
        require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)",
        )
