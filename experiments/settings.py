"""What the experiments share: a task that a CPU can train, the methods, and the papers' settings.

The task of the scales `smoke` and `cpu` is the sum of three to five small digits. A digit is
legible in a patch, and no more once the whole image is shrunk to what fits the memory of a few
patches; and no patch knows the label, which is a sum. Every method starts from one encoder that was
trained for half a minute on single digits, as the papers' start from ImageNet, and sees the same
number of images. Batch statistics stay those of that encoder.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from runs import Row

from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig, get_preset
from patchgd_jax.config import BaselineConfig, MethodName, OptimizerConfig


@dataclass(frozen=True)
class DigitSums:
    """The task, the networks and the length of the runs."""

    side: int = 128
    """Of the images, in pixels."""
    patch: int = 32
    sampled: int = 1
    """Patches of an image that an inner step encodes; they set the memory that the other methods
    may take."""
    digit_px: tuple[int, int] = (12, 18)
    """Smallest and largest side of a digit's box."""
    train_images: int = 3200
    val_images: int = 500
    batch: int = 8
    pretraining_images: int = 24_000
    pretraining_batch: int = 32
    pretraining_rate: float = 2e-3
    pretraining_patches: int = 2
    """Patches along a side of an image with a single digit."""
    encoder: str = "small-cnn"
    stem_stride: int | None = None
    norm: Literal["group", "batch"] = "batch"
    norm_policy: Literal["inner", "paper", "frozen"] = "frozen"
    latent_dim: int = 64
    head: str = "attention"
    mode: Literal["patchgd", "accumulate"] = "accumulate"
    learning_rate: float = 3e-3
    encoder_learning_rate: float = 5e-4
    digits: Literal["sklearn", "font"] = "sklearn"

    @property
    def downscale_side(self) -> int:
        """The side whose pixels are no fewer than those of the patches of an inner step."""
        return math.ceil(self.patch * math.sqrt(self.sampled))

    @property
    def config(self) -> TrainConfig:
        """PatchGD on it."""
        low, high = self.digit_px
        return TrainConfig(
            data=DataConfig(
                task="digit-sum",
                size=(self.side, self.side),
                object_ratio=(low / self.side, high / self.side),
                digits=self.digits,
                train_size=self.train_images,
                val_size=self.val_images,
            ),
            model=ModelConfig(
                encoder=self.encoder,
                stem_stride=self.stem_stride,
                norm=self.norm,
                latent_dim=self.latent_dim,
                head=self.head,
            ),
            patchgd=PatchGDConfig(
                patch=self.patch,
                fraction=self.sampled / (self.side // self.patch) ** 2,
                mode=self.mode,
                norm_policy=self.norm_policy,
            ),
            optimizer=OptimizerConfig(
                learning_rate=self.learning_rate,
                encoder_learning_rate=self.encoder_learning_rate,
            ),
            batch_size=self.batch,
            eval_batch_size=self.batch,
        )

    @property
    def pretraining(self) -> Row:
        """The run that every method's encoder comes from: one digit in few patches."""
        low, high = self.digit_px
        side = self.pretraining_patches * self.patch
        config = changed(
            self.config,
            data={
                "task": "most-frequent",
                "digit_count": 1,
                "label_share": 1.0,
                "size": (side, side),
                "object_ratio": (low / side, high / side),
                "train_size": self.pretraining_images,
                "val_size": min(200, self.val_images),
            },
            # Attention has to be learned first; a mean teaches the encoder sooner.
            model={"head": "linear"},
            patchgd={"fraction": min(1.0, 2 / self.pretraining_patches**2), "norm_policy": "inner"},
            optimizer={"learning_rate": self.pretraining_rate, "encoder_learning_rate": None},
            batch_size=self.pretraining_batch,
        )
        label = (
            f"single digits of {low} to {high} px in {side} px, {self.encoder}, {self.norm}, "
            f"latent {self.latent_dim}"
        )
        if self.stem_stride is not None:
            label += f", stem stride {self.stem_stride}"
        return Row(label, config)

    def row(self, label: str, columns: dict[str, Any] | None = None, **changes: Any) -> Row:
        """A run from the pretrained encoder.

        Args:
            label: of the row.
            columns: more columns of the table.
            changes: of settings, as `changed` takes them.
        """
        return Row(label, changed(self.config, **changes), columns or {}, self.pretraining)

    def method(self, method: MethodName) -> Row:
        """A method at the memory of the patches of an inner step, or without regard to it."""
        side = self.downscale_side if method == "downscale" else None
        return self.row(method, method=method, baseline=BaselineConfig(side=side))


SMOKE = DigitSums(
    side=32,
    patch=16,
    digit_px=(6, 8),
    train_images=8,
    val_images=10,
    batch=4,
    pretraining_images=8,
    pretraining_batch=4,
    latent_dim=8,
    digits="font",
)
"""Two steps, to see that everything runs."""


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A config with other settings; those of a group are a dictionary of its own."""
    groups = {
        name: dataclasses.replace(getattr(config, name), **value)
        for name, value in changes.items()
        if isinstance(value, dict)
    }
    return dataclasses.replace(config, **{**changes, **groups})


COMPARED: tuple[MethodName, ...] = ("patchgd", "downscale", "patchwise", "gd", "gd-extended")
"""The papers' methods, and the two that users try first."""

OTHERS: tuple[MethodName, ...] = ("fully-conv", "mil", "ips")
"""Methods of other work, whose answer comes from patches or positions."""

BUDGETS = ("8GiB", "16GiB", "24GiB")
"""Memory of common graphics cards, which the methods are compared at; not the papers' list."""

IMAGENET = {
    "resnet50": "resnet50-imagenet1k-v1",
    "mobilenet-v2": "mobilenet-v2-imagenet1k-v1",
}
"""The weights that the papers' encoders start from."""


def published(encoder: str) -> TrainConfig:
    """The papers' setting on UltraMNIST with 512 px, from ImageNet's weights."""
    model = {"encoder": encoder, "weights": IMAGENET[encoder]}
    return changed(get_preset("paper"), model=model)


def published_rows(config: TrainConfig, methods: tuple[MethodName, ...] = COMPARED) -> list[Row]:
    """Every method with the largest batch that each budget has room for."""
    return [
        Row(
            f"{method}, {budget}",
            changed(config, method=method, batch_size="auto"),
            {"method": method, "budget": budget},
            budget=budget,
        )
        for budget in BUDGETS
        for method in methods
    ]
