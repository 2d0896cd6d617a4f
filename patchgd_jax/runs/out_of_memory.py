"""Explains an out-of-memory error: the plan, a smaller setting, and the saved state."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from patchgd_jax.config import TrainConfig
from patchgd_jax.engine.compiling import release_memory
from patchgd_jax.errors import PatchGDError
from patchgd_jax.planner import MemoryBudgetError, Quantity, free_memory, show_size
from patchgd_jax.planner.report import PlanRow, method_lines
from patchgd_jax.planner.run_plan import RunPlan, plan_of
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.folder import CONFIG, RunFolder

# Where a setting did not fit although the plan says it does, the plan's error is not known.
_SHRINK = 0.75
# The second is of XLA:CPU's library for products, when it cannot allocate its own buffers.
_SIGNS = ("RESOURCE_EXHAUSTED", "YNNPACK operation failed")


@contextmanager
def explain_oom(config: TrainConfig, run_dir: str | Path) -> Iterator[None]:
    """Turns an out-of-memory error of Python or XLA into a `MemoryBudgetError` with next steps.

    `config` must have no settings that are auto; the run folder may not exist yet.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not any(
            sign in str(error) for sign in _SIGNS
        ):
            raise
        # The memory of the failed step is needed for planning another.
        traceback.clear_frames(error.__traceback__)
        release_memory()
        what = (str(error).strip() or "Python has no memory left").splitlines()[0]
        lines = [f"out of memory: {what[:300]}", *_advice(config), *_saved_state(Path(run_dir))]
        raise MemoryBudgetError("\n".join(lines)) from error


def _saved_state(run_dir: Path) -> list[str]:
    there = (run_dir / CONFIG).exists()
    steps = Checkpoints(RunFolder(run_dir).checkpoints).steps() if there else []
    if not steps:
        return ["Nothing was saved."]
    return [
        f"The run is saved after step {steps[-1]}. With more memory, continue with: patchgd-jax "
        f"resume {run_dir}",
        "With another setting it is a new run, which can start from this one's encoder: "
        f"--init-encoder {run_dir}",
    ]


def _advice(config: TrainConfig) -> list[str]:
    """Formats the plan's row of the setting, and the next smaller one that fits."""
    lines: list[str] = []
    try:
        plan = plan_of(config)
        request = plan.requests[0]
        free, source = free_memory(plan.device)
        row = PlanRow(plan.row(request))
        lines += [
            f"The plan of this setting, for {show_size(free)} ({source}):",
            *method_lines([row], {}, free, plan.calibration),
        ]
        smaller = _smaller(plan, min(free, round(_SHRINK * plan.estimated(request))))
    except (PatchGDError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return [*lines, f"No smaller setting is known ({error}); see patchgd-jax plan."]
    if smaller is None:
        smaller = "none by --patchgd.fraction or --batch-size; take a smaller patch or model"
    return [*lines, f"The next smaller setting that fits by the plan: {smaller}"]


def _smaller(plan: RunPlan, budget: int) -> str | None:
    """Finds the flags of a setting that fits the budget, by estimate."""
    request = plan.requests[0]
    quantities: tuple[Quantity, ...] = ("batch",)
    if plan.method in ("patchgd", "accumulate", "patchwise"):
        # Fewer patches at a time change a run less than a smaller batch does.
        quantities = ("fraction", "batch")
    for quantity in quantities:
        try:
            answer = plan.largest(request, quantity, budget, plan.estimated)
        except MemoryBudgetError:
            continue
        if quantity == "fraction":
            flags = f"--patchgd.fraction {answer.value:.6g}"
        else:
            flags = f"--batch-size {answer.request.batch} --eval-batch-size "
            flags += str(answer.request.config.eval_batch_size)
        return f"{flags} ({show_size(answer.bytes)})"
    return None
