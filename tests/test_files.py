"""Runs on the user's own files: sizes, masks, tasks, folds, and what must stop them first."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from micro import ENCODER, Stopped, config_for, sizes, stop_at, write_csv, write_images
from PIL import Image

from patchgd_jax import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelConfig,
    PatchGDConfig,
    TaskConfig,
)
from patchgd_jax.config import BackgroundConfig, ColumnsConfig, SplitConfig
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import make_data, read_files
from patchgd_jax.data.sources import file_reader
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.data.tables import csv_table
from patchgd_jax.engine.setup import training_grids
from patchgd_jax.runs.cross_validation import RESULT, cross_validate
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.train import resume, train


@pytest.fixture
def labels(tmp_path):
    return write_csv(tmp_path / "labels.csv", write_images(tmp_path, sizes(24)))


FITS = {
    "resize": {},
    "native": {"fit": "native"},
    "native, background left out": {
        "fit": "native", "background": 0,
        "empty": BackgroundConfig(method="threshold", threshold=128, share=0.1),
    },
    "resize, background left out": {
        "background": 0, "empty": BackgroundConfig(method="threshold", threshold=30)
    },
}  # fmt: skip


LONG = ("native", "resize, background left out")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in FITS]
)
def test_a_run_is_scored_again_and_its_files_predicted(name, labels, tmp_path):
    """The score is reproduced, and each file gives alone what the evaluation gives it."""
    config = config_for(labels, **FITS[name])
    summary = train(config, tmp_path / "run")
    model = TrainedModel(tmp_path / "run")
    metrics = model.evaluate()
    recorded = metrics.pop("recorded")
    assert metrics == summary["best"]
    assert recorded["loss"] == metrics["loss"]
    source = model.source("validation")
    answers = model.predict_files([source.table.paths[row] for row in source.rows])
    names = [source.class_names[label] for label in source.table.labels[source.rows]]
    chances = [answer["probabilities"][name] for answer, name in zip(answers, names, strict=True)]
    np.testing.assert_allclose(-np.mean(np.log(chances)), metrics["loss"], rtol=1e-4)


def test_native_images_are_padded_to_three_sizes_and_read_as_they_are(labels):
    config = config_for(labels, fit="native")
    data = make_data(config)
    assert len(data.shapes) == 3
    assert "6 programs" in data.notes[0]
    for source in (data.train, data.validation):
        assert sorted(np.concatenate(source.buckets).tolist()) == list(range(len(source)))
        for bucket in source.buckets:
            shapes = {source[int(i)]["image"].shape for i in bucket}
            slots = {source[int(i)]["patches"].shape for i in bucket}
            assert len(shapes) == len(slots) == 1
    source = data.train
    grids = dict(zip(data.shapes, training_grids(config, data), strict=True))
    for i in range(len(source)):
        example = source[i]
        with Image.open(source.table.paths[source.rows[i]]) as file:
            pixels = np.asarray(file)[..., None]
        height, width = example["size"]
        assert (height, width) == pixels.shape[:2]
        np.testing.assert_array_equal(example["image"][:height, :width], pixels)
        assert not example["image"][height:].any()
        assert not example["image"][:, width:].any()
        grid = grids[example["image"].shape[:2]]
        used = [p for p in example["patches"].tolist() if p < grid.num_patches]
        mask = np.asarray(grid.mask(example["size"][None]))[0]
        assert used == np.flatnonzero(mask).tolist()


@pytest.fixture
def many_sizes(tmp_path):
    """A thousand images of three hundred sizes."""
    distinct = np.stack(np.meshgrid(range(17, 32), range(17, 37)), -1).reshape(-1, 2)
    assert len(distinct) == 300
    rows = write_images(tmp_path, np.tile(distinct, (4, 1))[:1000].tolist())
    return dataclasses.replace(
        config_for(write_csv(tmp_path / "labels.csv", rows), fit="native"),
        patchgd=PatchGDConfig(patch=8, fraction=0.5),
        model=ModelConfig(latent_dim=4, head="linear"),
        batch_size=50,
        eval_batch_size=50,
    )


def test_many_sizes_need_six_programs(many_sizes):
    data = make_data(many_sizes)
    assert len(data.shapes) == 3
    assert "Images of 300 sizes are padded to 3" in data.notes[0]
    assert "6 programs" in data.notes[0]


@pytest.mark.slow
def test_a_run_on_many_sizes_compiles_six_programs(many_sizes, tmp_path):
    """A compiled program takes one shape only: another would have been an error."""
    told = []

    class Kept(Progress):
        def message(self, text):
            told.append(text)

    summary = train(many_sizes, tmp_path / "run", progress=Kept())
    assert summary["best"]["examples"] == 200
    assert any(text.startswith("Compiled 6 programs") for text in told)


@pytest.mark.parametrize(
    "task", ["multi-label", "regression", pytest.param("ordinal", marks=pytest.mark.slow)]
)
def test_other_tasks_from_a_csv(task, labels, tmp_path):
    column = {"multi-label": "tags", "regression": "number", "ordinal": "number"}[task]
    config = dataclasses.replace(
        config_for(labels, columns=ColumnsConfig(label=column), split=SplitConfig(folds=3)),
        task=TaskConfig(name=task),
    )
    summary = train(config, tmp_path / "run")
    model = TrainedModel(tmp_path / "run")
    (answer,) = model.predict_files([tmp_path / "images" / "0.png"])
    if task == "regression":
        assert summary["best"]["mae"] >= 0
        assert isinstance(answer["label"], float)
    elif task == "multi-label":
        assert set(answer["probabilities"]) == {"a", "b"}
        assert answer["label"] == [n for n, p in answer["probabilities"].items() if p > 0.5]
    else:
        assert list(answer["probabilities"]) == ["0", "1", "2", "3", "4"]
        assert summary["best"]["mae"] >= 0
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_label_that_is_no_class_is_named_with_its_line(labels, tmp_path):
    config = config_for(labels, class_names=("disc", "ring"))
    with pytest.raises(DataError, match=r"(?s)line 3.*'plain' is none of the 2 classes"):
        train(config, tmp_path / "run")
    data = make_data(config_for(labels, class_names=("plain", "disc")))
    assert data.train.class_names == ("plain", "disc")
    table = data.train.table
    assert table.labels[table.paths.index(tmp_path / "images" / "0.png")] == 1


def test_the_test_fold_is_apart_and_groups_are_whole(labels):
    config = config_for(
        labels, columns=ColumnsConfig(group="who"), split=SplitConfig(folds=4, fold=1, test_fold=3)
    )
    data = make_data(config)
    sources = (data.train, data.validation, data.test)
    groups = [{s.table.groups[row] for row in s.rows} for s in sources]
    rows = np.concatenate([s.rows for s in sources])
    assert sorted(rows.tolist()) == list(range(24))
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_folds_are_trained_once_each_and_go_on_after_a_stop(labels, tmp_path):
    config = config_for(labels, split=SplitConfig(folds=3, test_fold=2), channels=None)
    folder = tmp_path / "folds"
    first = cross_validate(config, folder)
    assert set(first["folds"]) == {0, 1}
    # The files are grey; the run says so, and is still the same one below.
    assert json.loads((folder / "fold-1" / "config.json").read_text())["data"]["channels"] == 1
    for metric in ("accuracy", "loss"):
        values = [score[metric] for score in first["folds"].values()]
        assert first["mean"][metric] == pytest.approx(np.mean(values))
        assert first["std"][metric] == pytest.approx(np.std(values, ddof=1))
    scored = TrainedModel(folder / "fold-0").evaluate(split="test")
    assert scored["examples"] == len(make_data(config).test)
    assert scored["recorded"] is None
    # One fold as a kill leaves it: begun, with a log, not finished.
    (folder / "fold-1" / "summary.json").unlink()
    before = (folder / "fold-0" / "metrics.jsonl").stat().st_mtime_ns
    again = cross_validate(config, folder)
    assert again == first
    assert (folder / "fold-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((folder / RESULT).read_text())["mean"] == first["mean"]
    with pytest.raises(ConfigError, match="run with other settings than fold 0"):
        cross_validate(dataclasses.replace(config, seed=5), folder)


def test_a_run_does_not_go_on_with_other_files(labels, tmp_path):
    config = dataclasses.replace(config_for(labels), epochs=2, save_every=2)

    with pytest.raises(Stopped):
        train(config, tmp_path / "run", on_step=stop_at(3))
    image = tmp_path / "images" / "3.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(image)
    with pytest.raises(CheckpointError, match="--accept-changed-data"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", accept_changed_data=True)["best"]["examples"] == 5


def test_statistics_are_those_of_the_pixels_without_the_padding(labels):
    data = make_data(config_for(labels, fit="native"))
    got = Preprocess.measure(data)
    images = []
    for i in range(len(data.train)):
        example = data.train[i]
        height, width = example["size"]
        images.append(example["image"][:height, :width].astype(np.float64) / 255)
    mean = np.mean([image.mean() for image in images])
    square = np.mean([(image**2).mean() for image in images])
    assert got.mean == (pytest.approx(mean, abs=1e-6),)
    assert got.std == (pytest.approx(np.sqrt(square - mean**2), abs=1e-6),)


def test_what_is_background_must_be_said(labels):
    config = config_for(labels, empty=BackgroundConfig(method="otsu"))
    with pytest.raises(ConfigError, match=r"--data\.background 255"):
        make_data(config)


def test_a_test_fold_beside_a_column_of_splits_is_refused(labels):
    config = config_for(
        labels, columns=ColumnsConfig(split="label"), split=SplitConfig(test_fold=1)
    )
    with pytest.raises(ConfigError, match="leave one of them out"):
        make_data(config)
    with pytest.raises(ConfigError, match="leave one of them out"):
        cross_validate(config_for(labels, columns=ColumnsConfig(split="label")), labels + "-folds")
    assert SplitConfig(test_fold=0).validation_fold == 1


def test_a_head_for_one_grid_and_images_of_many_is_refused(labels, tmp_path):
    config = config_for(labels, fit="native")
    config = dataclasses.replace(config, model=ModelConfig(latent_dim=8, head="cnn-smaller"))
    with pytest.raises(ConfigError, match="takes one grid of patches"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_broken_files_are_listed_before_anything_begins(labels, tmp_path):
    (tmp_path / "images" / "4.png").write_bytes(b"no image")
    path = tmp_path / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:15])
    for fit in ("resize", "native"):
        with pytest.raises(DataError, match=r"(?s)2 of 24 images.*line 6.*4\.png.*line 9.*7\.png"):
            train(config_for(labels, fit=fit), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_commands_on_a_folder_of_images(labels, tmp_path, command):
    # Smaller than a patch: it is one.
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(tmp_path / "images" / "0.png")
    data = ["--data.csv", labels, "--data.fit", "native", "--data.columns.group", "who"]
    small = ["--patchgd.patch", "16", "--patchgd.fraction", "0.5", "--model.latent-dim", "8",
             "--model.encoder", ENCODER,
             "--batch-size", "4", "--eval-batch-size", "4"]  # fmt: skip
    checked = command("data", "check", *data, *small)
    assert checked.returncode == 0, checked.stderr
    assert "24" in checked.stdout
    shown = command("data", "show", *data, *small, "--count", 5, "--output", "sheet.png")
    assert shown.returncode == 0, shown.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 400
    trained = command("train", *data, *small, "--run-dir", "run")
    assert trained.returncode == 0, trained.stderr
    assert "programs to compile" in trained.stdout
    predicted = command("predict", "run", "images/0.png", "--json")
    assert json.loads(predicted.stdout)[0]["label"] in ("disc", "plain")
    (tmp_path / "images" / "4.png").write_bytes(b"no image")
    checked = command("data", "check", *data, "--json")
    assert checked.returncode == 3
    assert "4.png" in checked.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "../outside.png"}, "line 5"),
        ({"path": "images/none.png"}, "line 5"),
        ({"label": ""}, "line 5"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(change, message, labels, tmp_path, command):
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3] |= change
    write_csv(tmp_path / "labels.csv", rows)
    failed = command("train", "--data.csv", labels, "--run-dir", "run")
    assert failed.returncode == 3
    assert message in failed.stderr
    assert not (tmp_path / "run").exists()


def test_every_header_is_opened_once_and_the_labels_are_read_once(tmp_path, monkeypatch):
    rows = write_images(tmp_path, sizes(24))
    config = config_for(write_csv(tmp_path / "labels.csv", rows), fit="native", channels=None)
    opened, texts = [], []

    def counted(path, **options):
        opened.append(path)
        return open_regions(path, **options)

    def counted_text(path):
        texts.append(path)
        return read_text(path)

    open_regions, read_text = file_reader.open_regions, csv_table._read_text
    monkeypatch.setattr(file_reader, "open_regions", counted)
    monkeypatch.setattr(csv_table, "_read_text", counted_text)
    files = read_files(config)
    data = make_data(resolve_channels(config, files), files)
    assert len(texts) == 1
    assert sorted(opened) == sorted(files.table.paths)
    assert len(data.shapes) > 1
