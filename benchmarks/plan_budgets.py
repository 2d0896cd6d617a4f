"""Whether what the planner suggests trains inside a real limit, and the next larger does not.

Command:   python benchmarks/plan_budgets.py
Time:      about half an hour on two CPU cores; it needs Linux, and root to make a control group
Expected:  the suggested setting trains 50 steps with evaluation in 10 of 10 budgets; one step above
           it is killed, or its peak is above the budget, in at least 8 of 10

The limit is a control group's, because it counts memory that is really there, as a machine does.
`ulimit -d` and `-v` count what is allotted: the C library's arenas of 64 MiB for each thread alone
would be more than these budgets. It is set when everything is compiled and every library has been
used once, to what the process then has, its state left out, plus the budget, what images may wait
in, and pages of files on their way to the disk, which count as well. Whether a run kept to its
budget is told by its own peak.

The steps between settings are coarse: from one image to two, three to four or four to five, or
from half of the patches to all. The planner leaves a margin: the calibration factor less one, and
tens of MB that hardly grow with the setting. A step that is smaller than the margin, from 81 images
to 82 or from four patches of 16 to six say, fits in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import patchgd_jax as pgd
from patchgd_jax.config import from_dict, to_dict
from patchgd_jax.engine.compiling import use_compilation_cache
from patchgd_jax.planner import PeakMeter, calibrate, calibration, parse_size, step_of
from patchgd_jax.planner.auto_settings import resolve_auto
from patchgd_jax.planner.request import tree_bytes
from patchgd_jax.planner.run_plan import plan_of
from patchgd_jax.runs.record.progress import Progress

STEPS = 50
READER_MIB = 8
FILES_MIB = 32
SETTINGS = [
    *(("batch", budget) for budget in ("152MiB", "160MiB", "285MiB", "300MiB", "345MiB")),
    *(("fraction", budget) for budget in ("153MiB", "156MiB", "159MiB", "162MiB", "165MiB")),
]
# By version of the control groups: their folder, and the files of the limit and the usage.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
)
_EMPTY = "memory.force_empty"


def config_of(quantity: str) -> pgd.TrainConfig:
    """The run, with what is asked for left to the planner."""
    fraction: Any = "auto" if quantity == "fraction" else 1.0
    return pgd.TrainConfig(
        data=pgd.DataConfig(size=(512, 512), digits="font", val_size=8, train_size=4096),
        patchgd=pgd.PatchGDConfig(patch=128, fraction=fraction),
        batch_size="auto" if quantity == "batch" else 2,
        eval_batch_size=1,
        eval_every=STEPS // 2,
        reader_mib=READER_MIB,
        device="cpu",
    )


def above(config: pgd.TrainConfig, quantity: str) -> pgd.TrainConfig | None:
    """The next larger setting; None if there is none."""
    if quantity == "batch":
        return dataclasses.replace(config, batch_size=config.images_per_step + 1)
    patches = plan_of(config).requests[0].patches
    inner = config.patchgd.num_inner_steps
    sampled = -(-patches // inner)
    larger = next((j for j in range(inner - 1, 0, -1) if -(-patches // j) > sampled), None)
    if larger is None:
        return None
    patchgd = dataclasses.replace(config.patchgd, fraction=1 / larger)
    return dataclasses.replace(config, patchgd=patchgd)


class Limit(Progress):
    """Puts the process under its limit when everything is compiled."""

    def __init__(self, group: Path, limit: str, usage: str, room: int) -> None:
        self.group, self.limit, self.usage, self.room = group, limit, usage, room

    def shortcuts(self, scores: Any) -> None:
        if (self.group / _EMPTY).exists():
            (self.group / _EMPTY).write_text("0")
        used = int((self.group / self.usage).read_text())
        (self.group / self.limit).write_text(str(used + self.room))
        self.meter = PeakMeter(jax.devices()[0])


def child() -> None:
    """Trains under a limit and prints the peak."""
    from patchgd_jax.runs.train import train

    given = json.load(sys.stdin)
    (Path(given["group"]) / "cgroup.procs").write_text(str(os.getpid()))
    config = from_dict(pgd.TrainConfig, given["config"])
    tiny = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, size=(64, 64), train_size=4, val_size=2),
        patchgd=pgd.PatchGDConfig(patch=64, fraction=1.0),
        batch_size=2,
        eval_batch_size=2,
    )
    progress = Limit(Path(given["group"]), given["limit"], given["usage"], given["room"])
    with tempfile.TemporaryDirectory() as folder:
        # A whole small run, so that every library has been used.
        train(tiny, Path(folder) / "tiny")
        train(config, Path(folder) / "run", progress=progress)
    print(json.dumps({"growth": progress.meter.peak()}))


def train_within(config: pgd.TrainConfig, budget: int) -> dict[str, Any]:
    """Trains in a process under the budget, and says how it ended."""
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train_size=STEPS * config.images_per_step)
    )
    request = plan_of(config).requests[0]
    state = tree_bytes(step_of(request, request.patchgd.mode).state)
    root, limit, usage = next(g for g in _GROUPS if (g[0] / "cgroup.procs").exists())
    group = root / f"patchgd-plan-{os.getpid()}"
    group.mkdir()
    try:
        given = {
            "config": to_dict(config),
            "group": str(group),
            "limit": limit,
            "usage": usage,
            "room": budget - state + (READER_MIB + FILES_MIB) * 2**20,
        }
        command = [sys.executable, __file__, "--child"]
        ended = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    finally:
        group.rmdir()
    result: dict[str, Any] = {"returncode": ended.returncode}
    if ended.returncode == 0:
        peak = json.loads(ended.stdout.splitlines()[-1])["growth"] + state
        result |= {"peak": peak, "within": peak <= budget}
    else:
        lines = ended.stderr.strip().splitlines()
        result["said"] = lines[-1][:200] if lines else "killed"
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--only", type=int, help="the first so many budgets")
    options = parser.parse_args()
    if options.child:
        child()
        return
    from record import record

    use_compilation_cache()
    figures = []
    with tempfile.TemporaryDirectory() as cache:
        # The calibration of this machine alone, as `plan --tier profile` makes it.
        os.environ["XDG_CACHE_HOME"] = cache
        os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        start = dataclasses.replace(config_of("batch"), batch_size=2)
        calibrate(plan_of(start).requests[0], start.patchgd.mode)
        factor = calibration(jax.devices()[0]).factor
        print(f"calibration factor {factor:.3f}")
        for quantity, budget in SETTINGS[: options.only]:
            size = parse_size(budget)
            config = resolve_auto(config_of(quantity), budget)
            figure: dict[str, Any] = {
                "quantity": quantity,
                "budget": size,
                "batch": config.batch_size,
                "fraction": config.patchgd.fraction,
                "suggested": train_within(config, size),
            }
            larger = above(config, quantity)
            if larger is not None:
                figure["above"] = train_within(larger, size)
            figures.append(figure)
            print(figure, flush=True)
            # So that what was found is kept when the time is up.
            record("plan_budgets", {"summary": summary(figures, factor), "budgets": figures})
    print(summary(figures, factor))


def summary(figures: list[dict[str, Any]], factor: float) -> dict[str, Any]:
    return {
        "budgets": len(figures),
        "suggested_trains": sum(f["suggested"].get("within", False) for f in figures),
        "above_fails_or_exceeds": sum(
            "above" in f and not f["above"].get("within", False) for f in figures
        ),
        "factor": factor,
    }


if __name__ == "__main__":
    main()
