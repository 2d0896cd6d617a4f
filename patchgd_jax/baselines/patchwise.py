"""Patch-wise training: every patch is told its image's label, and sees nothing of the others."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from patchgd_jax.baselines.answers import Pooling, answers_loss, patch_logits, pooled
from patchgd_jax.baselines.base import Metrics, scores
from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.core.augment import augmentation
from patchgd_jax.core.gradients import (
    Batch,
    Gradient,
    listed_patches,
    patch_mask,
    real_patches,
    stream,
)
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.latents import encode_patches
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.sampling import sample_groups
from patchgd_jax.core.step import (
    TrainState,
    apply_gradient,
    eval_fill,
    global_norm,
    step_beside_frozen,
)
from patchgd_jax.core.tasks import SINGLE_LABEL, Task


def patchwise_gradient(
    params: Params,
    model_state: Params,
    ids: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    train_encoder: bool,
    task: Task,
    augment: AugmentConfig | None,
    pooling: Pooling,
) -> Gradient:
    """The gradient through the patches `ids int [B, k]`, each with its image's label.

    Returns:
        The gradient; its logits are those of the image by these patches.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        latents, new_state = encode_patches(
            params,
            model_state,
            batch["image"],
            ids,
            stream(key, "encoder"),
            model=model,
            grid=grid,
            train=train_encoder,
            real=real_patches(batch, grid),
            augment=augmentation(augment, stream(key, "augment"), 0),
        )
        logits, new_state = patch_logits(
            params, new_state, latents, stream(key, "head"), model=model, train=True
        )
        counts = ids < grid.num_patches
        loss = answers_loss(logits, batch, counts, task=task)
        return loss, (pooled(logits, counts, pooling), new_state)

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits)


def patchwise_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task = SINGLE_LABEL,
    augment: AugmentConfig | None = None,
    frozen: frozenset[str] = frozenset(),
    placement: Placement = ALONE,
    pooling: Pooling = "mean",
) -> tuple[TrainState, Metrics]:
    """One pass over the patches of a batch of images, in PatchGD's groups, without Z.

    The groups, and when they update, are those of `step.train_step` in the modes `patchgd` and
    `accumulate`, at the memory of an inner step. Arguments, results and metrics are also its; for
    the training metric, the patches of a group answer for an image by `pooling`.
    """
    if frozen:
        return step_beside_frozen(
            partial(patchwise_step, pooling=pooling),
            state,
            batch,
            key,
            frozen,
            model=model,
            optimizer=optimizer,
            grid=grid,
            patchgd=patchgd,
            task=task,
            augment=augment,
        )
    key = jax.random.fold_in(key, state.step)
    inner_steps = patchgd.num_inner_steps
    updates = patchgd.updates_per_step
    ids = sample_groups(
        stream(key, "sampling"),
        num_patches=grid.num_patches,
        inner_steps=inner_steps,
        batch=batch["image"].shape[0],
        sampling=patchgd.sampling,
        sample_per=patchgd.sample_per,
        patches=listed_patches(batch, grid),
        strata=patchgd.strata,
    )

    def update(state: TrainState, steps: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        def accumulate(
            carry: tuple[Params, Params], step: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[Params, Params], tuple[jax.Array, jax.Array]]:
            total, model_state = carry
            number, group = step
            gradient = patchwise_gradient(
                state.params,
                model_state,
                group,
                batch,
                jax.random.fold_in(key, number),
                model=model,
                grid=grid,
                train_encoder=patchgd.norm_policy != "frozen",
                task=task,
                augment=augment,
                pooling=pooling,
            )
            total = jax.tree.map(lambda t, g: t + g * updates / inner_steps, total, gradient.grads)
            return (total, gradient.model_state), (gradient.loss, gradient.logits)

        start = (jax.tree.map(jnp.zeros_like, state.params), state.model_state)
        (grads, model_state), (losses, logits) = lax.scan(accumulate, start, steps)
        # A small image has no patch in some groups: the last that has answers for it.
        some = (steps[1] < grid.num_patches).any(2)
        last = jnp.where(some, jnp.arange(some.shape[0])[:, None], 0).max(0)
        answers = logits[last, jnp.arange(last.shape[0])]
        gradient = Gradient(grads, model_state, losses.mean(), answers)
        return apply_gradient(state, gradient, batch, optimizer, task, 1.0)

    steps = jax.tree.map(
        lambda x: x.reshape(updates, -1, *x.shape[1:]), (jnp.arange(inner_steps), ids)
    )
    state, metrics = lax.scan(update, state, steps)
    return state._replace(step=state.step + 1), {
        "loss": metrics["loss"].mean(),
        task.training_metric: metrics[task.training_metric][-1],
        "grad_norm": metrics["grad_norm"].mean(),
        "param_norm": global_norm(state.params),
    }


def patchwise_eval(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    fill_chunk: int,
    task: Task = SINGLE_LABEL,
    pooling: Pooling = "mean",
) -> Metrics:
    """Encodes every patch and pools their answers; arguments and results of `step.eval_step`."""
    z = eval_fill(params, model_state, batch, model=model, grid=grid, fill_chunk=fill_chunk)
    logits, _ = patch_logits(params, model_state, z, jax.random.key(0), model=model, train=False)
    mask = patch_mask(batch, grid)
    counts = None if mask is None else mask.reshape(-1, grid.num_patches)
    return scores(pooled(logits, counts, pooling), batch, task)
