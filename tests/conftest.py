"""Settings for all tests: float64 where asked, a shared compilation cache, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Most of these modules' time is the compiler's, and none of what they prove is about its work: they
# look at what runs do and leave, not at numbers, memory or speed of a single program.
QUICKLY_COMPILED = {"test_cli", "test_dry_run", "test_executions", "test_experiments", "test_train"}


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled(request):
    """Programs of the modules named above are compiled without optimizations, in processes too.

    Not those of the slow tests, which train for long.
    """
    slow = request.config.getoption("markexpr") == "slow"
    if slow or request.module.__name__ not in QUICKLY_COMPILED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def float64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def command(tmp_path):
    """Runs `patchgd-jax` as a user does, in a process of its own, in an empty folder."""

    def run(*arguments, cwd=tmp_path, **options):
        return subprocess.run(
            [sys.executable, "-m", "patchgd_jax", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "COLUMNS": "100", **options},
        )

    return run
