"""PatchGD's gradients against the whole image's: does the approximation cost anything?

Command:   python experiments/gradient_modes.py --scale cpu
Time:      cpu: about a quarter of an hour on one core; paper: weeks on one GPU
Expected:  `accumulate`, `exact` and `full` within each other's intervals (37 to 38 %), at 8, 13
           and 33 MiB; `full, recomputed` has the memory of `exact`; `patchgd`, which updates after
           every inner step, 29 % at the same learning rate, and 38 % at an eighth of it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import main
from runs import Row, Scale
from settings import SMOKE, DigitSums, changed, published

CPU = DigitSums(train_images=4800)

MODES: Mapping[str, dict[str, Any]] = {
    "patchgd": {"mode": "patchgd"},
    "accumulate": {"mode": "accumulate"},
    "exact": {"mode": "exact"},
    "full": {"mode": "full"},
    "full, recomputed": {"mode": "full", "remat": True},
}
SLOWER = (2, 4, 8)
"""Divisors of the learning rates for mode patchgd, which updates sixteen times as often."""


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        # Batch statistics of chunks are not the image's, so `exact` needs them frozen.
        base = changed(published("resnet50"), patchgd={"norm_policy": "frozen"})
        return [Row(label, changed(base, patchgd=mode)) for label, mode in MODES.items()]
    task = {"smoke": SMOKE, "cpu": CPU}[scale]
    labels = ("accumulate", "exact", "full") if scale == "smoke" else tuple(MODES)
    made = [task.row(label, patchgd=MODES[label]) for label in labels]
    if scale == "cpu":
        slower = [
            task.row(
                f"patchgd, 1/{n} of the rate",
                patchgd=MODES["patchgd"],
                optimizer={
                    "learning_rate": task.learning_rate / n,
                    "encoder_learning_rate": task.encoder_learning_rate / n,
                },
            )
            for n in SLOWER
        ]
        made[1:1] = slower
    return made


if __name__ == "__main__":
    main("gradient_modes", rows)
