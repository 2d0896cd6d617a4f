"""Does the method depend on the dimension? PatchGD on series `[B, T, C]`, by the same steps.

Command:   python experiments/series.py --scale cpu
Time:      TODO
Expected:  TODO

A series is noise with about eleven short tones, of four pitches; its label is the pitch that occurs
most often (`series_data.py`). Contenders, in `METHODS`: the four gradient modes on chunks of the
series, plain gradient descent on the whole series (a grid of one patch), and the same on series
shrunk to as many steps as PatchGD encodes at a time. What is one-dimensional here is the grid,
`SeriesGrid`, and the encoder; the steps and the head are those for images.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from series_data import CLASSES, NOISE, Samples, counting_a_quarter, make_samples

import patchgd_jax as pgd
from patchgd_jax.models.heads import AttentionHead

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from record import record

RESULTS = Path(__file__).parent / "results"
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
) -> Iterator[dict[str, Any]]:
    """Trains a contender with each seed, by one compiled step; yields a row of figures for each."""
    length = scale.length // method.shrink
    grid = pgd.SeriesGrid(length, scale.chunk if method.chunks else length)
    patchgd = pgd.PatchGDConfig(mode=method.mode, fraction=FRACTION)
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
    init = jax.jit(partial(pgd.init_state, model=model, optimizer=optimizer))
    step = partial(pgd.train_step, model=model, optimizer=optimizer, grid=grid, patchgd=patchgd)
    evaluate = jax.jit(partial(pgd.eval_step, model=model, grid=grid, fill_chunk=4))
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
            state, metrics = compiled(state, batch, key)
        training_loss = float(metrics["loss"])
        seconds = time.monotonic() - begun
        right = loss = 0.0
        for batch in batches(validation, scale.batch, in_order):
            out = evaluate(state.params, state.model_state, batch)
            right += float(((out["prediction"] == batch["label"]) * batch["weight"]).sum())
            loss += float((out["loss"] * batch["weight"]).sum())
        yield {
            "label": method.label,
            "seed": seed,
            "patches": grid.num_patches,
            "updates": steps * patchgd.updates_per_step,
            "accuracy": right / scale.validation,
            "examples": scale.validation,
            "loss": loss / scale.validation,
            "training_loss": training_loss,
            "step_memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            "seconds": seconds,
            "images_per_s": scale.train / seconds,
        }


def interval(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean accuracy, over seeds and validation series."""
    rng = np.random.default_rng(0)
    accuracy = rng.choice([row["accuracy"] for row in rows], (10_000, len(rows)))
    means = (rng.binomial(rows[0]["examples"], accuracy) / rows[0]["examples"]).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, a row for each contender."""
    summaries = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        means = {
            name: float(np.mean([row[name] for row in own]))
            for name in ("accuracy", "step_memory_mib", "seconds")
        }
        low, high = interval(own)
        counts = {name: own[0][name] for name in ("patches", "updates")}
        summaries.append({"label": label, **counts, **means, "low": low, "high": high})
    return summaries


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| | patches | updates | accuracy, % [95 %] | step, MiB | time, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in summaries:
        accuracy, low, high = (100 * row[name] for name in ("accuracy", "low", "high"))
        lines.append(
            f"| {row['label']} | {row['patches']} | {row['updates']} | "
            f"{accuracy:.1f} [{low:.1f}, {high:.1f}] | {row['step_memory_mib']:.1f} | "
            f"{row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def draw(summaries: Sequence[dict[str, Any]], quarter: float, path: Path) -> None:
    """Accuracy against the memory of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for row in summaries:
        accuracy, low, high = (100 * row[name] for name in ("accuracy", "low", "high"))
        errors = [[max(0, accuracy - low)], [max(0, high - accuracy)]]
        axes.errorbar(
            row["step_memory_mib"], accuracy, errors, fmt="o", capsize=3, label=row["label"]
        )
    axes.axhline(100 * quarter, color="grey", linestyle=":", label="counting in the first quarter")
    axes.axhline(100 / CLASSES, color="grey", linestyle="--", label="chance")
    axes.set(
        xlabel="memory of the compiled training step (by XLA), MiB", ylabel="validation accuracy, %"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(scale: str, rows: Sequence[dict[str, Any]], quarter: float, folder: Path) -> None:
    """Writes `series.json`, `.csv`, `.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = summarise(rows)
    # First, because it says whether there are changes that no commit has.
    figures = {"scale": scale, "counting_a_quarter": quarter, "rows": summaries, "runs": rows}
    record("series", figures, folder)
    with (folder / "series.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = f"""# series, scale {scale}

{markdown(summaries)}

Accuracy: mean over {SEEDS} seeds at the end of training, and its 95 % bootstrap interval over seeds
and validation series. Step: memory of the compiled training step by XLA. Time: of training, without
compiling. Counting without error in the first quarter of each series: {100 * quarter:.1f} %;
chance: {100 / CLASSES:.0f} %.
"""
    (folder / "series.md").write_text(text, encoding="utf-8")
    print(text)
    draw(summaries, quarter, folder / "series.png")


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
    if options.scale == "smoke":
        # Nearly all of its time goes into compiling.
        jax.config.update("jax_disable_most_optimizations", True)
    training, validation = (
        make_samples(count, length=scale.length, tone=scale.tone, seed=seed)
        for seed, count in enumerate((scale.train, scale.validation))
    )
    rows = []
    for method in METHODS:
        for row in compare(method, scale, training, validation):
            accuracy, seconds = 100 * row["accuracy"], row["seconds"]
            print(f"{method.label}, seed {row['seed']}: {accuracy:.1f} %, {seconds:.1f} s")
            rows.append(row)
    write(options.scale, rows, counting_a_quarter(validation), options.out or default)


if __name__ == "__main__":
    main()
