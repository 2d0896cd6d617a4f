"""patchgd_jax beside the PyTorch reference on the same work: speed, memory, compile time.

Command:   python benchmarks/compare.py            (needs the extra `torch`; --quick for a trial)
Time:      about half an hour on two CPU cores, otherwise idle
Expected:  more images per second than the best PyTorch variant in every float32 row

Every contender is a process of its own; they take turns (A B A B), and the figures are medians
with quartiles. Writes results/compare.json, results/compare.md and two plots.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any

from contenders import Contender, compare
from flops import step_flops
from plots import memory_plot, speed_plot
from record import RESULTS, record
from worker import Task

SETTINGS = {
    "ResNet-50, 512 px, p = 64": Task("ours", depth=50, patch=64),
    "ResNet-18, 512 px, p = 32": Task("ours", depth=18, patch=32),
    "ResNet-18, 512 px, p = 128": Task("ours", depth=18, patch=128),
}
VARIANTS = (
    ("ours", "dots", "float32"),
    ("torch", "", "float32"),
    ("torch", "channels_last", "float32"),
    ("torch", "channels_last+compile", "float32"),
    ("torch", "channels_last", "bfloat16"),
)
# Whole-image rows may take this much memory before they count as too large.
BUDGET = 12 << 30
SIDES = (512, 1024, 2048, 4096, 8192, 16384)


def label(task: Task | dict[str, Any]) -> str:
    """A contender's name in tables and plots."""
    get = task.get if isinstance(task, dict) else lambda name: getattr(task, name)
    if get("library") == "ours":
        name = "patchgd_jax"
    else:
        variant = get("variant").replace("channels_last+compile", "torch.compile, channels-last")
        name = f"PyTorch {variant.replace('channels_last', 'channels-last') or 'eager'}"
    return name + (", bf16" if get("dtype") == "bfloat16" else "")


def speed(settings: dict[str, Task], rounds: int) -> dict[str, Any]:
    """Every variant at every setting."""
    rows = {}
    for name, task in settings.items():
        tasks = [replace(task, library=a, variant=b, dtype=c) for a, b, c in VARIANTS]
        results = compare(tasks, rounds=rounds)
        rows[name] = {"flops_per_step": step_flops(task), "contenders": results}
        for result in results:
            print(name, label(result["task"]), summary(result), flush=True)
    return rows


def summary(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "failure" in result:
        return f"does not run: {result['failure']}"
    return (
        f"{result['images_per_s']:.2f} images/s, peak {result['peak_bytes'] / 2**20:.0f} MiB, "
        f"compile {result['compile_cold_s']:.1f} / {result.get('compile_warm_s', 0):.1f} s"
    )


def whole_image(sides: tuple[int, ...], rounds: int) -> dict[int, Any]:
    """GD, the plain network on the whole image, until it no longer fits the budget."""
    rows: dict[int, Any] = {}
    pairs = (("ours", "none"), ("ours", "blocks"), ("torch", "channels_last"))
    failed: set[tuple[str, str]] = set()
    for side in sides:
        tasks = [
            Task(a, b, method="gd", side=side, batch=1, limit_bytes=BUDGET)
            for a, b in pairs
            if (a, b) not in failed
        ]
        if not tasks:
            break
        # One after another: two of them at once would not fit the machine.
        rows[side] = [compare([task], rounds=rounds)[0] for task in tasks]
        for task, result in zip(tasks, rows[side], strict=True):
            print("GD", side, label(task), task.variant, summary(result), flush=True)
            if "failure" in result:
                failed.add((task.library, task.variant))
    return rows


def memory_by_side(sides: tuple[int, ...], measured: tuple[int, ...]) -> dict[str, Any]:
    """Memory at a fixed number of patches, k = 16 of 128 px: compiled, and measured where feasible.

    The compiled figures are for one image, and leave out its pixels and Z; the measured ones are
    of the whole process, for two images.
    """
    rows: dict[str, Any] = {"compiled": {}, "measured": {}}
    for side in sides:
        task = Task("ours", "dots", depth=50, side=side, patch=128, batch=1)
        task = replace(task, inner_steps=max(1, task.patches // 16))
        # Nothing is allocated; the worker is only asked for the compiler's figures.
        figures = compiled_bytes(task)
        image, z = 3 * side * side, task.patches * task.latent * 4
        total = figures["arguments"] + figures["temporary"] + figures["output"] - figures["alias"]
        rows["compiled"][side] = {**figures, "image": image, "z": z, "rest": total - image - z}
        print(
            side, "compiled, without image and Z:", (total - image - z) / 2**20, "MiB", flush=True
        )
    for side in measured:
        # PyTorch refuses batch statistics of one pixel, which one image of 512 px has in the head.
        base = Task("ours", "dots", depth=50, side=side, patch=128, batch=2)
        base = replace(base, inner_steps=max(1, base.patches // 16))
        tasks = [base, replace(base, library="torch", variant="channels_last")]
        rows["measured"][side] = compare(tasks, rounds=1)
        for result in rows["measured"][side]:
            print(side, label(result["task"]), summary(result), flush=True)
    return rows


def compiled_bytes(task: Task) -> dict[str, int]:
    """The compiler's memory figures for one outer step."""
    planner = Contender(replace(task, plan_only=True))
    try:
        if planner.failure:
            raise RuntimeError(planner.failure)
        return planner.started["compiled_bytes"]
    finally:
        planner.close()


def matmul_peak() -> float:
    """FLOP/s of a large float32 product on this machine."""
    contender = Contender(Task("ours", "none", depth=18, side=64, patch=32, inner_steps=2))
    try:
        answer = contender.ask("matmul")
        if answer is None:
            raise RuntimeError(contender.failure)
        return answer["flops_per_s"]
    finally:
        contender.close()


def table(rows: dict[str, Any], peak: float) -> str:
    """The speed rows as a Markdown table."""
    lines = [
        "| setting | contender | images/s (quartiles) | patches/s | ours is | peak memory "
        "| compile cold / warm | of the product peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ours = row["contenders"][0]
        for result in row["contenders"]:
            who = label(result["task"])
            if "failure" in result:
                lines.append(f"| {name} | {who} | does not run | | | | | |")
                continue
            batch = result["task"]["batch"]
            low, high = (batch / s for s in reversed(result["step_s"]["quartiles"]))
            ratio = ours["images_per_s"] / result["images_per_s"]
            cold, warm = result["compile_cold_s"], result.get("compile_warm_s", 0)
            share = row["flops_per_step"] / result["step_s"]["median"] / peak
            lines.append(
                f"| {name} | {who} | {result['images_per_s']:.2f} ({low:.2f}-{high:.2f}) "
                f"| {result['patches_per_s']:.0f} "
                f"| {'' if result is ours else f'{ratio:.2f} x'} "
                f"| {result['peak_bytes'] / 2**20:.0f} MiB | {cold:.1f} / {warm:.1f} s "
                f"| {share:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one tiny setting, to try it out")
    quick = parser.parse_args().quick
    # The machine's own load would otherwise decide the result.
    print("load average before:", os.getloadavg())
    peak = matmul_peak()
    if quick:
        settings = {"ResNet-18, 128 px, p = 32": Task("ours", depth=18, side=128, patch=32)}
        figures = {"matmul_flops_per_s": peak, "speed": speed(settings, 2)}
        print(table(figures["speed"], peak))
        return
    figures = {"matmul_flops_per_s": peak, "load_before": os.getloadavg()}
    figures["speed"] = speed(SETTINGS, 5)
    print("load average after the timed rows:", os.getloadavg(), flush=True)
    figures["whole_image"] = whole_image((512, 1024, 2048, 4096), 1)
    figures["memory"] = memory_by_side(SIDES, SIDES[:3])
    record("compare", figures)
    (RESULTS / "compare.md").write_text(table(figures["speed"], peak), encoding="utf-8")
    speed_plot(figures["speed"], label, RESULTS / "compare_speed.png")
    memory_plot(figures["memory"], figures["whole_image"], label, RESULTS / "compare_memory.png")


if __name__ == "__main__":
    main()
