"""Everything that needs a GPU, in one command and under eight minutes, into one JSON.

Command:   python benchmarks/gpu_suite.py          (from the repository root; nothing to install)
Time:      under 8 minutes on one data-centre GPU with 16 CPU cores
Expected:  CPU and GPU agree; at least twice eager PyTorch at the papers' settings, with at most two
           thirds of its memory

Needs jax, flax, optax, torch, matplotlib and psutil only. Sections that no longer fit the time are
left out and named. `--smoke` runs the same on the CPU at toy sizes, to test the suite itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
# Contenders share the GPU: none may take all of it beforehand.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
_PATHS = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

from contenders import Contender, compare  # noqa: E402
from flops import step_flops  # noqa: E402
from record import record  # noqa: E402
from worker import Task  # noqa: E402

VARIANTS = (
    ("ours", "dots", "float32"),
    ("ours", "dots", "bfloat16"),
    ("torch", "", "float32"),
    ("torch", "channels_last+compile", "float32"),
    ("torch", "", "bfloat16"),
    ("torch", "channels_last", "bfloat16"),
    ("torch", "channels_last+compile", "bfloat16"),
)


@dataclass(frozen=True)
class Scale:
    """The sizes of a run of the suite."""

    device: str
    depth: int
    patch: int
    paper: tuple[tuple[int, int, int], ...]
    """Image side, inner steps and batch of the comparison."""
    memory: tuple[int, ...]
    whole: tuple[int, ...]
    variants: tuple[tuple[str, str, str], ...]
    rounds: int
    at_once: int

    def task(self, side: int, inner_steps: int, batch: int) -> Task:
        """Our contender at one size, in half precision."""
        return Task(
            "ours",
            "dots",
            depth=self.depth,
            side=side,
            patch=self.patch,
            inner_steps=inner_steps,
            batch=batch,
            dtype="bfloat16" if self.device == "gpu" else "float32",
            device=self.device,
        )


# Fractions 0.3, 0.1 and 0.1 are 4, 10 and 10 inner steps.
PAPER = Scale(
    device="gpu",
    depth=50,
    patch=128,
    paper=((512, 4, 64), (2048, 10, 8), (4096, 10, 4)),
    memory=(512, 1024, 4096, 16384),
    whole=(1024, 2048, 4096, 8192, 16384),
    variants=VARIANTS,
    rounds=5,
    at_once=8,
)
SMOKE = Scale(
    device="cpu",
    depth=18,
    patch=32,
    paper=((64, 2, 2),),
    memory=(64, 128),
    whole=(64,),
    variants=(("ours", "dots", "float32"), ("torch", "", "float32")),
    rounds=1,
    at_once=1,
)


def agreement(scale: Scale) -> dict[str, float]:
    """Relative differences between this device and the CPU after two outer steps, in float32."""
    import functools

    import jax
    import numpy as np
    import optax

    import patchgd_jax as pgd

    grid = pgd.PatchGrid(128, 128, 32)
    config = pgd.ModelConfig(
        encoder="resnet18", latent_dim=32, head="cnn-smaller-feat", dropout=0.0
    )
    model = pgd.build_model(config, grid=grid, channels=3, classes=10, mean=0.5, std=0.25)
    optimizer = optax.sgd(1e-2)
    patchgd = pgd.PatchGDConfig(patch=32, inner_steps=4, norm_policy="paper")
    problem = pgd.Problem(model, grid, patchgd)
    init = functools.partial(pgd.init_state, problem, optimizer)
    step = functools.partial(pgd.train_step, problem, optimizer)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 128, 128, 3), np.uint8)
    batch = {"image": images, "label": np.array([1, 2], np.int32)}
    results = []
    with jax.default_matmul_precision("highest"):
        for device in (jax.devices("cpu")[0], jax.devices()[0]):
            with jax.default_device(device):
                key = jax.random.key(0)
                state = jax.jit(init)(key)
                for _ in range(2):
                    state, metrics = jax.jit(step)(state, batch, key)
                results.append(jax.device_get((*state.weights, metrics)))

    def difference(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12))

    parts = zip(("params", "statistics", "metrics"), *results, strict=True)
    return {
        name: max(jax.tree.leaves(jax.tree.map(difference, cpu, own))) for name, cpu, own in parts
    }


def settings(scale: Scale) -> list[Any]:
    """The papers' settings, every variant."""
    rows = []
    for side, inner_steps, batch in scale.paper:
        base = scale.task(side, inner_steps, batch)
        tasks = [replace(base, library=a, variant=b, dtype=c) for a, b, c in scale.variants]
        results = compare(tasks, rounds=scale.rounds, at_once=scale.at_once)
        rows.append({"side": side, "flops_per_step": step_flops(base), "contenders": results})
        show(results)
    return rows


def policies(scale: Scale) -> list[Any]:
    """What each policy of rematerialisation costs and saves."""
    base = scale.task(*scale.paper[min(1, len(scale.paper) - 1)])
    tasks = [replace(base, variant=v) for v in ("none", "dots", "blocks", "everything")]
    results = compare(tasks, rounds=scale.rounds, at_once=scale.at_once)
    show(results)
    return results


def gradients(scale: Scale) -> list[Any]:
    """`exact` beside `patchgd`, both with frozen batch statistics."""
    base = replace(scale.task(*scale.paper[-1]), norm_policy="frozen")
    tasks = [replace(base, method=m) for m in ("patchgd", "accumulate", "exact")]
    results = compare(tasks, rounds=scale.rounds, at_once=scale.at_once)
    show(results)
    return results


def memory(scale: Scale) -> list[Any]:
    """Peak memory against the image's side at a fixed number of patches, k = 16."""
    tasks = []
    for side in scale.memory:
        patches = (side // scale.patch) ** 2
        tasks.append(scale.task(side, max(1, patches // 16), 1))
    results = compare(tasks, rounds=1, at_once=scale.at_once)
    show(results)
    return results


def whole(scale: Scale) -> list[Any]:
    """Training on whole images, up to what does not fit."""
    results: list[Any] = []
    for library, variant in (("ours", "none"), ("ours", "blocks"), ("torch", "channels_last")):
        for side in scale.whole:
            base = replace(scale.task(side, 1, 1), method="gd", library=library, variant=variant)
            results += compare([base], rounds=1)
            show(results[-1:])
            if "failure" in results[-1]:
                break
    return results


def peaks(scale: Scale) -> dict[str, float]:
    """FLOP/s of a large matrix product, by number format."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        task = Task("ours", "none", depth=18, side=64, patch=32, inner_steps=2, dtype=dtype)
        contender = Contender(replace(task, device=scale.device, plan_only=True))
        answer = contender.ask("matmul")
        found[dtype] = answer["flops_per_s"] if answer else float("nan")
        contender.close()
    print("FLOP/s of a product:", found, flush=True)
    return found


def show(results: list[Any]) -> None:
    """A line for each result."""
    for result in results:
        task = result["task"]
        words = [task[k] for k in ("library", "variant", "dtype", "method", "side")]
        if "failure" in result:
            print(*words, "does not run:", result["failure"], flush=True)
        else:
            speed, peak = result["images_per_s"], result["peak_bytes"] / 2**20
            print(*words, f"{speed:.2f} images/s, peak {peak:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no section after this")
    parser.add_argument("--name", default="gpu_suite", help="name of the results file")
    options = parser.parse_args()
    scale = SMOKE if options.smoke else PAPER
    sections: dict[str, Callable[[Scale], Any]] = {
        "agreement": agreement,
        "matmul_flops_per_s": peaks,
        "settings": settings,
        "remat": policies,
        "exact": gradients,
        "memory": memory,
        "whole_image": whole,
    }
    begun = time.monotonic()
    figures: dict[str, Any] = {}
    for name, section in sections.items():
        if time.monotonic() - begun > 60 * options.minutes:
            figures[name] = "left out: no time"
            continue
        print(f"== {name}, after {time.monotonic() - begun:.0f} s", flush=True)
        figures[name] = section(scale)
        # Written after every section, so that a suite that is cut off leaves what it has.
        record(options.name, figures)


if __name__ == "__main__":
    main()
