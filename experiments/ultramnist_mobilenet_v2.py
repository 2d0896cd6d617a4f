"""UltraMNIST with MobileNetV2: PatchGD and the other methods at the same memory.

Command:   python experiments/ultramnist_mobilenet_v2.py --scale cpu
Time:      cpu: about 70 minutes on one core, beside other work; paper: days on one GPU
Expected:  cpu: as with the small CNN of `ultramnist_resnet50.py`, after a third of the images:
           PatchGD 29 %, `patchwise` 18 % and `downscale` 10 % (chance) at 53 to 62 MiB, `gd` 28 %
           and `gd-extended` 39 % at 250 MiB

At scale cpu MobileNetV2 has its stem at stride 1, because small digits do not outlive a stride of
32, and the images are 96 px; at scale smoke the encoder is the small CNN, because compiling
MobileNetV2 alone takes longer than that scale may.
"""

from __future__ import annotations

from pathlib import Path

from runner import main
from runs import Row, Scale
from settings import COMPARED, SMOKE, DigitSums, published, published_rows

CPU = DigitSums(
    encoder="mobilenet-v2", stem_stride=1, side=96, train_images=3200, val_images=400,
    pretraining_images=64_000, pretraining_rate=6e-3, pretraining_patches=1,
)  # fmt: skip


def rows(scale: Scale, folder: Path) -> list[Row]:
    if scale == "paper":
        return published_rows(published("mobilenet-v2"))
    task = {"smoke": SMOKE, "cpu": CPU}[scale]
    return [task.method(method) for method in (COMPARED if scale == "cpu" else COMPARED[:2])]


if __name__ == "__main__":
    main("ultramnist_mobilenet_v2", rows)
