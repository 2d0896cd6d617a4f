"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Label = Callable[[dict[str, Any]], str]
_GIB = 2**30


def speed_plot(rows: dict[str, Any], label: Label, path: Path) -> None:
    """Images per second of every contender, a panel for each setting."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (name, row) in zip(panels[0], rows.items(), strict=True):
        results = [r for r in row["contenders"] if "failure" not in r]
        ours = [r["task"]["library"] == "ours" for r in results]
        values = [r["images_per_s"] for r in results]
        batch = [r["task"]["batch"] for r in results]
        quartiles = [
            sorted(b / s for s in r["step_s"]["quartiles"])
            for r, b in zip(results, batch, strict=True)
        ]
        errors = [
            [max(0, v - low) for v, (low, _) in zip(values, quartiles, strict=True)],
            [max(0, high - v) for v, (_, high) in zip(values, quartiles, strict=True)],
        ]
        colours = ["tab:blue" if own else "tab:gray" for own in ours]
        panel.barh([label(r["task"]) for r in results], values, xerr=errors, color=colours)
        panel.invert_yaxis()
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("images per second (median, quartiles)")
        panel.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def memory_plot(
    memory: dict[str, Any], whole_image: dict[int, Any], label: Label, path: Path
) -> None:
    """Memory against the image's side, at a fixed number of patches and for the whole image."""
    figure, panel = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    sides = sorted(memory["compiled"], key=int)
    panel.plot(
        [int(s) for s in sides],
        [memory["compiled"][s]["rest"] / _GIB for s in sides],
        "o-",
        label="patchgd_jax, one image: compiled, without pixels and Z",
    )
    lines: dict[str, list[tuple[int, float]]] = {}
    for side, results in memory["measured"].items():
        for result in results:
            if "failure" not in result:
                name = f"{label(result['task'])}, two images: process peak"
                lines.setdefault(name, []).append((int(side), result["peak_bytes"] / _GIB))
    for side, results in whole_image.items():
        for result in results:
            if "failure" not in result:
                remat = ", remat blocks" if result["task"]["variant"] == "blocks" else ""
                name = f"{label(result['task'])}{remat}, one whole image: process peak"
                lines.setdefault(name, []).append((int(side), result["peak_bytes"] / _GIB))
    for name, points in lines.items():
        style = "s--" if "whole" in name else "o-"
        panel.plot(*zip(*points, strict=True), style, label=name)
    panel.set(xscale="log", yscale="log", xlabel="image side, px", ylabel="GiB")
    panel.set_xticks([int(s) for s in sides], [str(s) for s in sides])
    low, high = panel.get_ylim()
    ticks = [2.0**n for n in range(-2, 8) if low <= 2.0**n <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    panel.set_title("ResNet-50, 16 patches of 128 px of an image at a time", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
