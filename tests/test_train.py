"""The library's own training loop, on every kind of image and gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest
from micro import BASE, changed
from toy import max_relative

from patchgd_jax.data.run_data import make_data
from patchgd_jax.engine.resident import ResidentExecutor
from patchgd_jax.runs import loop
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.train import train

CASES = {
    "colour": changed(data={"channels": 3}),
    "not square, not a multiple of the patch": changed(data={"size": (40, 57)}),
    "shrunk": changed(data={"size": (64, 64), "downscale": 2}),
    "exact": changed(model={"norm": "group"}, patchgd={"mode": "exact"}),
    "whole image": changed(patchgd={"mode": "full", "remat": True}),
    "overlap, frozen, uniform": changed(
        patchgd={
            "stride": 12, "norm_policy": "frozen", "mode": "patchgd", "sampling": "uniform",
            "sample_per": "image",
        }
    ),
    "UltraMNIST": changed(data={"task": "digit-sum", "size": (96, 96), "object_ratio": None}),
}  # fmt: skip


LONG = ("colour", "shrunk")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CASES]
)
def test_trained_evaluated_and_predicted(name, tmp_path):
    """The score is reproduced, and an example's file gives what evaluating the example gives."""
    config = CASES[name]
    summary = train(config, tmp_path / "run")
    model = TrainedModel(tmp_path / "run")
    metrics = model.evaluate()
    recorded = metrics.pop("recorded")
    assert {**metrics} == {**summary["best"]}
    assert recorded["loss"] == metrics["loss"]

    files = sorted((tmp_path / "run" / "examples").glob("*.png"))
    answers = model.predict_files(files)
    source = make_data(config).validation
    probabilities = []
    for index, answer in enumerate(answers):
        image = model.read(files[index])
        np.testing.assert_array_equal(image, source[index]["image"])
        label = source[index]["label"]
        assert files[index].name == f"{index}_label_{label}.png"
        probabilities.append(answer["probabilities"][str(label)])
    # The first batch of the evaluation holds the same four images.
    first = BASE.eval_batch_size
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, val_size=first))
    model.config = alone
    np.testing.assert_allclose(-np.mean(np.log(probabilities)), model.evaluate()["loss"], rtol=1e-4)


def test_the_clock_of_a_run_starts_after_compiling(tmp_path, monkeypatch):
    begun = []

    def noting(name, function):
        def called(*arguments):
            begun.append(name)
            return function(*arguments)

        return called

    monkeypatch.setattr(ResidentExecutor, "compile", noting("compile", ResidentExecutor.compile))
    monkeypatch.setattr(loop, "Recorder", noting("clock", loop.Recorder))
    train(BASE, tmp_path / "run")
    assert begun == ["compile", "clock"]


def test_any_optax_transformation(tmp_path):
    """Another optimizer's state is saved, and what it trained can be used without it."""
    optimizer = optax.chain(optax.scale_by_lion(), optax.scale(-1e-3))
    train(BASE, tmp_path / "run", optimizer=optimizer)
    assert TrainedModel(tmp_path / "run").evaluate()["examples"] == 5


def test_a_run_with_another_seed_is_another(tmp_path):
    """One with the same seed is the same: `test_resume` compares two."""
    params = []
    for seed in range(2):
        train(dataclasses.replace(BASE, seed=seed), tmp_path / str(seed))
        params.append(TrainedModel(tmp_path / str(seed), "last").weights.params)
    assert max_relative(*params) > 0.01
