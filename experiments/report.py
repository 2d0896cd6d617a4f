"""The results of an experiment as a CSV file, a Markdown table, JSON and a picture."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from collect import Result, Summary, summarise

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from record import record

Figure = Callable[[Sequence[Summary], Path], None]
"""Draws the summaries into a PNG file."""

STEP_MEMORY = "memory of the compiled training step (by XLA), MiB"

_COLUMNS: Mapping[str, Callable[[Summary], str | None]] = {
    "accuracy, % [95 %]": lambda s: _accuracy(s),
    "kappa": lambda s: _number(s.quadratic_weighted_kappa, "{:.3f}"),
    "step, MiB": lambda s: _number(s.step_memory_mib, "{:.1f}"),
    "peak, MiB": lambda s: _number(s.peak_memory_mib, "{:.0f}"),
    "time, s": lambda s: _number(s.seconds, "{:.0f}"),
    "images/s": lambda s: _number(s.images_per_s, "{:.3g}"),
    "images": lambda s: _number(s.images, "{:.0f}"),
    "seeds": lambda s: str(s.seeds),
    "failed": lambda s: "; ".join(reason[:120] for reason in s.reasons) or None,
}
"""Of the Markdown table, after the label and the row's own; one that no row has is left out."""

_NOTE = (
    "Accuracy: mean over seeds at the end of training, and its 95 % bootstrap interval over seeds "
    "and validation images. Step: memory of the compiled training step by XLA. Peak: of the whole "
    "process on the CPU, libraries included; else of the device. Time: of training with its "
    "evaluations, without compiling."
)


def write_report(
    name: str, scale: str, results: Sequence[Result], figure: Figure, folder: Path
) -> str:
    """Writes `NAME.json`, `.csv`, `.md` and `.png`.

    Args:
        name: of the experiment.
        scale: it was run at.
        results: of its runs.
        figure: draws the picture.
        folder: of the files.

    Returns:
        The Markdown table.
    """
    summaries = summarise(results)
    # First, because it says whether there are changes that no commit has.
    record(
        name,
        {
            "scale": scale,
            "rows": [asdict(summary) for summary in summaries],
            "runs": [asdict(result) for result in results],
        },
        folder,
    )
    write_csv(results, folder / f"{name}.csv")
    table = markdown(summaries)
    text = f"# {name}, scale {scale}\n\n{table}\n\n{_NOTE}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    figure(summaries, folder / f"{name}.png")
    return table


def write_csv(results: Sequence[Result], path: Path) -> None:
    """A line for each run; the rows' own columns come after label and seed."""
    own = list(dict.fromkeys(column for result in results for column in result.columns))
    lines = []
    for result in results:
        values = asdict(result)
        values.update(values.pop("columns"))
        lines.append(values)
    rest = [name for name in lines[0] if name not in ("label", "seed", *own)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["label", "seed", *own, *rest], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def markdown(summaries: Sequence[Summary]) -> str:
    """The table, a line for each row of the experiment."""
    own = list(dict.fromkeys(column for summary in summaries for column in summary.columns))
    cells = [
        [
            summary.label,
            *(str(summary.columns.get(name, "")) for name in own),
            *(show(summary) for show in _COLUMNS.values()),
        ]
        for summary in summaries
    ]
    header = ["", *own, *_COLUMNS]
    used = [i for i in range(len(header)) if any(line[i] is not None for line in cells)]
    lines = [[header[i] for i in used], ["---"] * len(used)]
    lines += [[(line[i] or "").replace("|", "\\|") for i in used] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _accuracy(summary: Summary) -> str | None:
    if summary.accuracy is None or summary.low is None or summary.high is None:
        return None
    mean, low, high = (100 * x for x in (summary.accuracy, summary.low, summary.high))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def accuracy_against_memory(summaries: Sequence[Summary], path: Path) -> None:
    """Every row as a point with the interval of its accuracy."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = [
        (summary, summary.step_memory_mib, 100 * summary.accuracy)
        for summary in summaries
        if summary.accuracy is not None and summary.step_memory_mib is not None
    ]
    by_memory = sorted(points, key=lambda point: point[1])
    for number, (summary, memory, accuracy) in enumerate(points):
        above = by_memory.index((summary, memory, accuracy)) % 2
        axes.errorbar(
            memory,
            accuracy,
            yerr=_errors([summary]),
            fmt=_MARKERS[number // 10 % len(_MARKERS)],
            color=f"C{number % 10}",
            capsize=3,
            label=summary.label,
        )
        axes.annotate(
            summary.label,
            (memory, accuracy),
            # Neighbours in memory may be so in accuracy as well: not all on one side.
            xytext=(6, 4 if above else -11),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xscale="log", xlabel=STEP_MEMORY, ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    if points:
        memories = [memory for _, memory, _ in points]
        # Room for the names, which stand to the right of their points.
        axes.set_xlim(min(memories) / 1.5, max(memories) * 2)
        _plain_ticks(axes.xaxis, axes.get_xlim())
        figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def accuracy_intervals(summaries: Sequence[Summary], path: Path) -> None:
    """A line for each row: its accuracy with the interval, and the memory of its step."""
    plt = _pyplot()
    known = [summary for summary in summaries if summary.accuracy is not None][::-1]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(known)), layout="constrained")
    places = range(len(known))
    axes.errorbar(
        [100 * (summary.accuracy or 0) for summary in known],
        places,
        xerr=_errors(known),
        fmt="o",
        capsize=3,
    )
    axes.set_yticks(places, [summary.label for summary in known])
    memory = axes.secondary_yaxis("right")
    memory.set_yticks(
        places,
        [
            "" if summary.step_memory_mib is None else f"{summary.step_memory_mib:.1f}"
            for summary in known
        ],
    )
    memory.set_ylabel("step, MiB (by XLA)")
    axes.set_xlabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(x: str, by: str, panels: Mapping[str, str], xlabel: str) -> Figure:
    """A figure with a line for each value of a column, over another column.

    Args:
        x: column on the horizontal axis.
        by: column whose values have a line each.
        panels: figures of `Summary` and what their axes are called; a panel for each.
        xlabel: what the horizontal axis is called.
    """

    def draw(summaries: Sequence[Summary], path: Path) -> None:
        plt = _pyplot()
        figure, row = plt.subplots(
            1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for axes, (name, label) in zip(row[0], panels.items(), strict=True):
            known = [s for s in summaries if getattr(s, name) is not None]
            for number, value in enumerate(dict.fromkeys(s.columns[by] for s in known)):
                line = sorted(
                    (s for s in known if s.columns[by] == value), key=lambda s: s.columns[x]
                )
                scale = 100 if name == "accuracy" else 1
                axes.errorbar(
                    [s.columns[x] for s in line],
                    [scale * getattr(s, name) for s in line],
                    yerr=_errors(line) if name == "accuracy" else None,
                    fmt=f"{_MARKERS[number % len(_MARKERS)]}-",
                    capsize=3,
                    label=str(value),
                )
            axes.set(xscale="log", xlabel=xlabel, ylabel=label)
            if name != "accuracy":
                axes.set_yscale("log")
                _plain_ticks(axes.yaxis, axes.get_ylim())
            sizes = sorted({s.columns[x] for s in known})
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        lines, names = row[0][0].get_legend_handles_labels()
        if lines:
            figure.legend(lines, names, loc="outside right upper", fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    return draw


_MARKERS = "osD^vP*X"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _errors(summaries: Sequence[Summary]) -> list[list[float]]:
    """Distances from the mean to both ends of the interval, in per cent."""
    below = [100 * max(0.0, (s.accuracy or 0) - (s.low or 0)) for s in summaries]
    above = [100 * max(0.0, (s.high or 0) - (s.accuracy or 0)) for s in summaries]
    return [below, above]


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks at powers of two as plain numbers: a decade is too far apart for most figures."""
    low, high = limits
    ticks = [2.0**n for n in range(-10, 40) if low <= 2.0**n <= high]
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
