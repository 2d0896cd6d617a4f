"""Files and folders that are written whole or not at all, also across a power cut."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.io.text import first_line

_INCOMPLETE = ".incomplete-"


def sha256(path: Path) -> str:
    """Hashes a file's content; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns an `OSError` into a `DiskError` that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror or first_line(error)}") from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Replaces a file by the one that the body writes to the yielded path, beside it.

    If the body raises, the new file is removed and the old one stays. A killed process leaves
    `.NAME.PID.tmp`. Raises `DiskError` if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(f"cannot write {path}"):
            yield partial
            fsync_path(partial)
            partial.replace(path)
            fsync_path(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file with `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Makes a folder of what the body writes to the yielded one, which has the same name.

    If the body raises, nothing is left. A killed process leaves its `unfinished_folders`. Raises
    `ConfigError` if `final` is not empty, also if it became so meanwhile, and `DiskError` if it
    cannot be written.
    """
    final = Path(final)
    work = None
    try:
        with disk_errors(f"cannot write {final}"):
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise DiskError(f"cannot write {final}: {final.parent} is a file") from None
            _refuse_full(final)
            # mkdtemp's own mode would keep everybody else out of the finished folder.
            outer = Path(tempfile.mkdtemp(prefix=f"{_INCOMPLETE}{final.name}-", dir=final.parent))
            work = outer / final.name
            work.mkdir()
            yield work
            for folder, _, names in os.walk(work):
                for name in (*names, "."):
                    fsync_path(Path(folder, name))
            try:
                work.rename(final)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    _refuse_full(final)
                raise
            fsync_path(final.parent)
    finally:
        if work is not None:
            shutil.rmtree(work.parent, ignore_errors=True)


def unfinished_folders(final: Path) -> list[Path]:
    """Lists what processes that were killed, or still run, have of `atomic_folder(final)`."""
    return sorted(final.parent.glob(f"{_INCOMPLETE}{final.name}-*"))


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name another folder, or delete it first")
