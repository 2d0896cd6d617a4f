"""Which patches an inner step re-encodes: groups of patch numbers, of one static shape."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

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
    num_patches: int, inner_steps: int, sampling: Literal["partition", "uniform"]
) -> float:
    """The chance that a given patch is in a given inner step's group.

    The mean over the inner steps of the encoder's gradient is this share of the whole-image
    gradient, in expectation (exactly, for a partition and unchanged parameters).
    """
    if sampling == "partition":
        return 1 / inner_steps
    return 1 - (1 - 1 / num_patches) ** group_size(num_patches, inner_steps)


def sample_groups(
    key: jax.Array,
    *,
    num_patches: int,
    inner_steps: int,
    batch: int,
    sampling: Literal["partition", "uniform"] = "partition",
    sample_per: Literal["batch", "image"] = "batch",
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

    Returns:
        `int32 [J, B, k]` with `k = ceil(N / J)`. Slots without a patch hold numbers of at least
        N, different from each other within a group: gather them clipped, scatter with
        `mode="drop"`.

    Raises:
        ConfigError: if J is more than N.
    """
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
