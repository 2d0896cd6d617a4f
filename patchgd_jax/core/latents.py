"""The latent block Z: encoding patches, filling all of it, writing fresh entries into it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.core.augment import Augment
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.sampling import without_repeats


def encode_patches(
    params: Params,
    model_state: Params,
    images: jax.Array,
    ids: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    train: bool,
    real: jax.Array | None = None,
    spare: bool = True,
    augment: Augment | None = None,
    placement: Placement = ALONE,
) -> tuple[jax.Array, Params]:
    """Cuts patches out of the images and encodes them.

    Args:
        params: of both parts.
        model_state: of both parts.
        images: `[B, H, W, C]`, as they come (uint8); normalised after the gather.
        ids: `int [B, k]`; slots of at least N hold no patch.
        key: PRNG key for dropout.
        model: the model.
        grid: the patch grid of the images.
        train: passed to the model.
        real: `bool [B, N]`, False for patches that batch statistics must leave out.
        spare: whether `ids` may have slots without a patch. Where there are none, and every
            patch is real, the encoder gets no mask, and spends nothing on it.
        augment: changes the patches before they are encoded.
        placement: of the images; `ids` are this device's slots.

    Returns:
        latents `[B, k, D]` and the new model state.
    """
    batch, count = ids.shape
    patches = placement.take(grid, images, ids)
    if augment is not None:
        patches = augment(patches, ids)
    counts = ids < grid.num_patches if spare else None
    if real is not None:
        seen = jnp.take_along_axis(real, jnp.minimum(ids, grid.num_patches - 1), axis=1)
        counts = seen if counts is None else seen & counts
    latents, model_state = model.encode(
        params,
        model_state,
        patches.reshape(batch * count, *patches.shape[2:]),
        train=train,
        rng=placement.patches_key(key),
        mask=None if counts is None else counts.reshape(-1),
    )
    return latents.reshape(batch, count, -1), model_state


def chunked_ids(grid: Grid, chunk: int, batch: int) -> jax.Array:
    """All patch numbers in order, some at a time.

    Returns:
        `int32 [n, B, chunk]`, the same for every image; spare slots at the end are N and more.
    """
    chunk = min(chunk, grid.num_patches)
    count = -(-grid.num_patches // chunk)
    ids = jnp.arange(count * chunk, dtype=jnp.int32).reshape(count, 1, chunk)
    return jnp.broadcast_to(ids, (count, batch, chunk))


def chunked_list(patches: jax.Array, chunk: int, num_patches: int) -> jax.Array:
    """The patches of a list, some at a time.

    Args:
        patches: `int [B, M]`, from `gradients.listed_patches`.
        chunk: patches at a time.
        num_patches: N.

    Returns:
        `int32 [ceil(M / chunk), B, chunk]`; slots without a patch are N and more.
    """
    batch, length = patches.shape
    chunk = min(chunk, length)
    spare = jnp.arange(-length % chunk, dtype=jnp.int32) + num_patches + length
    rows = jnp.broadcast_to(spare, (batch, len(spare)))
    ids = jnp.concatenate([patches, rows], axis=1).reshape(batch, -1, chunk)
    return jnp.swapaxes(ids, 0, 1)


def chunked_strata(strata: jax.Array, chunk: int, num_patches: int) -> jax.Array:
    """The patches of all strata, some at a time, an equal share from each.

    Args:
        strata: `int [S, B, L]`, from `sampling.strata_lists`.
        chunk: patches at a time, rounded up to a multiple of S.
        num_patches: N.

    Returns:
        `int32 [n, B, k]`, in each chunk one stratum's after the other's; slots without a patch
        are N and more.
    """
    count, batch, length = strata.shape
    share = min(-(-chunk // count), length)
    pad = ((0, 0), (0, 0), (0, -length % share))
    ids = jnp.pad(strata, pad, constant_values=num_patches).reshape(count, batch, -1, share)
    return without_repeats(ids.transpose(2, 1, 0, 3).reshape(-1, batch, count * share), num_patches)


def has_spare(ids: jax.Array, grid: Grid) -> bool:
    """Whether chunks `[n, B, k]` that hold each patch once have slots without a patch."""
    return ids.shape[0] * ids.shape[2] != grid.num_patches


def fill(
    params: Params,
    model_state: Params,
    images: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    ids: jax.Array,
    train: bool = False,
    remat: bool = False,
    real: jax.Array | None = None,
    spare: bool | None = None,
    augment: Augment | None = None,
    placement: Placement = ALONE,
) -> tuple[jax.Array, Params]:
    """Computes all of Z, some grid positions at a time.

    Args:
        params: of both parts.
        model_state: of both parts.
        images: `[B, H, W, C]`.
        key: PRNG key; chunk `i` gets `fold_in(key, i)`.
        model: the model.
        grid: the patch grid.
        ids: `int [n, B, k]`, each image's patch numbers by chunk (`chunked_ids`, or the groups of
            a partition), in which each patch stands once; what is not in them is zero in Z. They
            change nothing else but speed and memory, unless `train` is set and the encoder has
            batch statistics, which are then those of a chunk and move once a chunk.
        train: encode in train mode, carrying batch statistics from chunk to chunk.
        remat: if the result is differentiated, recompute each chunk instead of keeping it.
        real: `bool [B, N]`, False for patches that batch statistics must leave out.
        spare: whether `ids` may have slots without a patch. None: if there are more slots or fewer
            than patches, which is right where every patch is in them.
        augment: changes the patches before they are encoded.
        placement: of the images; `ids` are all slots, of which this device encodes its own.

    Returns:
        Z as `[B, N, D]` and the new model state.
    """
    some_spare = has_spare(ids, grid) if spare is None else spare

    def encode(model_state: Params, step: tuple[jax.Array, jax.Array]) -> tuple[Params, jax.Array]:
        number, chunk = step
        latents, model_state = encode_patches(
            params,
            model_state,
            images,
            chunk,
            jax.random.fold_in(key, number),
            model=model,
            grid=grid,
            train=train,
            real=real,
            spare=some_spare,
            augment=augment,
            placement=placement,
        )
        return model_state, latents

    body: Any = jax.checkpoint(encode) if remat else encode
    # lax.scan, not lax.map: the latter would return the batch statistics of every chunk.
    numbers = jnp.arange(ids.shape[0])
    model_state, latents = lax.scan(body, model_state, (numbers, placement.own_slots(ids)))
    latents = placement.all_slots(latents)
    batch, width = images.shape[0], latents.shape[-1]
    z = jnp.zeros((batch, grid.num_patches, width), latents.dtype)
    slots = jnp.swapaxes(ids, 0, 1).reshape(batch, -1)
    flat = jnp.swapaxes(latents, 0, 1).reshape(batch, -1, width)
    return write_latents(z, slots, flat), model_state


def write_latents(z: jax.Array, ids: jax.Array, latents: jax.Array) -> jax.Array:
    """Replaces the entries of Z that were encoded anew.

    Args:
        z: `[B, N, D]`.
        ids: `int [B, k]`, different within a row; those of at least N are dropped.
        latents: `[B, k, D]`.

    Returns:
        `[B, N, D]`; every other entry is `z`'s, bit for bit.
    """
    row = jnp.arange(z.shape[0])[:, None]
    return z.at[row, ids].set(latents.astype(z.dtype), mode="drop", unique_indices=True)


def read_latents(z: jax.Array, ids: jax.Array) -> jax.Array:
    """The entries `ids [B, k]` of Z as `[B, k, D]`; zero for numbers of at least N."""
    row = jnp.arange(z.shape[0])[:, None]
    return z.at[row, ids].get(mode="fill", fill_value=0)
