"""How small may objects be in the image, before a method breaks?

Command:   python experiments/object_ratio.py --scale cpu
Time:      cpu: about half an hour on one core; paper: weeks on one GPU
Expected:  cpu: PatchGD 31, 40 and 43 % for digits of 8, 14 and 24 px, `gd` 27, 33 and 38 %, `mil`
           with an encoder that was trained on such digits 32, 38 and 39 %, `patchwise` 19, 19 and
           22 %; `downscale`, whose shrunk digits have 2 to 8 px, and `ips` at chance (10 %) for all

The digits' side over the image's is varied; image, patches and memory stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from report import curves
from runner import main
from runs import Row, Scale
from settings import SMOKE, DigitSums, changed, published

from patchgd_jax.config import BaselineConfig, MethodName

METHODS: tuple[MethodName, ...] = ("patchgd", "downscale", "patchwise", "mil", "ips", "gd")
CPU = DigitSums(train_images=3200, val_images=400)
DIGIT_PX = {"smoke": (6,), "cpu": (8, 14, 24), "paper": (14, 28, 56, 112)}
"""Smallest side of a digit; the largest is a quarter more."""


def at_paper_scale(digit_px: int) -> list[Row]:
    base = published("resnet50")
    side = base.data.size[0]
    ratio = digit_px / side, 1.25 * digit_px / side
    config = changed(base, data={"object_ratio": ratio, "scale": "relative"})
    shrunk = {"downscale": BaselineConfig(side=side // 4)}
    return [
        Row(m, changed(config, method=m, baseline=shrunk.get(m, BaselineConfig()))) for m in METHODS
    ]


def rows(scale: Scale, folder: Path) -> list[Row]:
    made = []
    for digit_px in DIGIT_PX[scale]:
        if scale == "paper":
            side, methods = published("resnet50").data.size[0], at_paper_scale(digit_px)
        else:
            task = {"smoke": SMOKE, "cpu": CPU}[scale]
            task = replace(task, digit_px=(digit_px, round(1.25 * digit_px)))
            names = METHODS if scale == "cpu" else METHODS[:2]
            side, methods = task.side, [task.method(method) for method in names]
        made += [
            replace(
                row,
                label=f"{row.label}, {digit_px} px",
                columns={"method": row.label, "object over image": round(digit_px / side, 4)},
            )
            for row in methods
        ]
    return made


PANELS = {"accuracy": "validation accuracy, %"}

if __name__ == "__main__":
    figure = curves("object over image", "method", PANELS, "side of a digit over the image's")
    main("object_ratio", rows, figure)
