"""How stale Z is while the head reads it: the age of its entries, and how far they have drifted."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.forward import read_latents


def init_last_encoded(batch: int, num_patches: int) -> Array:
    """Starts the record of the inner step that computed each entry of Z: -1, the fill."""
    return jnp.full((batch, num_patches), -1, jnp.int32)


def mark_encoded(computed: Array, ids: Array, number: Array) -> Array:
    """Records in `computed [B, N]` that an inner step encodes `ids [B, k]`."""
    row = jnp.arange(ids.shape[0])[:, None]
    return computed.at[row, ids].set(number.astype(computed.dtype), mode="drop")


def mean_age(ids: Array, num_patches: int, real: Array | None = None) -> Array:
    """Averages the age of the entries of Z that the head reads, over patches and inner steps.

    An entry's age is the number of inner steps since the one that computed it: 0 where it is
    encoded in this very step. The fill counts as the step before the first, so what is never
    sampled is `j + 1` old in inner step `j`.

    Args:
        ids: `int [J, B, k]`, the groups of an outer step; those of at least N are dropped.
        num_patches: N.
        real: `bool [B, N]`, the patches that count. None: all.
    """
    inner_steps, batch, _ = ids.shape
    count = jnp.maximum(batch * num_patches if real is None else real.sum(), 1)

    def read(computed: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        number, group = step
        computed = mark_encoded(computed, group, number)
        # Not a sum of integers, which many patches and steps could overflow.
        ages = (number - computed).astype(jnp.float32)
        return computed, ages.sum(where=real) / count

    steps = (jnp.arange(inner_steps), ids)
    return lax.scan(read, init_last_encoded(batch, num_patches), steps)[1].mean()


def squared_change(old: Array, new: Array, ids: Array, weight: Array | None = None) -> Array:
    """Sums the squared change of the entries of Z `[B, N, D]` that were encoded anew.

    Args:
        old: Z before.
        new: Z after.
        ids: `int [B, k]`, which they are; those of at least N do not count.
        weight: `float [B]`; examples of weight 0 are padding. None: all count.

    Returns:
        `float [2]`: the sums of squares of the change and of the old entries; those of several
        parts of a batch add up.
    """
    dtype = jnp.promote_types(old.dtype, jnp.float32)
    before, after = (read_latents(z, ids).astype(dtype) for z in (old, new))
    if weight is not None:
        used = (weight > 0)[:, None, None]
        before, after = jnp.where(used, before, 0), jnp.where(used, after, 0)
    change = after - before
    return jnp.stack([jnp.vdot(change, change), jnp.vdot(before, before)])


def drift(changes: Array) -> Array:
    """Averages the relative change `|new - old| / |old|` of entries since they were last computed.

    Besides updates of the encoder it includes dropout, augmentation drawn anew (`augment.same_draw`
    False), and the difference between a group's batch statistics and the moving ones of the fill
    (unless `norm_policy` is paper or frozen): then a drift of 1 says nothing about the updates.
    `changes` `float [J, 2]` are from `squared_change`; a step whose old entries are all zero counts
    0.
    """
    change, size = changes[:, 0], changes[:, 1]
    return jnp.where(size > 0, jnp.sqrt(change / jnp.where(size > 0, size, 1)), 0).mean()
