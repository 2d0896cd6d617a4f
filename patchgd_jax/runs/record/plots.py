"""Learning curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LABELS = {"loss": "loss", "accuracy": "accuracy", "mae": "mean absolute error"}


def plot_curves(
    lines: Sequence[Mapping[str, Any]], shortcuts: Mapping[str, float], path: Path
) -> None:
    """Draws loss and accuracy (or mean absolute error) over outer steps into a PNG file.

    `lines` are those of `metrics.jsonl`, `shortcuts` the accuracies of trivial baselines, of which
    the best is drawn as a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    metric = "accuracy" if "accuracy" in lines[0] else "mae"
    for axis, name in zip(axes, ("loss", metric), strict=True):
        for kind, label, style in (("train", "training", "-"), ("eval", "validation", "o-")):
            chosen = [line for line in lines if line["kind"] == kind]
            steps = np.array([line["step"] for line in chosen])
            values = np.array([line[name] for line in chosen])
            if kind == "train" and len(values) > 100:
                width = len(values) // 50
                values = np.convolve(values, np.ones(width) / width, "valid")
                steps, label = steps[width - 1 :], f"training, mean of {width} steps"
            axis.plot(steps, values, style, label=label, markersize=4)
        axis.set(xlabel="outer step", ylabel=_LABELS[name])
    if metric == "accuracy":
        axes[0].set_ylabel("loss (nats)")
        axes[1].set_ylim(0, 1)
    if shortcuts:
        best = max(shortcuts, key=lambda name: shortcuts[name])
        axes[1].axhline(shortcuts[best], color="grey", linestyle=":", label=f"shortcut: {best}")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
