"""Atomic writes of files and folders that survive a power cut."""

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
    """Computes the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Converts an `OSError` of the body to a `DiskError` that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror or first_line(error)}") from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside a file, and replaces the file by it after the body.

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
    """Writes a JSON file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Yields a temporary folder of the same name, and moves it to `final` after the body.

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
            # The inner folder has the usual mode; mkdtemp's would exclude other users.
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
    """Lists the temporary folders of `atomic_folder(final)` of killed or running processes."""
    return sorted(final.parent.glob(f"{_INCOMPLETE}{final.name}-*"))


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name another folder, or delete it first")
