"""Whole-image gradients: plain autodiff through every patch, or chunk by chunk (`exact`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.forward import cut, encode, fill, head_loss, read_latents
from patchgd_jax.core.model import Params
from patchgd_jax.core.patch_ids import PatchIds, chunk_patch_ids
from patchgd_jax.core.problem import Batch, Problem, Weights, named_key
from patchgd_jax.core.update import Gradient
from patchgd_jax.errors import ConfigError


def check_exact(problem: Problem, batch_stats: Params) -> None:
    """Raises `ConfigError` if batch statistics of the encoder would move in mode `exact`."""
    if problem.trains_encoder and jax.tree.leaves(batch_stats["encoder"]):
        raise ConfigError(
            "mode exact needs an encoder without batch statistics (norm group) or norm_policy "
            "frozen: statistics taken chunk by chunk are not those of the whole image"
        )


def exact_gradient(problem: Problem, weights: Weights, batch: Batch, key: Array) -> Gradient:
    """Computes the whole-image gradient at the memory of one chunk of patches; see `check_exact`.

    Z is filled without gradient, `dL/dZ` taken once through the head, and every chunk encoded again
    to carry its slice of `dL/dZ` into the encoder (gradient caching, arXiv 2101.06983).
    """
    check_exact(problem, weights.batch_stats)
    config, images, fill_key = problem.config, batch["image"], named_key(key, "encoder")
    augment = problem.augmentation(key, "augment", images.shape[0])
    groups = chunk_patch_ids(batch, problem.grid, config.fill_chunk, config.strata)
    train = problem.trains_encoder
    z, _ = fill(problem, weights, batch, groups, fill_key, augment=augment, train=train)
    head_key = named_key(key, "head")
    gradient, dz = z_gradient(problem, weights, lax.stop_gradient(z), batch, head_key)

    def add(total: Params, step: tuple[Array, PatchIds]) -> tuple[Params, None]:
        number, group = step
        group = problem.layout.own_slots(group)
        patches = cut(problem, images, group, augment)
        # The key of the fill, so that dropout is the same in both passes.
        chunk_key = jax.random.fold_in(fill_key, number)
        part = chunk_gradient(problem, weights, dz, patches, group, batch, chunk_key)
        return jax.tree.map(jnp.add, total, part), None

    numbers = jnp.arange(groups.ids.shape[0])
    grads, _ = lax.scan(add, gradient.grads, (numbers, groups))
    return gradient._replace(grads=grads)


def z_gradient(
    problem: Problem, weights: Weights, z: Array, batch: Batch, key: Array
) -> tuple[Gradient, Array]:
    """Computes the head's gradient and `dL/dZ` `[B, N, D]`; `key` is for its dropout."""

    def loss_fn(params: Params, z: Array) -> tuple[Array, Any]:
        head_weights = weights._replace(params=params)
        return head_loss(problem, head_weights, z, batch, key)

    (loss, (logits, batch_stats)), (grads, dz) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(weights.params, z)
    return Gradient(grads, batch_stats, loss, logits), dz


def chunk_gradient(
    problem: Problem,
    weights: Weights,
    dz: Array,
    patches: Array,
    group: PatchIds,
    batch: Batch,
    key: Array,
) -> Params:
    """Carries `dL/dZ` `[B, N, D]` into the encoder, with the `key` of the patches' first pass."""

    def latents_of(params: Params) -> Array:
        chunk_weights = weights._replace(params=params)
        train = problem.trains_encoder
        return encode(problem, chunk_weights, patches, group, batch, key, train=train)[0]

    latents, pull_back = jax.vjp(latents_of, weights.params)
    grads: Params = pull_back(read_latents(dz, group.ids).astype(latents.dtype))[0]
    return grads


def full_gradient(problem: Problem, weights: Weights, batch: Batch, key: Array) -> Gradient:
    """Differentiates end to end through every patch; `config.remat` recomputes chunks."""
    grid, config = problem.grid, problem.config
    chunk = config.fill_chunk if config.remat else grid.num_patches
    groups = chunk_patch_ids(batch, grid, chunk, config.strata)
    augment = problem.augmentation(key, "augment", batch["image"].shape[0])

    def loss_fn(params: Params) -> tuple[Array, Any]:
        z, batch_stats = fill(
            problem,
            weights._replace(params=params),
            batch,
            groups,
            named_key(key, "encoder"),
            augment=augment,
            train=problem.trains_encoder,
        )
        head_weights = Weights(params, batch_stats)
        return head_loss(problem, head_weights, z, batch, named_key(key, "head"))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights.params)
    return Gradient(grads, batch_stats, loss, logits)
