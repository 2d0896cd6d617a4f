"""A run that is killed and resumed ends bit for bit like one that was not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from micro import ENCODER, Stopped, assert_same_run, lines_of, stop_at

from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig
from patchgd_jax.runs import checkpoint, loop
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.train import resume, train

TOTAL = 25
CONFIG = TrainConfig(
    data=DataConfig(
        digits="font", size=(32, 32), digit_count=1, label_share=1.0, object_ratio=(0.8, 1.0),
        train_size=100, val_size=10,
    ),
    model=ModelConfig(ENCODER, latent_dim=16, dropout=0.2),
    patchgd=PatchGDConfig(patch=16, fraction=0.5, mode="patchgd"),
    batch_size=8, eval_batch_size=10, epochs=2, eval_every=9, save_every=4, reader_threads=2,
)  # fmt: skip

# The places in which a save or an evaluation can be interrupted.
OWNERS = {
    "rename": Path,
    "replace": Path,
    "evaluate": loop,
    "write_json": checkpoint,
    "mark_best": Checkpoints,
    "prune": Checkpoints,
    "rmtree": checkpoint.shutil,
    "_write_manifest": Checkpoints,
}


def fail_at(patch, where, last, fail):
    """Makes the `last` call of a function `fail` before it does anything."""
    original, calls = getattr(OWNERS[where], where), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == last:
            fail()
        return original(*arguments, **options)

    patch.setattr(OWNERS[where], where, failing)


def work(folder, on_step=None):
    """Begins or resumes the run."""
    if (folder / "config.json").exists():
        resume(folder, on_step=on_step)
    else:
        train(CONFIG, folder, on_step=on_step)


# In a process of its own, which kills itself with the signal that nothing can catch.
WORKER = """
import os, signal, sys
from pathlib import Path
import pytest
from test_resume import fail_at, work

def die():
    os.kill(os.getpid(), signal.SIGKILL)

folder, last, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if where:
    fail_at(pytest.MonkeyPatch(), where, last, die)
work(folder, lambda step: step == last and not where and die())
"""


def killed(folder, last, where=""):
    """A run up to a step, or to a call of a function, and no further."""
    process = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), str(last), where],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -9, process.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    work(folder)
    assert lines_of(folder)[-1]["step"] == TOTAL
    return folder


def kill_and_resume(straight, folder, step):
    killed(folder, step)
    assert all(line["step"] <= step for line in lines_of(folder))
    work(folder)
    assert_same_run(straight, folder)


def test_killed_at_an_evaluation_and_resumed_is_like_uninterrupted(straight, tmp_path):
    kill_and_resume(straight, tmp_path / "run", 18)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("rename", 3),
        *(
            pytest.param(where, call, marks=pytest.mark.slow)
            for where, call in [
                ("_write_manifest", 4),
                ("prune", 3),
                ("rmtree", 3),
                ("replace", 9),
                ("evaluate", 3),
            ]
        ),
    ],
)
def test_killed_in_the_middle_of_a_save_or_an_evaluation(straight, tmp_path, where, call):
    folder = tmp_path / "run"
    killed(folder, call, where)
    work(folder)
    assert_same_run(straight, folder)


# Before the first save, between saves.
@pytest.mark.parametrize("step", [2, pytest.param(23, marks=pytest.mark.slow)])
def test_ended_and_resumed_is_like_uninterrupted(straight, tmp_path, step):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        work(folder, stop_at(step))
    work(folder)
    assert_same_run(straight, folder)


@pytest.mark.parametrize(("where", "call"), [("write_json", 3), ("mark_best", 2)])
def test_ended_in_the_middle_of_a_save(straight, tmp_path, where, call):
    """What is on the disk by then is all that counts, so an exception does for a kill."""

    def end():
        raise Stopped

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, where, call, end)
        with pytest.raises(Stopped):
            work(folder)
    work(folder)
    assert_same_run(straight, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", np.random.default_rng(2026).choice(np.arange(1, TOTAL), 20, replace=False).tolist()
)
def test_twenty_random_kills(straight, tmp_path, step):
    kill_and_resume(straight, tmp_path / "run", step)


def test_ended_twice_and_with_a_damaged_newest_checkpoint(straight, tmp_path):
    folder = tmp_path / "run"
    for step in (14, 24):
        with pytest.raises(Stopped):
            work(folder, stop_at(step))
    newest = sorted((folder / "checkpoints").glob("0*"))[-1]
    meta = newest / "meta.json"
    meta.write_text(meta.read_text().replace("step", "steq"))
    # What a kill in the middle of a write leaves of the log's last line.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    work(folder)
    assert_same_run(straight, folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    assert 24 in checkpoints.steps(), "the damaged step was written anew"
    assert all(checkpoints.damage(step) is None for step in checkpoints.steps())


def test_a_stop_before_the_best_step_was_named(straight, tmp_path):
    """The log knows the best step; a stale best.json must not cost its checkpoint."""
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        work(folder, stop_at(20))
    (folder / "checkpoints" / "best.json").write_text('{"step": 9}')
    work(folder)
    assert_same_run(straight, folder)


def test_a_finished_run_resumes_to_itself(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = (folder / "metrics.jsonl").read_text()
    work(folder)
    assert (folder / "metrics.jsonl").read_text() == before
    assert_same_run(straight, folder)
