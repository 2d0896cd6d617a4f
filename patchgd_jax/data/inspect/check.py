"""Checks the image files of a table before a run: `patchgd-jax data check`."""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.regions import is_flat
from patchgd_jax.data.images.safe_image import ImageReadError, read_header, read_image
from patchgd_jax.data.sources.channels import ADVICE, common_channels
from patchgd_jax.data.tables.splits import Split, absent_labels
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.io.files import atomic_file, sha256
from patchgd_jax.io.text import csv_cell, printable

_LINES = 20
"""Largest number of lines of a part of the report."""
_SWEEP = 2048
"""Side in pixels of the regions to decode."""

OpenRegions = Callable[..., RegionSource]
"""Opens an image by regions, from its path and `channels`."""


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


def check_images(
    table: ImageTable,
    splits: Split,
    *,
    channels: Literal[1, 3] | None,
    open_image: OpenRegions,
    decode: bool = False,
    threads: int = 4,
    on_image: Callable[[int], object] = lambda done: None,
) -> CheckReport:
    """Opens every file of a table, counts sizes and labels, and finds copies and leaks.

    Problems are unreadable files, the same content (by SHA-256) under different labels or in
    different splits, groups in different splits, and grey images among mostly coloured ones, or
    the reverse.

    Args:
        table: the images.
        splits: `int [m]` indices of each split's images, as of `split_table`.
        channels: the run's channels, with which grey and coloured images may be mixed. None: must
            be the same for all images.
        open_image: `open_regions`, or another reader of the files that are not `is_flat`.
        decode: decode all pixels, which finds any damage; otherwise only headers are read.
        threads: number of files to examine at once; with `decode` each may need a whole image of
            memory.
        on_image: called with the number of opened files.
    """
    home = {int(index): name for name, indices in splits.items() for index in indices}
    with ThreadPoolExecutor(threads) as pool:
        try:
            facts: list[_Facts | str] = []
            for found in pool.map(lambda p: _examine(p, open_image, decode), table.paths):
                facts.append(found)
                on_image(len(facts))
            good = [index for index, found in enumerate(facts) if isinstance(found, _Facts)]
            copies = _copies(table, good, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    problems = [(index, found) for index, found in enumerate(facts) if isinstance(found, str)]
    problems += _torn_groups(table, home)
    if channels is None:
        problems += _other_channels(facts)
    harmless = []
    for first, *others in copies:
        for index in others:
            reasons = _copy_problems(table, home, first, index)
            problems += [(index, reason) for reason in reasons]
            if not reasons:
                harmless.append(f"{table.paths[index].name} = {table.paths[first].name}")
    known = [found for found in facts if isinstance(found, _Facts)]
    notes = [*absent_labels(table, splits), *_channel_notes(known, channels)]
    if harmless:
        more = ", ..." if len(harmless) > 3 else ""
        examples = printable(", ".join(harmless[:3]))
        notes.append(f"{len(harmless)} images are copies of others: {examples}{more}")
    sides = {"height": [f.height for f in known], "width": [f.width for f in known]}
    return CheckReport(
        images={name: len(indices) for name, indices in splits.items()},
        labels={name: _label_counts(table, indices) for name, indices in splits.items()},
        sizes={
            side: (min(values), float(np.median(values)), max(values))
            for side, values in sides.items()
            if values
        },
        longer_sides=_by_power_of_two(max(found.height, found.width) for found in known),
        formats=dict(Counter(found.format for found in known).most_common()),
        decoded=decode,
        problems=tuple(
            Problem(table.rows[index], str(table.paths[index]), reason)
            for index, reason in sorted(problems, key=lambda problem: problem[0])
        ),
        notes=tuple(notes),
    )


class _Facts(NamedTuple):
    height: int
    width: int
    channels: int
    """1 or 3, of the file."""
    format: str


def _examine(path: Path, open_image: OpenRegions, decode: bool) -> _Facts | str:
    """Facts about a file, or the reason why it cannot be used."""
    try:
        if is_flat(path):
            header = read_header(path)
            if decode:
                read_image(path, channels=header.channels)
            return _Facts(header.height, header.width, header.channels, header.format)
        with closing(open_image(path, channels=None)) as source:
            for level, (height, width) in enumerate(source.level_shapes if decode else ()):
                for y, x in itertools.product(range(0, height, _SWEEP), range(0, width, _SWEEP)):
                    source.read(y, x, min(_SWEEP, height - y), min(_SWEEP, width - x), level)
            return _Facts(*source.level_shapes[0], source.channels, "regions")
    except ImageReadError as error:
        return error.reason


def _copies(table: ImageTable, indices: Sequence[int], pool: ThreadPoolExecutor) -> list[list[int]]:
    """Indices of images with the same content, in sets of two or more, increasing."""
    by_size: dict[int, list[int]] = {}
    for index in indices:
        if table.paths[index].is_file():
            by_size.setdefault(table.paths[index].stat().st_size, []).append(index)
    candidates = [index for same in by_size.values() if len(same) > 1 for index in same]
    by_content: dict[str, list[int]] = {}
    digests = pool.map(lambda index: sha256(table.paths[index]), candidates)
    for index, digest in zip(candidates, digests, strict=True):
        by_content.setdefault(digest, []).append(index)
    return [same for same in by_content.values() if len(same) > 1]


def _copy_problems(table: ImageTable, home: Mapping[int, str], first: int, index: int) -> list[str]:
    other = f"the content of {printable(table.paths[first].name)}"
    if table.rows[first]:
        other += f" (line {table.rows[first]})"
    reasons = []
    if not np.array_equal(table.labels[first], table.labels[index]):
        labels = f"{_label(table, index)} here and {_label(table, first)} there"
        reasons.append(f"{other} under another label: {labels}")
    if home.get(first) != home.get(index):
        reasons.append(f"{other}, which is in the split {home.get(first)}, is in {home.get(index)}")
    return reasons


def _torn_groups(table: ImageTable, home: Mapping[int, str]) -> list[tuple[int, str]]:
    """The first image of a group in each of its splits except the first."""
    seen: dict[str, list[str]] = {}
    problems = []
    for index, group in enumerate(table.groups or ()):
        splits, split = seen.setdefault(group, []), home.get(index, "none")
        if split not in splits:
            if splits:
                both = f"the splits {splits[0]} and {split}"
                problems.append((index, f"group {printable(group)!r} is in {both}"))
            splits.append(split)
    return problems


def _label(table: ImageTable, index: int) -> str:
    label = table.labels[index]
    if table.labels.ndim == 2:
        names = [name for name, has in zip(table.class_names, label, strict=True) if has > 0.5]
        return printable(";".join(names) or "none")
    return printable(table.class_names[label]) if table.class_names else f"{label:g}"


def _label_counts(table: ImageTable, indices: np.ndarray) -> dict[str, float]:
    labels = table.labels[indices]
    if not table.class_names:
        if not len(labels):
            return {}
        mean = float(labels.mean(dtype=np.float64))
        return {"min": float(labels.min()), "mean": mean, "max": float(labels.max())}
    if labels.ndim == 2:
        counts = (labels > 0.5).sum(0)
    else:
        counts = np.bincount(labels, minlength=len(table.class_names))
    return dict(zip(table.class_names, counts.tolist(), strict=True))


def _by_power_of_two(sides: Iterable[int]) -> dict[str, int]:
    powers = Counter(int(math.log2(side)) for side in sides)
    return {f"{2**power}-{2 ** (power + 1) - 1} px": powers[power] for power in sorted(powers)}


def _other_channels(facts: Sequence[_Facts | str]) -> list[tuple[int, str]]:
    channels = common_channels([f.channels if isinstance(f, _Facts) else None for f in facts])
    most, rare = channels.kinds
    return [(index, f"it is {rare}, most are {most}; {ADVICE}") for index in channels.others]


def _channel_notes(known: Sequence[_Facts], channels: int | None) -> list[str]:
    grey = sum(found.channels == 1 for found in known)
    colour = sum(found.channels == 3 for found in known)
    if channels is None and known and not (grey and colour):
        return [f"all images are {'in colour' if colour else 'grey'}, and are read so"]
    if channels == 1 and colour:
        return [f"{colour} of {len(known)} images are coloured; data.channels 1 makes them grey"]
    if channels == 3 and grey and colour:
        return [f"{grey} of {len(known)} images are grey, the others coloured"]
    if channels == 3 and grey:
        return ["all images are grey; data.channels 1 needs a third of the memory"]
    return []
