"""Fully convolutional training: one pass over the whole image, and a loss at every position.

The encoder's last map is pooled in windows of a patch's size, one at every entry of the map, and
what follows it reads each window as it would a patch (Long et al., arXiv 1411.4038, section 3.1).
Without padding, squeezing or other reach beyond a patch, the logits at a position are those that
patch-wise training has for the patch there; one pass computes what overlapping patches share once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from patchgd_jax.baselines.patch_logits import Pooling, patch_logits, patch_loss, pool_logits
from patchgd_jax.core.forward import score_logits
from patchgd_jax.core.model import Params
from patchgd_jax.core.problem import Batch, Problem, Weights, named_key
from patchgd_jax.core.update import Gradient, Metrics


def position_latents(
    problem: Problem, weights: Weights, images: Array, key: Array, *, train: bool
) -> tuple[Array, Params]:
    """Encodes images `[B, H, W, C]` to the latents of every position, `float [B, P, D]`.

    The model's encoder must be built with a `window`. Also returns the new batch statistics.
    """
    latents, batch_stats = problem.model.encode(*weights, images, train=train, rng=key)
    return latents.reshape(latents.shape[0], -1, latents.shape[-1]), batch_stats


def fully_conv_gradient(
    problem: Problem,
    weights: Weights,
    batch: Batch,
    key: Array,
    *,
    positions: float,
    pooling: Pooling,
) -> Gradient:
    """Takes the gradient of the mean loss over positions; arguments as `full_gradient`'s.

    The share `positions` of them is drawn without replacement, the same for all images of the
    batch; the loss ignores the others. The training metric pools the drawn ones by `pooling`.
    """
    images = batch["image"]
    augment = problem.augmentation(key, "augment", images.shape[0])
    if augment is not None:
        images = augment(images[:, None], jnp.zeros((images.shape[0], 1), jnp.int32))[:, 0]

    def loss_fn(params: Params) -> tuple[Array, Any]:
        latents, batch_stats = position_latents(
            problem,
            weights._replace(params=params),
            images,
            named_key(key, "encoder"),
            train=problem.trains_encoder,
        )
        count = latents.shape[1]
        if positions < 1:
            order = jax.random.permutation(named_key(key, "sampling"), count)
            latents = latents[:, order[: math.ceil(positions * count)]]
        logits, batch_stats = patch_logits(
            problem, Weights(params, batch_stats), latents, named_key(key, "head"), train=True
        )
        loss = patch_loss(problem, logits, batch, None)
        return loss, (pool_logits(logits, None, pooling), batch_stats)

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights.params)
    return Gradient(grads, batch_stats, loss, logits)


def fully_conv_eval(
    problem: Problem, weights: Weights, batch: Batch, *, pooling: Pooling = "mean"
) -> Metrics:
    """Pools the logits of all positions; arguments and results as `eval_step`'s."""
    key = jax.random.key(0)
    latents, _ = position_latents(problem, weights, batch["image"], key, train=False)
    logits, _ = patch_logits(problem, weights, latents, key, train=False)
    return score_logits(problem, pool_logits(logits, None, pooling), batch)
