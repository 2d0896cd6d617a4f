"""Runs on PANDA's layout, on tensorflow-datasets, and on images of which some are unreadable."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
from micro import (
    ENCODER,
    TINY,
    Stopped,
    config_for,
    lines_of,
    sizes,
    stop_at,
    write_csv,
    write_images,
)
from tiny_panda import make_tiny_panda

from patchgd_jax import DataConfig, DataError, PatchGDConfig, TrainConfig
from patchgd_jax.config import BackgroundConfig, PandaConfig, SplitConfig
from patchgd_jax.data.loading.bad_images import BAD_IMAGES
from patchgd_jax.data.run_data import make_data
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.train import resume, train


@pytest.fixture(scope="module")
def panda(tmp_path_factory):
    root = tmp_path_factory.mktemp("panda")
    make_tiny_panda(root, n=14)
    return str(root)


def panda_config(root, **data):
    options = {
        "panda": root, "size": (64, 64), "channels": 3, "split": SplitConfig(folds=2),
        "empty": BackgroundConfig(method="otsu"),
    }  # fmt: skip
    return TrainConfig(data=DataConfig(**(options | data)), **TINY)


def test_panda_is_scored_by_kappa_in_folds_by_grade_and_centre(panda, tmp_path):
    config = panda_config(panda)
    summary = train(config, tmp_path / "run")
    model = TrainedModel(tmp_path / "run")
    assert model.task.selection == "quadratic_weighted_kappa"
    metrics = model.evaluate()
    metrics.pop("recorded")
    assert metrics == summary["best"]
    assert model.preprocess.background == 255
    assert model.preprocess.class_names == ("0", "1", "2", "3", "4", "5")
    source = model.source("validation")
    answers = model.predict_files([source.table.paths[row] for row in source.rows])
    labels = source.table.labels[source.rows]
    chances = [a["probabilities"][str(y)] for a, y in zip(answers, labels, strict=True)]
    np.testing.assert_allclose(-np.mean(np.log(chances)), metrics["loss"], rtol=1e-4)


def test_white_patches_are_left_out_and_the_share_is_told(panda):
    data = make_data(panda_config(panda))
    (slots,) = data.slots
    assert slots < 16
    assert any("of all patches are background and left out" in note for note in data.notes)
    white = next(i for i in range(len(data.train)) if (data.train[i]["patches"] < 16).sum() < 12)
    example = data.train[white]
    kept = example["patches"][example["patches"] < 16]
    empty = sorted(set(range(16)) - set(kept.tolist()))
    for number in empty:
        y, x = 16 * (number // 4), 16 * (number % 4)
        assert example["image"][y : y + 16, x : x + 16].mean() > 235


def test_the_reference_level_is_another_picture(panda):
    ours = make_data(panda_config(panda)).train
    papers = make_data(
        panda_config(panda, panda_options=PandaConfig(reference_level=True), size=(128, 128))
    ).train
    assert papers[0]["image"].shape == (128, 128, 3)
    # The last level has at most 89 px: the paper's code enlarges it to the side that was asked for.
    assert max(papers[0]["size"]) == 128
    assert ours.fingerprint != papers.fingerprint


def test_a_frozen_set_trains_like_the_generator(tmp_path, command):
    generator = [
        "--data.size", "32", "32", "--data.digits", "font", "--data.digit-count", "1",
        "--data.label-share", "1", "--data.object-ratio", "0.8", "1",
        "--data.train-size", "40", "--data.val-size", "10",
    ]  # fmt: skip
    made = command("data", "make", *generator, "--output", "sets")
    assert made.returncode == 0, made.stderr
    where = made.stdout.split("--data.tfds ")[1].strip()
    small = ["--patchgd.patch", "16", "--patchgd.fraction", "0.5", "--model.latent-dim", "8",
             "--model.encoder", ENCODER,
             "--batch-size", "8", "--eval-batch-size", "8"]  # fmt: skip
    frozen = command("train", "--data.tfds", where, "--data.size", "32", "32", *small,
                     "--run-dir", "frozen")  # fmt: skip
    assert frozen.returncode == 0, frozen.stderr
    live = command("train", *generator, *small, "--run-dir", "live")
    assert live.returncode == 0, live.stderr

    def losses(name):
        return [line["loss"] for line in lines_of(tmp_path / name)]

    assert losses("frozen") == losses("live")


@pytest.fixture
def some_bad(tmp_path):
    """Images of which two cannot be decoded, though their headers are intact."""
    rows = write_images(tmp_path, sizes(24))
    for number in (3, 10):
        path = tmp_path / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    return write_csv(tmp_path / "labels.csv", rows)


def test_an_unreadable_image_ends_the_run_with_its_name(some_bad, tmp_path):
    config = dataclasses.replace(config_for(some_bad), epochs=3)
    bad = make_data(config).train
    late = {bad.describe(i).split(" ")[0] for i in range(len(bad))}
    assert late & {str(tmp_path / "images" / f"{n}.png") for n in (3, 10)}
    with pytest.raises(DataError, match=r"images/(3|10)\.png"):
        train(config, tmp_path / "run")


def test_what_was_trained_before_an_unreadable_image_is_saved(tmp_path):
    rows = write_images(tmp_path, sizes(24))
    labels = write_csv(tmp_path / "labels.csv", rows)
    config = dataclasses.replace(config_for(labels), epochs=3, eval_every=100)
    file = tmp_path / "images" / "5.png"
    whole = file.read_bytes()

    def damage(step):
        if step == 4:
            file.write_bytes(whole[:200])

    with pytest.raises(DataError, match=r"(?s)5\.png.*is saved after step") as caught:
        train(config, tmp_path / "run", on_step=damage)
    assert "resume" in str(caught.value)
    file.write_bytes(whole)
    summary = resume(tmp_path / "run", accept_changed_data=True)
    assert summary["last"]["step"] == config.total_steps(len(make_data(config).train))


@pytest.mark.parametrize("fit", ["resize", pytest.param("native", marks=pytest.mark.slow)])
def test_unreadable_images_are_replaced_and_listed(fit, some_bad, tmp_path):
    config = config_for(some_bad, bad_images="substitute", fit=fit)
    config = dataclasses.replace(config, epochs=2, save_every=2)
    summary = train(config, tmp_path / "run")
    with (tmp_path / "run" / BAD_IMAGES).open(newline="") as file:
        listed = {row["path"].split(" ")[0] for row in csv.DictReader(file)}
    assert listed == {str(tmp_path / "images" / f"{n}.png") for n in (3, 10)}
    data = make_data(config)
    bad_in_validation = sum(
        str(data.validation.table.paths[row]) in listed for row in data.validation.rows
    )
    assert summary["best"].get("bad_images", 0) == bad_in_validation
    assert summary["best"]["examples"] == len(data.validation) - bad_in_validation

    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", on_step=stop_at(5))
    again = resume(tmp_path / "stopped")
    assert again["best"] == summary["best"]
    assert again["last"] == summary["last"]


def test_more_unreadable_images_than_the_limit_end_the_run(some_bad, tmp_path):
    config = config_for(some_bad, bad_images="substitute", bad_limit=1)
    with pytest.raises(DataError, match=r"more than data\.bad_limit 1"):
        train(dataclasses.replace(config, patchgd=PatchGDConfig(patch=16)), tmp_path / "run")
