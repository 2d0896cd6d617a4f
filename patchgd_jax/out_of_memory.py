"""What a run says when its memory is not enough: the plan, a smaller setting, and what is saved."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from patchgd_jax.checkpoint import Checkpoints
from patchgd_jax.config import TrainConfig
from patchgd_jax.errors import PatchGDError
from patchgd_jax.memory import Formula, MemoryBudgetError, Quantity, device_limit, show_size, solve
from patchgd_jax.memory.report import PlanRow, method_lines
from patchgd_jax.run_folder import RunFolder
from patchgd_jax.run_plan import RunPlan, plan_of

# Where the plan said that a setting fits and it did not, by how much it was wrong is not known.
_SHRINK = 0.75


@contextmanager
def out_of_memory_told(config: TrainConfig, run_dir: str | Path) -> Iterator[None]:
    """Turns a failure for want of memory into an error that says what to do.

    Args:
        config: of the run; nothing of it is auto.
        run_dir: its folder, which need not be there yet.

    Raises:
        MemoryBudgetError: instead of Python's or XLA's error.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # What the failed step holds is in the way of planning another.
        traceback.clear_frames(error.__traceback__)
        what = (str(error).strip() or "Python has no memory left").splitlines()[0]
        lines = [f"out of memory: {what[:300]}", _saved(run_dir), *_advice(config, run_dir)]
        raise MemoryBudgetError("\n".join(lines)) from error


def _saved(run_dir: str | Path) -> str:
    steps = Checkpoints(RunFolder(run_dir).checkpoints).steps() if Path(run_dir).exists() else []
    if not steps:
        return "Nothing is saved yet."
    return (
        f"The run is saved after step {steps[-1]}. With more memory it goes on there: "
        f"patchgd-jax resume {run_dir}"
    )


def _advice(config: TrainConfig, run_dir: str | Path) -> list[str]:
    """The plan's row of the setting, and the next smaller one that fits."""
    try:
        plan = plan_of(config)
        request = plan.requests[0]
        mode = request.patchgd.mode
        limit, source = device_limit(plan.device)
        platform = {"gpu": "cuda"}.get(plan.device.platform, plan.device.platform)
        row = PlanRow(Formula(request, platform).row(mode))
        lines = [
            f"The plan of this setting, with {show_size(limit)} there ({source}):",
            *method_lines([row], {}, limit, plan.calibration),
        ]
        smaller = _smaller(plan, min(limit, round(_SHRINK * plan.by_formula(request))))
    except (PatchGDError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return [f"No smaller setting is known ({error}); see patchgd-jax plan."]
    if smaller is None:
        return [
            *lines,
            "No smaller fraction or batch fits; take a smaller patch or model, or --model.remat "
            "blocks.",
        ]
    return [
        *lines,
        f"The next smaller setting that fits by the plan: {smaller}",
        "It is another run: give it a --run-dir of its own"
        + (
            f", and --init-encoder {run_dir} to start from this one's encoder."
            if Path(run_dir).exists()
            else "."
        ),
    ]


def _smaller(plan: RunPlan, budget: int) -> str | None:
    """The flags of a setting that takes no more than the budget, by formula."""
    request = plan.requests[0]
    quantities: tuple[Quantity, ...] = ("batch",)
    if request.patchgd.mode in ("patchgd", "accumulate"):
        # Fewer patches at a time change a run less than a smaller batch does.
        quantities = ("fraction", "batch")
    for quantity in quantities:
        try:
            answer = solve(
                request,
                request.patchgd.mode,
                quantity,
                budget,
                total=plan.by_formula,
                most_inner_steps=plan.fewest_patches,
            )
        except MemoryBudgetError:
            continue
        if quantity == "fraction":
            flags = f"--patchgd.fraction {answer.value:.6g}"
        else:
            flags = f"--batch-size {answer.request.batch} --eval-batch-size "
            flags += str(answer.request.eval_batch)
        return f"{flags} ({show_size(answer.bytes)})"
    return None
