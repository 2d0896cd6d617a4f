"""Folders that are complete or not there, also after a power cut."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchgd_jax.errors import DiskError
from patchgd_jax.io.files import fsync_path

_PREFIX = ".incomplete-"


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Encloses the making of a folder under another name, beside its place.

    Args:
        final: the folder to make; it may exist if it is empty.

    Yields:
        An empty folder. It becomes `final` at the end, or is removed if anything raises; a
        killed process leaves it, under its own name.

    Raises:
        FileExistsError: if `final` is not empty, or became so meanwhile.
        DiskError: if anything cannot be written.
    """
    work = None
    try:
        _make_parents(final)
        _refuse_full(final)
        # mkdtemp's own mode would keep everybody else out of the finished folder.
        outer = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{final.name}-", dir=final.parent))
        work = outer / final.name
        work.mkdir()
        yield work
        for folder, _, names in os.walk(work):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        try:
            work.rename(final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                _refuse_full(final)
            raise
        fsync_path(final.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise DiskError(f"cannot write {final}: {error}; nothing was left there") from error
    finally:
        if work is not None:
            shutil.rmtree(work.parent, ignore_errors=True)


def leftovers(final: Path) -> list[Path]:
    """Unfinished folders beside `final`, of processes that were killed or still run."""
    return sorted(final.parent.glob(f"{_PREFIX}{final.name}-*"))


def _make_parents(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder.parent)) from error


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "there is something already", str(folder))
