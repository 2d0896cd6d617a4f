"""Writes a benchmark's result with what is needed to repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _told(argument: str) -> str:
    """An argument; of a path from the root, which others do not have, the last part."""
    return Path(argument).name if os.path.isabs(argument) else argument


def record(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json`: the figures, versions, device, command and commit."""
    import jax

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS).stdout.strip()

    # Results of other programs, written before, change nothing of this one.
    changed = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)*/results/*")
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    content = {
        "figures": figures,
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(_told, sys.argv[1:])]),
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: installed[package] for package in packages if package in installed},
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
