"""The smallest runs that test what runs do, and what two of them must have the same."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
from PIL import Image

from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig, register_encoder
from patchgd_jax.cli.main import main
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.runs.checkpoint import Checkpoints

ENCODER = "micro"
"""The default encoder with one stage: its steps take half as long to compile."""

register_encoder(ENCODER, partial(SmallCNN, widths=(8,)), norms=("batch", "group"), features=16)

MICRO = [
    "--data.size", 32, 32, "--data.digits", "font", "--data.digit-count", 1,
    "--data.label-share", 1, "--data.object-ratio", 0.8, 1, "--data.train-size", 64,
    "--data.val-size", 21, "--patchgd.patch", 16, "--patchgd.fraction", 0.5,
    "--model.latent-dim", 16, "--batch-size", 8, "--eval-batch-size", 8,
]  # fmt: skip

BASE = TrainConfig(
    data=DataConfig(
        digits="font", size=(32, 32), digit_count=1, label_share=1.0, object_ratio=(0.8, 1.0),
        train_size=32, val_size=5,
    ),
    model=ModelConfig(ENCODER, latent_dim=8),
    patchgd=PatchGDConfig(patch=16, fraction=0.5),
    batch_size=8,
    eval_batch_size=4,
)  # fmt: skip

TINY = {
    "model": ModelConfig(ENCODER, latent_dim=8),
    "patchgd": PatchGDConfig(patch=16, fraction=0.5),
    "batch_size": 4,
    "eval_batch_size": 4,
}


def changed(data=None, model=None, patchgd=None):
    """`BASE` with some of its settings replaced."""
    return dataclasses.replace(
        BASE,
        data=dataclasses.replace(BASE.data, **(data or {})),
        model=dataclasses.replace(BASE.model, **(model or {})),
        patchgd=dataclasses.replace(BASE.patchgd, **(patchgd or {})),
    )


def config_for(labels, **data):
    """A run on the images of a CSV file."""
    return TrainConfig(
        data=DataConfig(csv=labels, **{"size": (48, 48), "channels": 1, **data}), **TINY
    )


def write_images(folder, sizes, seed=0):
    """One file for each size: class "disc" has a bright spot, "plain" has none."""
    rng = np.random.default_rng(seed)
    rows = []
    (folder / "images").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        image = rng.integers(0, 40, (height, width), dtype=np.uint8)
        label = ("disc", "plain")[i % 2]
        if label == "disc":
            image[2:12, 2:12] = 255
        name = f"images/{i}.png"
        Image.fromarray(image).save(folder / name)
        tags = ";".join(tag for tag, on in (("a", i % 2), ("b", i % 3 == 0)) if on) or ";"
        who = f"patient {i // 2}"
        rows.append({"path": name, "label": label, "who": who, "number": i % 5, "tags": tags})
    return rows


def write_csv(path, rows):
    """A CSV file of such rows; its name."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def sizes(count, seed=1):
    """Heights and widths of that many images."""
    rng = np.random.default_rng(seed)
    return rng.integers(17, 60, (count, 2)).tolist()


def run_here(*arguments):
    """The exit code of a `patchgd-jax` command that runs in this process."""
    platforms = jax.config.jax_platforms
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code
    finally:
        jax.config.update("jax_platforms", platforms)


def start(*arguments, cwd, **environment):
    """Starts `patchgd-jax` in a process of its own, as a user does."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "patchgd_jax", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A proxy would be asked for the processes of a run, too.
        env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        | {"COLUMNS": "100", **environment},
    )


class Stopped(Exception):  # noqa: N818
    """What ends a run in the place of a kill."""


def stop_at(last):
    """An `on_step` that ends the run after a step."""

    def on_step(step):
        if step == last:
            raise Stopped

    return on_step


def lines_of(folder):
    """A run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder):
    """The arrays of a run's last checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints")
    return checkpoints.restore_arrays(checkpoints.newest_intact())


def assert_same_run(a, b):
    """Bit for bit: every parameter, optimizer moment and metric but the wall-clock ones."""

    def without_clock(folder):
        return [{k: v for k, v in line.items() if k != "perf"} for line in lines_of(folder)]

    for one, other in zip(without_clock(a), without_clock(b), strict=True):
        assert one == other
    last = [Checkpoints(folder / "checkpoints").newest_intact() for folder in (a, b)]
    assert last[0] == last[1]
    jax.tree.map(np.testing.assert_array_equal, final(a), final(b))
    best = [json.loads((folder / "checkpoints" / "best.json").read_text()) for folder in (a, b)]
    assert best[0] == best[1]
