"""From an OptimizerConfig to an optax chain whose schedule counts outer steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from patchgd_jax.config import OptimizerConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(config: OptimizerConfig, *, total_steps: int, warmup_steps: int) -> Schedule:
    """The learning rate at an outer step.

    The rate rises linearly from `peak / warmup_steps` to the peak over `warmup_steps`. Then
    `linear` falls so that it would reach zero at `decay_factor * total_steps` (the official
    PatchGD schedule, which ends near half of the peak for the factor 2), and `cosine` falls to
    zero at `total_steps`.
    """
    peak = config.learning_rate
    after = max(1, total_steps - warmup_steps)
    match config.schedule:
        case "linear":
            horizon = max(1, round(config.decay_factor * total_steps) - warmup_steps)
            decay = optax.linear_schedule(peak, 0.0, horizon)
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, after)
        case "constant":
            decay = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    config: OptimizerConfig, *, total_steps: int, steps_per_epoch: int, updates_per_step: int
) -> optax.GradientTransformation:
    """Builds the optimizer.

    Args:
        config: update rule, schedule, decay and clipping.
        total_steps: outer steps of the run.
        steps_per_epoch: outer steps of an epoch.
        updates_per_step: updates of one outer step; the rate is the same for all of them.
    """
    warmup_steps = min(total_steps, round(config.warmup_epochs * steps_per_epoch))
    per_outer_step = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)

    def rate(count: jax.Array) -> jax.Array:
        return per_outer_step(count // updates_per_step)

    match config.name:
        case "adam":
            rule = optax.adam(rate)
        case "adamw":
            rule = optax.adamw(rate, weight_decay=config.weight_decay)
        case "sgd":
            rule = optax.sgd(rate, momentum=config.momentum)
    if config.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
