"""Memory and speed of a training step against the side of the image, by method.

Command:   python experiments/memory_throughput.py --scale cpu
Time:      cpu: about three minutes on two cores; paper: an hour on one GPU
Expected:  cpu: the memory of `gd` and `fully-conv` grows with the pixels (19, 61, 226 MiB), that of
           PatchGD, `patchwise` and `ips` stays with their patches (20 to 21 MiB), and `downscale`
           has that of its side. Images per second fall with the pixels for all but `downscale`, and
           `mil`, whose features are there once an image was seen. Recomputing the blocks saves 2 to
           7 % of this encoder's memory

Nothing is trained to the end: a step is compiled, and five are timed. A method that does not fit is
a row that says so.
"""

from __future__ import annotations

from pathlib import Path

from report import STEP_MEMORY, curves
from runner import main
from runs import Row, Scale
from settings import OTHERS, SMOKE, DigitSums, changed, published

from patchgd_jax import TrainConfig
from patchgd_jax.config import BaselineConfig

SIDES = {"smoke": (32,), "cpu": (128, 256, 512), "paper": (512, 1024, 2048, 4096)}
CPU = DigitSums(patch=64, sampled=4, batch=4, digit_px=(24, 48))


def at_side(scale: Scale, side: int) -> tuple[TrainConfig, int]:
    """PatchGD on images of a side, and its patches in an inner step: as many at every side."""
    if scale == "paper":
        sampled, base = 16, changed(published("resnet50"), batch_size=2, eval_batch_size=2)
    else:
        task = {"smoke": SMOKE, "cpu": CPU}[scale]
        sampled, base = min(task.sampled, (side // task.patch) ** 2), task.config
    size = {"size": (side, side), "train_size": base.images_per_step, "val_size": 10}
    fraction = sampled / (side // base.patchgd.patch) ** 2
    return changed(base, data=size, patchgd={"fraction": fraction}), sampled


def rows(scale: Scale, folder: Path) -> list[Row]:
    made = []
    for side in SIDES[scale]:
        config, sampled = at_side(scale, side)
        patch = config.patchgd.patch
        shrunk = BaselineConfig(side=min(side, round(patch * sampled**0.5)))
        methods = {
            "patchgd": config,
            "patchgd, exact": changed(config, patchgd={"mode": "exact", "norm_policy": "frozen"}),
            "gd": changed(config, method="gd"),
            "gd, recomputed": changed(config, method="gd", model={"remat": "blocks"}),
            "downscale": changed(config, method="downscale", baseline=shrunk),
            **{name: changed(config, method=name) for name in ("patchwise", *OTHERS)},
        }
        for method in methods if scale != "smoke" else ("patchgd", "gd"):
            made.append(
                Row(
                    f"{method}, {side} px",
                    methods[method],
                    {"method": method, "side": side},
                    task="measure",
                )
            )
    return made


PANELS = {"step_memory_mib": STEP_MEMORY, "images_per_s": "images per second"}

if __name__ == "__main__":
    main("memory_throughput", rows, curves("side", "method", PANELS, "image side, px"))
