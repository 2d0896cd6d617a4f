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

from patchgd_jax.config import PatchGDConfig
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
from patchgd_jax.patch_model import Parts, PatchModel, Tree
from patchgd_jax.sampling import inclusion_probability, sample_groups


class TrainState(NamedTuple):
    """All that an outer step changes."""

    step: jax.Array
    """`int32 []`, outer steps done."""
    params: Parts
    model_state: Parts
    opt_state: Tree


def init_state(
    key: jax.Array, *, model: PatchModel, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first outer step."""
    params, model_state = model.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: PatchGrid,
    patchgd: PatchGDConfig,
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

    Returns:
        The new state and metrics, each `float []`: `loss` (mean over the inner steps), `accuracy`
        (of the last inner step's logits, as the papers report), `grad_norm` (mean over the
        updates) and `param_norm` (after the last one). If all are finite, so is the state.

    Raises:
        ConfigError: if there are more inner steps than patches, or mode `exact` is asked of an
            encoder whose batch statistics move.
    """
    key = jax.random.fold_in(key, state.step)
    if patchgd.mode in ("patchgd", "accumulate"):
        new_state, metrics = _inner_steps(
            state, batch, key, model=model, optimizer=optimizer, grid=grid, patchgd=patchgd
        )
    else:
        train_encoder = patchgd.norm_policy != "frozen"
        arguments = (state.params, state.model_state, batch, key)
        if patchgd.mode == "exact":
            gradient = exact_gradient(
                *arguments,
                model=model,
                grid=grid,
                chunk=patchgd.fill_chunk,
                train_encoder=train_encoder,
            )
        else:
            gradient = full_gradient(
                *arguments,
                model=model,
                grid=grid,
                chunk=patchgd.fill_chunk,
                train_encoder=train_encoder,
                remat=patchgd.remat,
            )
        scale = patchgd.encoder_grad_scale
        # Every patch has its part in these gradients: they are unbiased as they are.
        new_state, metrics = _update(
            state, gradient, batch, optimizer, 1.0 if scale == "unbiased" else scale
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
    encoder_scale: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    grads = gradient.grads
    if encoder_scale != 1:
        scaled = jax.tree.map(lambda g: g * encoder_scale, grads["encoder"])
        grads = {**grads, "encoder": scaled}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    right = gradient.logits.argmax(-1) == batch["label"]
    weight = batch.get("weight", jnp.ones_like(right, jnp.float32))
    metrics = {
        "loss": gradient.loss,
        "accuracy": (right * weight).sum() / jnp.maximum(weight.sum(), 1),
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
    )

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
        state, metrics = _update(state, gradient, batch, optimizer, scale)
        return (state, z), metrics

    steps = jax.tree.map(
        lambda x: x.reshape(inner_steps // epsilon, epsilon, *x.shape[1:]),
        (jnp.arange(inner_steps), ids),
    )
    carry = (state._replace(model_state=model_state), lax.stop_gradient(z))
    (state, _), metrics = lax.scan(update, carry, steps)
    return state, {
        "loss": metrics["loss"].mean(),
        "accuracy": metrics["accuracy"][-1],
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
) -> dict[str, jax.Array]:
    """One fill in eval mode and one head pass.

    Returns:
        Per example: `loss` `float [B]`, `prediction` `int [B]` and `logits` `float [B, classes]`.
        Padding examples are in them; the caller leaves them out by the batch's `weight`.
    """
    key = jax.random.key(0)
    ids = chunked_ids(grid, fill_chunk, batch["image"].shape[0])
    z, _ = fill(params, model_state, batch["image"], key, model=model, grid=grid, ids=ids)
    logits, losses, _ = read_z(
        params, model_state, z, batch, key, model=model, grid=grid, train=False
    )
    return {"loss": losses, "prediction": logits.argmax(-1), "logits": logits}
