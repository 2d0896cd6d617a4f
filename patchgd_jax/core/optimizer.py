"""From an OptimizerConfig to an optax chain whose schedule counts outer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from patchgd_jax.config import OptimizerConfig
from patchgd_jax.core.model import Params, PyTree
from patchgd_jax.errors import ConfigError

Optimizer: TypeAlias = optax.GradientTransformation
Schedule = Callable[[Array], Array]


def make_schedule(config: OptimizerConfig, *, total_steps: int, warmup_steps: int) -> Schedule:
    """Makes the learning rate as a function of the outer step.

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
    config: OptimizerConfig,
    *,
    total_steps: int,
    steps_per_epoch: int,
    updates_per_step: int,
    depth: Mapping[str, int] | None = None,
) -> Optimizer:
    """Builds the optimizer.

    Args:
        config: update rule, schedule, decay, clipping, the encoder's rates and EMA.
        total_steps: outer steps of the run.
        steps_per_epoch: outer steps of an epoch.
        updates_per_step: updates of one outer step; the rate is the same for all of them.
        depth: of each of the encoder's top-level entries, from `encoder_layers(...).depth`; needed
            for `layer_decay`.
    """
    warmup_steps = min(total_steps, round(config.warmup_epochs * steps_per_epoch))
    per_outer_step = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)

    def rate(count: Array) -> Array:
        return per_outer_step(count // updates_per_step)

    match config.name:
        case "adam":
            rule = optax.adam(rate)
        case "adamw":
            rule = optax.adamw(rate, weight_decay=config.weight_decay)
        case "sgd":
            rule = optax.sgd(rate, momentum=config.momentum)
    steps = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    steps.append(rule)
    if config.encoder_learning_rate is not None or config.layer_decay != 1:
        # Updates are linear in the learning rate, so scaling them equals scaling the rate.
        ratio = (config.encoder_learning_rate or config.learning_rate) / config.learning_rate
        steps.append(_scale_encoder(ratio, config.layer_decay, depth))
    optimizer = steps[0] if len(steps) == 1 else optax.chain(*steps)
    return with_ema(optimizer, config.ema_decay)


def _scale_encoder(ratio: float, decay: float, depth: Mapping[str, int] | None) -> Optimizer:
    """Multiplies the updates of the encoder by `ratio`, and by `decay` per block after them."""
    if decay != 1 and depth is None:
        raise ConfigError("optimizer.layer_decay needs the depth of the encoder's parameters")

    def scale(updates: Params, params: Params | None) -> Params:
        def scaled(tree: PyTree, factor: float) -> PyTree:
            return jax.tree.map(lambda u: u * factor, tree)

        encoder = updates["encoder"]
        if depth is None or decay == 1:
            return {**updates, "encoder": scaled(encoder, ratio)}
        last = max(depth.values())
        factors = {name: ratio * decay ** (last - depth[name]) for name in encoder}
        return {
            **updates,
            "encoder": {name: scaled(tree, factors[name]) for name, tree in encoder.items()},
        }

    return optax.stateless(scale)


class EmaState(NamedTuple):
    """State of an optimizer with an EMA of the parameters."""

    updates: Array
    """`int32 []`, their number so far."""
    average: Params
    """EMA of the trainable parameters."""
    inner: PyTree


def with_ema(optimizer: Optimizer, decay: float | None) -> Optimizer:
    """Adds an exponential moving average (EMA) of the parameters to an optimizer; None adds none.

    With the parameters `p_0` before the first update and `p_i` after update `i`, the average is
    `a_0 = p_0`, `a_i = decay * a_(i - 1) + (1 - decay) * p_i`.
    """
    if decay is None:
        return optimizer

    def init(params: Params) -> EmaState:
        # Copies: a donated state must not hold one buffer twice.
        average = jax.tree.map(jnp.copy, params)
        return EmaState(jnp.zeros((), jnp.int32), average, optimizer.init(params))

    def update(
        grads: Params, state: EmaState, params: Params | None = None
    ) -> tuple[Params, EmaState]:
        updates, inner = optimizer.update(grads, state.inner, params)
        after = optax.apply_updates(params, updates)

        def mean(average: Array, before: Array, after: Array) -> Array:
            # Parameters may have been replaced since `init`, such as by pretrained ones.
            average = jnp.where(state.updates == 0, before, average)
            return decay * average + (1 - decay) * after

        average = jax.tree.map(mean, state.average, params, after)
        return updates, EmaState(state.updates + 1, average, inner)

    return optax.GradientTransformation(init, update)
