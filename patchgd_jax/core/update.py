"""The train state, and what all outer steps share: one optimizer update, and frozen parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from patchgd_jax.core.freezing import close_over_frozen, combine_frozen, partition_frozen
from patchgd_jax.core.model import Params, PyTree
from patchgd_jax.core.optimizer import EmaState, Optimizer
from patchgd_jax.core.problem import Batch, Problem, Spec, Weights


class TrainState(NamedTuple):
    """All that an outer step changes."""

    step: Array
    """`int32 []`, outer steps done."""
    params: Params
    batch_stats: Params
    opt_state: PyTree

    @property
    def weights(self) -> Weights:
        """Parameters and batch statistics."""
        return Weights(self.params, self.batch_stats)


Metrics = dict[str, Array]
TrainStep = Callable[[Problem, Optimizer, TrainState, Batch, Array], tuple[TrainState, Metrics]]
"""`(problem, optimizer, state, batch, key)` to the new state and metrics, each `float []`."""


class Gradient(NamedTuple):
    """A gradient, with the auxiliary outputs of its forward pass."""

    grads: Params
    batch_stats: Params
    loss: Array
    """`float []`, mean over the batch."""
    logits: Array
    """`float [B, O]`, as the task has them."""


GRADIENT_SPEC = Gradient(Spec.GRADIENT, Spec.SAME, Spec.SUM, Spec.IMAGES)  # type: ignore[arg-type]

GradientFn = Callable[[Problem, Weights, Batch, Array], Gradient]
"""`(problem, weights, batch, key)` to the gradient of a method with one update per outer step."""


def init_state(problem: Problem, optimizer: Optimizer, key: Array) -> TrainState:
    """Makes the state before the first outer step; frozen parameters get no optimizer state."""
    params, batch_stats = problem.model.init(key)
    trained = partition_frozen(params, problem.frozen)[0] if problem.frozen else params
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(trained))


def ema_params(state: TrainState) -> Params:
    """Returns the parameters to evaluate: their EMA if the optimizer keeps one."""
    if not isinstance(state.opt_state, EmaState):
        return state.params
    average = state.opt_state.average
    if len(jax.tree.leaves(average)) == len(jax.tree.leaves(state.params)):
        return average
    # Frozen parameters have no average.
    return {**average, "encoder": {**state.params["encoder"], **average["encoder"]}}


def outer_step(step: TrainStep) -> TrainStep:
    """Adds what every train step shares: frozen parameters, the step's key, count and `param_norm`.

    The wrapped function sees trainable parameters only, and a key with the step number folded in.
    """

    @functools.wraps(step)
    def wrapped(
        problem: Problem, optimizer: Optimizer, state: TrainState, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if problem.frozen:
            trained, frozen = partition_frozen(state.params, problem.frozen)
            vary = partial(problem.layout.vary, frozen)
            model = close_over_frozen(problem.model, vary)
            problem = dataclasses.replace(problem, model=model, frozen=frozenset())
            new_state, metrics = step(
                problem, optimizer, state._replace(params=trained), batch, key
            )
            new_state = new_state._replace(params=combine_frozen(new_state.params, frozen))
        else:
            new_state, metrics = step(problem, optimizer, state, batch, key)
        # The other metrics are of the parameters before the last update.
        metrics = {**metrics, "param_norm": global_norm(new_state.params)}
        return new_state._replace(step=state.step + 1), metrics

    return wrapped


def one_update(
    gradient_fn: GradientFn,
    problem: Problem,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[TrainState, Metrics]:
    """Makes one update with a gradient in which every patch has its part."""
    gradient_of = problem.layout.spread(
        partial(gradient_fn, problem), (Spec.WEIGHTS, Spec.BATCH, Spec.SAME), GRADIENT_SPEC
    )
    scale = problem.config.encoder_grad_scale
    gradient = gradient_of(state.weights, batch, key)
    return apply_gradient(
        problem, optimizer, state, gradient, batch, 1.0 if scale == "unbiased" else scale
    )


def make_train_step(gradient_fn: GradientFn) -> TrainStep:
    """Makes the train step of a method that updates once per outer step."""
    return outer_step(partial(one_update, gradient_fn))


def apply_gradient(
    problem: Problem,
    optimizer: Optimizer,
    state: TrainState,
    gradient: Gradient,
    batch: Batch,
    encoder_scale: float,
) -> tuple[TrainState, Metrics]:
    """Makes one optimizer update; reads `label` and `weight` of the batch.

    Returns:
        The new state with `step` as it was; `loss`, `grad_norm` and the task's training metric, the
        mean score over the examples by weight.
    """
    grads, task = gradient.grads, problem.task
    if encoder_scale != 1:
        scaled = jax.tree.map(lambda g: g * encoder_scale, grads["encoder"])
        grads = {**grads, "encoder": scaled}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    score = task.score(gradient.logits, batch["label"])
    weight = batch.get("weight", jnp.ones_like(score, jnp.float32))
    total = weight.sum()
    metrics = {
        "loss": gradient.loss,
        task.training_metric: (score * weight).sum() / jnp.where(total > 0, total, 1),
        "grad_norm": global_norm(grads),
    }
    return TrainState(state.step, params, gradient.batch_stats, opt_state), metrics


def global_norm(tree: PyTree) -> Array:
    """Computes the global L2 norm, in few operations: XLA:CPU makes several kernels of each sum."""
    leaves = [x.reshape(-1) if x.ndim < 2 else x for x in jax.tree.leaves(tree)]
    vectors = [x for x in leaves if x.ndim == 1]
    arrays = [x for x in leaves if x.ndim > 1] + ([jnp.concatenate(vectors)] if vectors else [])
    return jnp.sqrt(jnp.stack([jnp.vdot(x, x) for x in arrays]).sum())
