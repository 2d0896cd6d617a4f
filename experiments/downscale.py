"""What does shrinking the image cost? The default run against its down-scaled twin.

Command:   python experiments/downscale.py
Time:      about ten minutes on two CPU cores
Expected:  97.5 % for PatchGD after 9,600 images; 98.0 % for the shrunk images after 123,000 of them
           (digits that are 10 to 16 px after shrinking are still legible, so on this data the
           detail that is lost costs less than the images that are gained)

Both runs have the same encoder, head, optimizer and wall-clock time. The first trains with PatchGD
on 256 px images, in patches of 64 px; the second on the same images shrunk to 64 px, one patch
each, for as many images as it can see in that time. Result: `benchmarks/results/downscale.json`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

from patchgd_jax import TrainConfig, get_preset
from patchgd_jax.runs.record.progress import ConsoleProgress
from patchgd_jax.runs.train import train

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from record import record


def run(config: TrainConfig, folder: Path) -> dict[str, float]:
    begun = time.monotonic()
    summary = train(config, folder, progress=ConsoleProgress())
    return {
        "accuracy": summary["best"]["accuracy"],
        "loss": summary["best"]["loss"],
        "images": config.data.train_size,
        "seconds": round(time.monotonic() - begun, 1),
        "images_per_s": summary["perf"]["images_per_s"],
        "best_shortcut": max(summary["shortcuts"].values()),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        patchgd = run(get_preset("default"), root / "patchgd")
        twin = get_preset("downscale")

        def sized(images: int) -> TrainConfig:
            data = dataclasses.replace(twin.data, train_size=images)
            return dataclasses.replace(twin, data=data, eval_every=max(1, images // 16 // 6))

        probe = run(sized(8_000), root / "probe")
        # Start-up and evaluations are in the budget, too.
        fixed = probe["seconds"] - probe["images"] / probe["images_per_s"]
        images = int((patchgd["seconds"] - fixed) * probe["images_per_s"])
        downscaled = run(sized(images // 16 * 16), root / "downscaled")
    record("downscale", {"patchgd": patchgd, "downscaled": downscaled})


if __name__ == "__main__":
    main()
