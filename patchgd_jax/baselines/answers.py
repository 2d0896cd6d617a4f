"""An answer for each patch: their loss, and what they say of the image together."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from patchgd_jax.core.gradients import Batch
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.tasks import Task

Pooling = Literal["mean", "vote"]

# What breaks the ties of a vote, and stands for no vote at all.
_FAINT = 1e-6


def patch_logits(
    params: Params,
    model_state: Params,
    latents: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    train: bool,
) -> tuple[jax.Array, Params]:
    """Each patch's own answer: the head reads it as a Z of one entry.

    Args:
        params: of both parts.
        model_state: of both parts.
        latents: `float [B, k, D]`.
        key: PRNG key for the head's dropout.
        model: whose head reads any grid.
        train: passed to the head.

    Returns:
        `float [B, k, O]`, at least float32, and the new model state.
    """
    batch, count, width = latents.shape
    z = latents.reshape(batch * count, 1, 1, width)
    logits, model_state = model.classify(params, model_state, z, None, train=train, rng=key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits.reshape(batch, count, -1), model_state


def answers_loss(
    logits: jax.Array, batch: Batch, counts: jax.Array | None, *, task: Task
) -> jax.Array:
    """The loss where every patch is told its image's label.

    Args:
        logits: `float [B, k, O]`.
        batch: `label`, and `weight` if it has them.
        counts: `bool [B, k]`, False for slots without a patch. None: all are patches.
        task: it has the loss.

    Returns:
        `float []`, the mean over the patches of images that are no padding (weight 0) of loss times
        weight.
    """
    images, count, outputs = logits.shape
    labels = jnp.repeat(batch["label"], count, axis=0)
    losses = task.loss(logits.reshape(-1, outputs), labels).reshape(images, count)
    weight = batch.get("weight", jnp.ones(images, losses.dtype))[:, None]
    real = jnp.ones_like(losses) if counts is None else counts.astype(losses.dtype)
    total = (real * (weight > 0)).sum()
    return (losses * weight * real).sum() / jnp.maximum(total, 1)


def pooled(logits: jax.Array, counts: jax.Array | None, pooling: Pooling) -> jax.Array:
    """An image's answer.

    Args:
        logits: `float [B, k, O]` of its patches.
        counts: `bool [B, k]`, False for slots without a patch. None: all are patches.
        pooling: `mean` of the logits; or `vote`, where each patch has one for its likeliest class,
            and a tie is broken by the mean of their probabilities.

    Returns:
        `float [B, O]`, logits; of a vote, those of the classes' shares in it. Without a patch they
        say nothing, 0 or -inf.
    """
    if counts is None:
        counts = jnp.ones(logits.shape[:2], bool)
    number = jnp.maximum(counts.sum(1), 1)[:, None]

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(counts[..., None], values, 0).sum(1) / number

    if pooling == "mean":
        return mean(logits)
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    return jnp.log(mean(votes + jax.nn.softmax(logits) * _FAINT))
