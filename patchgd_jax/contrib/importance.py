"""Importance sampling: inner steps that re-encode the patches that matter more, more often.

A patch is drawn with a probability that grows with its score, and its part of the encoder's
gradient is divided by its chance to be in the group, so that the expected gradient stays what
uniform sampling has.

Sources: Katharopoulos and Fleuret, Not All Samples Are Created Equal, arXiv 1803.00942 (a bound of
the gradient's norm as the score, a share of uniform draws); Horvitz and Thompson, A Generalization
of Sampling Without Replacement from a Finite Universe, JASA 1952 (weights of one over the inclusion
probability).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.gradients import Batch, head_loss, listed_patches, patch_mask, stream
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.sampling import counted_once, group_size
from patchgd_jax.core.staleness import never_sampled, sampled_now
from patchgd_jax.core.tasks import Task
from patchgd_jax.errors import ConfigError


def importance_groups(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    placement: Placement = ALONE,
) -> tuple[jax.Array, jax.Array]:
    """Patch numbers of every inner step, drawn by `patchgd.importance`, and their weights.

    Scores of a patch, `patchgd.importance`:
    - `loss`: the norm of `dL/dZ` there, at the filled Z: the first-order effect of the patch's
      latent on the loss, and so the encoder's gradient through it up to the encoder's Jacobian.
    - `attention`: the head's attention there, at the filled Z.
    - `staleness`: inner steps since its entry of Z was computed (the fill is the step before the
      first). In each step's own draw.

    The share `patchgd.importance_mix` of the draws is uniform. With `patchgd.sample_per` batch the
    scores of a position are summed over the images. The draws are with replacement, and a patch
    that is drawn twice in a group counts once.

    Args:
        params: of both parts.
        model_state: of both parts.
        z: the filled Z, `[B, N, D]`.
        batch: see `gradients.Batch`.
        key: the outer step's PRNG key.
        model: the model; for `attention` its head must have some.
        grid: the patch grid of the images.
        patchgd: with an `importance` that is not none.
        task: it has the loss.
        placement: of the images.

    Returns:
        Groups `int32 [J, B, k]` as those of `sampling.sample_groups`, and `float [J, B, k]` the
        weights for `gradients.inner_gradient`: the chance to be in the group of a uniform draw over
        that of this one, at most 1 / `importance_mix`.

    Raises:
        ConfigError: if the head has no attention to draw by, there are more inner steps than
            patches, or images with patches of their own are to share positions.
    """
    listed = listed_patches(batch, grid)
    shared = patchgd.sample_per == "batch"
    if listed is not None and shared:
        raise ConfigError(
            f"patchgd.importance {patchgd.importance} with patchgd.sample_per batch draws the same "
            "patches of all images, but these images differ in which they have; add "
            "--patchgd.sample-per image"
        )
    steps = patchgd.num_inner_steps
    k = group_size(grid.num_patches if listed is None else listed.shape[1], steps)
    images = z.shape[0]
    mask = patch_mask(batch, grid)
    counted = jnp.ones((1, grid.num_patches), bool)
    if mask is not None:
        counted = mask.reshape(images, -1)
    # As for uniform groups: a small image is not re-encoded more often than a large one.
    draws = jnp.minimum(-(-counted.sum(1) // steps), k)

    fixed = None
    if patchgd.importance != "staleness":
        fixed = _scores(
            params,
            model_state,
            z,
            batch,
            stream(key, "importance"),
            model=model,
            grid=grid,
            by_attention=patchgd.importance == "attention",
            task=task,
            placement=placement,
        )
        if shared:
            fixed = fixed.sum(0, keepdims=True)

    def draw(
        computed: jax.Array, step: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        number, key = step
        scores = number - computed if fixed is None else fixed
        chance = probabilities(scores, counted, patchgd.importance_mix)
        keys = jax.random.split(key, chance.shape[0])
        choose = partial(jax.random.choice, a=grid.num_patches, shape=(k,))
        drawn = jax.vmap(lambda key, p: choose(key, p=p))(keys, chance)
        ids, weights = weighted_group(drawn, chance, counted, draws)
        return sampled_now(computed, ids, number), (ids, weights)

    keys = jax.random.split(stream(key, "sampling"), steps)
    start = never_sampled(1 if shared else images, grid.num_patches)
    _, (ids, weights) = lax.scan(draw, start, (jnp.arange(steps), keys))
    shape = (steps, images, k)
    return jnp.broadcast_to(ids, shape), jnp.broadcast_to(weights, shape)


def probabilities(scores: jax.Array, counted: jax.Array, mix: float) -> jax.Array:
    """The probability of each patch in one draw.

    Args:
        scores: `[B, N]`, not negative; all zero is as good as all equal.
        counted: `bool [B or 1, N]`, the patches to draw from.
        mix: the share of uniform draws, in (0, 1].

    Returns:
        `float [B, N]`, rows that sum to one (or are zero, for images without a patch).
    """
    scores = jnp.where(counted, scores, 0).astype(float)
    total = scores.sum(1, keepdims=True)
    uniform = counted / jnp.maximum(counted.sum(1, keepdims=True), 1).astype(float)
    share = jnp.where(total == 0, uniform, scores / jnp.where(total == 0, 1, total))
    return mix * uniform + (1 - mix) * share


def weighted_group(
    drawn: jax.Array, chance: jax.Array, counted: jax.Array, draws: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The group of some draws, and the weights that make its gradient unbiased.

    Args:
        drawn: `int [B, k]`, patch numbers, drawn with replacement.
        chance: `float [B, N]`, from `probabilities`: what they were drawn with.
        counted: `bool [B or 1, N]`, the patches that could be drawn.
        draws: `int [B or 1]`, how many of an image's k draws count, at most k.

    Returns:
        `int32 [B, k]`, each patch once and numbers of at least N in the other slots; and
        `float [B, k]`, the weight of each.
    """
    num_patches, k = chance.shape[1], drawn.shape[1]
    # Rounding of the cumulative probabilities must not let in what cannot be drawn.
    possible = jnp.take_along_axis(chance, drawn, axis=1) > 0
    used = possible & (jnp.arange(k) < draws[:, None])
    ids = counted_once(jnp.where(used, drawn, num_patches), num_patches)
    uniform = 1 / jnp.maximum(counted.sum(1, keepdims=True), 1).astype(float)
    inside = _inclusion(chance, draws[:, None])
    weights = _inclusion(uniform, draws[:, None]) / jnp.where(inside > 0, inside, 1)
    return ids, jnp.take_along_axis(weights, jnp.minimum(ids, num_patches - 1), axis=1)


def _inclusion(chance: jax.Array, draws: jax.Array) -> jax.Array:
    """The chance to be drawn at least once, 1 - (1 - p)^k, exact for small p."""
    return -jnp.expm1(draws * jnp.log1p(-chance))


def _scores(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    by_attention: bool,
    task: Task,
    placement: Placement,
) -> jax.Array:
    """The scores `float [B, N]` of the filled Z; 0 for padding examples."""

    def local(
        params: Params, model_state: Params, z: jax.Array, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array]:
        if by_attention:
            attention = _attend(params, model_state, z, batch, model=model, grid=grid)
            return (attention.reshape(z.shape[:2]),)

        def loss_of(z: jax.Array) -> jax.Array:
            # What this pass does to batch statistics is dropped.
            return head_loss(
                params,
                model_state,
                z,
                batch,
                key,
                model=model,
                grid=grid,
                task=task,
                placement=placement,
            )[0]

        dz = jax.grad(loss_of)(z).astype(jnp.promote_types(z.dtype, jnp.float32))
        return (jnp.sqrt((dz * dz).sum(-1)),)

    (scores,) = placement.spread(local, ("params", "same", "images", "batch", "same"), ("images",))(
        params, model_state, z, batch, key
    )
    weight = batch.get("weight")
    return scores if weight is None else jnp.where(weight[:, None] > 0, scores, 0)


def _attend(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
) -> jax.Array:
    if model.attend is None:
        raise ConfigError(
            "patchgd.importance attention needs a head with attention, but the model's `attend` is "
            "None; give it one, or use --patchgd.importance loss"
        )
    z = z.reshape(z.shape[0], grid.rows, grid.cols, z.shape[-1])
    try:
        return model.attend(params, model_state, z, patch_mask(batch, grid))
    except ConfigError as error:
        raise ConfigError(f"patchgd.importance attention: {error}") from error
