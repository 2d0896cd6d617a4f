"""The experiments: their runner against interruptions and foreign runs, and their smoke scale."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
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

# Rows with a start, without one, and that cannot be trained; `LONG` steps of the first.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(EXPERIMENTS)!r})
from runner import main
from runs import Row
from settings import SMOKE, changed

def rows(scale, folder):
    long = 4 * int(os.environ.get("LONG", 2))
    rate = float(os.environ.get("RATE", 1e-3))
    alone = changed(SMOKE.config, data={{"train_size": long}}, optimizer={{"learning_rate": rate}})
    return [
        Row("alone", alone, {{"method": "patchgd"}}),
        Row("diverges", changed(SMOKE.config, optimizer={{"name": "sgd", "learning_rate": 1e38}})),
        Row("no such encoder", changed(SMOKE.config, model={{"encoder": "no-such"}})),
        SMOKE.row("from a start"),
    ]

main("tiny", rows)
"""


@pytest.fixture
def tiny(tmp_path):
    """A command line that runs the small experiment above in `tmp_path / "out"`."""
    script = tmp_path / "tiny.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, str(script), "--scale", "smoke", "--out", str(tmp_path / "out")]


def run(command, code=0, **environment):
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process


def python(code):
    """Runs code in a process that can import what lies in experiments/."""
    return run([sys.executable, "-c", code], PYTHONPATH=str(EXPERIMENTS)).stdout


def table_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_finished_runs_are_kept_and_failed_ones_are_rows(tiny, tmp_path):
    out = tmp_path / "out"
    # The encoder that there is none of is a mistake, not a result.
    said = run(tiny, code=2).stdout
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
    outputs = {path: path.stat().st_size for path in out.glob("*/output.txt")}
    again = run([*tiny, "--only", "alone", "diverges", "from a start"]).stdout
    assert "failed: step" in again
    assert {path: path.stat().st_mtime_ns for path in summaries} == summaries
    assert {path: path.stat().st_size for path in outputs} == outputs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tiny, tmp_path, number):
    command = [*tiny, "--only", "alone"]
    folder = tmp_path / "out" / "alone-seed-0"
    with subprocess.Popen(
        command, env={**os.environ, "LONG": "400"}, stderr=subprocess.PIPE, text=True
    ) as process:
        log = folder / "run" / "metrics.jsonl"
        until = time.monotonic() + 240
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert said.startswith("error: stopped by SIGTERM after saving; the same command goes on")
    with (tmp_path / "out" / ".lock").open() as lock:
        # The run itself outlives a runner that is killed, until it has saved.
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert not (folder / "run" / "summary.json").exists()
    assert list((folder / "run" / "checkpoints").glob("0*"))
    run(command, LONG="400")
    assert "Resuming" in (folder / "output.txt").read_text(encoding="utf-8")
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [s["step"] for s in steps if s["kind"] == "train"] == list(range(1, 401))


def test_runs_of_other_settings_or_code_are_not_mixed_in(tiny, tmp_path):
    command = [*tiny, "--only", "alone"]
    folder = tmp_path / "out" / "alone-seed-0"
    run(command)
    said = run(command, code=2, RATE="0.5").stderr
    assert f"error: {folder} is a run with other settings" in said
    assert "config.optimizer.learning_rate was 0.001, is 0.5" in said
    assert "delete that folder" in said

    origin = json.loads((folder / "origin.json").read_text())
    origin["code"][-1].update(source="another", commit="abc1234", dirty=True)
    (folder / "origin.json").write_text(json.dumps(origin))
    said = run(command, code=2).stderr
    assert f"{folder} was trained by other code: commit abc1234+changes, this is " in said
    assert len(said.splitlines()) == 1
    run([*command, "--accept-other-commit"])
    assert table_of(tmp_path / "out" / "tiny.csv")[0]["code"] == "commit abc1234+changes"

    (folder / "origin.json").unlink()
    assert f"{folder} is not of an experiment" in run(command, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "cpuu"], "unknown scale 'cpuu'; did you mean 'cpu'?"),
        (["--only", "alon"], "unknown label 'alon'; did you mean 'alone'?"),
        (["--seeds", "0"], "--seeds is 0; at least 1"),
    ],
)
def test_bad_arguments_are_one_message(tiny, arguments, said):
    assert run([*tiny, *arguments], code=2).stderr == f"error: {said}\n"


def test_one_runner_at_a_time(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at work" in run(tiny, code=2).stderr


def test_the_interval_of_one_seed_is_the_binomial_one():
    n, share = 50, 0.7
    code = f"from collect import bootstrap_interval\nprint(*bootstrap_interval([{share}], [{n}]))"
    low, high = map(float, python(code).split())
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    cumulated = np.cumsum(chances)
    assert abs(low - np.argmax(cumulated >= 0.025) / n) <= 1 / n
    assert abs(high - np.argmax(cumulated >= 0.975) / n) <= 1 / n


def test_the_interval_of_several_seeds_is_that_of_resampled_examples():
    right = {0.4: 40, 0.6: 200, 0.7: 100}
    code = (
        "from collect import bootstrap_interval\n"
        f"print(*bootstrap_interval({list(right)}, {list(right.values())}))"
    )
    interval = list(map(float, python(code).split()))
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
def test_an_experiment_says_how_it_is_run_and_has_rows_at_every_scale(name):
    text = (EXPERIMENTS / f"{name}.py").read_text(encoding="utf-8")
    assert f"Command:   python experiments/{name}.py --scale" in text
    assert "\nTime:      " in text
    assert "\nExpected:  " in text
    code = (
        f"import {name} as experiment\nfrom pathlib import Path\nfrom runs import runs_of\n"
        "experiment.make_tiny_panda = lambda *_: None\n"
        "for scale in ('cpu', 'paper'):\n"
        "    runs = runs_of(experiment.rows(scale, Path('none')), 3, Path('none'))\n"
        "    print(scale, len({run.name for run in runs if run.wanted}))"
    )
    assert all(int(line.split()[1]) >= 7 for line in python(code).splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--scale", "smoke"]
    run([*command, "--out", str(tmp_path)])
    lines = table_of(tmp_path / f"{name}.csv")
    assert len(lines) >= 2
    assert all(line["reason"] == "" for line in lines)
    assert all(float(line["step_memory_mib"]) > 0 for line in lines)
    assert {f"{name}.{kind}" for kind in ("json", "md", "png")} <= {
        path.name for path in tmp_path.iterdir()
    }
