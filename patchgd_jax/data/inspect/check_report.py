"""The report of `patchgd-jax data check`, as text, as JSON and as a list of bad images."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from patchgd_jax.io.files import atomic_file
from patchgd_jax.io.text import csv_cell, printable

_LINES = 20


class Problem(NamedTuple):
    """A defect of an image."""

    row: int
    """Line of the CSV file, or 0."""
    path: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """Findings in the image files of a table."""

    images: dict[str, int]
    """Number of images of each split."""
    labels: dict[str, dict[str, float]]
    """By split the number of images of each class; for regression min, mean and max."""
    sizes: dict[str, tuple[int, float, int]]
    """`height` and `width` of readable files: smallest, median and largest, in pixels."""
    longer_sides: dict[str, int]
    """Number of images by powers of two of their longer side, such as `512-1023 px`."""
    formats: dict[str, int]
    """Number of images by file format; `regions` for those read by regions."""
    decoded: bool
    """Whether all pixels were decoded, or only the headers read."""
    problems: tuple[Problem, ...]
    """Defects of the data, in the order of the table."""
    notes: tuple[str, ...]
    """Remarks."""

    def to_dict(self) -> dict[str, Any]:
        """Converts the report to JSON's types."""
        return {
            **asdict(self),
            "sizes": {side: list(values) for side, values in self.sizes.items()},
            "problems": [problem._asdict() for problem in self.problems],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Formats the report as lines that are safe to print, with the first twenty problems."""
        total = sum(self.images.values())
        counts = ", ".join(f"{count} {name}" for name, count in self.images.items())
        lines = [f"{total} images: {counts}", *_columns(self.labels)]
        for side, (low, middle, high) in self.sizes.items():
            lines.append(f"{side}: {low} to {high} px, median {middle:g}")
        for name, values in (("longer side", self.longer_sides), ("format", self.formats)):
            if values:
                lines.append(f"{name}: " + ", ".join(f"{n} of {key}" for key, n in values.items()))
        lines += [f"note: {note}" for note in self.notes]
        for row, path, reason in self.problems[:_LINES]:
            where = f"line {row}, " if row else ""
            lines.append(f"problem: {where}{printable(path)}: {reason}")
        if len(self.problems) > _LINES:
            lines.append(f"and {len(self.problems) - _LINES} more problems")
        what = "decoded" if self.decoded else "looked at the header of"
        found = len({problem.path for problem in self.problems})
        lines.append(f"{what} {total} images: {found or 'none'} with a problem")
        return "\n".join(lines)


def _columns(labels: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Formats a table with a column for each split and a line for each class."""
    splits = [name for name in labels if labels[name]]
    names = list(dict.fromkeys(name for split in splits for name in labels[split]))
    rows = [["", *splits]]
    for name in names[:_LINES]:
        rows.append([printable(name), *(f"{labels[split].get(name, 0):g}" for split in splits)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return [*lines, f"and {len(names) - _LINES} more classes"] if len(names) > _LINES else lines


def write_bad_list(path: str | Path, problems: Iterable[Problem]) -> None:
    """Writes problems atomically to a CSV file with the columns row, path and reason.

    Cells that a spreadsheet would compute begin with `'`.

    Raises:
        DiskError: if it cannot be written.
    """
    with (
        atomic_file(path) as partial,
        partial.open("w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Problem._fields)
        for row, name, reason in problems:
            writer.writerow([row or "", csv_cell(printable(name)), csv_cell(printable(reason))])
