"""Run folders of earlier versions load, evaluate, predict and resume.

`fixtures/schema_0` was written by the code before settings had a schema number: `finished` (6 outer
steps), `interrupted` (SIGTERM after its checkpoint of step 3), and `predicted.json`, what `predict`
said of an example. The encoder is registered here because a shipped one would be far larger.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from patchgd_jax import ENCODERS, register_encoder
from patchgd_jax.cli.main import main
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.folder import RunFolder
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.record.metrics_log import read_metrics

OLD = Path(__file__).parent / "fixtures" / "schema_0"
ENCODER = "old-run-cnn"


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    monkeypatch.setattr("patchgd_jax.models.registry._ENCODERS", dict(ENCODERS))
    register_encoder(ENCODER, partial(SmallCNN, widths=(8, 8)), norms=("batch", "group"))


@pytest.fixture
def copy(tmp_path):
    return lambda name: Path(shutil.copytree(OLD / name, tmp_path / name))


def close(got, wanted):
    """Equal, but for the last digits of numbers that another jax may round differently."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            close(got[name], value)
    elif isinstance(wanted, float):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    else:
        assert got == wanted


def logged(folder):
    return [
        {k: v for k, v in x.items() if k != "perf"} for x in read_metrics(folder / "metrics.jsonl")
    ]


def test_it_evaluates_to_what_it_recorded(copy):
    folder = copy("finished")
    scores = TrainedModel(folder).evaluate()
    recorded = scores.pop("recorded")
    close(recorded, {name: value for name, value in scores.items() if name != "step"})
    close(scores, json.loads((folder / "summary.json").read_text())["best"])


def test_it_predicts_as_it_did(copy, capsys):
    folder = copy("finished")
    (image,) = (folder / "examples").iterdir()
    assert main(["predict", str(folder), str(image), "--json"]) == 0
    (got,) = json.loads(capsys.readouterr().out)
    close({**got, "image": image.name}, json.loads((OLD / "predicted.json").read_text()))


def test_an_interrupted_run_ends_as_the_other_did(copy):
    folder, finished = copy("interrupted"), copy("finished")
    assert not (folder / "summary.json").exists()
    assert main(["resume", str(folder)]) == 0
    for got, wanted in zip(logged(folder), logged(finished), strict=True):
        close(got, wanted)
    got, wanted = (Checkpoints(RunFolder(f).checkpoints) for f in (folder, finished))
    assert got.newest_intact() == wanted.newest_intact() == 6
    flat = [c.meta(6)["tree"].keys() for c in (got, wanted)]
    assert flat[0] == flat[1]
    # What was read with schema 0 is written with the present one.
    assert got.meta(6)["schema"] == 1
    assert "schema" not in wanted.meta(6)


def test_a_changed_setting_is_still_refused(copy, capsys):
    folder = copy("interrupted")
    config = json.loads((folder / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["resume", str(folder)]) == 6
    assert "optimizer.learning_rate was 0.003, is 0.5" in capsys.readouterr().err
