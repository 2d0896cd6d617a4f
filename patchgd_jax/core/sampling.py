"""Which patches an inner step re-encodes: groups of patch ids, of one static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.patch_ids import deduplicate, strata_ids, unique_padding_ids
from patchgd_jax.errors import ConfigError


def group_size(num_patches: int, inner_steps: int) -> int:
    """Computes the width of a group, k = ceil(N / J); raises `ConfigError` if J > N."""
    if inner_steps > num_patches:
        raise ConfigError(
            f"{inner_steps} inner steps for a grid of {num_patches} patches: some would have no "
            f"patch; use a sampling fraction of at least 1/{num_patches} or a smaller stride"
        )
    return -(-num_patches // inner_steps)


def inclusion_probability(config: PatchGDConfig, num_patches: int) -> float:
    """Computes the probability that a given patch is in a given inner step's group.

    The mean over the inner steps of the encoder's gradient is this share of the whole-image
    gradient, in expectation (exactly, for a partition and unchanged parameters). Raises
    `ConfigError` if patches differ in it, because strata differ in size.
    """
    if config.sampling == "partition":
        return 1 / config.num_inner_steps
    if num_patches % config.strata != 0:
        raise ConfigError(
            f"patchgd.strata {config.strata} does not divide the {num_patches} patches, so with "
            "patchgd.sampling uniform some are drawn more often than others and no one factor is "
            "unbiased; use partition"
        )
    num_patches //= config.strata
    return 1 - (1 - 1 / num_patches) ** group_size(num_patches, config.num_inner_steps)


def encoder_scale(config: PatchGDConfig, num_patches: int, batch: Mapping[str, Array]) -> float:
    """Returns the factor on the encoder's gradient in the modes with inner steps.

    Raises `ConfigError` if `unbiased` has no one value for all images.
    """
    if config.encoder_grad_scale != "unbiased":
        return config.encoder_grad_scale
    if config.sampling == "uniform" and ("patches" in batch or "size" in batch):
        raise ConfigError(
            "patchgd.encoder_grad_scale unbiased with patchgd.sampling uniform has a factor of "
            "its own for each number of patches, and these images differ; use partition"
        )
    return 1 / inclusion_probability(config, num_patches)


def partition_groups(
    key: Array, config: PatchGDConfig, num_patches: int, batch: int, valid: Array | None = None
) -> Array:
    """Draws groups as `sample_groups`, as a partition even if the config's sampling is uniform."""
    config = dataclasses.replace(config, sampling="partition", importance="none")
    return sample_groups(key, config, num_patches, batch, valid)


def sample_groups(
    key: Array, config: PatchGDConfig, num_patches: int, batch: int, valid: Array | None = None
) -> Array:
    """Draws the groups of an outer step's inner steps.

    `config.sampling` partition shuffles all N patches and deals them out: each is in exactly one of
    the J groups, and group sizes differ by at most one (arXiv 2301.13817, Algorithm 1: sampling
    without replacement). uniform draws each slot independently; a patch drawn twice in a group
    counts once. With S > 1 strata (runs of consecutive ids) each group takes an equal share of
    each, one stratum's slots after the other's.

    Args:
        key: PRNG key.
        config: J, `sampling`, `strata`, and `sample_per`: batch gives every image the same groups,
            image its own.
        num_patches: N.
        batch: B.
        valid: `int [B, M]`, from `patch_ids.valid_ids`. An image with n of them has n / J, rounded
            up or down, in a group of a partition, and at most ceil(n / J) in a uniform one. None:
            all N.

    Returns:
        `int32 [J, B, k]` with `k = ceil(N / J)`, or `ceil(M / J)`; with strata S times that of the
        largest stratum. Padding slots hold different ids of at least N.

    Raises:
        ConfigError: if J or S is more than N.
    """
    steps, shared = config.num_inner_steps, config.sample_per == "batch"
    k = group_size(num_patches if valid is None else valid.shape[1], steps)
    if config.strata > 1:
        lists = strata_ids(num_patches, config.strata, valid)
        if valid is None and not shared:
            lists = jnp.repeat(lists, batch, axis=1)
        ids = _stratified(key, config, lists, num_patches)
        return jnp.broadcast_to(ids, (steps, batch, ids.shape[-1]))
    if valid is not None:
        deal = _deal_list if config.sampling == "partition" else _draw_list
        return deal(key, valid, num_patches, steps, k, shared=shared)

    def partition(key: Array) -> Array:
        order = jax.random.permutation(key, num_patches).astype(jnp.int32)
        padding = jnp.arange(num_patches, steps * k, dtype=jnp.int32)
        # Dealt out like cards, so that the padding slots fall on different groups.
        return jnp.concatenate([order, padding]).reshape(k, steps).T

    def uniform(key: Array) -> Array:
        drawn = jnp.sort(jax.random.randint(key, (steps, k), 0, num_patches), axis=-1)
        again = jnp.pad(drawn[:, 1:] == drawn[:, :-1], ((0, 0), (1, 0)))
        return jnp.where(again, num_patches + jnp.arange(k), drawn).astype(jnp.int32)

    draw = partition if config.sampling == "partition" else uniform
    if shared:
        return jnp.broadcast_to(draw(key)[:, None], (steps, batch, k))
    groups = jax.vmap(draw)(jax.random.split(key, batch))
    return jnp.swapaxes(groups, 0, 1)


def _stratified(key: Array, config: PatchGDConfig, lists: Array, num_patches: int) -> Array:
    """Draws groups `int32 [J, B, S * k]` from the lists `[S, B, L]` of strata."""
    strata, batch, length = lists.shape
    steps, shared = config.num_inner_steps, config.sample_per == "batch"
    k = -(-length // steps)
    deal = _deal_list if config.sampling == "partition" else _draw_list

    def groups(number: Array, patches: Array) -> Array:
        stratum_key = jax.random.fold_in(key, number)
        return deal(stratum_key, patches, num_patches, steps, k, shared=shared)

    ids = jax.vmap(groups)(jnp.arange(strata), lists)
    if config.sampling == "partition":
        # Each stratum is dealt out from where the one before has ended, so that the sums over the
        # strata, too, differ by at most one.
        count = (lists < num_patches).sum(-1)
        before = jnp.cumsum(count, axis=0) - count
        source = (jnp.arange(steps)[:, None] - before[:, None]) % steps
        ids = jnp.take_along_axis(ids, source[..., None], axis=1)
    ids = ids.transpose(1, 2, 0, 3).reshape(steps, batch, strata * k)
    return unique_padding_ids(ids, num_patches)


def _deal_list(
    key: Array, patches: Array, num_patches: int, inner_steps: int, k: int, *, shared: bool
) -> Array:
    """Shuffles each image's patches and deals them out to J groups, `int32 [J, B, k]`."""
    batch, length = patches.shape
    order = jax.random.uniform(key, (1 if shared else batch, length))
    # Slots without a patch stay behind all others, so that the groups' patches differ by one.
    shuffled = jnp.take_along_axis(
        patches, jnp.argsort(jnp.where(patches < num_patches, order, 2), axis=1), axis=1
    )
    pad = ((0, 0), (0, inner_steps * k - length))
    dealt = jnp.pad(shuffled, pad, constant_values=num_patches).reshape(batch, k, inner_steps)
    return unique_padding_ids(dealt.transpose(2, 0, 1).astype(jnp.int32), num_patches)


def _draw_list(
    key: Array, patches: Array, num_patches: int, inner_steps: int, k: int, *, shared: bool
) -> Array:
    """Draws from each image's patches with replacement, `int32 [J, B, k]`."""
    batch = patches.shape[0]
    count = (patches < num_patches).sum(1)
    drawn = jax.random.uniform(key, (inner_steps, 1 if shared else batch, k))
    slot = jnp.minimum((drawn * count[:, None]).astype(jnp.int32), count[:, None] - 1)
    ids = jnp.take_along_axis(jnp.broadcast_to(patches, (inner_steps, *patches.shape)), slot, 2)
    # A small image must not be re-encoded more often than a large one.
    used = jnp.arange(k) < -(-count // inner_steps)[:, None]
    return deduplicate(jnp.where(used, ids, num_patches), num_patches)
