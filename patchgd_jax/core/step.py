"""One outer step of Patch Gradient Descent on a batch of images.

Source: arXiv 2301.13817, Algorithm 1 (and its TMLR 2024 version, openreview 6dS1jhdemD).
`train_step` is the algorithm, each function below it one part of it. Nothing is jitted here; the
caller adds jit, donation and shardings once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.forward import cut, encode, fill, head_loss, scale_gradient, write_latents
from patchgd_jax.core.gradients import exact_gradient, full_gradient
from patchgd_jax.core.model import Params
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.patch_ids import PatchIds, chunk_patch_ids, has_padding, real_mask, valid_ids
from patchgd_jax.core.problem import Batch, Problem, Spec, Weights, named_key
from patchgd_jax.core.sampling import encoder_scale, partition_groups, sample_groups
from patchgd_jax.core.staleness import drift, mean_age, squared_change
from patchgd_jax.core.update import (
    GRADIENT_SPEC,
    Gradient,
    Metrics,
    TrainState,
    apply_gradient,
    one_update,
    outer_step,
)


@outer_step
def train_step(
    problem: Problem, optimizer: Optimizer, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Trains on one batch of images: fills Z, then makes J inner steps.

    Args:
        problem: the static part.
        optimizer: any optax transformation; called `config.updates_per_step` times.
        state: from `init_state` or an earlier step.
        batch: see `problem.Batch`.
        key: the run's key; the step number is folded into it here.

    Returns:
        The new state and metrics, each `float []`: `loss` (mean over the inner steps), the task's
        `training_metric` (of the last inner step's logits, as the papers report), `grad_norm` (mean
        over the updates) and `param_norm` (after the last one). If all are finite, so is the state.
        In the modes `patchgd` and `accumulate` also how stale Z is: `z_age`, in inner steps
        (`staleness.mean_age`), and `z_drift`, a relative change (`staleness.drift`).

    Raises:
        ConfigError: if there are more inner steps than patches, mode `exact` meets moving batch
            statistics, the labels are not the task's, the encoder scale `unbiased` has no one
            value, or the sampler refuses.
    """
    config, layout = problem.config, problem.layout
    if config.mode == "exact":
        return one_update(exact_gradient, problem, optimizer, state, batch, key)
    if config.mode == "full":
        return one_update(full_gradient, problem, optimizer, state, batch, key)
    scale = encoder_scale(config, problem.grid.num_patches, batch)

    # Lines 3 to 6: Z without a gradient.
    chunks, groups = draw(problem, batch, key)
    fill_z = layout.spread(
        partial(first_fill, problem),
        (Spec.WEIGHTS, Spec.BATCH, Spec.GROUPS, Spec.SAME),
        (Spec.IMAGES, Spec.SAME),
    )
    z, batch_stats = fill_z(state.weights, batch, chunks, key)
    state = state._replace(batch_stats=batch_stats)
    if problem.sampler is not None:
        groups = problem.sampler(problem, state.weights, z, batch, key)

    # Lines 7 to 14: inner steps, an update after every epsilon of them.
    gradient_of = layout.spread(
        partial(mean_gradient, problem),
        (Spec.WEIGHTS, Spec.IMAGES, Spec.BATCH, (Spec.SAME, Spec.GROUPS), Spec.SAME),
        (GRADIENT_SPEC, Spec.IMAGES, Spec.SUM),
    )

    def update(carry: tuple[TrainState, Array], inner: Any) -> Any:
        state, z = carry
        gradient, z, moved = gradient_of(state.weights, z, batch, inner, key)
        state, metrics = apply_gradient(problem, optimizer, state, gradient, batch, scale)
        return (state, z), {**metrics, "moved": moved}

    steps, updates = config.num_inner_steps, config.updates_per_step
    inner = jax.tree.map(
        lambda x: x.reshape(updates, steps // updates, *x.shape[1:]), (jnp.arange(steps), groups)
    )
    (state, _), metrics = lax.scan(update, (state, lax.stop_gradient(z)), inner)
    return state, {
        "loss": metrics["loss"].mean(),
        problem.task.training_metric: metrics[problem.task.training_metric][-1],
        "grad_norm": metrics["grad_norm"].mean(),
        "z_age": mean_age(groups.ids, problem.grid.num_patches, real_mask(batch, problem.grid)),
        "z_drift": drift(metrics["moved"].reshape(steps, 2)),
    }


def draw(problem: Problem, batch: Batch, key: Array) -> tuple[PatchIds, PatchIds]:
    """Draws the fill's chunks `int32 [n, B, chunk]` and the inner steps' groups `[J, B, k]`.

    The batch tells which patches are valid; `key` has the step number folded in.
    """
    config, grid = problem.config, problem.grid
    images, valid = next(iter(batch.values())).shape[0], valid_ids(batch, grid)
    ids = sample_groups(named_key(key, "sampling"), config, grid.num_patches, images, valid)
    repeats = config.sampling == "uniform"
    groups = PatchIds(ids, valid is not None or repeats or has_padding(ids, grid))
    if config.norm_policy != "paper":
        return chunk_patch_ids(batch, grid, config.fill_chunk, config.strata), groups
    # Batch statistics of neighbours would not be those of the inner steps.
    order = named_key(key, "fill-order")
    ids = partition_groups(order, config, grid.num_patches, images, valid)
    return PatchIds(ids, valid is not None or has_padding(ids, grid)), groups


def first_fill(
    problem: Problem, weights: Weights, batch: Batch, chunks: PatchIds, key: Array
) -> tuple[Array, Params]:
    """Fills Z `[B, N, D]` before the inner steps; batch statistics move under `paper` only."""
    augment = problem.augmentation(key, "augment", batch["image"].shape[0])
    train = problem.config.norm_policy == "paper"
    return fill(
        problem, weights, batch, chunks, named_key(key, "fill"), augment=augment, train=train
    )


def mean_gradient(
    problem: Problem,
    weights: Weights,
    z: Array,
    batch: Batch,
    inner: tuple[Array, PatchIds],
    key: Array,
) -> tuple[Gradient, Array, Array]:
    """Averages the gradients of the inner steps between two updates.

    `inner` has their numbers `int [epsilon]` and groups `[epsilon, B, k]`; `key` is the outer
    step's. Returns the mean gradient (logits of the last step), the new Z `[B, N, D]`, and
    `squared_change` of each step.
    """
    images, (numbers, _) = batch["image"], inner
    augment = problem.augmentation(key, inner_stream(problem), images.shape[0])

    def accumulate(carry: Any, step: tuple[Array, PatchIds]) -> Any:
        total, batch_stats, z = carry
        number, group = step
        patches = cut(problem, images, problem.layout.own_slots(group), augment)
        # The gradient is taken inside the scan: a gradient of the scan would keep every step.
        gradient, fresh = inner_gradient(
            problem,
            weights._replace(batch_stats=batch_stats),
            z,
            patches,
            group,
            batch,
            jax.random.fold_in(key, number),
        )
        total = jax.tree.map(lambda t, g: t + g / len(numbers), total, gradient.grads)
        moved = squared_change(z, fresh, group.ids, batch.get("weight"))
        return (total, gradient.batch_stats, fresh), (gradient.loss, gradient.logits, moved)

    start = (jax.tree.map(jnp.zeros_like, weights.params), weights.batch_stats, z)
    (grads, batch_stats, z), (losses, logits, moved) = lax.scan(accumulate, start, inner)
    return Gradient(grads, batch_stats, losses.mean(), logits[-1]), z, moved


def inner_stream(problem: Problem) -> str:
    """Names the random stream of augmentation in inner steps: the fill's, unless drawn anew."""
    same = problem.augment is None or problem.augment.same_draw
    return "augment" if same else "augment-inner"


def inner_gradient(
    problem: Problem,
    weights: Weights,
    z: Array,
    patches: Array,
    group: PatchIds,
    batch: Batch,
    key: Array,
) -> tuple[Gradient, Array]:
    """Takes the gradient of one inner step (Algorithm 1, lines 8 to 12).

    A group is encoded anew and written into Z, the rest of which is a constant; the head reads all
    of Z.

    Args:
        problem: the static part.
        weights: of encoder and head.
        z: `[B, N, D]`.
        patches: this device's slots of the group, `[B, k, *patch_shape, C]`.
        group: all slots, `[B, k]`. Its weights scale each patch's part of the encoder's gradient;
            Z, the loss and the head's gradient do not depend on them.
        batch: labels, weights and valid patches; `image` is not read.
        key: of this inner step.

    Returns:
        This device's part of the gradient, and Z with the fresh entries, again a constant.
    """
    layout = problem.layout

    def loss_fn(params: Params) -> tuple[Array, Any]:
        latents, batch_stats = encode(
            problem,
            weights._replace(params=params),
            patches,
            layout.own_slots(group),
            batch,
            named_key(key, "encoder"),
            train=problem.trains_encoder,
        )
        latents = layout.all_slots(latents)
        if group.weights is not None:
            latents = scale_gradient(latents, group.weights[..., None])
        fresh = write_latents(z, group.ids, latents)
        loss, (logits, batch_stats) = head_loss(
            problem, Weights(params, batch_stats), fresh, batch, named_key(key, "head")
        )
        return loss, (logits, batch_stats, lax.stop_gradient(fresh))

    (loss, (logits, batch_stats, fresh)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        weights.params
    )
    return Gradient(grads, batch_stats, loss, logits), fresh
