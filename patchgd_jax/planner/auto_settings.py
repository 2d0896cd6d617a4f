"""Resolves settings that are `auto` to the largest numbers that fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from patchgd_jax.config import PatchGDConfig, TrainConfig
from patchgd_jax.data.run_data import ImageFiles
from patchgd_jax.engine.compiling import release_memory, use_compilation_cache
from patchgd_jax.errors import ConfigError
from patchgd_jax.planner.request import with_inner_steps
from patchgd_jax.planner.run_plan import RunPlan, plan_of
from patchgd_jax.planner.size import free_memory, parse_size, show_size
from patchgd_jax.planner.solver import Answer


def is_resolved(config: TrainConfig) -> bool:
    """Whether no setting is auto."""
    return config.batch_size != "auto" and config.patchgd.fraction != "auto"


def resolve_auto(
    config: TrainConfig,
    budget: str | None = None,
    on_message: Callable[[str], None] = lambda text: None,
    files: ImageFiles | None = None,
) -> TrainConfig:
    """Resolves `auto` batch size and sampling fraction to the largest values that fit in memory.

    Each is checked by compiling training and evaluation for the run's own images. If both are
    auto, the fraction is the default one, or the largest below it that fits for a single image,
    and the batch is the largest that fits with that fraction.

    Args:
        config: a run.
        budget: memory that training may take, such as 8GiB. None: the device's free memory, on
            the CPU less the buffer of read images (`reader_mib`).
        on_message: called with each choice and its reason.
        files: the config's image files, if they are read already.

    Returns:
        The config without auto.

    Raises:
        MemoryBudgetError: if not even the smallest setting fits.
        PatchGDError: for an unreadable budget, for a budget where nothing is auto, and as `train`.
    """
    size = None if budget is None else parse_size(budget)
    if is_resolved(config):
        if size is not None:
            raise ConfigError(
                "the budget is for settings that are auto, but none is; set --batch-size auto or "
                "--patchgd.fraction auto, or leave --budget out"
            )
        return config
    if jax.process_count() > 1:
        raise ConfigError(
            "auto settings are for one process: it cannot know the free memory of the others; set "
            "--batch-size and --patchgd.fraction to numbers"
        )
    both = config.batch_size == "auto" and config.patchgd.fraction == "auto"
    plan = plan_of(_smallest(config), files)
    use_compilation_cache()
    source = "given"
    if size is None:
        size, source = free_memory(plan.device)
        if plan.device.platform == "cpu":
            size -= config.reader_mib * 2**20
            source += f", less {config.reader_mib} MiB of read images"
    request = plan.requests[0]
    if config.patchgd.fraction == "auto":
        answer = plan.largest(request, "fraction", size, plan.compiled)
        request = answer.request
        usual = _usual_inner_steps(config.patchgd)
        if both and answer.request.patchgd.num_inner_steps < usual <= plan.fewest_patches:
            request = with_inner_steps(request, usual)
        else:
            on_message(_explanation(plan, answer, size, source))
    if config.batch_size == "auto":
        # The evaluation batch is the configured one, unless the training batch is smaller.
        request = request.changed(eval_batch_size=config.eval_batch_size)
        answer = plan.largest(request, "batch", size, plan.compiled)
        request = answer.request
        on_message(_explanation(plan, answer, size, source))
        config = dataclasses.replace(
            config,
            batch_size=min(request.batch, plan.examples),
            eval_batch_size=request.config.eval_batch_size,
        )
    # Frees the memory of compilation for training.
    release_memory()
    return dataclasses.replace(config, patchgd=request.patchgd)


def _smallest(config: TrainConfig) -> TrainConfig:
    """Replaces auto by a batch of one image, and by the fewest inner steps."""
    patchgd = config.patchgd
    if patchgd.fraction == "auto":
        least = patchgd.epsilon if patchgd.mode == "patchgd" else 1
        patchgd = dataclasses.replace(patchgd, fraction=1 / least)
    if config.batch_size != "auto":
        return dataclasses.replace(config, patchgd=patchgd)
    return dataclasses.replace(config, patchgd=patchgd, batch_size=1, eval_batch_size=1)


def _usual_inner_steps(patchgd: PatchGDConfig) -> int:
    """Inner steps of the default fraction, rounded up to a multiple of epsilon."""
    default = PatchGDConfig().num_inner_steps
    unit = patchgd.epsilon if patchgd.mode == "patchgd" else 1
    return -(-default // unit) * unit


def _explanation(plan: RunPlan, answer: Answer, budget: int, source: str) -> str:
    request, known = answer.request, plan.calibration
    if answer.quantity == "batch":
        text = f"batch_size auto: {min(request.batch, plan.examples)}"
        if request.batch > plan.examples:
            text += " (all training images)"
        text += f", eval_batch_size {request.config.eval_batch_size}"
    else:
        text = (
            f"patchgd.fraction auto: {answer.value:.4g} ({request.sampled} of {request.patches} "
            f"patches at a time, {request.patchgd.num_inner_steps} inner steps)"
        )
    text += f": takes {show_size(answer.bytes)} of {show_size(budget)} ({source})"
    if answer.next_bytes is not None:
        text += f", the next larger {show_size(answer.next_bytes)}"
    how = "measured here" if known.measured else "a first guess; patchgd-jax plan --tier profile"
    return f"{text}; XLA's figure x {known.factor:.2f} ({how})"
