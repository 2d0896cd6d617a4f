"""UltraMNIST with ResNet-50: PatchGD and the other methods at the same memory.

Command:   python experiments/ultramnist_resnet50.py --scale cpu
Time:      cpu: about 25 minutes on one core; paper: days on one GPU
Expected:  cpu: PatchGD 38 % with the memory of one patch an image, `patchwise` 25 % and `downscale`
           10 % (chance) with no more; `gd` 38 %, `fully-conv` 31 % and `gd-extended` 49 % with four
           times the memory. `mil` 37 % with the least: its encoder knows these digits before it
           starts. `ips` at chance: the four patches that it chooses are blank ones, which teach
           it nothing, and with one patch its attention has no gradient at all. The best guess
           without reading a sum is 36 %. paper: PatchGD above `gd` at each budget (arXiv
           2301.13817)

At scale cpu the encoder is a small CNN and the images are those of `settings.DigitSums`; at scale
paper they are UltraMNIST's at 512 px, and the batch is the largest that a budget has room for.
"""

from __future__ import annotations

from pathlib import Path

from runner import main
from runs import Row, Scale
from settings import COMPARED, OTHERS, SMOKE, DigitSums, published, published_rows

from patchgd_jax.config import BaselineConfig

CPU = DigitSums(train_images=9600)


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        return published_rows(published("resnet50"))
    if scale == "smoke":
        # The other methods are in the other experiments.
        return [SMOKE.method(method) for method in ("patchgd", "patchwise", "gd-extended")]
    return [
        *(CPU.method(method) for method in (*COMPARED, *OTHERS)),
        CPU.row("ips, 4 patches", method="ips", baseline=BaselineConfig(top_patches=4)),
        CPU.row("gd, recomputed", method="gd", model={"remat": "blocks"}),
    ]


if __name__ == "__main__":
    main("ultramnist_resnet50", rows)
