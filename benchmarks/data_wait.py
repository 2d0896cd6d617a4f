"""How long training waits for its images, for each kind of source.

Command:   python benchmarks/data_wait.py
Time:      about ten minutes on two CPU cores; needs 500 MB in the temporary folder
Expected:  under 5 % of a step with the default encoder, for every source
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from record import record

from patchgd_jax import DataConfig, TrainConfig, get_preset
from patchgd_jax.data.images.tiling import tile_image
from patchgd_jax.data.synthetic.tfds_builder import make_dataset
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.runs.train import train

SLIDE_SIDE, SLIDES = 8192, 20
STEPS = 24


def write_table(folder: Path, names: list[str]) -> str:
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows((name, i % 2) for i, name in enumerate(names))
    return str(folder / "labels.csv")


def slides(folder: Path) -> str:
    """Tiled pyramids of 8192 px with smooth colour and grain, in JPEG tiles."""
    names = []
    rng = np.random.default_rng(0)
    for number in range(SLIDES):
        coarse = rng.integers(60, 256, (64, 64, 3), dtype=np.uint8)
        image = np.kron(coarse, np.ones((SLIDE_SIDE // 64, SLIDE_SIDE // 64, 1), np.uint8))
        image += rng.integers(0, 12, (SLIDE_SIDE, SLIDE_SIDE, 1), dtype=np.uint8) // 3
        flat = folder / "flat.npy"
        np.save(flat, image)
        names.append(f"{number}.tif")
        tile_image(flat, folder / names[-1])
        flat.unlink()
    return write_table(folder, names)


def pngs(folder: Path, config: DataConfig) -> str:
    from PIL import Image

    source = UltraMnist(config, "train", 0)
    names = []
    for index in range(200):
        names.append(f"{index}.png")
        Image.fromarray(source[index]["image"][..., 0]).save(folder / names[-1])
    return write_table(folder, names)


def waiting(config: TrainConfig, folder: Path) -> dict[str, float]:
    """Median share of a step that it waits, without the first steps."""
    config = dataclasses.replace(config, eval_every=10**6, save_every=10**6)

    class Enough(Exception):  # noqa: N818
        pass

    def stop(step: int) -> None:
        if step == STEPS:
            raise Enough

    with contextlib.suppress(Enough):
        train(config, folder, on_step=stop)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    perf = [line["perf"] for line in lines if line["kind"] == "train"][4:]
    return {
        "data_wait": statistics.median(p["data_wait"] for p in perf),
        "images_per_s": statistics.median(p["images_per_s"] for p in perf),
    }


def main() -> None:
    default = dataclasses.replace(get_preset("default"), epochs=100)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small = dataclasses.replace(default.data, train_size=200, val_size=20)
        for part in ("slides", "pngs", "sets"):
            (root / part).mkdir()
        slide_table = slides(root / "slides")
        frozen = make_dataset(small, 0, root / "sets")
        sources = {
            "generated, 256 px": default.data,
            "PNG, 256 px": DataConfig(csv=pngs(root / "pngs", small)),
            "array_record, 256 px": DataConfig(tfds=str(frozen)),
            "TIFF of 8192 px, resized to 256 px": DataConfig(csv=slide_table, channels=3),
            "TIFF of 8192 px, resized to 1024 px": DataConfig(
                csv=slide_table, channels=3, size=(1024, 1024)
            ),
        }
        for number, (label, data) in enumerate(sources.items()):
            batch = 16 if data.size == (256, 256) else 4
            config = dataclasses.replace(default, data=data, batch_size=batch)
            results[label] = waiting(config, root / f"run{number}")
            print(f"{label}: {results[label]}", flush=True)
    record("data_wait", {"sources": results, "reader_threads": default.reader_threads})


if __name__ == "__main__":
    main()
