"""The command line as a user meets it: real processes, exit codes, messages, files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from micro import MICRO, assert_same_run, lines_of, start
from PIL import Image
from test_safe_image import bomb

from patchgd_jax.runs.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, made by the command itself in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    process = start("train", *MICRO, "--run-dir", "first", cwd=folder)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder / "first", printed


def test_train_fills_the_run_folder_and_says_where_it_is(run):
    folder, printed = run
    assert "Run folder: first" in printed
    assert "Best shortcut" in printed
    assert "Compiled 2 programs" in printed
    assert "\r" not in printed, "no live line where there is no terminal"
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 8
    assert config["data"]["size"] == [32, 32]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["jax"]
    steps = [line["step"] for line in lines_of(folder) if line["kind"] == "train"]
    assert steps == list(range(1, 9))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"]["examples"] == 21
    with Image.open(folder / "curves.png") as image:
        assert image.size[0] > 800
    assert len(list((folder / "examples").glob("*.png"))) == 4
    assert (folder / "checkpoints" / "best.json").exists()


def test_importance_sampling_trains_and_the_log_says_how_stale_z_was(command, tmp_path):
    options = ["--patchgd.importance", "loss", "--patchgd.sampling", "uniform", "--epochs", 6,
               "--optimizer.learning-rate", 0.003, "--eval-every", 48]  # fmt: skip
    result = command("train", *MICRO, *options, "--run-dir", "chosen")
    assert result.returncode == 0, result.stderr
    lines = [line for line in lines_of(tmp_path / "chosen") if line["kind"] == "train"]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    for line in lines:
        # Two inner steps of one or two of four patches: two and other two, or one and the same.
        assert 0.5 <= line["z_age"] <= 1.125
        assert line["z_drift"] > 0


def test_evaluate_reproduces_the_recorded_score(run, command):
    folder, _ = run
    result = command("evaluate", folder, "--json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    recorded = metrics.pop("recorded")
    assert {k: v for k, v in metrics.items() if k != "step"} == {
        k: v for k, v in recorded.items() if k != "step"
    }
    text = command("evaluate", folder, "--checkpoint", "last").stdout
    assert "recorded in training" in text
    assert "confusion matrix" in text


def test_predict_labels_images_of_other_sizes(run, command, tmp_path):
    folder, _ = run
    example = sorted((folder / "examples").glob("*.png"))[0]
    wide = tmp_path / "wide.png"
    Image.fromarray(np.zeros((41, 77, 3), np.uint8)).save(wide)
    result = command("predict", folder, example, wide, "--json")
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [a["image"] for a in answers] == [str(example), str(wide)]
    for answer in answers:
        probabilities = answer["probabilities"]
        assert set(probabilities) == set("0123456789")
        assert abs(sum(probabilities.values()) - 1) < 1e-6
        assert answer["label"] == max(probabilities, key=probabilities.get)
    text = command("predict", folder, example).stdout
    assert f"label {answers[0]['label']}" in text


def test_presets_are_listed_and_shown(command):
    listed = command("presets")
    assert listed.returncode == 0
    assert "ultramnist" in listed.stdout
    shown = json.loads(command("presets", "paper").stdout)
    assert shown["model"]["encoder"] == "resnet50"


def test_help_shows_every_setting_with_its_default(command):
    text = command("train", "--help").stdout
    for flag in ("--patchgd.fraction FLOAT", "--optimizer.learning-rate", "--data.size INT INT"):
        assert flag in text
    words = " ".join(text.replace("│", " ").split())
    assert "--fraction for short. (default: 0.25)" in words
    assert "usage" in command().stdout
    assert command("--version").stdout.startswith("patchgd-jax 0.")


def bad(command, code, *words, arguments):
    """The command fails with one clear message and no traceback."""
    result = command(*arguments)
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    text = result.stderr + result.stdout
    assert "Traceback" not in text
    for word in words:
        assert str(word) in text.replace("\n", " "), text
    return result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--patchgd.importance", "loss"],
            ["patchgd.importance loss", "add --patchgd.sampling uniform"],
        ),
        (["trian"], ["unknown command 'trian'; did you mean 'train'"]),
        (["train", "defalt"], ["unknown preset 'defalt'; did you mean 'default'"]),
        (["train", "--batchsize", 3], ["--batchsize", "--batch-size"]),
        (["train", "--batch-size", "many"], ["--batch-size", "INT"]),
        (["train", "--patchgd.mode", "fast"], ["--patchgd.mode", "accumulate"]),
        (["train", "--patchgd.fraction", 1.5], ["patchgd.fraction is 1.5", "(0, 1]"]),
        (
            ["train", "--patchgd.mode", "patchgd", "--patchgd.epsilon", 3],
            ["epsilon 3 does not divide the 4 inner steps"],
        ),
        (["train", "--patchgd.patch", 300], ["patch side 300 is larger than the image", "256"]),
        (["train", "--patchgd.fraction", 0.01], ["100 inner steps for a grid of 16 patches"]),
        (["train", "--model.encoder", "resnet-50"], ["unknown encoder", "resnet50"]),
        (["train", "--model.head", "atention"], ["unknown head", "attention"]),
        (["train", "--patchgd.mode", "exact"], ["patchgd.mode exact needs model.norm group"]),
        (["presets", "papper"], ["unknown preset 'papper'; did you mean 'paper'"]),
        (["predict", "somewhere"], ["no image named"]),
    ],
)
def test_wrong_settings_are_told_and_nothing_is_written(command, tmp_path, arguments, words):
    extra = ["--run-dir", "new"] if arguments[0] == "train" else []
    bad(command, 2, *words, arguments=[*arguments, *extra])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.encoder", "resnet-50"], "did you mean 'resnet50'?"),
        (["--model.head", "atention"], "did you mean 'attention'?"),
        (["--patchgd.patch", 300], "larger than the image"),
        (["--patchgd.inner-steps", 99], "99 inner steps for a grid of 16 patches"),
        (["--mesh", "data"], "mesh 'data' cannot be read"),
        (["--param-rules", "kernel"], "cannot be read"),
    ],
)
def test_a_wrong_setting_is_reported_before_any_data(command, monkeypatch, arguments, words):
    def looked_at(*_):
        raise AssertionError("the data were looked at")

    monkeypatch.setattr("patchgd_jax.runs.run.make_data", looked_at)
    monkeypatch.setattr("patchgd_jax.runs.train.resolve_channels", looked_at)
    result = command("train", *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_a_used_run_folder_is_left_alone(run, command):
    folder, _ = run
    before = sorted(folder.rglob("*"))
    bad(command, 2, "is in use", "resume", arguments=["train", *MICRO, "--run-dir", folder])
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_a_disk_error(command, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["train", *MICRO, "--run-dir", tmp_path / "file" / "run"]
    bad(command, 7, "cannot write run folder", arguments=arguments)


@pytest.mark.parametrize("name", ["resume", "evaluate", "predict"])
def test_folders_without_a_run_are_told(command, tmp_path, name):
    image = ["a.png"] if name == "predict" else []
    bad(command, 6, "does not exist", arguments=[name, tmp_path / "nowhere", *image])
    (tmp_path / "empty").mkdir()
    bad(command, 6, "holds no run", arguments=[name, tmp_path / "empty", *image])


def test_a_checkpoint_of_another_model_is_refused(run, command, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["latent_dim"] = 17
    (copy / "config.json").write_text(json.dumps(config))
    words = ["another model", "float32[256, 16]", "float32[256, 17]"]
    bad(command, 6, *words, arguments=["evaluate", copy])
    bad(command, 6, "model.latent_dim was 16, is 17", arguments=["resume", copy])
    config["model"]["latentdim"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    bad(command, 2, "latentdim", "did you mean", arguments=["evaluate", copy])
    (copy / "config.json").write_text("{")
    bad(command, 2, "cannot read", arguments=["evaluate", copy])


def test_changed_settings_are_refused(run, command, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["object_ratio"] = [0.7, 1]
    (copy / "config.json").write_text(json.dumps(config))
    words = ["has changed since its checkpoint 8", "data.object_ratio was [0.8, 1.0], is [0.7, 1]"]
    bad(command, 6, *words, arguments=["resume", copy])


def test_damaged_checkpoints_fall_back_and_then_end(run, command, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    for path in (copy / "checkpoints").glob("0*/meta.json"):
        path.write_text("{}")
    bad(command, 6, "is damaged: meta.json has changed", "no usable", arguments=["evaluate", copy])


def test_bad_images_are_told(run, command, tmp_path):
    folder, _ = run
    good = sorted((folder / "examples").glob("*.png"))[0]
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:120])
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((8, 40), np.uint8)).save(small)
    cases = {
        tmp_path / "missing.png": "there is no such file",
        cut: "cut.png",
        small: "patch side 16 is larger than the image (8 x 40 px",
        bomb(tmp_path / "bomb.png"): "60000 x 60000 px",
    }
    for path, reason in cases.items():
        result = bad(command, 3, reason, path, arguments=["predict", folder, good, path, "--json"])
        assert result.stdout == "", "nothing is printed for the images before it"


def test_a_fixed_head_says_which_grid_it_needs(command, tmp_path):
    arguments = ["train", *MICRO, "--model.head", "cnn-smaller-feat", "--run-dir", "cnn"]
    assert command(*arguments).returncode == 0
    wide = tmp_path / "wide.png"
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(wide)
    words = ["2 x 3 patches", "cnn-smaller-feat works only on the 2 x 2", "--model.head attention"]
    bad(command, 2, *words, arguments=["predict", "cnn", wide])


def test_a_missing_device_is_told(tmp_path, monkeypatch):
    """In a process, which ends with the error's exit code."""
    monkeypatch.delenv("JAX_PLATFORMS")
    process = start("train", *MICRO, "--device", "gpu", "--run-dir", "new", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert process.returncode == 8
    assert "no gpu device; install patchgd-jax[cuda13]" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_another_device_than_the_one_in_use_is_refused(command):
    """JAX keeps the platform that a process has used first."""
    assert jax.devices()[0].platform == "cpu"
    words = ["no tpu device: this process already uses JAX on cpu", "start a new process"]
    bad(command, 8, *words, arguments=["plan", "tiny", "--device", "tpu"])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_batch(command, tmp_path):
    arguments = ["train", *MICRO, "--optimizer.learning-rate", 1e6, "--optimizer.name", "sgd",
                 "--model.norm", "group", "--epochs", 9, "--eval-every", 100, "--save-every", 1,
                 "--run-dir", "nan"]  # fmt: skip
    result = bad(command, 5, arguments=arguments)
    told = re.search(r"error: step (\d+): .*batch (\d+): examples \d+", result.stderr)
    assert told, result.stderr
    assert int(told[1]) == int(told[2]) + 1
    checkpoints = Checkpoints(tmp_path / "nan" / "checkpoints")
    assert checkpoints.steps(), "the run must have saved before it diverged"
    for step in checkpoints.steps():
        for leaf in jax.tree.leaves(checkpoints.restore_arrays(step)["params"]):
            assert np.isfinite(leaf).all(), "no checkpoint may hold what is not finite"


def test_debug_adds_the_traceback(command):
    result = command("train", "defalt", "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_resume_ends_like_an_uninterrupted_run(command, tmp_path, number):
    long = [*MICRO, "--epochs", 15, "--eval-every", 100, "--save-every", 10]
    straight = command("train", *long, "--run-dir", "straight")
    assert straight.returncode == 0, straight.stderr
    process = start("train", *long, "--run-dir", "stopped", cwd=tmp_path)
    metrics = tmp_path / "stopped" / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 200
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {signal.Signals(number).name} after step" in errors
    assert "patchgd-jax resume stopped" in errors
    assert "Traceback" not in errors
    resumed = command("resume", "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_while_compiling_ends_at_once(tmp_path):
    # A width that no other test compiles.
    arguments = [*MICRO, "--model.latent-dim", 19, "--run-dir", "early"]
    process = start("train", *arguments, cwd=tmp_path)
    assert process.stdout.readline().startswith("Device")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM while preparing" in errors
    assert "Traceback" not in errors


def test_a_second_signal_ends_the_process_without_saving():
    code = (
        "import os, signal\nfrom patchgd_jax.runs.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signal_number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "15\n"
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error():
    code = "from patchgd_jax.cli.main import run\nrun()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_the_encoder_of_another_run_is_taken_over(run, command, tmp_path):
    folder, _ = run
    arguments = ["train", *MICRO, "--init-encoder", folder, "--optimizer.learning-rate", 1e-30]
    result = command(*arguments, "--run-dir", "second")
    assert result.returncode == 0, result.stderr
    wanted = Checkpoints(folder / "checkpoints")
    wanted = wanted.restore_arrays(wanted.best())["params"]["encoder"]
    got = Checkpoints(tmp_path / "second" / "checkpoints")
    got = got.restore_arrays(got.best())["params"]["encoder"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, wanted)
    other = ["train", *MICRO, "--init-encoder", folder, "--model.latent-dim", 8]
    bad(
        command,
        6,
        "params/encoder of checkpoint",
        "another model",
        arguments=[*other, "--run-dir", "third"],
    )
    assert not (tmp_path / "third").exists()
