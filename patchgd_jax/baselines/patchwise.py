"""Patch-wise training: each patch is trained with its image's label, and sees no other."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.baselines.patch_logits import Pooling, patch_logits, patch_loss, pool_logits
from patchgd_jax.core.forward import cut, encode, encode_all, score_logits
from patchgd_jax.core.model import Params
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.patch_ids import PatchIds, valid_ids, valid_mask
from patchgd_jax.core.problem import Batch, Problem, Weights, named_key
from patchgd_jax.core.sampling import sample_groups
from patchgd_jax.core.update import (
    Gradient,
    Metrics,
    TrainState,
    TrainStep,
    apply_gradient,
    outer_step,
)


def patchwise_gradient(
    problem: Problem,
    weights: Weights,
    group: PatchIds,
    batch: Batch,
    key: Array,
    *,
    pooling: Pooling,
) -> Gradient:
    """Takes the gradient through a group's patches `[B, k]`; its logits are pooled over them."""
    images = batch["image"]
    augment = problem.augmentation(key, "augment", images.shape[0])

    def loss_fn(params: Params) -> tuple[Array, Any]:
        latents, batch_stats = encode(
            problem,
            weights._replace(params=params),
            cut(problem, images, group, augment),
            group,
            batch,
            named_key(key, "encoder"),
            train=problem.trains_encoder,
        )
        logits, batch_stats = patch_logits(
            problem, Weights(params, batch_stats), latents, named_key(key, "head"), train=True
        )
        mask = group.ids < problem.grid.num_patches
        loss = patch_loss(problem, logits, batch, mask)
        return loss, (pool_logits(logits, mask, pooling), batch_stats)

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights.params)
    return Gradient(grads, batch_stats, loss, logits)


def patchwise_step(pooling: Pooling = "mean") -> TrainStep:
    """Makes the train step: one pass over the patches of a batch, in PatchGD's groups, without Z.

    The groups, and when they update, are those of `core.step.train_step` in the modes `patchgd` and
    `accumulate`, at the memory of an inner step.
    """
    return outer_step(partial(_inner_steps, pooling))


def _inner_steps(
    pooling: Pooling,
    problem: Problem,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[TrainState, Metrics]:
    config, count = problem.config, problem.grid.num_patches
    steps, updates = config.num_inner_steps, config.updates_per_step
    images, valid = batch["image"].shape[0], valid_ids(batch, problem.grid)
    groups = sample_groups(named_key(key, "sampling"), config, count, images, valid)

    def update(state: TrainState, inner: Any) -> tuple[TrainState, Metrics]:
        def accumulate(carry: tuple[Params, Params], step: Any) -> Any:
            total, batch_stats = carry
            number, ids = step
            gradient = patchwise_gradient(
                problem,
                Weights(state.params, batch_stats),
                PatchIds(ids, padded=True),
                batch,
                jax.random.fold_in(key, number),
                pooling=pooling,
            )
            total = jax.tree.map(lambda t, g: t + g * updates / steps, total, gradient.grads)
            return (total, gradient.batch_stats), (gradient.loss, gradient.logits)

        start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
        (grads, batch_stats), (losses, logits) = lax.scan(accumulate, start, inner)
        # A small image has no patch in some groups: the last that has one stands for it.
        some = (inner[1] < count).any(2)
        last = jnp.where(some, jnp.arange(some.shape[0])[:, None], 0).max(0)
        latest = logits[last, jnp.arange(last.shape[0])]
        gradient = Gradient(grads, batch_stats, losses.mean(), latest)
        return apply_gradient(problem, optimizer, state, gradient, batch, 1.0)

    inner = jax.tree.map(
        lambda x: x.reshape(updates, -1, *x.shape[1:]), (jnp.arange(steps), groups)
    )
    state, metrics = lax.scan(update, state, inner)
    metric = problem.task.training_metric
    return state, {
        "loss": metrics["loss"].mean(),
        metric: metrics[metric][-1],
        "grad_norm": metrics["grad_norm"].mean(),
    }


def patchwise_eval(
    problem: Problem, weights: Weights, batch: Batch, *, pooling: Pooling = "mean"
) -> Metrics:
    """Encodes every patch and pools their logits; arguments and results as `eval_step`'s."""
    z = encode_all(problem, weights, batch)
    logits, _ = patch_logits(problem, weights, z, jax.random.key(0), train=False)
    mask = valid_mask(batch, problem.grid)
    if mask is not None:
        mask = mask.reshape(-1, problem.grid.num_patches)
    return score_logits(problem, pool_logits(logits, mask, pooling), batch)
