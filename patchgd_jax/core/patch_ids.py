"""Which patches count: the valid patches of a batch, and groups of patch ids with padding slots.

Patch ids are `int32`; a padding slot holds a number of at least N, different from every other of
its group: gather clipped, scatter with `mode="drop"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from patchgd_jax.core.grid import Grid
from patchgd_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PatchIds:
    """Groups of patches, such as the inner steps' `[J, B, k]`, or one of them `[B, k]`."""

    ids: Any
    """`int32 [..., B, k]`, on the device or the host."""
    padded: bool = field(metadata={"static": True})
    """Whether there may be padding slots; without them the encoder gets no mask."""
    weights: Array | None = None
    """`float [..., B, k]`, factors on each patch's part of the encoder's gradient. None: 1."""


def has_padding(ids: Array, grid: Grid) -> bool:
    """Tells whether groups `[n, B, k]` that hold each patch once have padding slots."""
    return ids.shape[0] * ids.shape[2] != grid.num_patches


def valid_ids(batch: Mapping[str, Array], grid: Grid) -> Array | None:
    """Lists the valid patches in order, padding last: `int32 [B, M]`, or None for all N."""
    if "patches" in batch:
        ids = jnp.sort(batch["patches"].astype(jnp.int32), axis=1)
    elif "size" in batch:
        used = grid.mask(batch["size"]).reshape(-1, grid.num_patches)
        every = jnp.arange(grid.num_patches, dtype=jnp.int32)
        ids = jnp.sort(jnp.where(used, every, grid.num_patches), axis=1)
    else:
        return None
    return unique_padding_ids(ids, grid.num_patches)


def valid_mask(batch: Mapping[str, Array], grid: Grid) -> Array | None:
    """Marks the valid patches for the head: `bool [B, rows, cols]`, or None for all."""
    if "patches" not in batch:
        return grid.mask(batch["size"]) if "size" in batch else None
    ids = batch["patches"]
    row = jnp.arange(ids.shape[0])[:, None]
    used = jnp.zeros((ids.shape[0], grid.num_patches), bool).at[row, ids].set(True, mode="drop")
    return used.reshape(-1, grid.rows, grid.cols)


def real_mask(batch: Mapping[str, Array], grid: Grid) -> Array | None:
    """Marks the valid patches of real examples (weight above 0): `bool [B, N]`, or None for all."""
    real = valid_mask(batch, grid)
    if real is not None:
        real = real.reshape(-1, grid.num_patches)
    if "weight" in batch:
        counts = jnp.repeat(batch["weight"][:, None] > 0, grid.num_patches, axis=1)
        real = counts if real is None else real & counts
    return real


def slot_mask(batch: Mapping[str, Array], grid: Grid, group: PatchIds) -> Array | None:
    """Marks a group's slots `[B, k]` that batch statistics count, or None for all of them."""
    mask = group.ids < grid.num_patches if group.padded else None
    real = real_mask(batch, grid)
    if real is not None:
        real = jnp.take_along_axis(real, jnp.minimum(group.ids, grid.num_patches - 1), axis=1)
        mask = real if mask is None else real & mask
    return mask


def chunk_patch_ids(
    batch: Mapping[str, Array], grid: Grid, chunk: int, strata: int = 1
) -> PatchIds:
    """Divides the valid patches into chunks `int32 [n, B, chunk]`, each patch in one.

    With S `strata` a chunk has an equal share of each, and is rounded up to a multiple of S. Any
    entry of the batch gives the number of images; a streamed batch has no `image`.
    """
    valid = valid_ids(batch, grid)
    images, count = next(iter(batch.values())).shape[0], grid.num_patches
    if strata > 1:
        ids = _chunk_strata(strata_ids(count, strata, valid), chunk, count)
    else:
        each = jnp.arange(count, dtype=jnp.int32)[None] if valid is None else valid
        ids = _chunk_list(each, chunk, count)
    ids = jnp.broadcast_to(ids, (ids.shape[0], images, ids.shape[2]))
    return PatchIds(ids, valid is not None or has_padding(ids, grid))


def _chunk_list(patches: Array, chunk: int, num_patches: int) -> Array:
    """Divides lists `int [B, M]` into chunks `int32 [ceil(M / chunk), B, chunk]`."""
    batch, length = patches.shape
    chunk = min(chunk, length)
    padding = jnp.arange(-length % chunk, dtype=jnp.int32) + num_patches + length
    rows = jnp.broadcast_to(padding, (batch, len(padding)))
    return jnp.swapaxes(jnp.concatenate([patches, rows], 1).reshape(batch, -1, chunk), 0, 1)


def _chunk_strata(strata: Array, chunk: int, num_patches: int) -> Array:
    """Divides strata `int [S, B, L]` into chunks, one stratum's share after the other's."""
    count, batch, length = strata.shape
    share = min(-(-chunk // count), length)
    pad = ((0, 0), (0, 0), (0, -length % share))
    ids = jnp.pad(strata, pad, constant_values=num_patches).reshape(count, batch, -1, share)
    ids = ids.transpose(2, 1, 0, 3).reshape(-1, batch, count * share)
    return unique_padding_ids(ids, num_patches)


def strata_ids(num_patches: int, strata: int, valid: Array | None = None) -> Array:
    """Lists the patches of each stratum: runs of consecutive ids, as equal as can be.

    Stratum `s` has the ids from `s * N // S` up to `(s + 1) * N // S`.

    Args:
        num_patches: N.
        strata: S.
        valid: `int [B, M]`, from `valid_ids`. None: all N.

    Returns:
        `int32 [S, B, L]`, in order, padding N last. B is 1 if `valid` is None.

    Raises:
        ConfigError: if S is more than N.
    """
    if strata > num_patches:
        raise ConfigError(
            f"patchgd.strata is {strata}, but the grid has only {num_patches} patches; use fewer "
            "strata (and devices per image) or smaller patches"
        )
    bounds = np.arange(strata + 1) * num_patches // strata
    longest = int(np.diff(bounds).max())
    if valid is None:
        numbers = bounds[:-1, None] + np.arange(longest)
        ids = np.where(numbers < bounds[1:, None], numbers, num_patches)
        return jnp.asarray(ids[:, None], jnp.int32)
    first, end = bounds[:-1, None, None], bounds[1:, None, None]
    inside = (valid >= first) & (valid < end)
    kept = jnp.sort(jnp.where(inside, valid, num_patches), axis=-1)
    return kept[..., : min(longest, valid.shape[1])].astype(jnp.int32)


def unique_padding_ids(ids: Array, num_patches: int) -> Array:
    """Gives padding slots (N and more) different ids along the last axis."""
    slots = num_patches + jnp.arange(ids.shape[-1], dtype=ids.dtype)
    return jnp.where(ids < num_patches, ids, slots)


def deduplicate(ids: Array, num_patches: int) -> Array:
    """Keeps each patch of groups `int [..., k]` once, in order; the other slots become padding."""
    ids = jnp.sort(ids, axis=-1)
    first = jnp.ones((*ids.shape[:-1], 1), bool)
    new = jnp.concatenate([first, ids[..., 1:] != ids[..., :-1]], axis=-1)
    return unique_padding_ids(jnp.where(new, ids, num_patches).astype(jnp.int32), num_patches)
