"""Three ways to a gradient of the loss: of some patches, of all at once, of all chunk by chunk."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.augment import Augment
from patchgd_jax.errors import ConfigError
from patchgd_jax.grid import PatchGrid
from patchgd_jax.latents import (
    chunked_ids,
    encode_patches,
    fill,
    has_spare,
    read_latents,
    write_latents,
)
from patchgd_jax.patch_model import Parts, PatchModel
from patchgd_jax.tasks import SINGLE_LABEL, Task

Batch = Mapping[str, jax.Array]
"""`image` `[B, H, W, C]` (uint8, or float in [0, 1]) and `label`, `int [B]` or what else the task
takes; optionally `weight` `float [B]` (0 for padding examples) and `size` `int [B, 2]` (true height
and width)."""


class Gradient(NamedTuple):
    """A gradient and what its computation leaves behind."""

    grads: Parts
    model_state: Parts
    loss: jax.Array
    """`float []`, mean over the batch."""
    logits: jax.Array
    """`float [B, O]`, as the task has them."""


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key for one named use of randomness, independent of every other name's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def real_patches(batch: Batch, grid: PatchGrid) -> jax.Array | None:
    """Which patches are of a real example and hold a real pixel: `bool [B, N]`, or None for all."""
    real = None
    if "size" in batch:
        real = grid.mask(batch["size"]).reshape(-1, grid.num_patches)
    if "weight" in batch:
        counts = jnp.repeat(batch["weight"][:, None] > 0, grid.num_patches, axis=1)
        real = counts if real is None else real & counts
    return real


def read_z(
    params: Parts,
    model_state: Parts,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    train: bool,
    task: Task,
) -> tuple[jax.Array, jax.Array, Parts]:
    """Reads Z `[B, N, D]` with the head.

    Returns:
        Logits `float [B, O]`, the task's loss of each example `float [B]`, and the new model state.
    """
    mask = grid.mask(batch["size"]) if "size" in batch else None
    z = z.reshape(z.shape[0], grid.rows, grid.cols, z.shape[-1])
    logits, model_state = model.classify(params, model_state, z, mask, train=train, rng=key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits, task.loss(logits, batch["label"]), model_state


def head_loss(
    params: Parts,
    model_state: Parts,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    task: Task,
) -> tuple[jax.Array, tuple[jax.Array, Parts]]:
    """The mean loss of a training batch, by weight; the logits; the new model state."""
    logits, losses, model_state = read_z(
        params, model_state, z, batch, key, model=model, grid=grid, train=True, task=task
    )
    weight = batch.get("weight", jnp.ones_like(losses))
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1), (logits, model_state)


def inner_gradient(
    params: Parts,
    model_state: Parts,
    z: jax.Array,
    ids: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    train_encoder: bool,
    spare: bool = True,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
) -> tuple[Gradient, jax.Array]:
    """The gradient of one inner step: through the patches `ids [B, k]` only.

    They are encoded anew and written into Z, the rest of which is a constant (arXiv 2301.13817,
    Algorithm 1, lines 8 to 12). `spare` says whether `ids` may have slots without a patch.

    Returns:
        The gradient, and Z with the fresh entries, again a constant.
    """

    def loss_fn(params: Parts) -> tuple[jax.Array, tuple[jax.Array, Parts, jax.Array]]:
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
            spare=spare,
            augment=augment,
        )
        fresh = write_latents(z, ids, latents)
        loss, (logits, new_state) = head_loss(
            params, new_state, fresh, batch, stream(key, "head"), model=model, grid=grid, task=task
        )
        return loss, (logits, new_state, lax.stop_gradient(fresh))

    (loss, (logits, new_state, fresh)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits), fresh


def exact_gradient(
    params: Parts,
    model_state: Parts,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    chunk: int,
    train_encoder: bool,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
) -> Gradient:
    """The whole-image gradient at the memory of one chunk of patches.

    Z is filled without gradient, `dL/dZ` taken once through the head, and every chunk encoded
    again to carry its slice of `dL/dZ` into the encoder (gradient caching, arXiv 2101.06983).

    Raises:
        ConfigError: if batch statistics of the encoder would move: those of a chunk are not those
            of the image.
    """
    if train_encoder and jax.tree.leaves(model_state["encoder"]):
        raise ConfigError(
            "mode exact needs an encoder without batch statistics (norm group) or norm_policy "
            "frozen: statistics taken chunk by chunk are not those of the whole image"
        )
    images, fill_key = batch["image"], stream(key, "encoder")
    chunks = chunked_ids(grid, chunk, images.shape[0])
    z, _ = fill(
        params,
        model_state,
        images,
        fill_key,
        model=model,
        grid=grid,
        ids=chunks,
        train=train_encoder,
        augment=augment,
    )

    def loss_fn(params: Parts, z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Parts]]:
        return head_loss(
            params, model_state, z, batch, stream(key, "head"), model=model, grid=grid, task=task
        )

    (loss, (logits, new_state)), (grads, dz) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(params, lax.stop_gradient(z))

    def add(total: Parts, step: tuple[jax.Array, jax.Array]) -> tuple[Parts, None]:
        number, ids = step

        def encode(params: Parts) -> jax.Array:
            # The key of the fill, so that dropout is the same in both passes.
            latents, _ = encode_patches(
                params,
                model_state,
                images,
                ids,
                jax.random.fold_in(fill_key, number),
                model=model,
                grid=grid,
                train=train_encoder,
                spare=has_spare(chunks, grid),
                augment=augment,
            )
            return latents

        latents, pull_back = jax.vjp(encode, params)
        (part,) = pull_back(read_latents(dz, ids).astype(latents.dtype))
        return jax.tree.map(jnp.add, total, part), None

    grads, _ = lax.scan(add, grads, (jnp.arange(chunks.shape[0]), chunks))
    return Gradient(grads, new_state, loss, logits)


def full_gradient(
    params: Parts,
    model_state: Parts,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    chunk: int,
    train_encoder: bool,
    remat: bool,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
) -> Gradient:
    """Plain end-to-end autodiff through every patch.

    Args:
        params: of both parts.
        model_state: of both parts.
        batch: the images.
        key: PRNG key.
        model: the model.
        grid: the patch grid.
        chunk: grid positions encoded at a time if `remat`; else all are encoded at once.
        train_encoder: passed to the encoder.
        remat: recompute activations chunk by chunk in the backward pass.
        task: it has the loss.
        augment: changes the patches before they are encoded.
    """

    def loss_fn(params: Parts) -> tuple[jax.Array, tuple[jax.Array, Parts]]:
        z, new_state = fill(
            params,
            model_state,
            batch["image"],
            stream(key, "encoder"),
            model=model,
            grid=grid,
            ids=chunked_ids(grid, chunk if remat else grid.num_patches, batch["label"].shape[0]),
            train=train_encoder,
            remat=remat,
            real=real_patches(batch, grid),
            augment=augment,
        )
        return head_loss(
            params, new_state, z, batch, stream(key, "head"), model=model, grid=grid, task=task
        )

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits)
