"""Named configurations that the command line offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from patchgd_jax.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    TrainConfig,
)
from patchgd_jax.errors import unknown_name


class Preset(NamedTuple):
    """A config and what it is for, in one line."""

    config: TrainConfig
    about: str


PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        TrainConfig(eval_every=150),
        "most frequent of eight handwritten digits, 256 px; under 10 minutes on two CPU cores",
    ),
    "tiny": Preset(
        TrainConfig(
            data=DataConfig(
                size=(64, 64),
                digit_count=1,
                label_share=1.0,
                object_ratio=(0.6, 1.0),
                train_size=2048,
                val_size=200,
            ),
            patchgd=PatchGDConfig(patch=32, fraction=0.5),
            batch_size=32,
            eval_every=32,
        ),
        "one digit in 64 px: half a minute, to see that everything works",
    ),
    "downscale": Preset(
        TrainConfig(
            data=DataConfig(downscale=4, train_size=200_000),
            patchgd=PatchGDConfig(mode="full", fraction=1.0),
            eval_every=2500,
        ),
        "the default's images shrunk to the patch side: what losing the detail costs",
    ),
    "ultramnist": Preset(
        TrainConfig(
            data=DataConfig(task="digit-sum", size=(512, 512), scale="absolute", train_size=28_000),
            eval_every=250,
        ),
        "UltraMNIST proper: sum of three to five digits, 512 px, 10 classes; start it from the "
        "default run's encoder with --init-encoder",
    ),
    "ultramnist-28": Preset(
        TrainConfig(
            data=DataConfig(
                task="digit-sum",
                classes=28,
                size=(4000, 4000),
                scale="absolute",
                noise=True,
                channels=3,
                train_size=28_000,
                val_size=2_800,
            ),
            model=ModelConfig(encoder="resnet50", latent_dim=256),
            patchgd=PatchGDConfig(patch=256, fraction=0.1),
            batch_size=4,
            eval_batch_size=4,
            epochs=30,
        ),
        "the UltraMNIST benchmark: 4000 px with noise, 28 classes; for a GPU or TPU",
    ),
    "panda": Preset(
        TrainConfig(
            data=DataConfig(panda="panda", size=(2048, 2048), channels=3),
            model=ModelConfig(
                encoder="resnet50", norm="batch", latent_dim=256, head="cnn-original"
            ),
            patchgd=PatchGDConfig(patch=128, fraction=0.1, fill_chunk=8),
            optimizer=OptimizerConfig(schedule="linear", warmup_epochs=2),
            augment=AugmentConfig(flips=True, turns=True),
            batch_size=8,
            eval_batch_size=8,
            epochs=100,
        ),
        "PANDA prostate biopsies at 2048 px, ResNet-50; name its folder with --data.panda; for a "
        "GPU or TPU",
    ),
    "paper": Preset(
        TrainConfig(
            data=DataConfig(
                task="digit-sum",
                size=(512, 512),
                scale="absolute",
                channels=3,
                train_size=28_000,
                val_size=2_800,
            ),
            model=ModelConfig(
                encoder="resnet50", norm="batch", latent_dim=256, head="cnn-original"
            ),
            patchgd=PatchGDConfig(
                patch=128, fraction=0.3, mode="accumulate", norm_policy="paper", fill_chunk=5
            ),
            optimizer=OptimizerConfig(schedule="linear", warmup_epochs=2),
            batch_size=32,
            eval_batch_size=32,
            epochs=100,
        ),
        "the PatchGD paper's ResNet-50 on 512 px UltraMNIST; for a GPU or TPU",
    ),
}


def get_preset(name: str) -> TrainConfig:
    """Looks a preset up; an unknown name is a `ConfigError` that names the nearest."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].config


_SHORT_NAMES = {"--batch": "--batch-size", "--fraction": "--patchgd.fraction"}


def preset_argument(arguments: Sequence[str]) -> tuple[str, TrainConfig, list[str]]:
    """Takes a preset's name (`default` if there is none) off the front of a command's arguments.

    Returns the name, its config, and the other arguments with the short names of settings written
    out.
    """
    name, rest = "default", list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    words = (word.partition("=") for word in rest)
    return name, get_preset(name), [_SHORT_NAMES.get(w, w) + eq + v for w, eq, v in words]
