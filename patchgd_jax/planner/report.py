"""Formats a plan as text, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.errors import ConfigError
from patchgd_jax.io.files import disk_errors
from patchgd_jax.planner.estimate import Estimator, Row
from patchgd_jax.planner.layers import LayerTable
from patchgd_jax.planner.measure import Calibration
from patchgd_jax.planner.methods import ABOUT, Method
from patchgd_jax.planner.size import show_size

_COLUMNS = (
    "parameters", "gradients", "optimizer", "activations", "input", "z", "workspace",
)  # fmt: skip


class PlanRow(NamedTuple):
    """Figures of a method in all tiers."""

    row: Row
    compiled: int | None = None
    """Bytes of the compiled programs, of training and evaluation."""
    measured: int | None = None
    """Peak bytes of real steps."""
    side: int | None = None
    """For `downscale`, the longer side in pixels."""

    def expected(self, calibration: Calibration) -> int:
        """Returns the best figure: measured, else from the compiled one, else the estimate."""
        if self.measured is not None:
            return self.measured
        return calibration.expected(self.row.total if self.compiled is None else self.compiled)

    def as_dict(self, budget: int | None, calibration: Calibration) -> dict[str, Any]:
        """Returns the figures for JSON; all sizes in bytes."""
        expected = self.expected(calibration)
        return {
            **self.row._asdict(),
            "compiled": self.compiled,
            "measured": self.measured,
            "side": self.side,
            "expected": expected,
            "fits": None if budget is None else expected <= budget,
            "changes": ABOUT[self.row.method],
        }


def method_lines(
    rows: Sequence[PlanRow],
    refused: Mapping[Method, str],
    budget: int | None,
    calibration: Calibration,
) -> list[str]:
    """Formats the method table."""
    tiers = [
        ("estimate", lambda r: r.row.total),
        ("compile", lambda r: r.compiled),
        ("profile", lambda r: r.measured),
    ]
    used = [(name, value) for name, value in tiers if any(value(r) is not None for r in rows)]
    heads = ["method", *_COLUMNS, *(name for name, _ in used)]
    if budget is not None:
        heads.append(f"fits {show_size(budget)}")
    cells = [[*heads, "what it changes"]]
    for plan in rows:
        name: str = plan.row.method
        if plan.side is not None:
            name += f" to {plan.side} px"
        line = [name, *(show_size(getattr(plan.row, column)) for column in _COLUMNS)]
        for _, value in used:
            size = value(plan)
            line.append("-" if size is None else show_size(size))
        if budget is not None:
            over = plan.expected(calibration) / budget
            line.append("yes" if over <= 1 else f"no ({over:.1f} x)")
        cells.append([*line, ABOUT[plan.row.method]])
    return [*_aligned(cells), *(f"{name}: not possible: {why}" for name, why in refused.items())]


def layer_lines(table: LayerTable) -> list[str]:
    """Formats the layer table, with its sums for training and for inference."""
    numbers = ("parameters", "parameter_bytes", "output_bytes", "kept_bytes", "flops")

    def line(name: str, output: str, figures: Iterable[int]) -> list[str]:
        count, *sizes, flops = figures
        return [name, output, f"{count:,}", *map(show_size, sizes), f"{flops / 1e6:,.1f}"]

    cells = [["layer", "output", "parameters", "bytes", "output bytes", "kept", "MFLOP"]]
    for layer in table.layers:
        if layer.parameters or layer.kept_bytes or layer.flops:
            output = " x ".join(map(str, layer.output))
            cells.append(line(layer.name, output, (getattr(layer, n) for n in numbers)))
    cells.append(line("sum", "", map(table.total, numbers)))
    # A backward pass costs two forward passes: a product for the gradient of each operand.
    forward = table.total("flops") / 1e6
    return [
        *_aligned(cells),
        f"training: {show_size(table.training_bytes)} of parameters, gradients and residuals, "
        f"{3 * forward:,.1f} MFLOP; inference: {show_size(table.inference_bytes)}, "
        f"{forward:,.1f} MFLOP",
    ]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def sweep(
    estimator: Estimator, methods: Sequence[Method], sides: Sequence[int]
) -> dict[Method, list[tuple[int, int]]]:
    """Estimates each method for square images of the sides that it and its settings allow."""
    lines: dict[Method, list[tuple[int, int]]] = {}
    for side in sides:
        for method in methods:
            with suppress(ConfigError):
                total = estimator.resized(side, side).row(method).total
                lines.setdefault(method, []).append((side, total))
    return lines


def _merged(
    lines: Mapping[Method, Sequence[tuple[int, int]]],
) -> list[tuple[list[Method], Sequence[tuple[int, int]]]]:
    """Merges the lines of methods that differ by less than 1 % everywhere."""
    groups: list[tuple[list[Method], Sequence[tuple[int, int]]]] = []
    for method, points in lines.items():
        for methods, others in groups:
            if len(points) == len(others) and np.allclose(points, others, rtol=0.01):
                methods.append(method)
                break
        else:
            groups.append(([method], points))
    return groups


def _short_size(size: float) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:g} {name}"


def plot_sweep(
    lines: Mapping[Method, Sequence[tuple[int, int]]], budget: int | None, path: Path
) -> None:
    """Draws memory against image side for every method, and the budget, into a PNG file.

    Raises `DiskError` if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for methods, points in _merged(lines):
        sides, sizes = zip(*points, strict=True)
        axis.plot(sides, sizes, "o-", label=", ".join(methods), markersize=4)
    if budget is not None:
        axis.axhline(budget, color="black", linestyle=":", label=f"budget {show_size(budget)}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda size, _: _short_size(size)))
    axis.set(xlabel="image side (px)", ylabel="estimated memory of a training step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with disk_errors(f"cannot write {path}"):
        figure.savefig(path, dpi=120)
