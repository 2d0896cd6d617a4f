"""What batch statistics do, and the official code's quirks, each by itself.

Command:   python experiments/norm_policies.py --scale cpu
Time:      cpu: about eight minutes on one core; paper: weeks on one GPU
Expected:  cpu: statistics that stay those of the start (`frozen`) 29 %, that move in the inner
           steps (`inner`) 26 %, in the fill as well (`paper`) 22 %; the other quirks within the
           interval of `inner` (24 to 27 %). Group normalisation 19 %, from an encoder that knew
           35 % of single digits where the others knew 82 %

The quirks that are settings here: batch statistics that move twice for each patch (`norm_policy
paper`), a learning rate that ends at half its peak (`schedule linear`), and one sample of positions
for a whole batch, against one for each image. The official level of PANDA's slides is in
`panda_resnet50.py`. The others are defects that have no setting, such as no update at all at some
fractions.
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

CPU = DigitSums(train_images=1600, val_images=400)

BATCH: Mapping[str, dict[str, Any]] = {
    "batch, inner": {},
    "batch, paper": {"patchgd": {"norm_policy": "paper"}},
    "batch, frozen": {"patchgd": {"norm_policy": "frozen"}},
    "batch, inner, linear schedule": {"optimizer": {"schedule": "linear"}},
    "batch, inner, own patches for each image": {"patchgd": {"sample_per": "image"}},
    "batch, inner, unbiased encoder gradient": {"patchgd": {"encoder_grad_scale": "unbiased"}},
}


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        base = changed(
            published("resnet50"),
            patchgd={"norm_policy": "inner"},
            optimizer={"schedule": "cosine"},
        )
        return [Row(label, changed(base, **change)) for label, change in BATCH.items()]
    task = {"smoke": SMOKE, "cpu": CPU}[scale]
    inner = replace(task, norm_policy="inner")
    if scale == "smoke":
        return [inner.row(label, **BATCH[label]) for label in ("batch, inner", "batch, paper")]
    group = replace(inner, norm="group").row("group")
    return [group, *(inner.row(label, **change) for label, change in BATCH.items())]


if __name__ == "__main__":
    main("norm_policies", rows, accuracy_intervals)
