"""The package as a whole: what importing it loads, what the README says, where it caches."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchgd_jax
from patchgd_jax.engine.compiling import use_compilation_cache
from patchgd_jax.models import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_is_light():
    heavy = "tyro matplotlib sklearn tensorflow_datasets PIL psutil torch tensorflow "
    heavy += "safetensors huggingface_hub"
    code = f"import patchgd_jax, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_the_core_needs_only_jax_flax_optax_and_numpy():
    """What a GPU machine without the rest of the dependencies can still run."""
    blocked = ["tyro", "matplotlib", "sklearn", "tensorflow_datasets", "PIL"]
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    # Smaller images: these are convolutions that XLA is slow at.
    example = example.replace("512", "192").replace("768", "256")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n{example}"
    assert float(python(code)) > 0


@pytest.mark.parametrize("call", ["register_encoder", "from_nnx"])
def test_the_readmes_own_networks_work(call, monkeypatch):
    monkeypatch.setattr(registry, "ENCODERS", dict(registry.ENCODERS))
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.S)
        if f"pgd.{call}(" in block
    ]
    names = {"__name__": __name__}
    exec(example, names)
    model, key = names["model"], jax.random.key(0)
    patches = np.zeros((2, 64, 64, 3), np.uint8)

    def logits(key):
        params, state = model.init(key)
        latents, state = model.encode(params, state, patches, train=True, rng=key)
        z = jnp.zeros((2, 8, 12, latents.shape[1]))
        return model.classify(params, state, z, None, train=True, rng=key)[0]

    assert jax.eval_shape(logits, key).shape == (2, 10)


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


@pytest.fixture
def cache_settings():
    """Of jax, as they were before a test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.skipif(sys.platform != "linux", reason="the cache folder is set by XDG_CACHE_HOME")
def test_the_compilation_cache_is_private(tmp_path, monkeypatch, cache_settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "patchgd-jax" / "xla"
    assert use_compilation_cache() == f"kept in {folder}"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    assert "can be written by others" in use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
