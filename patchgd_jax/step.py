"""The heart: one outer step on a batch of images, and one evaluation step. Pure functions.

Source: arXiv 2301.13817, Algorithm 1 (and its TMLR 2024 version, openreview 6dS1jhdemD). Nothing
here is jitted; the caller adds jit, donation and shardings once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from patchgd_jax.augment import Augment, augmentation
from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.errors import ConfigError
from patchgd_jax.gradients import (
    Batch,
    Gradient,
    exact_gradient,
    full_gradient,
    inner_gradient,
    read_z,
    real_patches,
    stream,
)
from patchgd_jax.grid import PatchGrid
from patchgd_jax.latents import chunked_ids, fill, has_spare
from patchgd_jax.optimizer import AverageState
from patchgd_jax.patch_model import (
    Parts,
    PatchModel,
    Tree,
    join_frozen,
    split_frozen,
    with_fixed,
)
from patchgd_jax.sampling import inclusion_probability, sample_groups
from patchgd_jax.tasks import SINGLE_LABEL, Task


class TrainState(NamedTuple):
    """All that an outer step changes."""

    step: jax.Array
    """`int32 []`, outer steps done."""
    params: Parts
    model_state: Parts
    opt_state: Tree


def init_state(
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    frozen: frozenset[str] = frozenset(),
) -> TrainState:
    """The state before the first outer step; the optimizer keeps nothing for `frozen` entries."""
    params, model_state = model.init(key)
    trained = split_frozen(params, frozen)[0] if frozen else params
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(trained))


def evaluated_params(state: TrainState) -> Parts:
    """The parameters to evaluate: their moving average if the optimizer keeps one."""
    if not isinstance(state.opt_state, AverageState):
        return state.params
    average = state.opt_state.average
    if len(jax.tree.leaves(average)) == len(jax.tree.leaves(state.params)):
        return average
    # What is frozen has no average.
    return {**average, "encoder": {**state.params["encoder"], **average["encoder"]}}


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: PatchGrid,
    patchgd: PatchGDConfig,
    task: Task = SINGLE_LABEL,
    augment: AugmentConfig | None = None,
    frozen: frozenset[str] = frozenset(),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One outer step on one batch of images.

    Args:
        state: from `init_state` or an earlier step.
        batch: see `gradients.Batch`.
        key: the run's key; the step number is folded into it here.
        model: the model.
        optimizer: any optax transformation; it is called `patchgd.updates_per_step` times.
        grid: the patch grid of the images.
        patchgd: gradient mode, sampling and policies.
        task: what the labels are; it has the loss.
        augment: random changes of the patches.
        frozen: the encoder's top-level entries whose parameters stay as they are, bit for bit
            (`Layers.until`); the same as for `init_state`.

    Returns:
        The new state and metrics, each `float []`: `loss` (mean over the inner steps), the task's
        `training_metric` (`accuracy` for most; of the last inner step's logits, as the papers
        report), `grad_norm` (mean over the updates) and `param_norm` (after the last one). If all
        are finite, so is the state.

    Raises:
        ConfigError: if there are more inner steps than patches, mode `exact` is asked of an encoder
            whose batch statistics move, or the labels are not the task's.
    """
    if frozen:
        trained, fixed = split_frozen(state.params, frozen)
        new_state, metrics = train_step(
            state._replace(params=trained),
            batch,
            key,
            model=with_fixed(model, fixed),
            optimizer=optimizer,
            grid=grid,
            patchgd=patchgd,
            task=task,
            augment=augment,
        )
        params = join_frozen(new_state.params, fixed)
        return new_state._replace(params=params), {**metrics, "param_norm": _norm(params)}
    key = jax.random.fold_in(key, state.step)
    if patchgd.mode in ("patchgd", "accumulate"):
        new_state, metrics = _inner_steps(
            state,
            batch,
            key,
            model=model,
            optimizer=optimizer,
            grid=grid,
            patchgd=patchgd,
            task=task,
            augment=augment,
        )
    else:
        train_encoder = patchgd.norm_policy != "frozen"
        arguments = (state.params, state.model_state, batch, key)
        changes = augmentation(augment, stream(key, "augment"))
        if patchgd.mode == "exact":
            gradient = exact_gradient(
                *arguments,
                model=model,
                grid=grid,
                chunk=patchgd.fill_chunk,
                train_encoder=train_encoder,
                task=task,
                augment=changes,
            )
        else:
            gradient = full_gradient(
                *arguments,
                model=model,
                grid=grid,
                chunk=patchgd.fill_chunk,
                train_encoder=train_encoder,
                remat=patchgd.remat,
                task=task,
                augment=changes,
            )
        scale = patchgd.encoder_grad_scale
        # Every patch has its part in these gradients: they are unbiased as they are.
        new_state, metrics = _update(
            state, gradient, batch, optimizer, task, 1.0 if scale == "unbiased" else scale
        )
    # The other metrics are of the parameters before the last update; this one is of those after.
    metrics["param_norm"] = _norm(new_state.params)
    return new_state._replace(step=state.step + 1), metrics


def _norm(tree: Tree) -> jax.Array:
    """The global L2 norm, in few operations: XLA:CPU makes several kernels of each sum.

    A product per matrix is one kernel, and the many short vectors are one vector.
    """
    leaves = [x.reshape(-1) if x.ndim < 2 else x for x in jax.tree.leaves(tree)]
    vectors = [x for x in leaves if x.ndim == 1]
    arrays = [x for x in leaves if x.ndim > 1] + ([jnp.concatenate(vectors)] if vectors else [])
    return jnp.sqrt(jnp.stack([jnp.vdot(x, x) for x in arrays]).sum())


def _update(
    state: TrainState,
    gradient: Gradient,
    batch: Batch,
    optimizer: optax.GradientTransformation,
    task: Task,
    encoder_scale: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    grads = gradient.grads
    if encoder_scale != 1:
        scaled = jax.tree.map(lambda g: g * encoder_scale, grads["encoder"])
        grads = {**grads, "encoder": scaled}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    score = task.score(gradient.logits, batch["label"])
    weight = batch.get("weight", jnp.ones_like(score, jnp.float32))
    metrics = {
        "loss": gradient.loss,
        task.training_metric: (score * weight).sum() / jnp.maximum(weight.sum(), 1),
        "grad_norm": _norm(grads),
    }
    return TrainState(state.step, params, gradient.model_state, opt_state), metrics


def _inner_steps(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: PatchGrid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: AugmentConfig | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The fill and the J inner steps of the modes `patchgd` and `accumulate`."""
    inner_steps = patchgd.num_inner_steps
    epsilon = inner_steps if patchgd.mode == "accumulate" else patchgd.epsilon
    scale = patchgd.encoder_grad_scale
    groups = partial(
        sample_groups,
        num_patches=grid.num_patches,
        inner_steps=inner_steps,
        batch=batch["image"].shape[0],
        sample_per=patchgd.sample_per,
    )
    ids = groups(stream(key, "sampling"), sampling=patchgd.sampling)
    if patchgd.norm_policy == "paper":
        # Batch statistics of neighbours would not be those of the inner steps.
        fill_ids = groups(stream(key, "fill-order"), sampling="partition")
    else:
        fill_ids = chunked_ids(grid, patchgd.fill_chunk, batch["image"].shape[0])
    if scale == "unbiased":
        scale = 1 / inclusion_probability(grid.num_patches, inner_steps, patchgd.sampling)
    changes: Augment | None = augmentation(augment, stream(key, "augment"))
    z, model_state = fill(
        state.params,
        state.model_state,
        batch["image"],
        stream(key, "fill"),
        model=model,
        grid=grid,
        ids=fill_ids,
        real=real_patches(batch, grid),
        train=patchgd.norm_policy == "paper",
        augment=changes,
    )
    if augment is not None and not augment.same_draw:
        changes = augmentation(augment, stream(key, "augment-inner"))

    def accumulate(
        params: Parts, carry: tuple[Parts, Parts, jax.Array], step: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Parts, Parts, jax.Array], tuple[jax.Array, jax.Array]]:
        total, model_state, z = carry
        number, group = step
        # The gradient is taken inside the scan: a gradient of the scan would keep every step.
        gradient, z = inner_gradient(
            params,
            model_state,
            z,
            group,
            batch,
            jax.random.fold_in(key, number),
            model=model,
            grid=grid,
            train_encoder=patchgd.norm_policy != "frozen",
            spare=patchgd.sampling == "uniform" or has_spare(ids, grid),
            task=task,
            augment=changes,
        )
        total = jax.tree.map(lambda t, g: t + g / epsilon, total, gradient.grads)
        return (total, gradient.model_state, z), (gradient.loss, gradient.logits)

    def update(
        carry: tuple[TrainState, jax.Array], steps: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[TrainState, jax.Array], dict[str, jax.Array]]:
        state, z = carry
        start = (jax.tree.map(jnp.zeros_like, state.params), state.model_state, z)
        (grads, model_state, z), (losses, logits) = lax.scan(
            lambda carry, step: accumulate(state.params, carry, step), start, steps
        )
        gradient = Gradient(grads, model_state, losses.mean(), logits[-1])
        state, metrics = _update(state, gradient, batch, optimizer, task, scale)
        return (state, z), metrics

    steps = jax.tree.map(
        lambda x: x.reshape(inner_steps // epsilon, epsilon, *x.shape[1:]),
        (jnp.arange(inner_steps), ids),
    )
    carry = (state._replace(model_state=model_state), lax.stop_gradient(z))
    (state, _), metrics = lax.scan(update, carry, steps)
    return state, {
        "loss": metrics["loss"].mean(),
        task.training_metric: metrics[task.training_metric][-1],
        "grad_norm": metrics["grad_norm"].mean(),
    }


def eval_step(
    params: Parts,
    model_state: Parts,
    batch: Batch,
    *,
    model: PatchModel,
    grid: PatchGrid,
    fill_chunk: int,
    task: Task = SINGLE_LABEL,
) -> dict[str, jax.Array]:
    """One fill in eval mode and one head pass.

    Returns:
        Per example: `loss` `float [B]` (without smoothing and class weights), `prediction` (the
        task's: `int [B]` for classes) and `logits` `float [B, O]`. Padding examples are in them;
        the caller leaves them out by the batch's `weight`.
    """
    key = jax.random.key(0)
    z = _fill_to_read(params, model_state, batch, model=model, grid=grid, fill_chunk=fill_chunk)
    logits, losses, _ = read_z(
        params,
        model_state,
        z,
        batch,
        key,
        model=model,
        grid=grid,
        train=False,
        task=task.for_evaluation(),
    )
    return {"loss": losses, "prediction": task.predict(logits), "logits": logits}


def attention_map(
    params: Parts,
    model_state: Parts,
    batch: Batch,
    *,
    model: PatchModel,
    grid: PatchGrid,
    fill_chunk: int,
) -> jax.Array:
    """How much the head looks at each patch, for a heatmap of an image.

    Args:
        params: of both parts.
        model_state: of both parts.
        batch: `image`, and `size` if it has one.
        model: with a head that has attention: `attention` or `transformer` of the shipped ones.
        grid: the patch grid of the images.
        fill_chunk: grid positions encoded at a time.

    Returns:
        `float [B, rows, cols]`, which sum to one over an image's patches and are zero for patches
        beyond its true size.

    Raises:
        ConfigError: if the head has no attention.
    """
    if model.attend is None:
        raise ConfigError("the model has no attention to show: its `attend` is None")
    z = _fill_to_read(params, model_state, batch, model=model, grid=grid, fill_chunk=fill_chunk)
    mask = grid.mask(batch["size"]) if "size" in batch else None
    z = z.reshape(z.shape[0], grid.rows, grid.cols, z.shape[-1])
    return model.attend(params, model_state, z, mask)


def _fill_to_read(
    params: Parts,
    model_state: Parts,
    batch: Batch,
    *,
    model: PatchModel,
    grid: PatchGrid,
    fill_chunk: int,
) -> jax.Array:
    """All of Z in eval mode, `[B, N, D]`."""
    ids = chunked_ids(grid, fill_chunk, batch["image"].shape[0])
    key = jax.random.key(0)
    return fill(params, model_state, batch["image"], key, model=model, grid=grid, ids=ids)[0]
