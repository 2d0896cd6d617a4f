"""The comparison with PyTorch: what it counts, and that it runs where little is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import contenders
import pytest
from worker import Task

BENCHMARKS = Path(contenders.__file__).parent
TORCH = "the extra `torch` is not installed"


def test_the_package_needs_torch_for_nothing_but_its_weight_files():
    package = BENCHMARKS.parent / "patchgd_jax"
    texts = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in package.rglob("*.py")
    }
    importing = {n for n, text in texts.items() if re.search(r"(import|from) torch\b", text)}
    assert importing == {"weights/files.py"}
    at_import = re.compile(r"^(import|from) torch\b", re.MULTILINE)
    assert not at_import.search(texts["weights/files.py"])


def test_the_gpu_suite_needs_no_data_pipeline_and_no_command_line():
    """GPU machines often have jax, flax, optax, orbax and torch, but none of these."""
    pytest.importorskip("torch", reason=TORCH)
    blocked = ["tyro", "tensorflow_datasets", "sklearn", "PIL", "platformdirs"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import gpu_suite, worker, jax\n"
        "contender = worker.Ours(worker.Task('ours', 'dots', depth=18, side=64, patch=32,"
        " inner_steps=2, plan_only=True))\n"
        "print(contender.start()['compiled_bytes']['temporary'])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"},
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) > 0


def test_flops_are_those_of_the_textbook():
    """By torchvision, ResNet-18 and -50 at 224 px are 1.814 and 4.089 billion multiply-adds."""
    pytest.importorskip("torch", reason=TORCH)
    from flops import step_flops

    whole18, whole50 = (
        step_flops(Task("torch", method="gd", depth=depth, side=224, batch=1, latent=1000))
        for depth in (18, 50)
    )
    patches = step_flops(Task("torch", depth=18, side=448, patch=224, inner_steps=4, batch=2))
    assert whole18 == pytest.approx(3 * 2 * 1.814e9, rel=1e-3)
    assert whole50 == pytest.approx(3 * 2 * 4.089e9, rel=1e-3)
    # Four patches of two images: two forwards and a backward of each, and a small head.
    assert patches == pytest.approx(4 * 8 * 2 * 1.814e9, rel=1e-2)


def test_a_contender_that_cannot_run_says_why():
    task = Task("ours", "no-such-policy", depth=18, side=64, patch=32)
    said = str(contenders.compare([task], rounds=1))
    assert "failure" in said
    assert "no-such-policy" in said


def test_quartiles():
    assert contenders.quartiles([4, 1, 2, 3, 5]) == (2, 3, 4)
    assert contenders.quartiles([2]) == (2, 2, 2)
