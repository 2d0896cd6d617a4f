"""The comparison with PyTorch: what it counts, and that it runs where little is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def python(code):
    """Runs code in a process that can import what lies in benchmarks/."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_package_needs_torch_for_nothing_but_its_weight_files():
    sources = (BENCHMARKS.parent / "patchgd_jax").rglob("*.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    importing = {n for n, text in texts.items() if re.search(r"(import|from) torch\b", text)}
    assert importing == {"weight_files.py"}
    at_import = re.compile(r"^(import|from) torch\b", re.MULTILINE)
    assert not at_import.search(texts["weight_files.py"])


def test_the_gpu_suite_needs_no_data_pipeline_and_no_command_line():
    """GPU machines often have jax, flax, optax, orbax and torch, but none of these."""
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    blocked = ["tyro", "tensorflow_datasets", "sklearn", "PIL", "platformdirs"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import gpu_suite, worker, jax\n"
        "contender = worker.Ours(worker.Task('ours', 'dots', depth=18, side=64, patch=32,"
        " inner_steps=2, plan_only=True))\n"
        "print(contender.start()['compiled_bytes']['temporary'])"
    )
    assert int(python(code).split()[-1]) > 0


def test_flops_are_those_of_the_textbook():
    """By torchvision, ResNet-18 and -50 at 224 px are 1.814 and 4.089 billion multiply-adds."""
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    code = (
        "from flops import step_flops\nfrom worker import Task\n"
        "for depth in (18, 50):\n"
        "    print(step_flops(Task('torch', method='gd', depth=depth, side=224, batch=1,"
        " latent=1000)))\n"
        "print(step_flops(Task('torch', depth=18, side=448, patch=224, inner_steps=4, batch=2)))"
    )
    whole18, whole50, patches = map(int, python(code).split())
    assert whole18 == pytest.approx(3 * 2 * 1.814e9, rel=1e-3)
    assert whole50 == pytest.approx(3 * 2 * 4.089e9, rel=1e-3)
    # Four patches of two images: two forwards and a backward of each, and a small head.
    assert patches == pytest.approx(4 * 8 * 2 * 1.814e9, rel=1e-2)


def test_a_contender_that_cannot_run_says_why():
    code = (
        "from contenders import compare\nfrom worker import Task\n"
        "print(compare([Task('ours', 'no-such-policy', depth=18, side=64, patch=32)], rounds=1))"
    )
    said = python(code)
    assert "failure" in said
    assert "no-such-policy" in said


def test_quartiles():
    code = "from contenders import quartiles\nprint(quartiles([4, 1, 2, 3, 5]), quartiles([2]))"
    assert python(code).strip() == "(2.0, 3.0, 4.0) (2, 2, 2)"
