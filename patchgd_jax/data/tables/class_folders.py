"""Reads a table of images from a folder with a subfolder for each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from patchgd_jax.data.images.regions import SLIDE_SUFFIXES
from patchgd_jax.data.tables.image_paths import ImageFinder, Problems
from patchgd_jax.data.tables.labels import natural_key
from patchgd_jax.data.tables.table import ImageTable, make_table
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import has_control, printable

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".btf", ".tf8", ".webp", ".bmp",
    ".svs", ".ndpi", ".npy", ".zarr", *SLIDE_SUFFIXES,
))
"""Lower-case suffixes of the files to read. A folder that ends in .zarr is one image."""

_OTHER_IMAGES = frozenset((
    ".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".psd", ".nd2",
    ".lif",
))
# fmt: on


def read_class_folders(root: str | Path) -> ImageTable:
    """Reads a folder with a subfolder of images, of any depth, for each class.

    Classes and images are in natural order of their names (`a2` before `a10`). Hidden files and
    folders are left out, and files that are not images.

    Args:
        root: the folder.

    Returns:
        A table for the task single-label.

    Raises:
        DataError: with the first ten reasons: fewer than two class folders, one without images, an
            image outside the class folders or of an unsupported format, a link out of `root`, a
            name with control characters.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; data.root must hold a folder for each class")
    problems, finder = Problems(f"cannot use the class folders in {root}"), ImageFinder(root)
    names: list[str] = []
    paths: list[Path] = []
    labels: list[int] = []
    seen: dict[Path, str] = {}
    for entry in _visible(root):
        if not entry.is_dir() or entry.suffix.lower() == ".zarr":
            if entry.suffix.lower() in IMAGE_SUFFIXES | _OTHER_IMAGES:
                problems.add(None, f"{printable(entry.name)!r} is in no class folder")
            continue
        found = list(_images_below(entry, finder, problems, seen, frozenset()))
        if not found:
            problems.add(None, f"the class folder {printable(entry.name)!r} holds no image")
        labels += [len(names)] * len(found)
        paths += found
        names.append(entry.name)
    if len(names) < 2:
        problems.add(None, f"it holds {len(names)} class folders; at least two are needed")
    problems.report()
    return make_table(paths, root, np.array(labels, np.int64), names)


def _visible(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entries, key=lambda entry: natural_key(entry.name))


def _images_below(
    folder: Path,
    finder: ImageFinder,
    problems: Problems,
    seen: dict[Path, str],
    above: frozenset[Path],
) -> Iterator[Path]:
    """Yields the images in a folder and its subfolders."""
    name = folder.relative_to(finder.root).as_posix()
    try:
        if has_control(folder.name):
            raise ValueError(f"the name {printable(name)!r} has control characters")
        finder.check_inside(folder, name)
        real = folder.resolve()
        if real in above:
            raise ValueError(f"{name!r} is a link to a folder above it")
        entries = _visible(folder)
    except (OSError, RuntimeError, ValueError) as error:
        problems.add(None, printable(str(error)))
        return
    for entry in entries:
        name, suffix = entry.relative_to(finder.root).as_posix(), entry.suffix.lower()
        if has_control(entry.name):
            problems.add(None, f"the name {printable(name)!r} has control characters")
        elif entry.is_dir() and suffix != ".zarr":
            yield from _images_below(entry, finder, problems, seen, above | {real})
        elif suffix in IMAGE_SUFFIXES:
            try:
                found = finder.find(name)
                if seen.setdefault(found.real, name) != name:
                    raise ValueError(f"{name!r} is a link to the image {seen[found.real]!r}")
                yield found.path
            except (OSError, ValueError) as error:
                problems.add(None, str(error))
        elif suffix in _OTHER_IMAGES:
            problems.add(None, f"{name!r} has an unsupported format; convert or remove it")
