"""The PANDA challenge's prostate biopsies, in the layout that Kaggle gives them.

`train.csv` names 10,616 slides of two centres with their ISUP grades 0..5; `train_images/ID.tiff`
are pyramids of three levels. The challenge's metric, by which the best model is to be chosen, is
the quadratic weighted kappa.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patchgd_jax.config import PandaConfig
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.regions import RegionSource
from patchgd_jax.data.tables.image_paths import Problems
from patchgd_jax.data.tables.table import ImageTable, make_table
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import printable

BACKGROUND = 255
GRADES = ("0", "1", "2", "3", "4", "5")
PROVIDERS = ("karolinska", "radboud")

GRADE_OF_GLEASON = {
    "0+0": "0",
    "negative": "0",
    "3+3": "1",
    "3+4": "2",
    "4+3": "3",
    "4+4": "4",
    "3+5": "4",
    "5+3": "4",
    "4+5": "5",
    "5+4": "5",
    "5+5": "5",
}
"""The ISUP grade that follows from a Gleason score; the centres spell "no cancer" differently."""

_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")
_PAPER_SIDE = 4096


@dataclass(frozen=True, eq=False)
class PandaTable(ImageTable):
    """PANDA's slides; the labels are ISUP grades."""

    providers: tuple[str, ...]
    """The centre of each slide, of `PROVIDERS`."""
    disagreeing: tuple[int, ...]
    """Lines of train.csv whose grade does not follow from the Gleason score. The labels are known
    to be noisy, so these are kept; the grade counts."""


def read_panda(folder: str | Path, options: PandaConfig) -> PandaTable:
    """Reads the table of slides.

    Args:
        folder: the one that holds train.csv and train_images.
        options: which slides to use; rows of others are not looked at.

    Returns:
        The slides in the order of train.csv; without groups and splits, as PANDA names neither.
        Folds should hold like shares of `panda_strata`.

    Raises:
        DataError: with the first ten reasons and their lines, if a file or column is missing, an
            id occurs twice, a grade or provider is unknown, a slide has no file, or the cleaned
            list names ids that are not in train.csv.
    """
    folder = Path(folder)
    table = folder / "train.csv"
    if not table.is_file():
        raise DataError(
            f"there is no file {table}; data.panda names the folder that holds train.csv and "
            "train_images"
        )
    lines = list(_lines(table))
    wanted = None
    if options.cleaned_list is not None:
        wanted = _cleaned(Path(options.cleaned_list), {cells["image_id"] for _, cells in lines})
    files = _file_names(folder / "train_images")
    problems = Problems(f"cannot use {printable(str(table))}")
    first: dict[str, int] = {}
    used: list[tuple[int, dict[str, str]]] = []
    for line, cells in lines:
        image_id = cells["image_id"]
        if wanted is not None and image_id not in wanted:
            continue
        reasons = list(_reasons(cells, files))
        if image_id in first:
            reasons.append(f"{_shown(image_id)} is the slide of line {first[image_id]} again")
        first.setdefault(image_id, line)
        for reason in reasons:
            problems.add(line, reason)
        if not reasons:
            used.append((line, cells))
    if not first:
        problems.add(None, "it names no slide")
    elif not any(f"{image_id}.tiff" in files for image_id in first):
        problems.add(None, "none of its slides is there; is data.panda right?")
    problems.report()
    images = make_table(
        [folder / "train_images" / f"{cells['image_id']}.tiff" for _, cells in used],
        folder,
        np.array([int(cells["isup_grade"]) for _, cells in used], np.int64),
        GRADES,
        rows=[line for line, _ in used],
    )
    if options.reference_level:
        images = replace(images, fingerprint=f"{images.fingerprint} reference level")
    return PandaTable(
        **vars(images),
        providers=tuple(cells["data_provider"] for _, cells in used),
        disagreeing=tuple(
            line
            for line, cells in used
            if GRADE_OF_GLEASON.get(cells["gleason_score"]) != cells["isup_grade"]
        ),
    )


def panda_strata(table: PandaTable) -> np.ndarray:
    """What folds should hold like shares of: `int64 [n]`, a number for each grade and centre."""
    centre = np.array([PROVIDERS.index(provider) for provider in table.providers], np.int64)
    return table.labels * len(PROVIDERS) + centre


def choose_level(
    level_shapes: Sequence[tuple[int, int]], target_side: int, reference: bool = False
) -> int:
    """The pyramid level to shrink a slide from.

    Args:
        level_shapes: height and width in pixels of each level, the largest first.
        target_side: the longer side wanted, in pixels.
        reference: as the PatchGD paper's code chooses. It goes from the last level up as long as
            the shorter side has 4096 px (or `target_side`, if that is more), whatever size is
            wanted; so for a usual slide it takes the last level, and enlarges it.

    Returns:
        The level. Not `reference`: the smallest whose longer side has `target_side` pixels; 0 if
        none has.
    """
    if not reference:
        fitting = [i for i, shape in enumerate(level_shapes) if max(shape) >= target_side]
        return min(fitting, key=lambda i: max(level_shapes[i]), default=0)
    level = len(level_shapes) - 1
    for above in reversed(range(len(level_shapes))):
        if min(level_shapes[above]) < max(target_side, _PAPER_SIDE):
            break
        level = above
    return level


def panda_image(
    source: RegionSource, target: int, reference: bool = False
) -> tuple[np.ndarray, tuple[int, int]]:
    """A slide in a square, its longer side as long as the square's.

    Area averages shrink it; it keeps its pixels where level 0 is smaller than the square. With
    `reference`, what is too small is enlarged (bilinear), as the paper's code does; but that code
    puts the slide into the middle, and swaps red and blue.

    Args:
        source: the slide, opened with 3 channels and background 255.
        target: side of the square in pixels.
        reference: whether to choose the level as the paper's code does.

    Returns:
        `uint8 [target, target, 3]`, RGB, white around the slide at its top left; and the slide's
        height and width in it.

    Raises:
        ImageReadError: if a part of the file is damaged.
    """
    level = choose_level(source.level_shapes, target, reference=reference)
    rows, cols = source.level_shapes[level]
    if not reference or max(rows, cols) >= target:
        return read_resized(source, (target, target), BACKGROUND, level)
    from PIL import Image

    height, width = (max(1, round(side * target / max(rows, cols))) for side in (rows, cols))
    small = Image.fromarray(source.read(0, 0, rows, cols, level))
    out = np.full((target, target, 3), BACKGROUND, np.uint8)
    out[:height, :width] = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    return out, (height, width)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and cells of each row of train.csv."""
    rows = _csv_rows(path)
    _, header = next(rows, (1, []))
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has "
            f"{printable(', '.join(header)) or 'none'}. PANDA's train.csv is needed as it is"
        )
    for line, row in rows:
        cells = row + [""] * (len(header) - len(row))
        yield line, {name: cells[header.index(name)] for name in _COLUMNS}


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(row):
                    yield reader.line_num, [cell.strip() for cell in row]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV file: {error}") from error


def _cleaned(path: Path, known: set[str]) -> set[str]:
    """The ids of a cleaned list; it may have a header, `image_id`."""
    problems = Problems(f"cannot use the cleaned list {printable(str(path))}")
    ids = set()
    for number, (line, row) in enumerate(_csv_rows(path)):
        if number == 0 and row[0].lower() == "image_id":
            continue
        if row[0] not in known:
            problems.add(line, f"{_shown(row[0])} is not in train.csv")
        ids.add(row[0])
    if not ids:
        problems.add(None, "it names no slide")
    problems.report()
    return ids


def _file_names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(
            f"cannot read {folder}: {error.strerror}; data.panda names the folder that holds "
            "train.csv and train_images"
        ) from error


def _reasons(cells: dict[str, str], files: set[str]) -> Iterator[str]:
    """What is wrong with a row by itself."""
    if f"{cells['image_id']}.tiff" not in files:
        yield f"there is no file train_images/{printable(cells['image_id'])}.tiff"
    if cells["isup_grade"] not in GRADES:
        yield f"the grade {_shown(cells['isup_grade'])} is not in 0..5"
    if cells["data_provider"] not in PROVIDERS:
        yield f"the provider {_shown(cells['data_provider'])} is none of {', '.join(PROVIDERS)}"


def _shown(text: str) -> str:
    return repr(printable(text))
