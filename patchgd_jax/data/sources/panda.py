"""The PANDA challenge's prostate biopsies, in Kaggle's layout.

`train.csv` lists 10,616 slides of two centres with their ISUP grades 0..5; `train_images/ID.tiff`
are pyramids of three levels. The challenge's metric is the quadratic weighted kappa.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from patchgd_jax.config import DataConfig, PandaConfig
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.sources.file_reader import FileReader
from patchgd_jax.data.tables.csv_table import read_rows, table_of_rows
from patchgd_jax.data.tables.image_paths import Problems
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import printable

BACKGROUND = 255
GRADES = ("0", "1", "2", "3", "4", "5")
PROVIDERS = ("karolinska", "radboud")

_COLUMNS = {"id": "image_id", "label": "isup_grade", "provider": "data_provider"}
_PAPER_SIDE = 4096


def read_panda(folder: str | Path, options: PandaConfig) -> ImageTable:
    """Reads the table of slides.

    Args:
        folder: contains train.csv and train_images.
        options: which slides to use; rows of others are ignored.

    Returns:
        The slides in the order of train.csv, with a stratum for each grade and centre.

    Raises:
        DataError: with the first ten reasons and their lines, if a file or column is missing, an
            id occurs twice, a grade or provider is unknown, a slide has no file, or the cleaned
            list names ids that are not in train.csv.
    """
    folder = Path(folder)
    table = folder / "train.csv"
    for path in (table, folder / "train_images"):
        if not path.exists():
            raise DataError(
                f"there is no {path}; data.panda names the folder with train.csv and train_images"
            )
    rows = read_rows(table, _COLUMNS, "PANDA's train.csv is needed unchanged")
    if options.cleaned_list is not None:
        wanted = _cleaned(Path(options.cleaned_list), {row.cells.get("id", "") for row in rows})
        rows = [row for row in rows if row.cells.get("id") in wanted]
    problems = Problems(f"cannot use {printable(str(table))}")
    for row in rows:
        provider = row.cells.get("provider", PROVIDERS[0])
        if provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            problems.add(row.line, f"the provider {printable(provider)!r} is none of {known}")
    problems.report()
    for row in rows:
        if row.cells:
            row.cells["path"] = f"train_images/{row.cells['id']}.tiff"
    images = table_of_rows(rows, table, folder, "single-label", class_names=GRADES)
    centre = np.array([PROVIDERS.index(row.cells["provider"]) for row in rows], np.int64)
    quirk = " reference level" if options.reference_level else ""
    return dataclasses.replace(
        images,
        strata=images.labels * len(PROVIDERS) + centre,
        background=BACKGROUND,
        fingerprint=images.fingerprint + quirk,
    )


def panda_reader(config: DataConfig, background: int) -> FileReader:
    """Makes the reader of slides, which resizes them by `panda_image`."""
    reference = config.panda_options.reference_level
    resize = partial(panda_image, reference=reference)
    # The reference level does not depend on the size, so a smaller image would save nothing.
    return FileReader(config, background, resize, scalable=not reference)


def choose_level(
    level_shapes: Sequence[tuple[int, int]], target_side: int, reference: bool = False
) -> int:
    """Chooses the pyramid level to shrink a slide from.

    Args:
        level_shapes: height and width in pixels of each level, the largest first.
        target_side: the longer side wanted, in pixels.
        reference: choose as the PatchGD paper's code: from the last level up while the next one's
            shorter side has at least 4096 px (or `target_side`, if that is more). For a usual
            slide this is the last level, enlarged.

    Returns:
        The level. Not `reference`: the smallest whose longer side has at least `target_side`
        pixels; 0 if there is none.
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
    source: RegionSource,
    size: tuple[int, int],
    background: int = BACKGROUND,
    *,
    reference: bool = False,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads a slide into a square, its longer side as long as the square's.

    The slide is shrunk by area averages; smaller ones keep their pixels. With `reference`, a level
    that is too small is enlarged (bilinear), as in the paper's code; but that code centres the
    slide, and swaps red and blue.

    Args:
        source: the slide, opened with 3 channels.
        size: height and width of the square in pixels, equal.
        background: uint8 value around the slide.
        reference: see `choose_level`.

    Returns:
        `uint8 [*size, 3]`, RGB, the slide at its top left; and the slide's height and width in it.

    Raises:
        ImageReadError: if a part of the file is damaged.
    """
    target = size[0]
    level = choose_level(source.level_shapes, target, reference=reference)
    rows, cols = source.level_shapes[level]
    if not reference or max(rows, cols) >= target:
        return read_resized(source, size, background, level)
    from PIL import Image

    height, width = (max(1, round(side * target / max(rows, cols))) for side in (rows, cols))
    small = Image.fromarray(source.read(0, 0, rows, cols, level))
    out = np.full((*size, 3), background, np.uint8)
    out[:height, :width] = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    return out, (height, width)


def _cleaned(path: Path, known: set[str]) -> set[str]:
    """Reads the ids in the first column of a cleaned list, with or without header `image_id`."""
    problems = Problems(f"cannot use the cleaned list {printable(str(path))}")
    ids: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                image_id = cells[0].strip() if cells else ""
                if not image_id or (not ids and image_id.lower() == _COLUMNS["id"]):
                    continue
                if image_id not in known:
                    problems.add(reader.line_num, f"{printable(image_id)!r} is not in train.csv")
                ids.add(image_id)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV file: {error}") from error
    if not ids:
        problems.add(None, "it names no slide")
    problems.report()
    return ids
