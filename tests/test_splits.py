"""Splits: what must hold for every table, checked on many random ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchgd_jax.config import SplitConfig
from patchgd_jax.data.tables.splits import absent_labels, split_table
from patchgd_jax.data.tables.table import ImageTable
from patchgd_jax.errors import DataError


def make(labels, groups=None, splits=None, names=None):
    labels = np.asarray(labels)
    return ImageTable(
        paths=tuple(Path(f"/data/{i}.png") for i in range(len(labels))),
        labels=labels,
        class_names=names or tuple("abcdefgh"),
        groups=None if groups is None else tuple(map(str, groups)),
        splits=splits,
        weights=None,
        rows=(0,) * len(labels),
        fingerprint="",
    )


def fold_indices(table, config):
    """The split of every fold in turn as the validation set."""
    return tuple(
        split_table(table, dataclasses.replace(config, fold=fold))
        for fold in config.validation_folds
    )


def random_table(seed):
    """A table of one of the kinds of labels, with groups or without."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(80, 200))
    grouped = rng.random() < 0.5
    groups = rng.integers(0, count // 3, count) if grouped else None
    kind = seed % 3
    if kind == 0:
        labels = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    elif kind == 1:
        labels = rng.exponential(size=count).astype(np.float32).round(1)
    else:
        labels = (rng.random((count, 4)) < [0.6, 0.3, 0.1, 0.02]).astype(np.float32)
    return make(labels, groups)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=24, deadline=None)
def test_splits_are_disjoint_complete_and_keep_groups_together(seed):
    table = random_table(seed)
    config = SplitConfig(folds=3 + seed % 3, test_fold=2 if seed % 2 else None, seed=seed)
    splits = fold_indices(table, config)
    assert len(splits) == config.folds - (config.test_fold is not None)
    assert all((split["test"] == splits[0]["test"]).all() for split in splits)
    everyone = np.arange(len(table))
    for split in splits:
        assert list(split) == ["train", "validation", "test"]
        together = np.concatenate(list(split.values()))
        np.testing.assert_array_equal(np.sort(together), everyone)
        for indices in split.values():
            assert indices.dtype == np.int64
            assert (np.diff(indices) > 0).all()
        if table.groups:
            of = {name: {table.groups[i] for i in indices} for name, indices in split.items()}
            assert not of["train"] & of["validation"]
            assert not (of["train"] | of["validation"]) & of["test"]
    validation = np.concatenate([split["validation"] for split in splits])
    rest = np.concatenate([validation, splits[0]["test"]])
    np.testing.assert_array_equal(np.sort(rest), everyone)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=12, deadline=None)
def test_a_split_depends_on_paths_and_seed_alone(seed):
    table = random_table(seed)
    config = SplitConfig(folds=4, test_fold=3, seed=seed)

    def names(table, config=config):
        return {
            name: {table.paths[i] for i in indices}
            for name, indices in split_table(table, config).items()
        }

    before = names(table)
    np.random.seed(1)  # noqa: NPY002
    np.random.random(17)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    order = np.random.default_rng(seed).permutation(len(table))
    moved = dataclasses.replace(
        table,
        paths=tuple(table.paths[i] for i in order),
        labels=table.labels[order],
        groups=table.groups and tuple(table.groups[i] for i in order),
    )
    assert names(moved) == before
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    elsewhere = dataclasses.replace(table, paths=tuple(Path("/b") / p.name for p in table.paths))
    assert {p.name for p in names(elsewhere)["test"]} == {p.name for p in before["test"]}
    assert names(table, dataclasses.replace(config, seed=seed + 100)) != before


def test_folds_hold_like_shares_of_every_class():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 300, p=[0.6, 0.3, 0.1])
    for split in fold_indices(make(labels), SplitConfig()):
        counts = np.bincount(labels[split["validation"]], minlength=3)
        assert np.abs(counts - np.bincount(labels) / 5).max() < 1
    groups = rng.integers(0, 100, 300)
    for split in fold_indices(make(labels, groups), SplitConfig()):
        counts = np.bincount(labels[split["validation"]], minlength=3)
        assert np.abs(counts - np.bincount(labels) / 5).max() <= 6


def test_regression_is_balanced_by_quantiles():
    values = np.random.default_rng(0).exponential(size=400).astype(np.float32)
    folds = fold_indices(make(values), SplitConfig())
    # An unbalanced fold of 80 would be off by about 1 / sqrt(80) = 0.11.
    for split in folds:
        assert abs(values[split["validation"]].mean() - values.mean()) < 0.06
        for quantile in (0.1, 0.5, 0.9):
            share = (values[split["validation"]] < np.quantile(values, quantile)).mean()
            assert abs(share - quantile) < 0.03
    zeros = np.where(np.arange(20) < 17, 0, 1 + np.arange(20)).astype(np.float32)
    assert len(fold_indices(make(zeros), SplitConfig())) == 5
    few = np.arange(5, dtype=np.float32)
    assert all(len(split["validation"]) == 1 for split in fold_indices(make(few), SplitConfig()))


def test_rare_labels_are_spread():
    labels = np.zeros((100, 3), np.float32)
    labels[:, 0] = 1
    labels[:50, 1] = 1
    labels[::10, 2] = 1
    for split in fold_indices(make(labels), SplitConfig()):
        np.testing.assert_allclose(labels[split["validation"]].sum(0), [20, 10, 2], atol=1)
        assert labels[split["validation"], 2].sum() == 2
    none = np.zeros((7, 2), np.float32)
    none[:2, 0] = none[2, 1] = 1
    assert len(fold_indices(make(none), SplitConfig(folds=5))) == 5


def test_the_users_own_splits_win():
    splits = ("train", "validation", "train", "test", "validation", "train", "test")
    labels = [0, 0, 1, 1, 1, 0, 0]
    got = split_table(make(labels, splits=splits), SplitConfig(fold=1, test_fold=0))
    assert {name: indices.tolist() for name, indices in got.items()} == {
        "train": [0, 2, 5],
        "validation": [1, 4],
        "test": [3, 6],
    }
    got = split_table(make([0, 0, 1, 1], splits=("train", "validation") * 2), SplitConfig())
    assert got["test"].size == 0
    assert got["test"].dtype == np.int64


def refused(match, *arguments, config=SplitConfig(), **options):  # noqa: B008
    with pytest.raises(DataError, match=match):
        split_table(make(*arguments, **options), config)


def test_splits_that_cannot_be_are_told():
    half = ("train", "validation")
    refused(
        "group 'p1' is in the splits train and validation",
        [0, 0, 1, 1],
        ["p0", "p1", "p1", "p2"],
        splits=("train", "validation", "train", "validation"),
    )
    refused("class 'b' has no image in the split validation", [0, 0, 1], splits=(*half, "train"))
    refused(
        "class 'b' has no image in the split test; move some of its images there",
        [0, 0, 1, 1, 0],
        splits=(*half, *half, "test"),
    )
    refused("no image is in the split train", [0, 1], splits=("validation", "test"))
    refused("no image is in the split validation", [0, 1], splits=("train", "train"))
    refused("class 'b' has 4 images, fewer than the 5 folds", [0] * 9 + [1] * 4)
    refused(
        "class 'b' has 2 groups, fewer than the 5", [0] * 9 + [1] * 9, [*range(9), *[8, 9] * 4, 8]
    )
    refused("4 images cannot make 5 folds", np.arange(4, dtype=np.float32))
    refused("2 groups cannot make 5 folds", np.arange(8, dtype=np.float32), [0, 1] * 4)
    # Four groups in three folds: the best balance leaves one without class b.
    table = make([0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1], [2, 0, 3, 0, 1, 2, 0, 1, 0, 3, 1, 3])
    with pytest.raises(DataError, match="class 'b' has no image in the split validation; another"):
        fold_indices(table, SplitConfig(folds=3))


def test_a_class_that_a_split_lacks_is_named_with_its_lines():
    table = make([0, 0, 0, 0, 1, 1], splits=("train", "validation") * 2 + ("train",) * 2)
    table = dataclasses.replace(table, rows=tuple(range(2, 8)))
    with pytest.raises(DataError, match=r"class 'b' \(lines 6, 7\) has no image in the split val"):
        split_table(table, SplitConfig())
    few = dataclasses.replace(make([0] * 9 + [1]), rows=tuple(range(2, 12)))
    with pytest.raises(DataError, match=r"class 'b' has 1 image \(line 11\), fewer than the 5"):
        split_table(few, SplitConfig())


def test_a_label_that_a_split_lacks_is_told():
    labels = np.zeros((12, 3), np.float32)
    labels[:, 0] = 1
    labels[:8, 1] = 1
    labels[11, 2] = 1
    splits = ("train", "validation", "test") * 4
    table = make(labels, splits=splits, names=("all", "many", "one"))
    table = dataclasses.replace(table, rows=tuple(range(2, 14)))
    assert absent_labels(table, split_table(table, SplitConfig())) == (
        "label 'one' (line 13) is in no image of the split train: it cannot be learnt",
        "label 'one' (line 13) is in no image of the split validation: it is not scored there",
    )
    whole = split_table(table, SplitConfig())
    whole["test"] = whole["test"][:0]
    assert len(absent_labels(table, whole)) == 2
    single = make([0, 1] * 6, splits=splits)
    assert absent_labels(single, split_table(single, SplitConfig())) == ()


def test_missing_grades_and_unused_classes_need_no_fold():
    table = make([0, 3] * 10, names=("0", "1", "2", "3"))
    assert len(fold_indices(table, SplitConfig())) == 5
