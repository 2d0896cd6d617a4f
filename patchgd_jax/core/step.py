"""The heart: one outer step on a batch of images, and one evaluation step. Pure functions.

Source: arXiv 2301.13817, Algorithm 1 (and its TMLR 2024 version, openreview 6dS1jhdemD). Nothing
here is jitted; the caller adds jit, donation and shardings once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.contrib.importance import importance_groups
from patchgd_jax.core.augment import augmentation
from patchgd_jax.core.freezing import close_over_frozen, combine_frozen, partition_frozen
from patchgd_jax.core.gradients import (
    Batch,
    Gradient,
    chunks,
    exact_gradient,
    full_gradient,
    inner_gradient,
    listed_patches,
    patch_mask,
    read_z,
    real_patches,
    stream,
)
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.latents import fill, has_spare
from patchgd_jax.core.model import (
    Params,
    PatchModel,
    PyTree,
)
from patchgd_jax.core.optimizer import AverageState
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.sampling import inclusion_probability, sample_groups
from patchgd_jax.core.staleness import drift, mean_age, squared_change
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.errors import ConfigError

Steps = tuple[jax.Array, jax.Array, jax.Array | None]
"""Inner steps: their numbers `int [j]`, groups `int [j, B, k]`, and the patches' weights in the
encoder's gradient, `float [j, B, k]`, or None for 1. Of a single one, without the first axis."""


class TrainState(NamedTuple):
    """All that an outer step changes."""

    step: jax.Array
    """`int32 []`, outer steps done."""
    params: Params
    model_state: Params
    opt_state: PyTree


def init_state(
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    frozen: frozenset[str] = frozenset(),
) -> TrainState:
    """The state before the first outer step; the optimizer keeps nothing for `frozen` entries."""
    params, model_state = model.init(key)
    trained = partition_frozen(params, frozen)[0] if frozen else params
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(trained))


def evaluated_params(state: TrainState) -> Params:
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
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task = SINGLE_LABEL,
    augment: AugmentConfig | None = None,
    frozen: frozenset[str] = frozenset(),
    placement: Placement = ALONE,
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
        placement: of the images, patches and parameters; see `sharding.sharded_train_step`.

    Returns:
        The new state and metrics, each `float []`: `loss` (mean over the inner steps), the task's
        `training_metric` (`accuracy` for most; of the last inner step's logits, as the papers
        report), `grad_norm` (mean over the updates) and `param_norm` (after the last one). If all
        are finite, so is the state. In the modes `patchgd` and `accumulate` also how stale Z is:
        `z_age`, in inner steps (`staleness.mean_age`), and `z_drift`, a relative change
        (`staleness.drift`).

    Raises:
        ConfigError: if there are more inner steps than patches, mode `exact` is asked of an encoder
            whose batch statistics move, the labels are not the task's, the scale `unbiased` is
            asked for where images have different numbers of patches that are drawn uniformly, or
            for what `importance.importance_groups` refuses.
    """
    if frozen:
        return step_beside_frozen(
            train_step,
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
            placement=placement,
        )
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
            placement=placement,
        )
    else:
        gradient = _whole_gradient(
            state,
            batch,
            key,
            model=model,
            grid=grid,
            patchgd=patchgd,
            task=task,
            augment=augment,
            placement=placement,
        )
        scale = patchgd.encoder_grad_scale
        # Every patch has its part in these gradients: they are unbiased as they are.
        new_state, metrics = apply_gradient(
            state, gradient, batch, optimizer, task, 1.0 if scale == "unbiased" else scale
        )
    # The other metrics are of the parameters before the last update; this one is of those after.
    metrics["param_norm"] = global_norm(new_state.params)
    return new_state._replace(step=state.step + 1), metrics


def step_beside_frozen(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    frozen: frozenset[str],
    *,
    model: PatchModel,
    placement: Placement = ALONE,
    **arguments: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step that sees only the parameters that are trained; `param_norm` is that of all.

    Args:
        step: of `train_step`'s arguments, but for `frozen`.
        state: with all parameters.
        batch: as `step`'s.
        key: as `step`'s.
        frozen: the encoder's entries that stay as they are.
        model: of all parameters.
        placement: as `step`'s.
        **arguments: the others of `step`.
    """
    trained, fixed = partition_frozen(state.params, frozen)
    new_state, metrics = step(
        state._replace(params=trained),
        batch,
        key,
        model=close_over_frozen(model, lambda: placement.vary(fixed)),
        placement=placement,
        **arguments,
    )
    params = combine_frozen(new_state.params, fixed)
    return new_state._replace(params=params), {**metrics, "param_norm": global_norm(params)}


def global_norm(tree: PyTree) -> jax.Array:
    """The global L2 norm, in few operations: XLA:CPU makes several kernels of each sum.

    A product per matrix is one kernel, and the many short vectors are one vector.
    """
    leaves = [x.reshape(-1) if x.ndim < 2 else x for x in jax.tree.leaves(tree)]
    vectors = [x for x in leaves if x.ndim == 1]
    arrays = [x for x in leaves if x.ndim > 1] + ([jnp.concatenate(vectors)] if vectors else [])
    return jnp.sqrt(jnp.stack([jnp.vdot(x, x) for x in arrays]).sum())


def apply_gradient(
    state: TrainState,
    gradient: Gradient,
    batch: Batch,
    optimizer: optax.GradientTransformation,
    task: Task,
    encoder_scale: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update.

    Args:
        state: whose parameters the gradient is of.
        gradient: from one of `gradients`.
        batch: `label` and `weight` of it are read.
        optimizer: any optax transformation.
        task: it has the training metric.
        encoder_scale: factor on the encoder's gradient.

    Returns:
        The new state, its `step` as it was; `loss`, `grad_norm` and the task's training metric.
    """
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
        "grad_norm": global_norm(grads),
    }
    return TrainState(state.step, params, gradient.model_state, opt_state), metrics


def _whole_gradient(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: AugmentConfig | None,
    placement: Placement,
) -> Gradient:
    """The gradient of the modes `exact` and `full`."""
    of_part = exact_gradient
    if patchgd.mode == "full":
        of_part = partial(full_gradient, remat=patchgd.remat)

    def local(
        params: Params, model_state: Params, batch: Batch, key: jax.Array
    ) -> tuple[Params, Params, jax.Array, jax.Array]:
        first = placement.first_image(batch["image"].shape[0])
        gradient = of_part(
            params,
            model_state,
            batch,
            key,
            model=model,
            grid=grid,
            chunk=patchgd.fill_chunk,
            strata=patchgd.strata,
            train_encoder=patchgd.norm_policy != "frozen",
            task=task,
            augment=augmentation(augment, stream(key, "augment"), first),
            placement=placement,
        )
        return gradient.grads, gradient.model_state, gradient.loss, gradient.logits

    everywhere = placement.spread(
        local, ("params", "same", "batch", "same"), ("gradient", "same", "sum", "images")
    )
    return Gradient(*everywhere(state.params, state.model_state, batch, key))


def _inner_steps(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: AugmentConfig | None,
    placement: Placement,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The fill and the J inner steps of the modes `patchgd` and `accumulate`."""
    inner_steps = patchgd.num_inner_steps
    epsilon = inner_steps if patchgd.mode == "accumulate" else patchgd.epsilon
    scale = patchgd.encoder_grad_scale
    patches = listed_patches(batch, grid)
    groups = partial(
        sample_groups,
        num_patches=grid.num_patches,
        inner_steps=inner_steps,
        batch=batch["image"].shape[0],
        sample_per=patchgd.sample_per,
        patches=patches,
        strata=patchgd.strata,
    )
    if patchgd.norm_policy == "paper":
        # Batch statistics of neighbours would not be those of the inner steps.
        fill_ids = groups(stream(key, "fill-order"), sampling="partition")
        fill_spare = patches is not None or has_spare(fill_ids, grid)
    else:
        fill_ids, fill_spare = chunks(batch, grid, patchgd.fill_chunk, patchgd.strata)
    if scale == "unbiased":
        if patches is not None and patchgd.sampling == "uniform":
            raise ConfigError(
                "patchgd.encoder_grad_scale unbiased with patchgd.sampling uniform has a factor of "
                "its own for each number of patches, and these images differ; use partition"
            )
        scale = 1 / inclusion_probability(
            grid.num_patches, inner_steps, patchgd.sampling, patchgd.strata
        )
    redrawn = augment is not None and not augment.same_draw

    def first_fill(
        params: Params, model_state: Params, batch: Batch, ids: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        first = placement.first_image(batch["image"].shape[0])
        return fill(
            params,
            model_state,
            batch["image"],
            stream(key, "fill"),
            model=model,
            grid=grid,
            ids=ids,
            spare=fill_spare,
            real=real_patches(batch, grid),
            train=patchgd.norm_policy == "paper",
            augment=augmentation(augment, stream(key, "augment"), first),
            placement=placement,
        )

    def group_gradient(
        params: Params,
        model_state: Params,
        z: jax.Array,
        batch: Batch,
        steps: Steps,
        key: jax.Array,
    ) -> tuple[Params, Params, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The mean gradient of the inner steps between two updates, and what they leave."""
        first = placement.first_image(batch["image"].shape[0])
        changes = augmentation(
            augment, stream(key, "augment-inner" if redrawn else "augment"), first
        )

        def accumulate(
            carry: tuple[Params, Params, jax.Array], step: Steps
        ) -> tuple[tuple[Params, Params, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
            total, model_state, z = carry
            number, group, weights = step
            # The gradient is taken inside the scan: a gradient of the scan would keep every step.
            gradient, fresh = inner_gradient(
                params,
                model_state,
                z,
                group,
                batch,
                jax.random.fold_in(key, number),
                model=model,
                grid=grid,
                train_encoder=patchgd.norm_policy != "frozen",
                weights=weights,
                spare=patches is not None or patchgd.sampling == "uniform" or has_spare(ids, grid),
                task=task,
                augment=changes,
                placement=placement,
            )
            total = jax.tree.map(lambda t, g: t + g / epsilon, total, gradient.grads)
            moved = squared_change(z, fresh, group, batch.get("weight"))
            return (total, gradient.model_state, fresh), (gradient.loss, gradient.logits, moved)

        start = (jax.tree.map(jnp.zeros_like, params), model_state, z)
        (grads, model_state, z), (losses, logits, moved) = lax.scan(accumulate, start, steps)
        return grads, model_state, z, losses.mean(), logits[-1], moved

    fill_everywhere = placement.spread(
        first_fill, ("params", "same", "batch", "groups", "same"), ("images", "same")
    )
    gradient_everywhere = placement.spread(
        group_gradient,
        ("params", "same", "images", "batch", ("same", "groups", "groups"), "same"),
        ("gradient", "same", "images", "sum", "images", "sum"),
    )
    z, model_state = fill_everywhere(state.params, state.model_state, batch, fill_ids, key)
    weights = None
    if patchgd.importance == "none":
        ids = groups(stream(key, "sampling"), sampling=patchgd.sampling)
    else:
        ids, weights = importance_groups(
            state.params,
            model_state,
            z,
            batch,
            key,
            model=model,
            grid=grid,
            patchgd=patchgd,
            task=task,
            placement=placement,
        )

    def update(
        carry: tuple[TrainState, jax.Array], steps: Steps
    ) -> tuple[tuple[TrainState, jax.Array], dict[str, jax.Array]]:
        state, z = carry
        grads, model_state, z, loss, logits, moved = gradient_everywhere(
            state.params, state.model_state, z, batch, steps, key
        )
        gradient = Gradient(grads, model_state, loss, logits)
        state, metrics = apply_gradient(state, gradient, batch, optimizer, task, scale)
        return (state, z), {**metrics, "moved": moved}

    steps = jax.tree.map(
        lambda x: x.reshape(inner_steps // epsilon, epsilon, *x.shape[1:]),
        (jnp.arange(inner_steps), ids, weights),
    )
    carry = (state._replace(model_state=model_state), lax.stop_gradient(z))
    (state, _), metrics = lax.scan(update, carry, steps)
    return state, {
        "loss": metrics["loss"].mean(),
        task.training_metric: metrics[task.training_metric][-1],
        "grad_norm": metrics["grad_norm"].mean(),
        "z_age": mean_age(ids, grid.num_patches, real_patches(batch, grid)),
        "z_drift": drift(metrics["moved"].reshape(inner_steps, 2)),
    }


def eval_step(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    fill_chunk: int,
    strata: int = 1,
    task: Task = SINGLE_LABEL,
    placement: Placement = ALONE,
) -> dict[str, jax.Array]:
    """One fill in eval mode and one head pass.

    Returns:
        Per example: `loss` `float [B]` (without smoothing and class weights), `prediction` (the
        task's: `int [B]` for classes) and `logits` `float [B, O]`. Padding examples are in them;
        the caller leaves them out by the batch's `weight`.
    """

    def local(params: Params, model_state: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        z = eval_fill(
            params,
            model_state,
            batch,
            model=model,
            grid=grid,
            fill_chunk=fill_chunk,
            strata=strata,
            placement=placement,
        )
        logits, losses, _ = read_z(
            params,
            model_state,
            z,
            batch,
            jax.random.key(0),
            model=model,
            grid=grid,
            train=False,
            task=task.for_evaluation(),
            placement=placement,
        )
        return losses, logits

    everywhere = placement.spread(local, ("params", "same", "batch"), ("images", "images"))
    losses, logits = everywhere(params, model_state, batch)
    return {"loss": losses, "prediction": task.predict(logits), "logits": logits}


def attention_map(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    fill_chunk: int,
) -> jax.Array:
    """How much the head looks at each patch, for a heatmap of an image.

    Args:
        params: of both parts.
        model_state: of both parts.
        batch: `image`, and `patches` or `size` if it has them.
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
    z = eval_fill(params, model_state, batch, model=model, grid=grid, fill_chunk=fill_chunk)
    mask = patch_mask(batch, grid)
    z = z.reshape(z.shape[0], grid.rows, grid.cols, z.shape[-1])
    return model.attend(params, model_state, z, mask)


def eval_fill(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    fill_chunk: int,
    strata: int = 1,
    placement: Placement = ALONE,
) -> jax.Array:
    """All of Z in eval mode, `[B, N, D]`; arguments as `eval_step`'s."""
    ids, spare = chunks(batch, grid, fill_chunk, strata)
    z, _ = fill(
        params,
        model_state,
        batch["image"],
        jax.random.key(0),
        model=model,
        grid=grid,
        ids=ids,
        spare=spare,
        placement=placement,
    )
    return z
