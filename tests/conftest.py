"""What all tests share: quick compiles, little memory, and commands without processes."""

from __future__ import annotations

import gc
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import hypothesis
import jax
import psutil
import pytest
from micro import run_here

from patchgd_jax.engine.compiling import release_memory

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PLATFORMS"] = "cpu"
# The emitters of jaxlib 0.10 can be left out, which takes two thirds off its compile times. Later
# ones have no such flag, and a flag that XLA does not know ends the process.
if version("jaxlib").startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Most of the suite's time is the compiler's, in its processes too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# The same few examples each time, of which each compiles something.
hypothesis.settings.register_profile(
    "suite", max_examples=15, derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("suite")

MOST_BYTES = 1_300_000_000
"""Memory of a worker from which on it compiles again rather than keep its programs."""


@pytest.fixture(scope="module", autouse=True)
def dropped_programs():
    """Drops a module's programs after it."""
    yield
    drop_programs()


def drop_programs():
    """Frees the memory of all compiled programs."""
    jax.clear_caches()
    gc.collect()
    release_memory()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Drops programs within a module as well, where it compiles very many."""
    if psutil.Process().memory_info().rss > MOST_BYTES:
        drop_programs()


@pytest.fixture
def float64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `patchgd-jax` in this process, in an empty folder: a start of Python takes seconds."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = run_here(*arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run
