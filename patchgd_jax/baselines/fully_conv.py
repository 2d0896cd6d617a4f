"""Fully convolutional training: one pass over the whole image, and a loss at every position.

The encoder's last map is pooled in windows of a patch's size, one at every entry of the map, and
what follows it reads each window as it would a patch (Long et al., arXiv 1411.4038, section 3.1).
Without padding, squeezing or other reach beyond a patch, the answer at a position is the one that
patch-wise training has for the patch there; one pass computes what overlapping patches share once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from patchgd_jax.baselines.answers import Pooling, answers_loss, patch_logits, pooled
from patchgd_jax.baselines.base import Metrics, scores
from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.augment import Augment
from patchgd_jax.core.gradients import Batch, Gradient, stream
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.tasks import SINGLE_LABEL, Task


def position_latents(
    params: Params,
    model_state: Params,
    images: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    train: bool,
) -> tuple[jax.Array, Params]:
    """The latent of every position.

    Args:
        params: of both parts.
        model_state: of both parts.
        images: `[B, H, W, C]`.
        key: PRNG key for dropout.
        model: whose encoder was built with a `window`.
        train: passed to the encoder.

    Returns:
        `float [B, P, D]`, row by row, and the new model state.
    """
    latents, model_state = model.encode(params, model_state, images, train=train, rng=key)
    return latents.reshape(latents.shape[0], -1, latents.shape[-1]), model_state


def fully_conv_gradient(
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: Augment | None,
    positions: float,
    pooling: Pooling,
) -> Gradient:
    """The gradient of the mean loss over positions, given `gradients.full_gradient`'s arguments.

    The share `positions` of them is drawn, without replacement and the same for all images of the
    batch; the others have no part in the loss. For the training metric, they answer for an image by
    `pooling`.
    """
    images = batch["image"]
    if augment is not None:
        images = augment(images[:, None], jnp.zeros((images.shape[0], 1), jnp.int32))[:, 0]

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        latents, new_state = position_latents(
            params,
            model_state,
            images,
            stream(key, "encoder"),
            model=model,
            train=patchgd.norm_policy != "frozen",
        )
        count = latents.shape[1]
        if positions < 1:
            order = jax.random.permutation(stream(key, "sampling"), count)
            latents = latents[:, order[: math.ceil(positions * count)]]
        logits, new_state = patch_logits(
            params, new_state, latents, stream(key, "head"), model=model, train=True
        )
        loss = answers_loss(logits, batch, None, task=task)
        return loss, (pooled(logits, None, pooling), new_state)

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits)


def fully_conv_eval(
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
    """Pools the answers of all positions; arguments and results of `step.eval_step`."""
    key = jax.random.key(0)
    latents, _ = position_latents(
        params, model_state, batch["image"], key, model=model, train=False
    )
    logits, _ = patch_logits(params, model_state, latents, key, model=model, train=False)
    return scores(pooled(logits, None, pooling), batch, task)
