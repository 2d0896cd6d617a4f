"""PatchGD's own settings, one at a time: what does each change cost or bring?

Command:   python experiments/ablations.py --scale cpu
Time:      cpu: about forty minutes on one core, beside other work; paper: weeks on one GPU
Expected:  cpu: 28 to 30 % at every fraction, latent size and draw, with 8 to 33 MiB; 36, 29 and
           22 % with a stem at stride 2, 4 (base) and 8, whose encoders knew 92, 82 and 42 % of
           single digits before; 17 % with heads that read the map, which learn a sum later. Four
           epochs of a quarter of the images are as good with a Z that is reused in the next epoch
           as with one that is filled anew (28 %), at 1.1 times the speed. paper: the ablation of
           arXiv 2301.13817 (fraction, latent size, heads)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import accuracy_intervals
from runner import main
from runs import Row, Scale
from settings import SMOKE, DigitSums, changed, published

from patchgd_jax.config import StreamConfig

CPU = DigitSums(train_images=1600, val_images=400)

Changes = Mapping[str, dict[str, Any]]
CPU_CHANGES: Changes = {
    "base": {},
    "fraction 1/4": {"patchgd": {"fraction": 1 / 4}},
    "fraction 1": {"patchgd": {"fraction": 1.0}},
    "head linear": {"model": {"head": "linear"}},
    "head cnn-original": {"model": {"head": "cnn-original"}},
    "head cnn-smaller-feat": {"model": {"head": "cnn-smaller-feat"}},
    "head conv": {"model": {"head": "conv"}},
    "patch 64": {"patchgd": {"patch": 64, "fraction": 1 / 4}},
    "epsilon 1": {"patchgd": {"mode": "patchgd", "epsilon": 1}},
    "epsilon 4": {"patchgd": {"mode": "patchgd", "epsilon": 4}},
    "4 of 16 inner steps": {"patchgd": {"inner_steps": 4, "sampling": "uniform"}},
    "own patches for each image": {"patchgd": {"sample_per": "image"}},
    "uniform draws": {"patchgd": {"sampling": "uniform"}},
    **{
        f"draws by {importance}": {"patchgd": {"sampling": "uniform", "importance": importance}}
        for importance in ("loss", "attention", "staleness")
    },
}
PAPER_CHANGES: Changes = {
    "base": {},
    **{f"fraction 1/{n}": {"patchgd": {"fraction": 1 / n}} for n in (4, 16, 32)},
    **{f"latent {n}": {"model": {"latent_dim": n}} for n in (128, 512)},
    **{
        f"head cnn-{size}": {"model": {"head": f"cnn-{size}"}}
        for size in ("smaller", "larger", "smaller-feat", "larger-feat")
    },
    "patch 64": {"patchgd": {"patch": 64}},
    "epsilon 1": {"patchgd": {"mode": "patchgd", "epsilon": 1}},
    "own patches for each image": {"patchgd": {"sample_per": "image"}},
}
REPEATED: Changes = {
    "400 images four times": {"stream": StreamConfig(enabled=True)},
    "400 images four times, Z of the epoch before": {
        "stream": StreamConfig(enabled=True, max_age=60)
    },
}
"""On a quarter of the images in four epochs of 50 steps, streamed."""
SMOKE_CHANGES: Changes = {"base": {}, "head linear": {"model": {"head": "linear"}}}
LATENTS = (16, 256)
STRIDES = (2, 8)
"""Of the stem, which is 4. These and the latents have encoders of their own to start from."""


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        base = changed(published("resnet50"), patchgd={"patch": 32, "fraction": 1 / 8})
        return [Row(label, changed(base, **change)) for label, change in PAPER_CHANGES.items()]
    if scale == "smoke":
        return [SMOKE.row(label, **change) for label, change in SMOKE_CHANGES.items()]
    quarter = replace(CPU, train_images=CPU.train_images // 4)
    return [
        *(CPU.row(label, **change) for label, change in CPU_CHANGES.items()),
        *(quarter.row(label, epochs=4, **change) for label, change in REPEATED.items()),
        *(replace(CPU, latent_dim=n).row(f"latent {n}") for n in LATENTS),
        *(replace(CPU, stem_stride=n).row(f"stem stride {n}") for n in STRIDES),
    ]


if __name__ == "__main__":
    main("ablations", rows, accuracy_intervals)
