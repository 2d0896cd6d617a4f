"""The experiments: their runner against interruptions and foreign runs, and their smoke scale."""

from __future__ import annotations

import csv
import fcntl
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import child
import numpy as np
import pytest
import runner
from collect import bootstrap_interval
from runs import Row, Run, runs_of
from settings import SMOKE, changed

from patchgd_jax.errors import PatchGDError

EXPERIMENTS = Path(runner.__file__).parent
NAMES = [
    "ultramnist_resnet50",
    "ultramnist_mobilenet_v2",
    "panda_resnet50",
    "ablations",
    "memory_throughput",
    "gradient_modes",
    "object_ratio",
    "norm_policies",
]
ALONE = Row("alone", changed(SMOKE.config, data={"train_size": 8}), {"method": "patchgd"})


def rows(scale, folder):
    """Rows with a start, without one, and that cannot be trained."""
    return [
        ALONE,
        Row("diverges", changed(SMOKE.config, optimizer={"name": "sgd", "learning_rate": 1e38})),
        Row("no such encoder", changed(SMOKE.config, model={"encoder": "no-such"})),
        SMOKE.row("from a start"),
    ]


def in_this_process(run, scale, lock, stop):
    """What `runner` has a child do."""
    try:
        child.work(run.folder)
    except PatchGDError as error:
        (run.folder / "errors.txt").write_text(f"error: {error}\n", encoding="utf-8")
        return error.exit_code
    return 0


@pytest.fixture
def tiny(tmp_path, monkeypatch, capsys):
    """Runs the small experiment above in `tmp_path / "out"`; what it printed, and its errors."""
    monkeypatch.setattr(runner, "_in_process", in_this_process)

    def run(*arguments, code=0, rows=rows):
        monkeypatch.setattr(
            sys, "argv", ["tiny", "--scale", "smoke", "--out", str(tmp_path / "out"), *arguments]
        )
        try:
            runner.main("tiny", rows)
            ended = 0
        except SystemExit as error:
            ended = error.code
        said = capsys.readouterr()
        assert ended == code, said
        return said

    return run


def table_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_finished_runs_are_kept_and_failed_ones_are_rows(tiny, tmp_path):
    out = tmp_path / "out"
    # The encoder that there is none of is a mistake, not a result.
    said = tiny(code=2).out
    assert "[1/5] single digits" in said
    assert "1 runs failed; the same command tries them again" in said
    lines = {line["label"]: line for line in table_of(out / "tiny.csv")}
    assert list(lines) == ["alone", "diverges", "no such encoder", "from a start"]
    assert lines["alone"]["method"] == "patchgd"
    assert lines["alone"]["images"] == "8"
    assert lines["alone"]["reason"] == ""
    assert float(lines["alone"]["step_memory_mib"]) > 0
    assert float(lines["alone"]["peak_memory_mib"]) > 50
    assert float(lines["from a start"]["accuracy"]) >= 0
    assert "learning-rate" in lines["diverges"]["reason"]
    assert lines["no such encoder"]["reason"].startswith("unknown encoder 'no-such'")
    config = json.loads((out / "from-a-start-seed-0" / "run" / "config.json").read_text())
    assert Path(config["init_encoder"]).parent.name.startswith("single-digits")

    table = (out / "tiny.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith("|  | method | accuracy, % [95 %] |")
    assert [line.split(" | ")[0] for line in table[4:8]] == [f"| {label}" for label in lines]
    assert (out / "tiny.png").stat().st_size > 1000
    result = json.loads((out / "tiny.json").read_text())
    assert {"commit", "command", "device", "versions", "figures"} <= result.keys()
    assert [row["seeds"] for row in result["figures"]["rows"]] == [1, 0, 0, 1]

    summaries = {path: path.stat().st_mtime_ns for path in out.glob("*/run/summary.json")}
    assert len(summaries) == 3
    assert "failed: step" in tiny("--only", "alone", "diverges", "from a start").out
    assert {path: path.stat().st_mtime_ns for path in summaries} == summaries


# In place of the child: it waits until it is told to stop, and the second time it finishes.
WAITING = f"""
import json, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(EXPERIMENTS)!r})
from child import stop_without_runner

run = Path(sys.argv[1]) / "run"
if (run / "saved").exists():
    last = {{"accuracy": 0.5, "examples": 10, "step": 2}}
    perf = {{"peak_memory_mib": 60, "images_per_s": 1, "seconds": 1}}
    (run / "summary.json").write_text(json.dumps({{"last": last, "perf": perf}}))
    sys.exit()

def save(number, frame):
    (run / "saved").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
run.mkdir()
(run / "config.json").write_text('{{"batch_size": 4}}')
stop_without_runner()
time.sleep(100)
"""
RUNNER = """
import sys
from pathlib import Path
import runner
from test_experiments import ALONE

runner._CHILD = Path(sys.argv.pop())
runner.main("tiny", lambda scale, folder: [ALONE])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tmp_path, number):
    waiting, out = tmp_path / "waiting.py", tmp_path / "out"
    waiting.write_text(WAITING, encoding="utf-8")
    command = [sys.executable, "-c", RUNNER, "--scale", "smoke", "--out", str(out), str(waiting)]
    paths = [str(EXPERIMENTS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = out / "alone-seed-0" / "run"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 100
        while not (run / "config.json").exists() and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert said.startswith("error: stopped by SIGTERM after saving; the same command goes on")
    with (out / ".lock").open() as lock:
        # The run itself outlives a runner that is killed, until it has saved.
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert (run / "saved").exists()
    assert not (run / "summary.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert table_of(out / "tiny.csv")[0]["accuracy"] == "0.5"


@pytest.mark.slow
def test_a_child_that_is_stopped_resumes(tiny, tmp_path, monkeypatch):
    """The whole of it: a training that is stopped goes on at its step."""
    monkeypatch.undo()
    long = Row("alone", changed(SMOKE.config, data={"train_size": 1600}))
    run = Run(long, 0, tmp_path / "out")
    run.claim()
    command = [sys.executable, EXPERIMENTS / "child.py", run.folder]
    log = run.folder / "run" / "metrics.jsonl"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 240
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.stdin.close()
        assert process.wait(60) == 143
    child.work(run.folder)
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [s["step"] for s in steps if s["kind"] == "train"] == list(range(1, 401))


def test_runs_of_other_settings_or_code_are_not_mixed_in(tiny, tmp_path):
    run = Run(ALONE, 0, tmp_path / "out")
    folder = run.folder
    run.claim()
    faster = changed(ALONE.config, optimizer={"learning_rate": 0.5})
    said = tiny(code=2, rows=lambda *_: [Row("alone", faster)]).err
    assert f"error: {folder} is a run with other settings" in said
    assert "config.optimizer.learning_rate was 0.003, is 0.5" in said
    assert "delete that folder" in said

    origin = json.loads((folder / "origin.json").read_text())
    origin["code"][-1].update(source="another", commit="abc1234", dirty=True)
    (folder / "origin.json").write_text(json.dumps(origin))
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"batch_size": 4}')
    summary = {"perf": {"peak_memory_mib": 60, "images_per_s": 1}}
    (folder / "run" / "summary.json").write_text(json.dumps(summary))
    said = tiny("--only", "alone", code=2).err
    assert f"{folder} was trained by other code: commit abc1234+changes, this is " in said
    assert len(said.splitlines()) == 1
    tiny("--only", "alone", "--accept-other-commit")
    assert table_of(tmp_path / "out" / "tiny.csv")[0]["code"] == "commit abc1234+changes"

    (folder / "origin.json").unlink()
    assert f"{folder} is not of an experiment" in tiny("--only", "alone", code=2).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "cpuu"], "unknown scale 'cpuu'; did you mean 'cpu'?"),
        (["--only", "alon"], "unknown label 'alon'; did you mean 'alone'?"),
        (["--seeds", "0"], "--seeds is 0; at least 1"),
    ],
)
def test_bad_arguments_are_one_message(tiny, arguments, said):
    assert tiny(*arguments, code=2).err == f"error: {said}\n"


def test_one_runner_at_a_time(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at work" in tiny(code=2).err


def test_the_interval_of_one_seed_is_the_binomial_one():
    n, share = 50, 0.7
    low, high = bootstrap_interval([share], [n])
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    cumulated = np.cumsum(chances)
    assert abs(low - np.argmax(cumulated >= 0.025) / n) <= 1 / n
    assert abs(high - np.argmax(cumulated >= 0.975) / n) <= 1 / n


def test_the_interval_of_several_seeds_is_that_of_resampled_examples():
    right = {0.4: 40, 0.6: 200, 0.7: 100}
    interval = bootstrap_interval(list(right), list(right.values()))
    rng = np.random.default_rng(7)
    answers = [np.arange(n) < round(share * n) for share, n in right.items()]
    means = [
        np.mean(
            [rng.choice(a, len(a)).mean() for a in (answers[i] for i in rng.integers(3, size=3))]
        )
        for _ in range(4000)
    ]
    np.testing.assert_allclose(interval, np.percentile(means, (2.5, 97.5)), atol=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_has_rows_at_every_scale(name, monkeypatch):
    experiment = importlib.import_module(name)
    monkeypatch.setattr(experiment, "make_tiny_panda", lambda *_: None, raising=False)
    for scale in ("cpu", "paper"):
        runs = runs_of(experiment.rows(scale, Path("none")), 3, Path("none"))
        assert len({run.name for run in runs if run.wanted}) >= 7


@pytest.mark.parametrize(
    ("name", "only"),
    [
        (NAMES[0], ["--only", "patchgd"]),
        *(pytest.param(name, [], marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_smoke(name, only, tmp_path):
    """In processes, as a user runs it."""
    script = str(EXPERIMENTS / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, "--scale", "smoke", "--out", str(tmp_path), *only],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = table_of(tmp_path / f"{name}.csv")
    assert len(lines) >= (1 if only else 2)
    assert all(line["reason"] == "" for line in lines)
    assert all(float(line["step_memory_mib"]) > 0 for line in lines)
    assert {f"{name}.{kind}" for kind in ("json", "md", "png")} <= {
        path.name for path in tmp_path.iterdir()
    }
