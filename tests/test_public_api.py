"""The public names: what `__all__` holds, the README lists, and users import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import patchgd_jax

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_exactly_the_public_names():
    table = README.split("<!-- public names -->")[1].split("<!-- end of public names -->")[0]
    listed = [
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(listed) == sorted(set(patchgd_jax.__all__) - {"__version__"})


def test_every_public_name_is_there_and_documented():
    for name in patchgd_jax.__all__:
        value = getattr(patchgd_jax, name)
        if callable(value) and getattr(value, "__module__", "").startswith("patchgd_jax"):
            assert value.__doc__, name


def test_heavy_parts_are_loaded_at_first_use():
    code = (
        "import sys, patchgd_jax; before = 'patchgd_jax.runs.train' in sys.modules;"
        "patchgd_jax.train; print(before, 'patchgd_jax.runs.train' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(patchgd_jax, "trian")
