"""Settings of the networks, the task and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchgd_jax.config.checks import require


@dataclass(frozen=True)
class ModelConfig:
    """The encoder (theta1) and the head (theta2)."""

    encoder: str = "small-cnn"
    """Backbone that turns a patch into a latent vector: small-cnn; resnet18, 34, 50 or 101;
    mobilenet-v2; efficientnet-b0; convnext-v2-atto, femto, pico, nano, tiny or base; deit- or vit-
    tiny, small or base."""
    norm: Literal["group", "batch", "layer"] | None = None
    """Normalisation inside the encoder. None: its architecture's own, layer for ConvNeXt-V2, DeiT
    and ViT, which have no other; batch for the rest, which can have group. `patchgd.norm_policy`
    decides when batch statistics move."""
    latent_dim: int = 128
    """Length D of a patch's latent vector."""
    stem_stride: int | None = None
    """Pixels between the windows of the encoder's first convolution: a larger stride makes all maps
    smaller, and loses detail. None: its architecture's own (2, or 4 for small-cnn and
    ConvNeXt-V2)."""
    head: str = "attention"
    """Network that reads Z: attention, transformer, adaptive-cnn, conv (no dense layer) or linear
    (for any grid), or one of the paper's, for the grid it was trained on: cnn-original,
    cnn-smaller, cnn-larger, cnn-smaller-feat, cnn-larger-feat."""
    dropout: float | None = None
    """Dropout rate inside the head. None: the head's own (0.2 for the paper's, else 0)."""
    drop_path: float = 0.0
    """Stochastic depth: the share of patches that skip the encoder's last residual block in
    training; earlier blocks are skipped less (ResNet, EfficientNet, ConvNeXt-V2, DeiT and ViT)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder's computation; parameters stay float32."""
    remat: Literal["none", "dots", "blocks", "everything"] = "dots"
    """What the backward pass recomputes instead of keeping it. none: nothing; dots: norms and
    activations, the cheap half; blocks: all but each block's input; everything: all of it."""
    weights: str | None = None
    """Pretrained weights to start from: a torchvision .pth, a timm .safetensors, what
    `patchgd-jax export` wrote, a name such as resnet50-imagenet1k-v2, a Hugging Face
    repository such as hf:timm/resnet50.a1_in1k, or URL#sha256=HASH. Images are scaled as the
    weights need it."""
    allow_partial: bool = False
    """Start with a new head where that of an export does not fit, such as for other classes.
    Published weights have neither head nor latent layer; both are always new."""

    def __post_init__(self) -> None:
        require(self.latent_dim >= 1, f"model.latent_dim is {self.latent_dim}; at least 1")
        require(
            self.stem_stride is None or self.stem_stride >= 1,
            f"model.stem_stride is {self.stem_stride}; at least 1",
        )
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"model.dropout is {self.dropout}; it must be in [0, 1)",
        )
        require(
            0 <= self.drop_path < 1, f"model.drop_path is {self.drop_path}; it must be in [0, 1)"
        )
        policies = ("none", "dots", "blocks", "everything")
        require(
            self.remat in policies,
            f"model.remat is {self.remat!r}; it must be one of {', '.join(policies)}",
        )
        require(
            self.weights is not None or not self.allow_partial,
            "model.allow_partial needs model.weights; name them, or leave it out",
        )


@dataclass(frozen=True)
class TaskConfig:
    """The label format, its loss and its metrics."""

    name: Literal["single-label", "multi-label", "regression", "ordinal"] = "single-label"
    """single-label: one of several classes. multi-label: any of them. regression: a number.
    ordinal: one of several ordered classes (CORN)."""
    label_smoothing: float = 0.0
    """Share of each training target that is spread over all classes."""
    class_weights: tuple[float, ...] | None = None
    """Factors on the training loss, one for each class: larger ones for rare classes."""
    best_metric: str | None = None
    """Validation metric that names the best checkpoint, such as accuracy, balanced_accuracy,
    quadratic_weighted_kappa, mean_f1, rmse or loss. None: the task's own."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of single patches while training; their places in Z stay."""

    flips: bool = False
    """Flip patches vertically and horizontally, each with probability 1/2."""
    turns: bool = False
    """Turn patches by 0, 90, 180 or 270 degrees."""
    brightness: float = 0.0
    """Multiply a patch by a factor drawn from 1 - this .. 1 + this."""
    contrast: float = 0.0
    """The same for the distance of its pixels from its mean grey."""
    saturation: float = 0.0
    """The same for the distance of its colours from grey (three channels only)."""
    same_draw: bool = False
    """Change a patch alike in the fill and the inner step of an outer step, so that its entry in Z
    changes by the parameters only. Otherwise each draws anew."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} is {value}; it must be in [0, 1]")

    @property
    def jitters(self) -> bool:
        """Whether brightness, contrast or saturation change."""
        return max(self.brightness, self.contrast, self.saturation) > 0

    @property
    def active(self) -> bool:
        """Whether anything changes."""
        return self.flips or self.turns or self.jitters
