"""Three ways to a gradient of the loss: of some patches, of all at once, of all chunk by chunk."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.core.augment import Augment
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.latents import (
    chunked_ids,
    chunked_list,
    chunked_strata,
    encode_patches,
    fill,
    has_spare,
    read_latents,
    write_latents,
)
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.sampling import strata_lists, without_repeats
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.errors import ConfigError

Batch = Mapping[str, jax.Array]
"""`image` `[B, H, W, C]` (uint8, or float in [0, 1]) and `label`, `int [B]` or what else the task
takes; optionally `weight` `float [B]` (a factor on the loss; 0 for padding examples) and which
patches count: `patches` `int [B, M]` (their numbers; N or more in slots without one), or else
`size` `int [B, 2]` (true height and width). The others are neither encoded nor sampled, and the
head does not see them."""


class Gradient(NamedTuple):
    """A gradient and what its computation leaves behind."""

    grads: Params
    model_state: Params
    loss: jax.Array
    """`float []`, mean over the batch."""
    logits: jax.Array
    """`float [B, O]`, as the task has them."""


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key for one named use of randomness, independent of every other name's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def listed_patches(batch: Batch, grid: Grid) -> jax.Array | None:
    """The numbers of the patches that count, in order: `int32 [B, M]`, or None for all of them.

    Slots without a patch are at the end, N or more and different from each other.
    """
    if "patches" in batch:
        ids = jnp.sort(batch["patches"].astype(jnp.int32), axis=1)
    elif "size" in batch:
        used = grid.mask(batch["size"]).reshape(-1, grid.num_patches)
        every = jnp.arange(grid.num_patches, dtype=jnp.int32)
        ids = jnp.sort(jnp.where(used, every, grid.num_patches), axis=1)
    else:
        return None
    return without_repeats(ids, grid.num_patches)


def chunks(batch: Batch, grid: Grid, chunk: int, strata: int = 1) -> tuple[jax.Array, bool]:
    """The patches that count, some at a time, for `latents.fill`.

    Returns:
        `int32 [n, B, chunk]`, and whether there may be slots without a patch. With strata, a chunk
        has an equal share from each, and is rounded up to a multiple of their number.
    """
    patches = listed_patches(batch, grid)
    # Whatever of a batch there is: images that are streamed are not in it.
    images = next(iter(batch.values())).shape[0]
    if strata > 1:
        lists = strata_lists(grid.num_patches, strata, patches)
        ids = chunked_strata(lists, chunk, grid.num_patches)
        ids = jnp.broadcast_to(ids, (ids.shape[0], images, ids.shape[2]))
        return ids, patches is not None or has_spare(ids, grid)
    if patches is not None:
        return chunked_list(patches, chunk, grid.num_patches), True
    ids = chunked_ids(grid, chunk, images)
    return ids, has_spare(ids, grid)


def patch_mask(batch: Batch, grid: Grid) -> jax.Array | None:
    """Which patches count, for the head: `bool [B, rows, cols]`, or None for all."""
    if "patches" not in batch:
        return grid.mask(batch["size"]) if "size" in batch else None
    ids = batch["patches"]
    row = jnp.arange(ids.shape[0])[:, None]
    used = jnp.zeros((ids.shape[0], grid.num_patches), bool).at[row, ids].set(True, mode="drop")
    return used.reshape(-1, grid.rows, grid.cols)


def real_patches(batch: Batch, grid: Grid) -> jax.Array | None:
    """Which patches count and are of a real example: `bool [B, N]`, or None for all."""
    real = patch_mask(batch, grid)
    if real is not None:
        real = real.reshape(-1, grid.num_patches)
    if "weight" in batch:
        counts = jnp.repeat(batch["weight"][:, None] > 0, grid.num_patches, axis=1)
        real = counts if real is None else real & counts
    return real


def read_z(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    train: bool,
    task: Task,
    placement: Placement = ALONE,
) -> tuple[jax.Array, jax.Array, Params]:
    """Reads Z `[B, N, D]` with the head.

    Returns:
        Logits `float [B, O]`, the task's loss of each example `float [B]`, and the new model state.
    """
    mask = patch_mask(batch, grid)
    z = z.reshape(z.shape[0], grid.rows, grid.cols, z.shape[-1])
    key = placement.images_key(key)
    logits, model_state = model.classify(params, model_state, z, mask, train=train, rng=key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits, task.loss(logits, batch["label"]), model_state


def head_loss(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    task: Task,
    placement: Placement = ALONE,
) -> tuple[jax.Array, tuple[jax.Array, Params]]:
    """The mean over a training batch of loss times weight; the logits; the new model state.

    The mean is over the examples whose weight is not 0: those are padding. Where several devices
    have a part of the batch, it is this one's share of the mean.
    """
    logits, losses, model_state = read_z(
        params,
        model_state,
        z,
        batch,
        key,
        model=model,
        grid=grid,
        train=True,
        task=task,
        placement=placement,
    )
    weight = batch.get("weight", jnp.ones_like(losses))
    total = placement.sum_images((weight > 0).astype(losses.dtype).sum())
    return (losses * weight).sum() / jnp.maximum(total, 1), (logits, model_state)


def inner_gradient(
    params: Params,
    model_state: Params,
    z: jax.Array,
    ids: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    train_encoder: bool,
    weights: jax.Array | None = None,
    spare: bool = True,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
    placement: Placement = ALONE,
) -> tuple[Gradient, jax.Array]:
    """The gradient of one inner step: through the patches `ids [B, k]` only.

    They are encoded anew and written into Z, the rest of which is a constant (arXiv 2301.13817,
    Algorithm 1, lines 8 to 12). `weights`, `float [B, k]`, are factors on each patch's part of the
    encoder's gradient; Z, the loss and the head's gradient do not depend on them. `spare` says
    whether `ids` may have slots without a patch. Where several devices have a part of the images,
    each returns its part of the gradient and loss.

    Returns:
        The gradient, and Z with the fresh entries, again a constant.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Params, jax.Array]]:
        latents, new_state = encode_patches(
            params,
            model_state,
            batch["image"],
            placement.own_slots(ids),
            stream(key, "encoder"),
            model=model,
            grid=grid,
            train=train_encoder,
            real=real_patches(batch, grid),
            spare=spare,
            augment=augment,
            placement=placement,
        )
        latents = placement.all_slots(latents)
        if weights is not None:
            latents = _scaled_gradient(latents, weights[..., None])
        fresh = write_latents(z, ids, latents)
        loss, (logits, new_state) = head_loss(
            params,
            new_state,
            fresh,
            batch,
            stream(key, "head"),
            model=model,
            grid=grid,
            task=task,
            placement=placement,
        )
        return loss, (logits, new_state, lax.stop_gradient(fresh))

    (loss, (logits, new_state, fresh)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits), fresh


def _scaled_gradient(latents: jax.Array, factor: jax.Array) -> jax.Array:
    """The latents as they are, with a gradient that is `factor` times theirs."""
    constant = lax.stop_gradient(latents)
    return constant + factor.astype(latents.dtype) * (latents - constant)


def exact_gradient(
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    chunk: int,
    strata: int = 1,
    train_encoder: bool,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
    placement: Placement = ALONE,
) -> Gradient:
    """The whole-image gradient at the memory of one chunk of patches.

    Z is filled without gradient, `dL/dZ` taken once through the head, and every chunk encoded
    again to carry its slice of `dL/dZ` into the encoder (gradient caching, arXiv 2101.06983). Where
    several devices have a part of the images, each returns its part of the gradient and loss.

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
    groups, spare = chunks(batch, grid, chunk, strata)
    z, _ = fill(
        params,
        model_state,
        images,
        fill_key,
        model=model,
        grid=grid,
        ids=groups,
        spare=spare,
        train=train_encoder,
        augment=augment,
        placement=placement,
    )

    def loss_fn(params: Params, z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        return head_loss(
            params,
            model_state,
            z,
            batch,
            stream(key, "head"),
            model=model,
            grid=grid,
            task=task,
            placement=placement,
        )

    (loss, (logits, new_state)), (grads, dz) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(params, lax.stop_gradient(z))

    def add(total: Params, step: tuple[jax.Array, jax.Array]) -> tuple[Params, None]:
        number, ids = step
        part = chunk_gradient(
            params,
            model_state,
            images,
            placement.own_slots(ids),
            dz,
            # The key of the fill, so that dropout is the same in both passes.
            jax.random.fold_in(fill_key, number),
            model=model,
            grid=grid,
            train_encoder=train_encoder,
            spare=spare,
            augment=augment,
            placement=placement,
        )
        return jax.tree.map(jnp.add, total, part), None

    grads, _ = lax.scan(add, grads, (jnp.arange(groups.shape[0]), groups))
    return Gradient(grads, new_state, loss, logits)


def chunk_gradient(
    params: Params,
    model_state: Params,
    images: jax.Array,
    ids: jax.Array,
    dz: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    train_encoder: bool,
    spare: bool,
    augment: Augment | None = None,
    placement: Placement = ALONE,
) -> Params:
    """The encoder's gradient through the patches `ids [B, k]`, given `dL/dZ` as `[B, N, D]`.

    `ids` are this device's slots. They are encoded again; `key` must be the one they were encoded
    with for Z.
    """

    def encode(params: Params) -> jax.Array:
        latents, _ = encode_patches(
            params,
            model_state,
            images,
            ids,
            key,
            model=model,
            grid=grid,
            train=train_encoder,
            spare=spare,
            augment=augment,
            placement=placement,
        )
        return latents

    latents, pull_back = jax.vjp(encode, params)
    return pull_back(read_latents(dz, ids).astype(latents.dtype))[0]


def full_gradient(
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    chunk: int,
    strata: int = 1,
    train_encoder: bool,
    remat: bool,
    task: Task = SINGLE_LABEL,
    augment: Augment | None = None,
    placement: Placement = ALONE,
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
        strata: that each chunk takes an equal share from.
        train_encoder: passed to the encoder.
        remat: recompute activations chunk by chunk in the backward pass.
        task: it has the loss.
        augment: changes the patches before they are encoded.
        placement: of the images. Where several devices have a part of them, each returns its part
            of the gradient and loss.
    """
    groups, spare = chunks(batch, grid, chunk if remat else grid.num_patches, strata)

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        z, new_state = fill(
            params,
            model_state,
            batch["image"],
            stream(key, "encoder"),
            model=model,
            grid=grid,
            ids=groups,
            spare=spare,
            train=train_encoder,
            remat=remat,
            real=real_patches(batch, grid),
            augment=augment,
            placement=placement,
        )
        return head_loss(
            params,
            new_state,
            z,
            batch,
            stream(key, "head"),
            model=model,
            grid=grid,
            task=task,
            placement=placement,
        )

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits)
