"""Weak scaling on virtual devices: compiled work per device as work and devices grow together.

Command:   python benchmarks/weak_scaling.py [mode ...]
Time:      two minutes on two CPU cores; nothing is allocated, only compiled
Expected:  FLOPs and bytes per device within 10 % of one device's, along both axes

Along `data` every device has two images, along `patch` 512 pixel rows of every image. The number
of inner steps stays, so the patches of one grow with the devices. Z and the head, which every
device along `patch` reads whole, are small beside the patches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from record import record

TESTS = Path(__file__).parent.parent / "tests"
DEVICES = (1, 2, 4, 8)


def request(data: int, patch: int, mode: str) -> dict[str, object]:
    return {
        "data": data,
        "patch": patch,
        "height": 512 * patch,
        "batch": 2 * data,
        "mode": mode,
        "strata": patch,
        "fill_chunk": 16 * patch,
    }


def main() -> None:
    cases = [
        (axis, mode, count)
        for axis in ("data", "patch")
        for mode in sys.argv[1:] or ["patchgd"]
        for count in DEVICES
    ]
    requests = [
        request(count if axis == "data" else 1, count if axis == "patch" else 1, mode)
        for axis, mode, count in cases
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    output = subprocess.run(
        [sys.executable, TESTS / "mesh_programs.py", *map(json.dumps, requests)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    ).stdout
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (axis, mode, count), line in zip(cases, output.splitlines(), strict=True):
        program = json.loads(line)
        rows = figures.setdefault(f"{axis}, {mode}", {})
        rows[str(count)] = {
            name: program[name] for name in ("flops", "bytes", "temporary", "arguments")
        }
        first = rows["1"]
        for name in ("flops", "bytes"):
            rows[str(count)][f"{name} over one device's"] = program[name] / first[name]
        print(axis, mode, count, {k: f"{v:.4g}" for k, v in rows[str(count)].items()})
    record("weak_scaling", figures)


if __name__ == "__main__":
    main()
