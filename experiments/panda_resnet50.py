"""PANDA with ResNet-50: PatchGD and plain gradient descent at three image sides.

Command:   python experiments/panda_resnet50.py --scale cpu
           python experiments/panda_resnet50.py --scale paper    (the challenge's folder in ./panda)
Time:      cpu: about a quarter of an hour on one core; paper: weeks on one GPU
Expected:  cpu: 62 and 67 % for PatchGD at 128 and 256 px with 9 to 10 MiB, 54 and 61 % for `gd`
           with 20 and 63 MiB, 50 % for `downscale` to 64 px; intervals of ten points each way,
           from 47 slides. paper: accuracy and kappa grow with the side for PatchGD; plain gradient
           descent does not fit at 4096 px (arXiv 2301.13817)

At the scales smoke and cpu the slides are made up: strips of tissue whose dark dots grow in number
with the grade. They have the challenge's folder and file format, and nothing of its difficulty.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runner import main
from runs import Row, Scale
from settings import IMAGENET, changed, published_rows

from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig, get_preset
from patchgd_jax.config import BaselineConfig, MethodName, SplitConfig

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tiny_panda import make_tiny_panda

SLIDES = {"smoke": 14, "cpu": 140}
FOLDS = {"smoke": 2, "cpu": 3}
SIDES = {"smoke": (64,), "cpu": (128, 256), "paper": (512, 2048, 4096)}
PATCH, SAMPLED = 32, 4
"""Of the small scales; an inner step encodes as many patches at every side."""
METHODS: tuple[MethodName, ...] = ("patchgd", "downscale", "gd")
FRACTION = {512: 0.3, 2048: 0.1, 4096: 0.1}
"""The papers' sampling fraction at each side."""


def small(scale: Scale, side: int, slides: Path) -> TrainConfig:
    """PatchGD with a small CNN, whose head reads the mean of Z: dots are to be counted."""
    grid = (side // PATCH) ** 2
    return TrainConfig(
        data=DataConfig(
            panda=str(slides), size=(side, side), split=SplitConfig(folds=FOLDS[scale])
        ),
        model=ModelConfig(norm="group", latent_dim=32, head="linear"),
        patchgd=PatchGDConfig(patch=PATCH, fraction=min(1.0, SAMPLED / grid), mode="accumulate"),
        batch_size=4,
        eval_batch_size=4,
        epochs={"smoke": 1, "cpu": 30}[scale],
        eval_every=10_000,
    )


def at_paper_scale() -> list[Row]:
    rows = []
    for side in SIDES["paper"]:
        config = changed(
            get_preset("panda"),
            data={"size": (side, side)},
            model={"weights": IMAGENET["resnet50"]},
            patchgd={"fraction": FRACTION[side]},
        )
        rows += [
            Row(
                f"{row.label}, {side} px",
                row.config,
                {**row.columns, "side": side},
                budget=row.budget,
            )
            for row in published_rows(config, ("patchgd", "gd"))
        ]
    # The official code reads the last level of a slide, which it enlarges beyond 512 px.
    quirk = changed(rows[-2].config, data={"panda_options": {"reference_level": True}})
    return [
        *rows,
        Row("patchgd, the official level", quirk, {"side": side}, budget=rows[-2].budget),
    ]


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        return at_paper_scale()
    slides = folder.absolute() / "slides"
    if not (slides / "train.csv").exists():
        make_tiny_panda(slides, SLIDES[scale])
    # The pixels of the patches of an inner step.
    baselines = {"downscale": BaselineConfig(side=round(PATCH * SAMPLED**0.5))}
    return [
        Row(
            f"{method}, {side} px",
            changed(
                small(scale, side, slides),
                method=method,
                baseline=baselines.get(method, BaselineConfig()),
            ),
            {"method": method, "side": side},
        )
        for side in SIDES[scale]
        for method in (METHODS if scale == "cpu" else METHODS[:2])
    ]


if __name__ == "__main__":
    main("panda_resnet50", rows)
