"""A plan as text, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.planner.formula import Formula, Row
from patchgd_jax.planner.layers import LayerTable
from patchgd_jax.planner.measure import Calibration
from patchgd_jax.planner.methods import ABOUT, Method
from patchgd_jax.planner.size import show_size

_COLUMNS = (
    "parameters", "gradients", "optimizer", "activations", "input", "z", "workspace",
)  # fmt: skip


class PlanRow(NamedTuple):
    """A method in all tiers."""

    row: Row
    compiled: int | None = None
    """Bytes by XLA, of training and evaluation."""
    measured: int | None = None
    """Bytes of a real step."""
    side: int | None = None
    """For `downscale`, the longer side in pixels."""

    def expected(self, calibration: Calibration) -> int:
        """The best figure that there is: measured, or from XLA's or the formula's."""
        if self.measured is not None:
            return self.measured
        return calibration.expected(self.row.total if self.compiled is None else self.compiled)

    def as_dict(self, budget: int | None, calibration: Calibration) -> dict[str, Any]:
        """For JSON; all sizes in bytes."""
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
    """The method table."""
    tiers = [
        ("formula", lambda r: r.row.total),
        ("XLA", lambda r: r.compiled),
        ("measured", lambda r: r.measured),
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
    """The layer table, and its sums for training and for inference."""
    cells = [["layer", "output", "parameters", "bytes", "output bytes", "kept", "MFLOP"]]
    for layer in table.layers:
        if layer.parameters or layer.kept_bytes or layer.flops:
            cells.append(
                [
                    layer.name,
                    " x ".join(map(str, layer.output)),
                    f"{layer.parameters:,}",
                    show_size(layer.parameter_bytes),
                    show_size(layer.output_bytes),
                    show_size(layer.kept_bytes),
                    f"{layer.flops / 1e6:,.1f}",
                ]
            )
    cells.append(
        [
            "sum",
            "",
            f"{table.total('parameters'):,}",
            show_size(table.total("parameter_bytes")),
            show_size(table.total("output_bytes")),
            show_size(table.total("kept_bytes")),
            f"{table.total('flops') / 1e6:,.1f}",
        ]
    )
    return [
        *_aligned(cells),
        f"training: {show_size(table.training_bytes)} of parameters, gradients and what is kept, "
        f"{table.training_flops / 1e6:,.1f} MFLOP; inference: "
        f"{show_size(table.inference_bytes)}, {table.total('flops') / 1e6:,.1f} MFLOP",
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
    formula: Formula, methods: Sequence[Method], sides: Sequence[int]
) -> dict[Method, list[tuple[int, int]]]:
    """Bytes by formula of each method against the side of a square image.

    Sides that a method or its settings do not allow are left out.
    """
    lines: dict[Method, list[tuple[int, int]]] = {method: [] for method in methods}
    for side in sides:
        try:
            resized = formula.resized(side, side)
        except ConfigError:
            continue
        for method in methods:
            try:
                lines[method].append((side, resized.row(method).total))
            except ConfigError:
                continue
    return {method: points for method, points in lines.items() if points}


def _told_apart(
    lines: Mapping[Method, Sequence[tuple[int, int]]],
) -> list[tuple[list[Method], Sequence[tuple[int, int]]]]:
    """The lines, with methods that differ by less than a hundredth everywhere as one."""
    groups: list[tuple[list[Method], Sequence[tuple[int, int]]]] = []
    for method, points in lines.items():
        for methods, others in groups:
            if len(points) == len(others) and all(
                side == other and abs(size / known - 1) < 0.01
                for (side, size), (other, known) in zip(points, others, strict=True)
            ):
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
    """Draws memory against the image's side for every method, and the budget, into a PNG file.

    Raises:
        DiskError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for methods, points in _told_apart(lines):
        sides, sizes = zip(*points, strict=True)
        axis.plot(sides, sizes, "o-", label=", ".join(methods), markersize=4)
    if budget is not None:
        axis.axhline(budget, color="black", linestyle=":", label=f"budget {show_size(budget)}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda size, _: _short_size(size)))
    axis.set(xlabel="image side (px)", ylabel="memory of a training step, by formula")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)
