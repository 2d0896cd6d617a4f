"""The latent block Z: encoding patches, filling all of it, writing fresh entries into it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.grid import PatchGrid
from patchgd_jax.patch_model import Parts, PatchModel


def encode_patches(
    params: Parts,
    model_state: Parts,
    images: jax.Array,
    ids: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    train: bool,
    real: jax.Array | None = None,
) -> tuple[jax.Array, Parts]:
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

    Returns:
        latents `[B, k, D]` and the new model state.
    """
    batch, count = ids.shape
    patches = grid.take(images, ids)
    counts = ids < grid.num_patches
    if real is not None:
        counts &= jnp.take_along_axis(real, jnp.minimum(ids, grid.num_patches - 1), axis=1)
    latents, model_state = model.encode(
        params,
        model_state,
        patches.reshape(batch * count, *patches.shape[2:]),
        train=train,
        rng=key,
        mask=counts.reshape(-1),
    )
    return latents.reshape(batch, count, -1), model_state


def chunked_ids(grid: PatchGrid, chunk: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """All patch numbers in order, some at a time.

    Returns:
        Chunk numbers `int32 [n]` and patch numbers `int32 [n, B, chunk]`, the same for every
        image; spare slots at the end are N and more.
    """
    chunk = min(chunk, grid.num_patches)
    count = -(-grid.num_patches // chunk)
    ids = jnp.arange(count * chunk, dtype=jnp.int32).reshape(count, 1, chunk)
    return jnp.arange(count), jnp.broadcast_to(ids, (count, batch, chunk))


def join_chunks(latents: jax.Array, grid: PatchGrid) -> jax.Array:
    """Latents by chunk, `[n, B, chunk, D]`, to Z, `[B, N, D]`."""
    count, batch, chunk, width = latents.shape
    z = jnp.swapaxes(latents, 0, 1).reshape(batch, count * chunk, width)
    return z[:, : grid.num_patches]


def fill(
    params: Parts,
    model_state: Parts,
    images: jax.Array,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: PatchGrid,
    chunk: int,
    train: bool = False,
    remat: bool = False,
    real: jax.Array | None = None,
) -> tuple[jax.Array, Parts]:
    """Computes all of Z, some grid positions at a time.

    Args:
        params: of both parts.
        model_state: of both parts.
        images: `[B, H, W, C]`.
        key: PRNG key; chunk `i` gets `fold_in(key, i)`.
        model: the model.
        grid: the patch grid.
        chunk: grid positions encoded at a time. It changes nothing but speed and memory, unless
            `train` is set and the encoder has batch statistics, which then move once a chunk.
        train: encode in train mode, carrying batch statistics from chunk to chunk.
        remat: if the result is differentiated, recompute each chunk instead of keeping it.
        real: `bool [B, N]`, False for patches that batch statistics must leave out.

    Returns:
        Z as `[B, N, D]` and the new model state.
    """

    def encode(model_state: Parts, step: tuple[jax.Array, jax.Array]) -> tuple[Parts, jax.Array]:
        number, ids = step
        latents, model_state = encode_patches(
            params,
            model_state,
            images,
            ids,
            jax.random.fold_in(key, number),
            model=model,
            grid=grid,
            train=train,
            real=real,
        )
        return model_state, latents

    body: Any = jax.checkpoint(encode) if remat else encode
    # lax.scan, not lax.map: the latter would return the batch statistics of every chunk.
    model_state, latents = lax.scan(body, model_state, chunked_ids(grid, chunk, images.shape[0]))
    return join_chunks(latents, grid), model_state


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
