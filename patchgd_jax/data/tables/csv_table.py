"""Reads the labels of images from a CSV file."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchgd_jax.config import ColumnsConfig
from patchgd_jax.data.tables.image_paths import ImageFinder, Problems
from patchgd_jax.data.tables.labels import parse_labels, parse_number
from patchgd_jax.data.tables.table import SPLITS, ImageTable, make_table
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import has_control, printable


class Row(NamedTuple):
    """A row of a CSV file."""

    line: int
    """On which it begins; the header's is 1."""
    cells: dict[str, str]
    """Text by the caller's names of the columns."""
    problem: str = ""
    """Why the row has no cells; empty if it has."""


def read_csv(
    csv_file: str | Path,
    root: str | Path | None,
    columns: ColumnsConfig,
    task_name: str,
    *,
    class_names: Sequence[str] | None = None,
) -> ImageTable:
    """Reads paths and labels of images from a UTF-8 CSV file with `,`, `;` or tabs.

    The file has a header. No cell is evaluated as a formula. `labels.parse_labels` defines the
    format of labels.

    Args:
        csv_file: the file.
        root: base folder of the paths; None: the file's.
        columns: names of the columns.
        task_name: a name of `tasks.TASKS`.
        class_names: the classes in the order of their indices; None: found from the labels.

    Returns:
        The images in the file's order. Rows without any text are left out.

    Raises:
        DataError: for a file that cannot be used, with the first ten reasons and their lines:
            a column that is missing; a path that is empty, leads out of `root`, does not exist or
            occurs twice; an empty or invalid label, group, split or weight; control characters;
            labels that are all equal.
    """
    csv_file = Path(csv_file)
    wanted = {name: column for name, column in vars(columns).items() if column is not None}
    return table_of_rows(
        read_rows(csv_file, wanted),
        csv_file,
        csv_file.parent if root is None else Path(root),
        task_name,
        class_names=class_names,
    )


def read_rows(
    csv_file: Path, columns: Mapping[str, str], advice: str = "Name it with data.columns.{}"
) -> list[Row]:
    """Reads some columns of a CSV file.

    Args:
        csv_file: the file.
        columns: names of the columns, by the key of their cells in a `Row`.
        advice: remedy for a missing column, with `{}` for its key.

    Raises:
        DataError: if the file cannot be read, is damaged, or lacks a column.
    """
    header, lines = _header_and_rows(_read_text(csv_file), csv_file, set(columns.values()))
    place = {
        name: _column(csv_file, header, column, advice.format(name))
        for name, column in columns.items()
    }
    return [
        Row(line, {name: fields[column] for name, column in place.items()})
        if len(fields) == len(header)
        else Row(line, {}, f"it has {len(fields)} cells, but the header has {len(header)}")
        for line, fields in lines
    ]


def table_of_rows(
    rows: Iterable[Row],
    csv_file: Path,
    root: Path,
    task_name: str,
    *,
    class_names: Sequence[str] | None = None,
) -> ImageTable:
    """Finds the images of rows and parses their labels, as `read_csv` does.

    Args:
        rows: with the cells `path` and `label`, optionally `group`, `split` and `weight`; other
            cells are ignored.
        csv_file: the rows' file, for messages.
        root: base folder of the paths.
        task_name: see `read_csv`.
        class_names: see `read_csv`.

    Raises:
        DataError: as `read_csv`.
    """
    rows = list(rows)
    finder = ImageFinder(root)
    problems = Problems(f"cannot use the labels in {printable(str(csv_file))}")
    good: list[tuple[Row, Path]] = []
    labels: list[tuple[int, str]] = []
    named: dict[Path, Row] = {}
    absent = 0
    for row in rows:
        line, cells, _ = row
        if row.problem:
            problems.add(line, row.problem)
            continue
        reasons = _invalid_cells(cells)
        if not has_control(cells["label"]):
            # Also of rows with other faults, to report all faults at once.
            labels.append((line, cells["label"]))
        try:
            path, real = finder.find(cells["path"])
            first = named.setdefault(real, row)
            if first is row:
                good.append((row, path))
            else:
                how = "the same" if first.cells["label"] == cells["label"] else "another"
                reasons.append(
                    f"{cells['path']!r} is the image of line {first.line} again, with {how} label; "
                    "keep one"
                )
        except FileNotFoundError as error:
            absent += 1
            reasons.append(str(error))
        except ValueError as error:
            reasons.append(str(error))
        for reason in reasons:
            problems.add(line, reason)
    if not rows:
        raise DataError(f"{csv_file} has no rows below its header")
    if absent == len(rows):
        problems.add(None, f"none of its images exists; is data.root right? It is {root}")
    parsed = parse_labels([label for _, label in labels], task_name, class_names)
    for index, reason in parsed.problems:
        if index is not None:
            problems.add(labels[index][0], reason)
        elif not problems:
            problems.add(None, reason)

    def column(name: str) -> list[str] | None:
        return [row.cells[name] for row, _ in good] if name in rows[0].cells else None

    splits, weights = column("split"), None
    if not problems and (texts := column("weight")) is not None:
        weights = np.array(texts, np.float32)
        if not weights.any():
            problems.add(None, "all weights are 0; give an image a positive one")
    problems.report()
    return make_table(
        [path for _, path in good],
        root,
        parsed.labels,
        parsed.class_names,
        groups=column("group"),
        splits=None if splits is None else [split.lower() for split in splits],
        weights=weights,
        rows=[row.line for row, _ in good],
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (at byte {error.start}); save it as CSV UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} has NUL characters; save it as CSV UTF-8")
    if not text.strip():
        raise DataError(f"{path} is empty; it needs a header and a row for each image")
    return text


def _header_and_rows(
    text: str, path: Path, wanted: set[str]
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header, and the rows below it with their first lines."""

    def rows(delimiter: str) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                fields = [field.strip() for field in next(reader)]
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path} is damaged at line {line}: {error}") from error
            if any(fields):
                yield line, fields

    def columns_found(delimiter: str) -> tuple[int, int]:
        with contextlib.suppress(DataError):
            _, names = next(rows(delimiter), (0, []))
            return len(wanted.intersection(names)), len(names)
        return -1, 0

    reader = rows(max(",;\t", key=columns_found))
    return next(reader, (0, []))[1], reader


def _column(path: Path, header: Sequence[str], column: str, advice: str) -> int:
    if header.count(column) == 1:
        return header.index(column)
    if header.count(column) > 1:
        raise DataError(f"{path} has several columns {column!r}; rename all but one")
    near = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
    names = ", ".join(map(printable, header[:20]))
    hint = f"did you mean {printable(near[0])!r}?" if near else f"it has {names}."
    raise DataError(f"{path} has no column {column!r}; {hint} {advice}")


def _invalid_cells(cells: dict[str, str]) -> list[str]:
    """Reasons against a row's cells, except for its file and the format of its label."""
    reasons = [
        f"the {name} {printable(value)!r} has control characters"
        for name, value in cells.items()
        if name != "path" and has_control(value)
    ]
    if cells.get("group") == "":
        reasons.append("the group is empty; give an image without others one of its own")
    split = cells.get("split")
    if split is not None and split.lower() not in SPLITS:
        reasons.append(f"the split {printable(split)!r} is none of {', '.join(SPLITS)}")
    weight = cells.get("weight")
    if weight is not None and ((number := parse_number(weight)) is None or number < 0):
        reasons.append(f"the weight {printable(weight)!r} is no number of at least 0")
    return reasons
