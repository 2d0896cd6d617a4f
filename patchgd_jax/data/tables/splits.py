"""Divides the images of a table into training, validation and test."""

from __future__ import annotations

import numpy as np

from patchgd_jax.config import SplitConfig
from patchgd_jax.data.tables.table import SPLITS, ImageTable
from patchgd_jax.errors import DataError

_LISTED = 5

Split = dict[str, np.ndarray]
"""Indices of `train`, `validation` and `test` (may be empty): `int64 [m]`, increasing."""


def split_table(table: ImageTable, config: SplitConfig) -> Split:
    """Divides the images by the table's own splits, or by folds.

    Folds are stratified by class and keep groups together. They depend on the paths, labels, groups
    and seed, not on the order of the rows. An image of several labels counts for the rarest of
    them; regression is stratified by quantiles. A table's own `strata` replace the labels (except
    where one is rarer than the folds).

    Raises:
        DataError: if a group is in two of the given splits; a class is in no image of a split, or
            in fewer images or groups than there are folds; training or validation is empty.
    """
    if table.splits is not None:
        names = np.array(table.splits)
        split = {name: np.flatnonzero(names == name) for name in SPLITS}
    else:
        folds, validation = _folds(table, config), config.validation_fold
        test = -1 if config.test_fold is None else config.test_fold
        split = {
            "train": np.flatnonzero((folds != validation) & (folds != test)),
            "validation": np.flatnonzero(folds == validation),
            "test": np.flatnonzero(folds == test),
        }
    _check(table, split)
    return split


def absent_labels(table: ImageTable, split: Split) -> tuple[str, ...]:
    """Lists the labels of a multi-label table that a split lacks, a line each.

    Unlike for single labels this is no error: any label rarer than the splits would stop the run.
    """
    if table.labels.ndim == 1:
        return ()
    has = table.labels > 0.5
    notes = []
    for name, indices in split.items():
        for label in np.flatnonzero(~has[indices].any(0)) if len(indices) else ():
            what = "it cannot be learnt" if name == "train" else "it is not scored there"
            notes.append(
                f"label {table.class_names[label]!r}{_on_lines(table, has[:, label])} is in no "
                f"image of the split {name}: {what}"
            )
    return tuple(notes)


def _on_lines(table: ImageTable, chosen: np.ndarray) -> str:
    """Lines of the CSV file of chosen images (`bool [n]`), in brackets; empty without a file."""
    lines = [table.rows[index] for index in np.flatnonzero(chosen)]
    if not lines or not all(lines):
        return ""
    more = ", ..." if len(lines) > _LISTED else ""
    return f" (line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:_LISTED]))}{more})"


def _folds(table: ImageTable, config: SplitConfig) -> np.ndarray:
    """The fold of each image, `int64 [n]`."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    strata = table.strata
    if strata is None:
        strata = _strata(table, config.folds)
    else:
        # Strata rarer than the folds count by label alone, so that each fold has every class.
        rare = np.bincount(strata)[strata] < config.folds
        strata = np.where(rare, strata.max() + 1 + table.labels, strata)
        strata = _common(strata, config.folds)
    grouped = table.groups is not None
    what = "groups" if grouped else "images"
    units = np.unique(np.array(table.groups or range(len(table))), return_inverse=True)[1]
    if (count := len(np.unique(units))) < config.folds:
        raise DataError(
            f"{count} {what} cannot make {config.folds} folds; set data.split.folds lower"
        )
    if _single(table):
        for label in np.unique(table.labels):
            has = table.labels == label
            count = len(np.unique(units[has]))
            if count < config.folds:
                units_there = what if count > 1 else what[:-1]
                raise DataError(
                    f"class {table.class_names[label]!r} has {count} {units_there}"
                    f"{_on_lines(table, has)}, fewer than the "
                    f"{config.folds} folds; set data.split.folds lower, or leave the class out"
                )
    # By path, so that the order of the rows does not matter.
    order = np.array(sorted(range(len(table)), key=lambda i: table.paths[i].as_posix()))
    maker = StratifiedGroupKFold if grouped else StratifiedKFold
    splitter = maker(config.folds, shuffle=True, random_state=config.seed)
    parts = splitter.split(order, strata[order], units[order] if grouped else None)
    folds = np.zeros(len(table), np.int64)
    for fold, (_, chosen) in enumerate(parts):
        folds[order[chosen]] = fold
    return folds


def _single(table: ImageTable) -> bool:
    return table.labels.ndim == 1 and table.labels.dtype.kind == "i"


def _strata(table: ImageTable, folds: int) -> np.ndarray:
    """The stratum of each image, from its labels: `int64 [n]`."""
    labels = table.labels
    if _single(table):
        return labels
    if labels.ndim == 1:
        # At least two images of each quantile for every fold, and no more than ten quantiles.
        quantiles = int(np.clip(len(labels) // (2 * folds), 1, 10))
        edges = np.quantile(labels, np.arange(1, quantiles) / quantiles)
        strata = np.searchsorted(edges, labels, side="right")
    else:
        rarest_first = np.argsort(labels.sum(0), kind="stable")
        has = labels[:, rarest_first] > 0.5
        strata = np.where(has.any(1), rarest_first[has.argmax(1)], labels.shape[1])
    return _common(strata, folds)


def _common(strata: np.ndarray, folds: int) -> np.ndarray:
    """Replaces strata rarer than the folds by the most common one."""
    counts = np.bincount(strata)
    return np.where(counts[strata] < folds, counts.argmax(), strata)


def _check(table: ImageTable, split: Split) -> None:
    for name in ("train", "validation"):
        if not len(split[name]):
            raise DataError(f"no image is in the split {name}; every run needs one")
    if table.groups is not None:
        home: dict[str, str] = {}
        for name, indices in split.items():
            for index in indices:
                group = table.groups[index]
                if home.setdefault(group, name) != name:
                    raise DataError(
                        f"group {group!r} is in the splits {home[group]} and {name}; keep all "
                        "images of a group in one split"
                    )
    if _single(table):
        for label in np.unique(table.labels):
            for name, indices in split.items():
                if len(indices) and not (table.labels[indices] == label).any():
                    lines = _on_lines(table, table.labels == label)
                    advice = (
                        "another data.split.seed or fewer data.split.folds may give it one"
                        if table.splits is None
                        else "move some of its images there"
                    )
                    raise DataError(
                        f"class {table.class_names[label]!r}{lines} has no image in the split "
                        f"{name}; {advice}"
                    )
