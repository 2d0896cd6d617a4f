"""Which patches an inner step re-encodes: groups of patch numbers, of one static shape."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from patchgd_jax.errors import ConfigError


def group_size(num_patches: int, inner_steps: int) -> int:
    """The width of a group, k = ceil(N / J).

    Raises:
        ConfigError: if there are more groups than patches, since some would then be empty.
    """
    if inner_steps > num_patches:
        raise ConfigError(
            f"{inner_steps} inner steps for a grid of {num_patches} patches: some would have no "
            f"patch; use a sampling fraction of at least 1/{num_patches} or a smaller stride"
        )
    return -(-num_patches // inner_steps)


def inclusion_probability(
    num_patches: int,
    inner_steps: int,
    sampling: Literal["partition", "uniform"],
    strata: int = 1,
) -> float:
    """The chance that a given patch is in a given inner step's group.

    The mean over the inner steps of the encoder's gradient is this share of the whole-image
    gradient, in expectation (exactly, for a partition and unchanged parameters).

    Raises:
        ConfigError: if it is not the same for all patches, since strata differ in size.
    """
    if sampling == "partition":
        return 1 / inner_steps
    if num_patches % strata != 0:
        raise ConfigError(
            f"patchgd.strata {strata} does not divide the {num_patches} patches, so with "
            "patchgd.sampling uniform some are drawn more often than others and no one factor is "
            "unbiased; use partition"
        )
    num_patches //= strata
    return 1 - (1 - 1 / num_patches) ** group_size(num_patches, inner_steps)


def sample_groups(
    key: jax.Array,
    *,
    num_patches: int,
    inner_steps: int,
    batch: int,
    sampling: Literal["partition", "uniform"] = "partition",
    sample_per: Literal["batch", "image"] = "batch",
    patches: jax.Array | None = None,
    strata: int = 1,
) -> jax.Array:
    """Patch numbers of every inner step of an outer step.

    `partition` shuffles all N patches and deals them out, so that each is in exactly one of the
    J groups and group sizes differ by at most one (arXiv 2301.13817, Algorithm 1: sampling
    without replacement). `uniform` draws each slot independently; a patch drawn twice in one
    group counts once.

    Args:
        key: PRNG key.
        num_patches: N.
        inner_steps: J.
        batch: B.
        sampling: see above.
        sample_per: `batch` gives every image the same groups, `image` its own.
        patches: `int [B, M]`, the numbers to draw from, in order and with N or more in slots
            without a patch, which are at the end. An image with n of them has n / J, rounded up
            or down, in a group of a partition, and at most ceil(n / J) in a uniform one. None:
            all N.
        strata: S, the runs of consecutive patch numbers that each group takes an equal share from
            (up to one patch, in a partition; uniform draws are apart for each). With S > 1 the
            slots of a group are one stratum's after the other's.

    Returns:
        `int32 [J, B, k]` with `k = ceil(N / J)`, or `ceil(M / J)`; with strata S times that of a
        stratum, whose N and M are the most that one can have. Slots without a patch hold
        numbers of at least N, different from each other within a group: gather them clipped,
        scatter with `mode="drop"`.

    Raises:
        ConfigError: if J or S is more than N.
    """
    if strata > 1:
        group_size(num_patches if patches is None else patches.shape[1], inner_steps)
        lists = strata_lists(num_patches, strata, patches)
        if patches is None and sample_per == "image":
            lists = jnp.repeat(lists, batch, axis=1)
        ids = _stratified(
            key, lists, num_patches, inner_steps, sampling, shared=sample_per == "batch"
        )
        return jnp.broadcast_to(ids, (inner_steps, batch, ids.shape[-1]))
    if patches is not None:
        k = group_size(patches.shape[1], inner_steps)
        deal = _deal_list if sampling == "partition" else _draw_list
        return deal(key, patches, num_patches, inner_steps, k, shared=sample_per == "batch")
    k = group_size(num_patches, inner_steps)

    def partition(key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, num_patches).astype(jnp.int32)
        spare = jnp.arange(num_patches, inner_steps * k, dtype=jnp.int32)
        # Dealt out like cards, so that the spare slots fall on different groups.
        return jnp.concatenate([order, spare]).reshape(k, inner_steps).T

    def uniform(key: jax.Array) -> jax.Array:
        drawn = jnp.sort(jax.random.randint(key, (inner_steps, k), 0, num_patches), axis=-1)
        again = jnp.pad(drawn[:, 1:] == drawn[:, :-1], ((0, 0), (1, 0)))
        spare = num_patches + jnp.arange(k)
        return jnp.where(again, spare, drawn).astype(jnp.int32)

    draw = partition if sampling == "partition" else uniform
    if sample_per == "batch":
        return jnp.broadcast_to(draw(key)[:, None], (inner_steps, batch, k))
    groups = jax.vmap(draw)(jax.random.split(key, batch))
    return jnp.swapaxes(groups, 0, 1)


def strata_lists(num_patches: int, strata: int, patches: jax.Array | None = None) -> jax.Array:
    """The patches of each stratum: runs of consecutive numbers, as equal as can be.

    Args:
        num_patches: N.
        strata: S; stratum `s` has the numbers from `s * N // S` up to `(s + 1) * N // S`.
        patches: `int [B, M]`, the numbers that count, as in `sample_groups`. None: all N.

    Returns:
        `int32 [S, B, L]`, in order, with N in slots without a patch, which are at the end. B is 1
        if `patches` is None.

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
    if patches is None:
        numbers = bounds[:-1, None] + np.arange(longest)
        ids = np.where(numbers < bounds[1:, None], numbers, num_patches)
        return jnp.asarray(ids[:, None], jnp.int32)
    first, end = bounds[:-1, None, None], bounds[1:, None, None]
    inside = (patches >= first) & (patches < end)
    kept = jnp.sort(jnp.where(inside, patches, num_patches), axis=-1)
    return kept[..., : min(longest, patches.shape[1])].astype(jnp.int32)


def _stratified(
    key: jax.Array,
    lists: jax.Array,
    num_patches: int,
    inner_steps: int,
    sampling: Literal["partition", "uniform"],
    *,
    shared: bool,
) -> jax.Array:
    """Groups `int32 [J, B, S * k]` from the lists `[S, B, L]` of strata."""
    strata, batch, length = lists.shape
    k = -(-length // inner_steps)
    deal = _deal_list if sampling == "partition" else _draw_list

    def groups(number: jax.Array, patches: jax.Array) -> jax.Array:
        stratum_key = jax.random.fold_in(key, number)
        return deal(stratum_key, patches, num_patches, inner_steps, k, shared=shared)

    ids = jax.vmap(groups)(jnp.arange(strata), lists)
    if sampling == "partition":
        # Each stratum is dealt out from where the one before has ended, so that the sums over the
        # strata, too, differ by at most one.
        count = (lists < num_patches).sum(-1)
        before = jnp.cumsum(count, axis=0) - count
        source = (jnp.arange(inner_steps)[:, None] - before[:, None]) % inner_steps
        ids = jnp.take_along_axis(ids, source[..., None], axis=1)
    return without_repeats(
        ids.transpose(1, 2, 0, 3).reshape(inner_steps, batch, strata * k), num_patches
    )


def without_repeats(ids: jax.Array, num_patches: int) -> jax.Array:
    """Gives the slots without a patch (N and more) different numbers along the last axis."""
    slots = num_patches + jnp.arange(ids.shape[-1], dtype=ids.dtype)
    return jnp.where(ids < num_patches, ids, slots)


def counted_once(ids: jax.Array, num_patches: int) -> jax.Array:
    """Groups in which a patch that was drawn several times stands once.

    Args:
        ids: `int [..., k]`, patch numbers, N in slots without one.
        num_patches: N.

    Returns:
        `int32 [..., k]`, in order; slots without a patch are N and more, different from each other.
    """
    ids = jnp.sort(ids, axis=-1)
    first = jnp.ones((*ids.shape[:-1], 1), bool)
    new = jnp.concatenate([first, ids[..., 1:] != ids[..., :-1]], axis=-1)
    return without_repeats(jnp.where(new, ids, num_patches).astype(jnp.int32), num_patches)


def _deal_list(
    key: jax.Array, patches: jax.Array, num_patches: int, inner_steps: int, k: int, *, shared: bool
) -> jax.Array:
    """Shuffles each image's patches and deals them out to J groups, `int32 [J, B, k]`."""
    batch, length = patches.shape
    order = jax.random.uniform(key, (1 if shared else batch, length))
    # Slots without a patch stay behind all others, so that the groups' patches differ by one.
    shuffled = jnp.take_along_axis(
        patches, jnp.argsort(jnp.where(patches < num_patches, order, 2), axis=1), axis=1
    )
    pad = ((0, 0), (0, inner_steps * k - length))
    dealt = jnp.pad(shuffled, pad, constant_values=num_patches).reshape(batch, k, inner_steps)
    return without_repeats(dealt.transpose(2, 0, 1).astype(jnp.int32), num_patches)


def _draw_list(
    key: jax.Array, patches: jax.Array, num_patches: int, inner_steps: int, k: int, *, shared: bool
) -> jax.Array:
    """Draws from each image's patches with replacement, `int32 [J, B, k]`."""
    batch = patches.shape[0]
    count = (patches < num_patches).sum(1)
    drawn = jax.random.uniform(key, (inner_steps, 1 if shared else batch, k))
    slot = jnp.minimum((drawn * count[:, None]).astype(jnp.int32), count[:, None] - 1)
    ids = jnp.take_along_axis(jnp.broadcast_to(patches, (inner_steps, *patches.shape)), slot, 2)
    # A small image must not be re-encoded more often than a large one.
    used = jnp.arange(k) < -(-count // inner_steps)[:, None]
    return counted_once(jnp.where(used, ids, num_patches), num_patches)
