"""Settings that are `auto`: the memory planner makes numbers of them before a run begins."""

from __future__ import annotations

import dataclasses

import jax

from patchgd_jax.config import PatchGDConfig, TrainConfig
from patchgd_jax.engine.compiling import release_memory, use_compilation_cache
from patchgd_jax.errors import ConfigError
from patchgd_jax.planner import (
    Answer,
    PlanRequest,
    Quantity,
    free_memory,
    parse_size,
    show_size,
    solve,
)
from patchgd_jax.planner.request import with_inner_steps
from patchgd_jax.planner.run_plan import RunPlan, plan_of
from patchgd_jax.runs.progress import Progress


def is_settled(config: TrainConfig) -> bool:
    """Whether no setting is auto."""
    return config.batch_size != "auto" and config.patchgd.fraction != "auto"


def settled(
    config: TrainConfig, budget: str | None = None, progress: Progress | None = None
) -> TrainConfig:
    """Makes numbers of the settings that are auto: the largest that fit the memory.

    Each is proved by a compile of training and evaluation for the run's own images. If both are
    auto, the fraction is the default one, or the largest below it that a single image fits with,
    and the batch is what fits with that.

    Args:
        config: a run.
        budget: memory that training may take, 8GiB say. None: what is free on the device, on the
            CPU less the images that wait (`reader_mib`).
        progress: told what was chosen and why.

    Returns:
        The config with numbers; the same if nothing is auto.

    Raises:
        MemoryBudgetError: if not even the smallest setting fits.
        PatchGDError: for a budget that cannot be read or has nothing to decide, and as `train`.
    """
    size = None if budget is None else parse_size(budget)
    if is_settled(config):
        if size is not None:
            raise ConfigError(
                "the budget decides about settings that are auto, but none is; set --batch-size "
                "auto or --patchgd.fraction auto, or leave --budget out"
            )
        return config
    if jax.process_count() > 1:
        raise ConfigError(
            "settings that are auto are for one process, which would not know what the others have "
            "free; give numbers"
        )
    progress = progress or Progress()
    both = config.batch_size == "auto" and config.patchgd.fraction == "auto"
    plan = plan_of(_smallest(config))
    use_compilation_cache()
    source = "given"
    if size is None:
        size, source = free_memory(plan.device)
        if plan.device.platform == "cpu":
            size -= config.reader_mib * 2**20
            source += f", less {config.reader_mib} MiB for images that wait"
    request = plan.requests[0]
    if config.patchgd.fraction == "auto":
        answer = _largest(plan, request, "fraction", size)
        request = answer.request
        usual = _usual_inner_steps(config.patchgd)
        if both and answer.request.patchgd.num_inner_steps < usual <= plan.fewest_patches:
            request = with_inner_steps(request, usual)
        else:
            progress.message(_why(plan, answer, size, source))
    if config.batch_size == "auto":
        # An evaluation is as large as the settings say, where the training batch is no smaller.
        request = dataclasses.replace(request, eval_batch=config.eval_batch_size)
        answer = _largest(plan, request, "batch", size)
        request = answer.request
        progress.message(_why(plan, answer, size, source))
        config = dataclasses.replace(
            config,
            batch_size=min(request.batch, plan.examples),
            eval_batch_size=request.eval_batch,
        )
    # What compilation has freed is free for training.
    release_memory()
    return dataclasses.replace(config, patchgd=request.patchgd)


def _smallest(config: TrainConfig) -> TrainConfig:
    """The config with a batch of one image and as few inner steps as can be where it says auto."""
    patchgd = config.patchgd
    if patchgd.fraction == "auto":
        least = patchgd.epsilon if patchgd.mode == "patchgd" else 1
        patchgd = dataclasses.replace(patchgd, fraction=1 / least)
    if config.batch_size != "auto":
        return dataclasses.replace(config, patchgd=patchgd)
    return dataclasses.replace(config, patchgd=patchgd, batch_size=1, eval_batch_size=1)


def _usual_inner_steps(patchgd: PatchGDConfig) -> int:
    """Those of the default fraction, or the next number above that epsilon divides."""
    default = PatchGDConfig().num_inner_steps
    unit = patchgd.epsilon if patchgd.mode == "patchgd" else 1
    return -(-default // unit) * unit


def _largest(plan: RunPlan, request: PlanRequest, quantity: Quantity, budget: int) -> Answer:
    return solve(
        request,
        plan.method,
        quantity,
        budget,
        total=plan.compiled,
        most_inner_steps=plan.fewest_patches,
    )


def _why(plan: RunPlan, answer: Answer, budget: int, source: str) -> str:
    request, known = answer.request, plan.calibration
    if answer.quantity == "batch":
        text = f"batch_size auto: {min(request.batch, plan.examples)}"
        if request.batch > plan.examples:
            text += " (all training images)"
        text += f", eval_batch_size {request.eval_batch}"
    else:
        text = (
            f"patchgd.fraction auto: {answer.value:.4g} ({request.sampled} of {request.patches} "
            f"patches at a time, {request.patchgd.num_inner_steps} inner steps)"
        )
    text += f": takes {show_size(answer.bytes)} of {show_size(budget)} ({source})"
    if answer.next_bytes is not None:
        text += f", the next larger {show_size(answer.next_bytes)}"
    how = "measured here" if known.measured else "a first guess; patchgd-jax plan --tier measure"
    return f"{text}; XLA's figure x {known.factor:.2f} ({how})"
