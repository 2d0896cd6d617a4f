"""UltraMNIST with ResNet-50: PatchGD and the other methods at the same memory.

Command:   python experiments/ultramnist_resnet50.py --scale cpu
Time:      cpu: about ten minutes on two cores; paper: days on one GPU
Expected:  cpu: PatchGD above `downscale` and `patchwise`, which have no more than its memory and
           cannot read a digit, or not add digits up; `gd` near PatchGD, for the memory of the whole
           image. paper: PatchGD above `gd` at each budget (arXiv 2301.13817)

At scale cpu the encoder is a small CNN and the images are those of `settings.DigitSums`; at scale
paper they are UltraMNIST's at 512 px, and the batch is the largest that a budget has room for.
"""

from __future__ import annotations

from pathlib import Path

from runner import main
from runs import Row, Scale
from settings import COMPARED, SMOKE, DigitSums, published, published_rows

CPU = DigitSums(train_images=9600)


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        return published_rows(published("resnet50"))
    task = {"smoke": SMOKE, "cpu": CPU}[scale]
    return [task.method(method) for method in COMPARED]


if __name__ == "__main__":
    main("ultramnist_resnet50", rows)
