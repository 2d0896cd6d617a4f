"""A run whose memory is not enough, by an injected failure and by a real limit of the system."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import jax
import micro
import pytest

from patchgd_jax import ModelConfig, PatchGDConfig
from patchgd_jax.cli.main import main
from patchgd_jax.planner import MemoryBudgetError
from patchgd_jax.runs.out_of_memory import explain_oom
from patchgd_jax.runs.train import train

BASE = dataclasses.replace(micro.BASE, save_every=1, device="cpu")
FAILURE = "RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes."


def fail_after(last, error):
    def on_step(step):
        if step == last:
            raise error

    return on_step


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError(FAILURE), MemoryError("no pixels")])
def test_the_run_says_what_is_saved_and_what_would_fit(error, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(MemoryBudgetError) as caught:
        train(BASE, run, on_step=fail_after(2, error))
    assert caught.value.exit_code == 4
    first, *rest = str(caught.value).splitlines()
    assert first == f"out of memory: {error}"
    text = "\n".join(rest)
    for words in (
        "The plan of this setting",
        "accumulate",
        "The next smaller setting that fits by the plan: ",
        "saved after step 2",
        f"patchgd-jax resume {run}",
        f"--init-encoder {run}",
    ):
        assert words in text


def test_the_command_ends_with_4(tmp_path, monkeypatch, capsys):
    """Through the command's own code, with a step that fails as XLA's do."""
    from patchgd_jax.engine.build import ResidentExecutor

    def step(self, state, batch):
        raise jax.errors.JaxRuntimeError(FAILURE)

    monkeypatch.setattr(ResidentExecutor, "train", step)
    monkeypatch.setattr(ResidentExecutor, "compile", lambda self, state: "")
    monkeypatch.chdir(tmp_path)
    settings = ["--data.size", "32", "32", "--data.digits", "font", "--patchgd.patch", "16"]
    assert main(["train", *settings, "--device", "cpu", "--run-dir", "run"]) == 4
    told = capsys.readouterr().err
    assert "error: out of memory: RESOURCE_EXHAUSTED" in told
    assert "Nothing was saved." in told
    assert "Traceback" not in told


def test_the_smaller_setting_is_smaller(tmp_path):
    def advice(config):
        with pytest.raises(MemoryBudgetError) as caught, explain_oom(config, tmp_path):
            raise MemoryError
        return re.search(r"by the plan: (.*)", str(caught.value))[1]

    # Large enough that the fixed share of a step does not hide the rest.
    large = dataclasses.replace(
        BASE,
        data=dataclasses.replace(BASE.data, size=(512, 512)),
        patchgd=PatchGDConfig(patch=64, fraction=0.5),
    )
    smaller = re.fullmatch(r"--patchgd.fraction ([\d.]+) \(.*\)", advice(large))
    assert float(smaller[1]) < 0.5
    exact = dataclasses.replace(
        large,
        model=ModelConfig(latent_dim=8, norm="group"),
        patchgd=PatchGDConfig(patch=64, mode="exact", fill_chunk=32),
    )
    smaller = re.fullmatch(r"--batch-size (\d+) --eval-batch-size (\d+) \(.*\)", advice(exact))
    assert int(smaller[1]) < 8
    one = dataclasses.replace(BASE, batch_size=1, patchgd=PatchGDConfig(patch=32, fraction=1))
    assert advice(one).startswith("none by")


def test_other_failures_stay_what_they_are(tmp_path):
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        explain_oom(BASE, tmp_path),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


LIMITED = """
import resource, sys
import psutil
from patchgd_jax.cli.main import main
from patchgd_jax.engine.build import ResidentExecutor

compile = ResidentExecutor.compile

def compile_then_limit(self, state):
    said = compile(self, state)
    # From here on there is room for less than the step's buffers of about 450 MiB.
    limit = psutil.Process().memory_info().data + 350 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return said

ResidentExecutor.compile = compile_then_limit
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may allot")
def test_a_real_limit_ends_the_run_with_4(tmp_path):
    arguments = [
        "train", "--data.size", 512, 512, "--data.digits", "font", "--data.digit-count", 1,
        "--data.label-share", 1, "--data.train-size", 16, "--data.val-size", 2,
        "--model.latent-dim", 16, "--batch-size", 8, "--eval-batch-size", 2, "--device", "cpu",
        "--patchgd.fraction", 1, "--run-dir", "run",
    ]  # fmt: skip
    failed = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert failed.returncode == 4, failed.stderr
    assert "error: out of memory" in failed.stderr
    assert "ulimit -d" in failed.stderr
    assert "Traceback" not in failed.stderr
    smaller = re.search(r"by the plan: --patchgd.fraction ([\d.]+)", failed.stderr)
    assert smaller, failed.stderr
    assert float(smaller[1]) < 1
