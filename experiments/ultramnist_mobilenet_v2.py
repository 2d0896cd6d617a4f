"""UltraMNIST with MobileNetV2: PatchGD and the other methods at the same memory.

Command:   python experiments/ultramnist_mobilenet_v2.py --scale paper
Time:      cpu: about ten minutes on two cores; paper: days on one GPU
Expected:  as with ResNet-50 (`ultramnist_resnet50.py`), with less memory for every method. At scale
           cpu the runs are too short to tell the methods apart

At scale cpu the encoder is MobileNetV2 on small images; at scale smoke it is the small CNN, because
compiling MobileNetV2 alone takes longer than that scale may.
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
