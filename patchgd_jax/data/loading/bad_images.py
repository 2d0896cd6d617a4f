"""The list of a run's unreadable images, `bad_images.csv` in its folder."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from patchgd_jax.data.loading.bad_records import BadRecord
from patchgd_jax.errors import CheckpointError
from patchgd_jax.io.files import atomic_file
from patchgd_jax.io.text import csv_cell

BAD_IMAGES = "bad_images.csv"

_HEADER = ["index", "path", "reason"]


class BadImages:
    """The unreadable images of a run, each once; the file is rewritten with every new one.

    In the file, a cell that a spreadsheet would take for a formula has an apostrophe in front.

    Args:
        folder: of the run; a list that is there already is continued.
        process: number of the process that lists what it cannot read; each has a file.

    Raises:
        CheckpointError: if that list is damaged.
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
            path: what the source calls it.
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
            return [BadRecord(int(i), _plain(path), _plain(why)) for i, path, why in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise CheckpointError(
                f"cannot read {self.path}: {error}; delete it, it will be written anew"
            ) from error


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") else cell
