"""Importance sampling: inner steps that re-encode the patches that matter more, more often.

Sources: Katharopoulos and Fleuret, Not All Samples Are Created Equal, arXiv 1803.00942 (a bound of
the gradient's norm as the score, a share of uniform draws); Horvitz and Thompson, A Generalization
of Sampling Without Replacement from a Finite Universe, JASA 1952 (weights of one over the inclusion
probability).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.forward import head_loss, z_map
from patchgd_jax.core.patch_ids import PatchIds, deduplicate, valid_ids, valid_mask
from patchgd_jax.core.problem import Batch, Problem, Spec, Weights, named_key
from patchgd_jax.core.sampling import group_size
from patchgd_jax.core.staleness import init_last_encoded, mark_encoded
from patchgd_jax.errors import ConfigError


def importance_groups(
    problem: Problem, weights: Weights, z: Array, batch: Batch, key: Array
) -> PatchIds:
    """Draws the groups of every inner step by `config.importance`; a `problem.Sampler`.

    Scores of a patch, `config.importance`:
    - `loss`: the norm of `dL/dZ` there, at the filled Z: the first-order effect of the patch's
      latent on the loss, and so the encoder's gradient through it up to the encoder's Jacobian.
    - `attention`: the head's attention there, at the filled Z.
    - `staleness`: inner steps since its entry of Z was computed (the fill is the step before the
      first), anew in each step.

    The share `config.importance_mix` of the draws is uniform. With `config.sample_per` batch the
    scores of a position are summed over the images. The draws are with replacement, and a patch
    that is drawn twice in a group counts once.

    Returns:
        Groups `[J, B, k]` with weights, which keep the expected gradient that of uniform sampling:
        the probability to be in the group of a uniform draw over that of this one, at most 1 /
        `importance_mix`.

    Raises:
        ConfigError: if the head has no attention to draw by, there are more inner steps than
            patches, or images with valid patches of their own are to share positions.
    """
    grid, config = problem.grid, problem.config
    valid, shared = valid_ids(batch, grid), config.sample_per == "batch"
    if valid is not None and shared:
        raise ConfigError(
            f"patchgd.importance {config.importance} with patchgd.sample_per batch draws the same "
            "patches of all images, but these images differ in which they have; add "
            "--patchgd.sample-per image"
        )
    steps, images = config.num_inner_steps, z.shape[0]
    k = group_size(grid.num_patches if valid is None else valid.shape[1], steps)
    mask = valid_mask(batch, grid)
    counted = jnp.ones((1, grid.num_patches), bool)
    if mask is not None:
        counted = mask.reshape(images, -1)
    # As for uniform groups: a small image is not re-encoded more often than a large one.
    draws = jnp.minimum(-(-counted.sum(1) // steps), k)

    fixed = None
    if config.importance != "staleness":
        fixed = _scores(problem, weights, z, batch, named_key(key, "importance"))
        if shared:
            fixed = fixed.sum(0, keepdims=True)

    def draw(computed: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        number, key = step
        scores = number - computed if fixed is None else fixed
        chance = probabilities(scores, counted, config.importance_mix)
        keys = jax.random.split(key, chance.shape[0])
        choose = partial(jax.random.choice, a=grid.num_patches, shape=(k,))
        drawn = jax.vmap(lambda key, p: choose(key, p=p))(keys, chance)
        ids, factors = weighted_group(drawn, chance, counted, draws)
        return mark_encoded(computed, ids, number), (ids, factors)

    keys = jax.random.split(named_key(key, "sampling"), steps)
    start = init_last_encoded(1 if shared else images, grid.num_patches)
    _, (ids, factors) = lax.scan(draw, start, (jnp.arange(steps), keys))
    shape = (steps, images, k)
    return PatchIds(jnp.broadcast_to(ids, shape), True, jnp.broadcast_to(factors, shape))


def probabilities(scores: Array, counted: Array, mix: float) -> Array:
    """Computes each patch's probability in one draw; rows without a patch are zero.

    Args:
        scores: `[B, N]`, not negative; all zero is as good as all equal.
        counted: `bool [B or 1, N]`, the patches to draw from.
        mix: the share of uniform draws, in (0, 1].
    """
    scores = jnp.where(counted, scores, 0).astype(float)
    total = scores.sum(1, keepdims=True)
    uniform = counted / jnp.maximum(counted.sum(1, keepdims=True), 1).astype(float)
    share = jnp.where(total == 0, uniform, scores / jnp.where(total == 0, 1, total))
    return mix * uniform + (1 - mix) * share


def weighted_group(
    drawn: Array, chance: Array, counted: Array, draws: Array
) -> tuple[Array, Array]:
    """Makes a group of some draws, with the weights that make its gradient unbiased.

    Args:
        drawn: `int [B, k]`, drawn with replacement.
        chance: `float [B, N]`, from `probabilities`: what they were drawn with.
        counted: `bool [B or 1, N]`, the patches that could be drawn.
        draws: `int [B or 1]`, how many of an image's k draws count, at most k.

    Returns:
        `int32 [B, k]`, each patch once and numbers of at least N in the other slots; and the
        weights `float [B, k]`.
    """
    num_patches, k = chance.shape[1], drawn.shape[1]
    # Rounding of the cumulative probabilities must not let in what cannot be drawn.
    possible = jnp.take_along_axis(chance, drawn, axis=1) > 0
    used = possible & (jnp.arange(k) < draws[:, None])
    ids = deduplicate(jnp.where(used, drawn, num_patches), num_patches)
    uniform = 1 / jnp.maximum(counted.sum(1, keepdims=True), 1).astype(float)
    inside = _inclusion(chance, draws[:, None])
    weights = _inclusion(uniform, draws[:, None]) / jnp.where(inside > 0, inside, 1)
    return ids, jnp.take_along_axis(weights, jnp.minimum(ids, num_patches - 1), axis=1)


def _inclusion(chance: Array, draws: Array) -> Array:
    """Computes the probability to be drawn at least once, 1 - (1 - p)^k, exact for small p."""
    return -jnp.expm1(draws * jnp.log1p(-chance))


def _scores(problem: Problem, weights: Weights, z: Array, batch: Batch, key: Array) -> Array:
    """Computes the scores `float [B, N]` of the filled Z; 0 for padding examples."""

    def local(weights: Weights, z: Array, batch: Batch, key: Array) -> Array:
        if problem.config.importance == "attention":
            return _attend(problem, weights, z, batch).reshape(z.shape[:2])
        # What this pass does to batch statistics is dropped.
        dz = jax.grad(lambda z: head_loss(problem, weights, z, batch, key)[0])(z)
        dz = dz.astype(jnp.promote_types(z.dtype, jnp.float32))
        return jnp.sqrt((dz * dz).sum(-1))

    kinds = (Spec.WEIGHTS, Spec.IMAGES, Spec.BATCH, Spec.SAME)
    scores: Array = problem.layout.spread(local, kinds, Spec.IMAGES)(weights, z, batch, key)
    weight = batch.get("weight")
    return scores if weight is None else jnp.where(weight[:, None] > 0, scores, 0)


def _attend(problem: Problem, weights: Weights, z: Array, batch: Batch) -> Array:
    if problem.model.attend is None:
        raise ConfigError(
            "patchgd.importance attention needs a head with attention, but the model's `attend` is "
            "None; give it one, or use --patchgd.importance loss"
        )
    try:
        return problem.model.attend(*weights, z_map(problem, z), valid_mask(batch, problem.grid))
    except ConfigError as error:
        raise ConfigError(f"patchgd.importance attention: {error}") from error
