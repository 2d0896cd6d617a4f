"""Resolves untrusted paths of image files, and collects problems to report together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from patchgd_jax.errors import DataError
from patchgd_jax.io.text import has_control, printable

_MOST_PROBLEMS = 10


class Problems:
    """Collects problems, to report them together.

    Args:
        title: the first line of the error, without a colon.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._found: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, row: int | None, reason: str) -> None:
        """Adds a problem of line `row`, or of the whole file (None)."""
        self._found.append((row or 0, reason))

    def report(self) -> None:
        """Raises `DataError` with the first ten problems, if there are any."""
        if not self._found:
            return
        found = sorted(self._found, key=lambda problem: problem[0])
        lines = [f"line {row}: {reason}" if row else reason for row, reason in found]
        more = len(lines) - _MOST_PROBLEMS
        tail = [f"and {more} more"] if more > 0 else []
        raise DataError("\n  ".join([f"{self._title}:", *lines[:_MOST_PROBLEMS], *tail]))


class Found(NamedTuple):
    """An image file."""

    path: Path
    """Below the root, as named."""
    real: Path
    """With links resolved; equal for two names of one file."""


class ImageFinder:
    """Finds the files of untrusted paths.

    Args:
        root: base folder of the paths.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = root.resolve()

    def find(self, text: str) -> Found:
        """Finds the file of a path.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if the path is empty, leads out of the root, or is no file.
        """
        if not text:
            raise ValueError("the path is empty")
        if has_control(text):
            raise ValueError(f"the path {printable(text)!r} has control characters")
        path = self.root / text
        try:
            self.check_inside(path, text)
            if not path.exists():
                hint = "; write / between folders" if "\\" in text else ""
                raise FileNotFoundError(f"there is no file {text!r}{hint}")
            if not (path.is_file() or is_zarr(path)):
                raise ValueError(f"{text!r} is not a file")
            return Found(path, path.resolve())
        except (FileNotFoundError, ValueError):
            raise
        except (OSError, RuntimeError) as error:
            # A loop of links is a RuntimeError before Python 3.13.
            raise ValueError(f"{text!r} cannot be opened: {error}") from error

    def check_inside(self, path: Path, text: str) -> None:
        """Raises `ValueError` for a path that leads out of the root, itself or by a link."""
        if ".." in Path(text).parts:
            raise ValueError(f"{text!r} has .. in it; paths must stay inside {self.root}")
        if not path.resolve().is_relative_to(self._real_root):
            how = "is" if Path(text).is_absolute() else "is a link that leads"
            raise ValueError(f"{text!r} {how} outside of {self.root}")


def described_by(path: Path) -> Path:
    """Returns the file whose size and time identify an image: of a Zarr folder its metadata."""
    for name in ("zarr.json", ".zattrs", ".zgroup", ".zarray"):
        if (path / name).is_file():
            return path / name
    return path


def is_zarr(path: Path) -> bool:
    """Whether a path is a folder that holds a Zarr image."""
    return described_by(path) != path
