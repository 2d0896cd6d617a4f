"""Logits of single patches: their loss, and pooling to an image's logits."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from patchgd_jax.core.model import Params
from patchgd_jax.core.problem import Batch, Problem, Weights

Pooling = Literal["mean", "vote"]

# Breaks the ties of a vote, and stands for no vote at all.
_FAINT = 1e-6


def patch_logits(
    problem: Problem, weights: Weights, latents: Array, key: Array, *, train: bool
) -> tuple[Array, Params]:
    """Applies the head to each patch's latent as to a Z of one entry.

    The latents are `float [B, k, D]`; the head must read any grid. Returns `float [B, k, O]`, at
    least float32, and the new batch statistics.
    """
    batch, count, width = latents.shape
    z = latents.reshape(batch * count, 1, 1, width)
    logits, batch_stats = problem.model.classify(*weights, z, None, train=train, rng=key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits.reshape(batch, count, -1), batch_stats


def patch_loss(problem: Problem, logits: Array, batch: Batch, mask: Array | None) -> Array:
    """Computes the mean loss of patches that are trained with their image's label.

    Args:
        problem: the static part.
        logits: `float [B, k, O]`.
        batch: with `label`, and `weight` if it has them.
        mask: `bool [B, k]`, False for padding. None: all slots are patches.

    Returns:
        `float []`, the mean of loss times weight over the patches of real examples.
    """
    images, count, outputs = logits.shape
    labels = jnp.repeat(batch["label"], count, axis=0)
    losses = problem.task.loss(logits.reshape(-1, outputs), labels).reshape(images, count)
    weight = batch.get("weight", jnp.ones(images, losses.dtype))[:, None]
    real = jnp.ones_like(losses) if mask is None else mask.astype(losses.dtype)
    total = (real * (weight > 0)).sum()
    return (losses * weight * real).sum() / jnp.maximum(total, 1)


def pool_logits(logits: Array, mask: Array | None, pooling: Pooling) -> Array:
    """Pools patch logits `float [B, k, O]` to an image's `float [B, O]`.

    Args:
        logits: `float [B, k, O]`.
        mask: `bool [B, k]`, False for padding. None: all slots are patches.
        pooling: `mean` of the logits; or `vote`, one for each patch's most probable class, with
            ties broken by the mean of the probabilities: the logarithms of the classes' shares.
    """
    if mask is None:
        mask = jnp.ones(logits.shape[:2], bool)
    number = jnp.maximum(mask.sum(1), 1)[:, None]

    def mean(values: Array) -> Array:
        return jnp.where(mask[..., None], values, 0).sum(1) / number

    if pooling == "mean":
        return mean(logits)
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    return jnp.log(mean(votes + jax.nn.softmax(logits) * _FAINT))
