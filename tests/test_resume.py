"""A run that is killed and resumed ends bit for bit like one that was not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import assert_same_run, lines_of

from patchgd_jax.runs.checkpoint import Checkpoints

# The worker kills itself, with the signal that nothing can catch, right after a given step.
WORKER = """
import os, signal, sys
from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig
from patchgd_jax.runs.train import resume, train

folder, kill_at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def on_step(step):
    if step == kill_at and not where:
        os.kill(os.getpid(), signal.SIGKILL)

if where:
    # Dies at the n-th call of a function, before it does anything.
    import pathlib
    from patchgd_jax.runs import checkpoint, train as training
    owners = {
        "rename": pathlib.Path, "replace": pathlib.Path, "evaluate": training,
        "write_json": checkpoint, "mark_best": checkpoint.Checkpoints,
        "prune": checkpoint.Checkpoints, "rmtree": checkpoint.shutil,
        "_write_manifest": checkpoint.Checkpoints,
    }
    original, calls = getattr(owners[where], where), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owners[where], where, dying)

config = TrainConfig(
    data=DataConfig(
        digits="font", size=(32, 32), digit_count=1, label_share=1.0, object_ratio=(0.8, 1.0),
        train_size=100, val_size=10,
    ),
    model=ModelConfig(latent_dim=16, dropout=0.2),
    patchgd=PatchGDConfig(patch=16, fraction=0.5, mode="patchgd"),
    batch_size=8, eval_batch_size=10, epochs=4, eval_every=9, save_every=4, reader_threads=2,
)
if os.path.exists(os.path.join(folder, "config.json")):
    resume(folder, on_step=on_step)
else:
    train(config, folder, on_step=on_step)
"""
TOTAL = 50


def work(folder: Path, kill_at: int = 0, where: str = "") -> int:
    process = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), str(kill_at), where],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert process.returncode in (0, -9), process.stderr
    return process.returncode


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert work(folder) == 0
    assert lines_of(folder)[-1]["step"] == TOTAL
    return folder


def kill_and_resume(straight, folder, step):
    assert work(folder, step) == -9, "the worker must have died"
    assert all(line["step"] <= step for line in lines_of(folder))
    assert work(folder) == 0
    assert_same_run(straight, folder)


# Before the first save, between saves, at an evaluation.
@pytest.mark.parametrize("step", [2, pytest.param(23, marks=pytest.mark.slow), 36])
def test_killed_and_resumed_is_like_uninterrupted(straight, tmp_path, step):
    kill_and_resume(straight, tmp_path / "run", step)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("write_json", 3),
        ("rename", 3),
        ("mark_best", 2),
        pytest.param("_write_manifest", 4, marks=pytest.mark.slow),
        pytest.param("prune", 3, marks=pytest.mark.slow),
        pytest.param("rmtree", 5, marks=pytest.mark.slow),
        pytest.param("replace", 9, marks=pytest.mark.slow),
        pytest.param("evaluate", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_of_a_save_or_an_evaluation(straight, tmp_path, where, call):
    folder = tmp_path / "run"
    assert work(folder, call, where) == -9, "the worker must have died"
    assert work(folder) == 0
    assert_same_run(straight, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", np.random.default_rng(2026).choice(np.arange(1, TOTAL), 20, replace=False).tolist()
)
def test_twenty_random_kills(straight, tmp_path, step):
    kill_and_resume(straight, tmp_path / "run", step)


def test_killed_twice_and_with_a_damaged_newest_checkpoint(straight, tmp_path):
    folder = tmp_path / "run"
    work(folder, 14)
    work(folder, 49)
    newest = sorted((folder / "checkpoints").glob("0*"))[-1]
    meta = newest / "meta.json"
    meta.write_text(meta.read_text().replace("step", "steq"))
    # What a kill in the middle of a write leaves of the log's last line.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert work(folder) == 0
    assert_same_run(straight, folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    assert 48 in checkpoints.steps(), "the damaged step was written anew"
    assert all(checkpoints.damage(step) is None for step in checkpoints.steps())


def test_a_kill_before_the_best_step_was_named(straight, tmp_path):
    """The log knows the best step; a stale best.json must not cost its checkpoint."""
    folder = tmp_path / "run"
    work(folder, 20)
    (folder / "checkpoints" / "best.json").write_text('{"step": 9}')
    assert work(folder) == 0
    assert_same_run(straight, folder)


def test_a_finished_run_resumes_to_itself(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = (folder / "metrics.jsonl").read_text()
    assert work(folder) == 0
    assert (folder / "metrics.jsonl").read_text() == before
    assert_same_run(straight, folder)
