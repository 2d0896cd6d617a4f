"""Unreadable examples: their error, the policies for them, and a run's list `bad_images.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import CheckpointError, DataError
from patchgd_jax.io.files import atomic_file
from patchgd_jax.io.text import csv_cell

BAD_IMAGES = "bad_images.csv"

Policy = Literal["raise", "substitute"]
OnBad = Callable[[int, str, str], object]
"""Called with index, description and reason of an example that cannot be read."""

_HEADER = ["index", "path", "reason"]


@dataclass(frozen=True)
class BadRecord:
    """An example that cannot be read."""

    index: int
    """In its source."""
    description: str
    """A path or name, from the source."""
    reason: str

    def __str__(self) -> str:
        # Most readers name the file themselves.
        name = "" if self.description in self.reason else f" ({self.description})"
        return f"example {self.index}{name}: {self.reason}"


class RecordError(DataError):
    """Unreadable examples stop the run.

    Args:
        message: the error's text.
        records: the examples; the last one stopped the run.
    """

    def __init__(self, message: str, records: tuple[BadRecord, ...] = ()) -> None:
        super().__init__(message)
        self.records = records


class BadTally:
    """Counts a run's unreadable examples, and stops the run when the policy demands it.

    Args:
        source: of the examples.
        policy: raise: the first one stops the run. substitute: more than `limit` do.
        limit: largest number of different unreadable examples.
        on_bad: called once for each, unless the policy is raise.
    """

    def __init__(self, source: ExampleSource, *, policy: Policy, limit: int, on_bad: OnBad) -> None:
        self._source = source
        self._policy = policy
        self._limit = limit
        self._on_bad = on_bad
        self._records: dict[int, BadRecord] = {}

    @property
    def tolerated(self) -> int:
        """Number of different unreadable examples that the policy tolerates."""
        return 0 if self._policy == "raise" else self._limit

    def take(self, bad: Iterable[tuple[int, str]]) -> None:
        """Counts examples, by index and reason each.

        Raises:
            RecordError: if the policy does not tolerate one of them.
        """
        for index, reason in bad:
            if index in self._records:
                continue
            record = BadRecord(index, self._source.describe(index), reason)
            self._records[index] = record
            if self._policy == "raise":
                raise RecordError(
                    f"{record}; repair it, or replace it by another with "
                    "--data.bad-images substitute",
                    (record,),
                )
            self._on_bad(index, record.description, reason)
            if len(self._records) > self._limit:
                raise self.error(
                    f"{len(self._records)} unreadable examples are more than data.bad_limit "
                    f"{self._limit}; repair them, or take them out of the data"
                )

    def error(self, message: str) -> RecordError:
        """Makes an error that lists the counted examples."""
        records = tuple(self._records.values())
        return RecordError("\n  ".join([f"{message}:", *map(str, records)]), records)


class BadImages:
    """A run's list of unreadable images, each once; its file is rewritten with every new one.

    Cells that a spreadsheet would compute as a formula begin with an apostrophe in the file.

    Args:
        folder: of the run; an existing list is continued.
        process: number of the process; each has its own file.

    Raises:
        CheckpointError: if an existing list is damaged.
    """

    def __init__(self, folder: str | Path, process: int = 0) -> None:
        name = Path(BAD_IMAGES)
        self.path = Path(folder) / (f"{name.stem}-{process}{name.suffix}" if process else name)
        # By index and path: training and validation images have indices of their own.
        self._records = {(r.index, r.description): r for r in self._read()}

    @property
    def records(self) -> tuple[BadRecord, ...]:
        """In the order in which they were found."""
        return tuple(self._records.values())

    def add(self, index: int, path: str, reason: str) -> None:
        """Adds an image, unless it is listed already.

        Args:
            index: in its source.
            path: the source's description of it.
            reason: why it cannot be read.

        Raises:
            DiskError: if the file cannot be written.
        """
        if (index, path) in self._records:
            return
        self._records[index, path] = BadRecord(index, path, reason)
        with (
            atomic_file(self.path) as partial,
            # Names of files need not be valid UTF-8.
            partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_HEADER)
            for record in self.records:
                cells = csv_cell(record.description), csv_cell(record.reason)
                writer.writerow([record.index, *cells])

    def _read(self) -> list[BadRecord]:
        try:
            text = self.path.read_bytes().decode(errors="surrogateescape")
            header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
            if header != _HEADER:
                raise ValueError(f"its first line is {','.join(header)}")
            # Without the apostrophe of `csv_cell`.
            rows = [[cell.removeprefix("'") for cell in row] for row in rows]
            return [BadRecord(int(index), path, reason) for index, path, reason in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise CheckpointError(
                f"cannot read {self.path}: {error}; delete it, it will be written anew"
            ) from error
