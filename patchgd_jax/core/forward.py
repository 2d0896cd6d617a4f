"""The forward pass: patches to latents, latents to Z, Z to logits; and the evaluation step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.augment import Augment
from patchgd_jax.core.model import Params
from patchgd_jax.core.patch_ids import PatchIds, chunk_patch_ids, slot_mask, valid_mask
from patchgd_jax.core.problem import Batch, Problem, Spec, Weights
from patchgd_jax.errors import ConfigError


def cut(problem: Problem, images: Array, group: PatchIds, augment: Augment | None = None) -> Array:
    """Cuts this device's slots of a group out of its images: `[B, k, *patch_shape, C]`."""
    patches = problem.layout.take(problem.grid, images, group.ids)
    return patches if augment is None else augment(patches, group.ids)


def encode(
    problem: Problem,
    weights: Weights,
    patches: Array,
    group: PatchIds,
    batch: Batch,
    key: Array,
    *,
    train: bool,
) -> tuple[Array, Params]:
    """Encodes the patches `[B, k, *patch_shape, C]` of a group (this device's slots).

    The batch tells which patches count in batch statistics; `key` is for dropout. Returns latents
    `[B, k, D]` and the new batch statistics.
    """
    mask = slot_mask(batch, problem.grid, group)
    latents, batch_stats = problem.model.encode(
        weights.params,
        weights.batch_stats,
        patches.reshape(-1, *patches.shape[2:]),
        train=train,
        rng=problem.layout.patches_key(key),
        mask=None if mask is None else mask.reshape(-1),
    )
    return latents.reshape(*group.ids.shape, -1), batch_stats


def fill(
    problem: Problem,
    weights: Weights,
    batch: Batch,
    groups: PatchIds,
    key: Array,
    *,
    augment: Augment | None = None,
    train: bool = False,
) -> tuple[Array, Params]:
    """Computes Z, some patches at a time (arXiv 2301.13817, Algorithm 1, lines 3 to 6).

    In mode `full` with `remat`, each chunk is recomputed in the backward pass instead of kept.

    Args:
        problem: the static part.
        weights: of encoder and head.
        batch: with `image`.
        groups: `int32 [n, B, k]`, each patch once; entries of Z that are not in them are zero. How
            patches are grouped changes speed and memory only, unless batch statistics move.
        key: for dropout; chunk `i` gets `fold_in(key, i)`.
        augment: changes the patches before they are encoded.
        train: encode in train mode, carrying batch statistics from chunk to chunk.

    Returns:
        Z `[B, N, D]` and the new batch statistics.
    """
    layout, images = problem.layout, batch["image"]

    def encode_chunk(batch_stats: Params, step: tuple[Array, PatchIds]) -> Any:
        number, group = step
        patches = cut(problem, images, group, augment)
        chunk_key, chunk_weights = jax.random.fold_in(key, number), Weights(params, batch_stats)
        latents, batch_stats = encode(
            problem, chunk_weights, patches, group, batch, chunk_key, train=train
        )
        return batch_stats, latents

    params = weights.params
    remat = problem.config.mode == "full" and problem.config.remat
    body: Any = jax.checkpoint(encode_chunk) if remat else encode_chunk
    # lax.scan, not lax.map: the latter would return the batch statistics of every chunk.
    steps = (jnp.arange(groups.ids.shape[0]), layout.own_slots(groups))
    batch_stats, latents = lax.scan(body, weights.batch_stats, steps)
    latents = layout.all_slots(latents)
    count, width = images.shape[0], latents.shape[-1]
    z = jnp.zeros((count, problem.grid.num_patches, width), latents.dtype)
    slots = jnp.swapaxes(groups.ids, 0, 1).reshape(count, -1)
    flat = jnp.swapaxes(latents, 0, 1).reshape(count, -1, width)
    return write_latents(z, slots, flat), batch_stats


def write_latents(z: Array, ids: Array, latents: Array) -> Array:
    """Replaces the entries `ids int [B, k]` of Z `[B, N, D]` by latents `[B, k, D]`.

    Ids are different within a row; padding is dropped. Every other entry stays, bit for bit.
    """
    row = jnp.arange(z.shape[0])[:, None]
    return z.at[row, ids].set(latents.astype(z.dtype), mode="drop", unique_indices=True)


def read_latents(z: Array, ids: Array) -> Array:
    """Reads the entries `ids int [B, k]` of Z as `[B, k, D]`; zero for padding."""
    row = jnp.arange(z.shape[0])[:, None]
    return z.at[row, ids].get(mode="fill", fill_value=0)


def scale_gradient(latents: Array, factor: Array) -> Array:
    """Returns the latents, with a gradient that is `factor` times theirs."""
    constant = lax.stop_gradient(latents)
    return constant + factor.astype(latents.dtype) * (latents - constant)


def z_map(problem: Problem, z: Array) -> Array:
    """Lays Z `[B, N, D]` out as the head reads it: `[B, rows, cols, D]`."""
    return z.reshape(z.shape[0], problem.grid.rows, problem.grid.cols, z.shape[-1])


def apply_head(
    problem: Problem, weights: Weights, z: Array, batch: Batch, key: Array, *, train: bool
) -> tuple[Array, Params]:
    """Reads Z `[B, N, D]` with the head: logits `float [B, O]` and new batch statistics."""
    logits, batch_stats = problem.model.classify(
        weights.params,
        weights.batch_stats,
        z_map(problem, z),
        valid_mask(batch, problem.grid),
        train=train,
        rng=problem.layout.images_key(key),
    )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), batch_stats


def head_loss(
    problem: Problem, weights: Weights, z: Array, batch: Batch, key: Array
) -> tuple[Array, tuple[Array, Params]]:
    """Computes the mean over real examples of loss times weight, in train mode.

    Where several devices have parts of the batch, it is this device's share of the mean. Returns
    the loss `float []`, and the logits and new batch statistics.
    """
    logits, batch_stats = apply_head(problem, weights, z, batch, key, train=True)
    losses = problem.task.loss(logits, batch["label"])
    weight = batch.get("weight", jnp.ones_like(losses))
    total = problem.layout.sum_images((weight > 0).astype(losses.dtype).sum())
    return (losses * weight).sum() / jnp.maximum(total, 1), (logits, batch_stats)


def encode_all(problem: Problem, weights: Weights, batch: Batch) -> Array:
    """Computes Z `[B, N, D]` in eval mode."""
    layout, chunk = problem.layout, problem.config.fill_chunk
    groups = chunk_patch_ids(batch, problem.grid, chunk, layout.patch_devices)
    return fill(problem, weights, batch, groups, jax.random.key(0))[0]


def eval_step(problem: Problem, weights: Weights, batch: Batch) -> dict[str, Array]:
    """Evaluates a batch: one fill and one head pass in eval mode.

    Returns:
        For each example `loss` `float [B]` (without smoothing and class weights), `prediction` (the
        task's: `int [B]` for classes) and `logits` `float [B, O]`; also for padding examples
        (`weight` 0).
    """
    task = problem.task.for_evaluation()

    def local(weights: Weights, batch: Batch) -> tuple[Array, Array]:
        z = encode_all(problem, weights, batch)
        logits, _ = apply_head(problem, weights, z, batch, jax.random.key(0), train=False)
        return task.loss(logits, batch["label"]), logits

    everywhere = problem.layout.spread(
        local, (Spec.WEIGHTS, Spec.BATCH), (Spec.IMAGES, Spec.IMAGES)
    )
    losses, logits = everywhere(weights, batch)
    return {"loss": losses, "prediction": task.predict(logits), "logits": logits}


def score_logits(problem: Problem, logits: Array, batch: Batch) -> dict[str, Array]:
    """Returns what `eval_step` does, given the logits `float [B, O]` on one device."""
    task = problem.task.for_evaluation()
    losses = task.loss(logits, batch["label"])
    return {"loss": losses, "prediction": task.predict(logits), "logits": logits}


def attention_map(problem: Problem, weights: Weights, batch: Batch) -> Array:
    """Computes how much the head looks at each patch, for a heatmap; see `read_attention`."""
    return read_attention(problem, weights, encode_all(problem, weights, batch), batch)


def read_attention(problem: Problem, weights: Weights, z: Array, batch: Batch) -> Array:
    """Reads the head's attention on Z `[B, N, D]`: `float [B, rows, cols]`.

    It sums to one over an image's patches and is zero for patches beyond its true size. Raises
    `ConfigError` if the head has no attention.
    """
    if problem.model.attend is None:
        raise ConfigError("the model has no attention to show: its `attend` is None")
    return problem.model.attend(*weights, z_map(problem, z), valid_mask(batch, problem.grid))
