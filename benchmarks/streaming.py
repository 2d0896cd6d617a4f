"""Streamed steps: memory against the image's side, overlap of reading, cost of exact, prediction.

Command:   python benchmarks/streaming.py [memory|overlap|exact|predict]
Time:      about two minutes each on two CPU cores; without an argument all, one by one
Expected:  memory: device memory of a 65,536 px image within 5 % of an 8,192 px one's, Z apart, and
           less than 2 GiB of host memory; exact: at 16 chunks at most 1.1 times the temporary
           memory of one, and at most 1.5 times the time of mode full; overlap: at most 1.25 times
           the slower of reading and computing; predict: a 100,000 px image is labelled, all of it
           and with its background left out, in less than 2 GiB of host memory
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import optax
import tensorstore
from flax import linen as nn
from PIL import Image
from record import record

import patchgd_jax as pgd
from patchgd_jax.models.heads.simple import AttentionHead

KEY = jax.random.key(0)
LABELS = {"label": np.zeros(1, np.int32)}
ROUNDS = 5


class VirtualImage:
    """A square image computed where it is read, with a pause at each read."""

    channels = 1
    mpp = None
    tile = None
    downsamples = (1.0,)

    def __init__(self, side: int, pause: float = 0.0) -> None:
        self.level_shapes = ((side, side),)
        self.pause = pause

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        time.sleep(self.pause)
        rows = (np.arange(y, y + height) >> 3).astype(np.uint8)
        cols = (np.arange(x, x + width) >> 3).astype(np.uint8)
        return (rows[:, None] ^ cols)[..., None]

    def close(self) -> None:
        pass


class Thumbnail(nn.Module):
    """A cheap encoder: the means of 32 x 32 px squares, and a small network on them."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        m, side = x.shape[0], x.shape[1] // 32
        x = x.reshape(m, side, 32, side, 32, -1).mean((2, 4)).reshape(m, -1)
        return nn.Dense(32)(nn.relu(nn.Dense(64)(x)))


def thumbnails(side: int, **settings: Any) -> pgd.Problem:
    grid = pgd.PatchGrid(side, side, 1024)
    head = AttentionHead(classes=10, features=16)
    model = pgd.from_linen(Thumbnail(), head, grid=grid, channels=1)
    return pgd.Problem(model, grid, pgd.PatchGDConfig(fill_chunk=16, **settings))


def small_cnn(side: int, **settings: Any) -> pgd.Problem:
    grid = pgd.PatchGrid(side, side, 64)
    model = pgd.build_model(
        pgd.ModelConfig(norm="group"), grid=grid, channels=1, classes=10, mean=0.0, std=1.0
    )
    return pgd.Problem(model, grid, pgd.PatchGDConfig(fill_chunk=16, **settings))


def initial(problem: pgd.Problem, optimizer: optax.GradientTransformation) -> pgd.TrainState:
    return jax.jit(partial(pgd.init_state, problem, optimizer))(KEY)


def needed(programs: dict[str, jax.stages.Lowered]) -> dict[str, int]:
    """Temporary and argument bytes of the program that needs most."""

    def own(lowered: jax.stages.Lowered) -> dict[str, int]:
        memory = lowered.compile().memory_analysis()
        temporary, arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes
        return {"temporary": temporary, "arguments": arguments, "total": temporary + arguments}

    return max(map(own, programs.values()), key=lambda bytes_: bytes_["total"])


def memory() -> dict[str, Any]:
    """Two outer steps on a virtual image of 4 Gpx, and what one of 8,192 px needs."""
    figures: dict[str, Any] = {}
    for side in (8_192, 65_536):
        patches = (side // 1024) ** 2
        problem = thumbnails(side, mode="accumulate", inner_steps=patches // 16)
        optimizer = optax.adam(1e-3)
        step = pgd.StreamedStep(problem, optimizer)
        state = initial(problem, optimizer)
        figures[str(side)] = needed(step.lower(state, LABELS, 1))
        figures[str(side)]["z"] = patches * 32 * 4
        start = time.perf_counter()
        losses = []
        for _ in range(2 if side == 8_192 else 1):
            state, metrics = step.train(state, [VirtualImage(side)], LABELS, KEY)
            losses.append(float(metrics["loss"]))
        figures[str(side)] |= {"seconds": time.perf_counter() - start, "loss": losses}
        print(side, figures[str(side)], flush=True)
    small, large = (figures[str(side)]["total"] - figures[str(side)]["z"] for side in (8192, 65536))
    figures["ratio_without_z"] = large / small
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return figures


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def overlap() -> dict[str, Any]:
    """The same work with readers that take no time, by the readers alone, and by both."""
    readers, patches = 4, (2048 // 64) ** 2
    problem = small_cnn(2048, mode="accumulate", inner_steps=patches // 16)
    optimizer = optax.sgd(1e-3)
    step = pgd.StreamedStep(problem, optimizer, pgd.StreamConfig(enabled=True, readers=readers))
    state, image = initial(problem, optimizer), VirtualImage(2048)

    def train() -> Any:
        nonlocal state
        state, metrics = step.train(state, [image], LABELS, KEY)
        return state, metrics

    def evaluate() -> Any:
        return step.evaluate(state.weights, [image], LABELS)

    figures: dict[str, Any] = {}
    for name, work, reads in (
        ("train", train, 2 * patches),
        ("evaluate", evaluate, patches),
    ):
        rounds = []
        work()
        for _ in range(ROUNDS):
            image.pause = 0.0
            alone = seconds(work)
            # All threads together then take as long for a chunk as the device does.
            image.pause = readers * alone / reads
            start = time.perf_counter()
            with ThreadPoolExecutor(readers) as pool:
                list(pool.map(lambda _: image.read(0, 0, 64, 64), range(reads)))
            reading = time.perf_counter() - start
            rounds.append((alone, reading, seconds(work)))
        figures[name] = {
            "computing": median(r[0] for r in rounds),
            "reading": median(r[1] for r in rounds),
            "both": median(r[2] for r in rounds),
            "ratio": median(both / max(alone, reading) for alone, reading, both in rounds),
            "rounds": rounds,
        }
        print(name, figures[name], flush=True)
    return figures


def exact() -> dict[str, Any]:
    """Mode exact, streamed, with 1 and 16 chunks of 16 patches, against mode full, resident."""
    figures: dict[str, Any] = {}
    optimizer = optax.sgd(1e-3)
    for side in (256, 1024):
        problem = small_cnn(side, mode="exact")
        step = pgd.StreamedStep(problem, optimizer)
        programs = step.lower(initial(problem, optimizer), LABELS, 1)
        figures[f"temporary_{problem.grid.num_patches}"] = max(
            lowered.compile().memory_analysis().temp_size_in_bytes for lowered in programs.values()
        )
    image = VirtualImage(1024)
    batch = {**LABELS, "image": image.read(0, 0, 1024, 1024)[None]}
    full = partial(pgd.train_step, small_cnn(1024, mode="full"), optimizer)
    compiled = (
        jax.jit(full, compiler_options=pgd.compiler_options())
        .lower(initial(problem, optimizer), batch, KEY)
        .compile()
    )
    figures["temporary_full"] = compiled.memory_analysis().temp_size_in_bytes
    rounds = []
    for _ in range(ROUNDS + 1):
        whole = seconds(partial(compiled, initial(problem, optimizer), batch, KEY))
        state = initial(problem, optimizer)
        rounds.append((whole, seconds(partial(step.train, state, [image], LABELS, KEY))))
    # The first round compiles the streamed programs.
    rounds = rounds[1:]
    figures |= {
        "full": median(r[0] for r in rounds),
        "exact": median(r[1] for r in rounds),
        "time_ratio": median(b / a for a, b in rounds),
        "memory_ratio": figures["temporary_256"] / figures["temporary_16"],
        "rounds": rounds,
    }
    print(figures, flush=True)
    return figures


def predict() -> dict[str, Any]:
    """A 100,000 px image, whole by a cheap encoder and as a user does, background left out."""
    side = 100_000
    problem = thumbnails(side)
    step = pgd.StreamedStep(problem, optax.identity())
    weights = pgd.Weights(*jax.jit(problem.model.init)(KEY))
    begun = time.perf_counter()
    out = jax.device_get(step.evaluate(weights, [VirtualImage(side)], LABELS))
    figures: dict[str, Any] = {
        "patches": problem.grid.num_patches,
        "seconds": time.perf_counter() - begun,
        "prediction": int(out["prediction"][0]),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures["command"] = predict_as_a_user(Path(folder), side)
    print(figures, flush=True)
    return figures


def predict_as_a_user(folder: Path, side: int) -> dict[str, Any]:
    """Trains on small slides and labels a large one, by the command line."""
    rng = np.random.default_rng(0)
    for number in range(10):
        place = folder / "slides" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((1024, 1536), np.uint8)
        pixels[256:768, 256:1024] = rng.integers(100, 200 + 50 * (number % 2), (512, 768))
        Image.fromarray(pixels).save(place / f"{number}.png")
    huge = folder / "huge.zarr"
    pyramid(huge, side, tissue=[(20_000 + 900 * i, 31_000, 4_000, 9_000) for i in range(8)])
    settings = (
        "--data.root slides --data.fit native --data.empty.method threshold --data.background 0 "
        "--data.empty.threshold 60 --patchgd.patch 256 --patchgd.inner-steps 2 --batch-size 2 "
        "--eval-batch-size 2 --stream.enabled --device cpu --run-dir run"
    )
    command = [sys.executable, "-m", "patchgd_jax"]
    subprocess.run([*command, "train", *settings.split()], cwd=folder, check=True)
    begun = time.perf_counter()
    subprocess.run([*command, "predict", "run", str(huge)], cwd=folder, check=True)
    return {
        "patches": (-(-side // 256)) ** 2,
        "seconds": time.perf_counter() - begun,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
    }


def pyramid(path: Path, side: int, tissue: list[tuple[int, int, int, int]]) -> None:
    """Writes an OME-Zarr image of which only the tissue takes room: top, left, height, width."""
    levels = [1, 16, 128]
    for number, by in enumerate(levels):
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(path / str(number))},
            "metadata": {
                "shape": [-(-side // by)] * 2, "chunks": [1024, 1024], "dtype": "|u1",
                "fill_value": 0, "compressor": {"id": "zlib", "level": 1},
            },
            "create": True,
        }  # fmt: skip
        array = tensorstore.open(spec).result()
        rng = np.random.default_rng(number)
        for top, left, height, width in tissue:
            shape = (height // by, width // by)
            y, x = top // by, left // by
            array[y : y + shape[0], x : x + shape[1]] = rng.integers(100, 200, shape, np.uint8)
    scales = [
        {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [by, by]}]}
        for n, by in enumerate(levels)
    ]
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    attributes = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": scales}]}
    (path / ".zattrs").write_text(json.dumps(attributes))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "memory": memory,
    "overlap": overlap,
    "exact": exact,
    "predict": predict,
}


def main() -> None:
    if len(sys.argv) > 1:
        record(f"streaming_{sys.argv[1]}", PARTS[sys.argv[1]]())
        return
    for name in PARTS:
        # A process each: the peak of the host's memory is one part's own.
        subprocess.run([sys.executable, str(Path(__file__)), name], check=True)


if __name__ == "__main__":
    main()
