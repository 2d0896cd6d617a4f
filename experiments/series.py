"""Does the method depend on the dimension? PatchGD on series `[B, T, C]`, by the same steps.

Command:   python experiments/series.py --scale cpu
Time:      2.5 minutes of processor time; up to 8 minutes on two cores that do other work as well
Expected:  `results/series.md`: accumulate, exact and full within each other's intervals (75 to
           77 %), accumulate and exact at about a third of full's memory; patchgd 70 %; the whole
           series 81 %, whose convolutions also see the tones that chunks cut in two; the shrunk
           series 30 %. Chance is 25 %, and counting in a quarter of each series gives 55 %.

A series is noise with about eleven short tones, of four pitches; its label is the pitch that occurs
most often (`series_data.py`). Contenders, in `METHODS`: the four gradient modes on chunks of the
series, plain gradient descent on the whole series (a grid of one patch), and the same on series
shrunk to as many steps as PatchGD encodes at a time. What is one-dimensional here is the grid,
`SeriesGrid`, and the encoder; the steps and the head are those for images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from collect import Result
from flax import linen as nn
from report import accuracy_against_memory, write_report
from runner import RESULTS
from runs import code_identity, told
from series_data import CLASSES, NOISE, Samples, counting_a_quarter, make_samples

import patchgd_jax as pgd
from patchgd_jax.contrib.series import SeriesGrid
from patchgd_jax.engine.compiling import allotted, use_compilation_cache
from patchgd_jax.models.heads.simple import AttentionHead

SEEDS = 3
FRACTION = 0.25


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    length: int
    chunk: int
    tone: int
    """Steps of a tone."""
    train: int
    """Series trained on, each once."""
    validation: int
    batch: int
    width: int
    """Channels of the encoder's first layer."""


SCALES = {
    "smoke": Scale(128, chunk=16, tone=8, train=32, validation=32, batch=16, width=8),
    "cpu": Scale(256, chunk=32, tone=12, train=25_600, validation=1_000, batch=32, width=32),
    "paper": Scale(
        16_384, chunk=512, tone=256, train=256_000, validation=10_000, batch=64, width=128
    ),
}


class Method(NamedTuple):
    """A contender."""

    label: str
    mode: Literal["patchgd", "accumulate", "exact", "full"]
    chunks: bool = True
    """Whether series are cut into chunks; else each is one."""
    shrink: int = 1
    """Steps that are averaged to one."""
    rate: float = 4e-3


METHODS = (
    # It makes four updates where the others make one.
    Method("patchgd", "patchgd", rate=2e-3),
    Method("accumulate", "accumulate"),
    Method("exact", "exact"),
    Method("full", "full"),
    Method("whole series", "full", chunks=False),
    Method("shrunk series", "full", chunks=False, shrink=round(1 / FRACTION)),
)


class Conv1d(nn.Module):
    """A convolution over the steps as one matrix product: XLA:CPU's own is slow inside a scan."""

    features: int
    taps: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `float [M, T, C]` to `[M, ceil(T / stride), features]`."""
        steps = x.shape[1]
        before = (self.taps - 1) // 2
        x = jnp.pad(x, ((0, 0), (before, self.taps - 1 - before), (0, 0)))
        shifted = [x[:, tap : tap + steps : self.stride] for tap in range(self.taps)]
        return nn.Dense(self.features)(jnp.concatenate(shifted, axis=-1))


class Encoder(nn.Module):
    """Three convolutions and the mean over the steps, for series of any length."""

    width: int
    latent_dim: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Encodes `float [M, T, C]` to `[M, latent_dim]`."""
        for features, taps in ((self.width, 8), (2 * self.width, 4), (2 * self.width, 4)):
            x = nn.relu(nn.LayerNorm()(Conv1d(features, taps, stride=2)(x)))
        return nn.Dense(self.latent_dim)(x.mean(1))


def batches(samples: Samples, size: int, order: np.ndarray) -> Iterator[dict[str, jax.Array]]:
    """Batches in an order; the last one is filled up with series of no weight."""
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        real = np.arange(size) < len(chosen)
        chosen = np.resize(chosen, size)
        yield {
            "image": jnp.asarray(samples.series[chosen]),
            "label": jnp.asarray(samples.labels[chosen]),
            "weight": jnp.asarray(real, jnp.float32),
        }


def compare(
    method: Method, scale: Scale, training: Samples, validation: Samples
) -> Iterator[Result]:
    """Trains a contender with each seed, by one compiled step; yields the figures of each."""
    length = scale.length // method.shrink
    grid = SeriesGrid(length, scale.chunk if method.chunks else length)
    # Mode exact encodes as many chunks at a time as the others sample.
    chunk = max(1, round(FRACTION * grid.num_patches))
    patchgd = pgd.PatchGDConfig(mode=method.mode, fraction=FRACTION, fill_chunk=chunk)
    model = pgd.from_linen(
        Encoder(scale.width), AttentionHead(CLASSES), grid=grid, channels=1, std=NOISE
    )
    steps = -(-scale.train // scale.batch)
    optimizer = pgd.make_optimizer(
        pgd.OptimizerConfig(learning_rate=method.rate, warmup_epochs=0.05, schedule="cosine"),
        total_steps=steps,
        steps_per_epoch=steps,
        updates_per_step=patchgd.updates_per_step,
    )
    problem = pgd.Problem(model, grid, patchgd)
    init = jax.jit(partial(pgd.init_state, problem, optimizer))
    step = partial(pgd.train_step, problem, optimizer)
    evaluate = jax.jit(partial(pgd.eval_step, problem))
    training, validation = (
        samples._replace(series=samples.series.reshape(-1, length, method.shrink, 1).mean(2))
        for samples in (training, validation)
    )
    in_order = np.arange(scale.validation)
    example = next(batches(training, scale.batch, np.arange(scale.batch)))
    key = jax.random.key(0)
    compiled = jax.jit(step, donate_argnums=0).lower(init(key), example, key).compile()
    for seed in range(SEEDS):
        key = jax.random.key(seed)
        state = init(key)
        order = np.random.default_rng(seed).permutation(scale.train)
        begun = time.monotonic()
        for batch in batches(training, scale.batch, order):
            state, _ = compiled(state, batch, key)
        jax.block_until_ready(state)
        seconds = time.monotonic() - begun
        right = loss = 0.0
        for batch in batches(validation, scale.batch, in_order):
            out = evaluate(state.weights, batch)
            right += float(((out["prediction"] == batch["label"]) * batch["weight"]).sum())
            loss += float((out["loss"] * batch["weight"]).sum())
        yield Result(
            method.label,
            seed,
            {"patches": grid.num_patches, "updates": steps * patchgd.updates_per_step},
            accuracy=right / scale.validation,
            examples=scale.validation,
            loss=loss / scale.validation,
            step_memory_mib=allotted(compiled).total / 2**20,
            seconds=seconds,
            images_per_s=scale.train / seconds,
            images=scale.train,
            code=told(code_identity()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", required=True, choices=SCALES)
    parser.add_argument(
        "--out", type=Path, help="folder of the results; experiments/results or runs/series-SCALE"
    )
    options = parser.parse_args()
    scale = SCALES[options.scale]
    default = RESULTS if options.scale == "cpu" else Path("runs") / f"series-{options.scale}"
    use_compilation_cache()
    if options.scale == "smoke":
        # Nearly all of its time goes into compiling.
        jax.config.update("jax_disable_most_optimizations", True)
    training, validation = (
        make_samples(count, length=scale.length, tone=scale.tone, seed=seed)
        for seed, count in enumerate((scale.train, scale.validation))
    )
    results = []
    for method in METHODS:
        for result in compare(method, scale, training, validation):
            print(f"{method.label}, seed {result.seed}: {result.told()}", flush=True)
            results.append(result)
    # What it takes the other three quarters to know.
    counted = Result(
        "counting in the first quarter",
        seed=0,
        accuracy=counting_a_quarter(validation),
        examples=scale.validation,
    )
    out = options.out or default
    out.mkdir(parents=True, exist_ok=True)
    print(write_report("series", options.scale, [*results, counted], accuracy_against_memory, out))


if __name__ == "__main__":
    main()
