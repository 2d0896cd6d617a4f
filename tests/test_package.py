"""The package as a whole: what importing it loads, what the README says, where it caches."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import patchgd_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_is_light():
    heavy = "tyro matplotlib sklearn tensorflow_datasets PIL psutil torch tensorflow "
    heavy += "safetensors pooch"
    code = f"import patchgd_jax, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_the_core_needs_only_jax_flax_optax_and_numpy():
    """What a GPU machine without the rest of the dependencies can still run."""
    blocked = ["tyro", "matplotlib", "sklearn", "tensorflow_datasets", "PIL"]
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n{example}"
    assert float(python(code)) > 0


@pytest.mark.parametrize("call", ["register_encoder", "from_nnx"])
def test_the_readmes_own_networks_work(call):
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.S)
        if f"pgd.{call}(" in block
    ]
    check = """
import jax, numpy as np
patches, key = np.zeros((2, 64, 64, 3), np.uint8), jax.random.key(0)
params, state = jax.eval_shape(model.init, key)
def encode(params, state):
    return model.encode(params, state, patches, train=True, rng=key)[0]
latents = jax.eval_shape(encode, params, state)
def classify(params, state):
    z = np.zeros((2, 8, 12, latents.shape[1]), np.float32)
    return model.classify(params, state, z, None, train=True, rng=key)[0]
print(jax.eval_shape(classify, params, state).shape)
"""
    assert python(example + check).strip() == "(2, 10)"


def test_the_readmes_commands_are_one_line_each():
    commands = re.findall(r"<!-- command \d -->\n```sh\n(.*?)```", README, re.S)
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
    assert commands[0].strip().endswith("patchgd-jax train")
    assert commands[1].strip().endswith("pytest")


def test_every_public_name_is_documented():
    for name in dir(patchgd_jax):
        thing = getattr(patchgd_jax, name)
        if name.startswith("_") or not callable(thing):
            continue
        assert thing.__doc__, name
        assert thing.__doc__.strip(), name


def test_the_version_is_written_once():
    from importlib.metadata import version

    assert version("patchgd-jax") == patchgd_jax.__version__


CACHE = (
    "import jax; jax.config.update('jax_compilation_cache_dir', None);"
    "from patchgd_jax.engine.compiling import use_compilation_cache;"
    "print(use_compilation_cache());"
    "print(jax.config.jax_compilation_cache_dir)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the cache folder is set by XDG_CACHE_HOME")
def test_the_compilation_cache_is_private(tmp_path):
    folder = tmp_path / "patchgd-jax" / "xla"
    said, used = python(CACHE, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert said == f"kept in {folder}"
    assert used == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    said, used = python(CACHE, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert "can be written by others" in said
    assert used == "None"
