"""Iterative patch selection: only the patches with the most attention are trained.

Source: Bergner et al., Iterative Patch Selection for High-Resolution Image Recognition, arXiv
2210.13007. There the best M patches are kept while a pass without gradient goes through the image
chunk by chunk, so that no more than M and a chunk are in memory. Scores of the attention head do
not depend on other patches, so the best M of all of Z are the same, and Z is small.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.core.forward import apply_head, encode_all, score_logits, z_map
from patchgd_jax.core.gradients import full_gradient
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import PatchModel
from patchgd_jax.core.patch_ids import unique_padding_ids, valid_mask
from patchgd_jax.core.problem import Batch, Problem, Weights, named_key
from patchgd_jax.core.update import Gradient, Metrics
from patchgd_jax.errors import ConfigError


def selected(grid: Grid, *, top: int | None, inner_steps: int) -> int:
    """Returns M: `top`, or as many patches as PatchGD re-encodes at a time, and at most N."""
    return min(grid.num_patches, top or -(-grid.num_patches // inner_steps))


def require_attention(model: PatchModel, grid: Grid, width: int) -> None:
    """Raises `ConfigError` for a head without attention, before anything is compiled."""

    def attention(key: Array, z: Array) -> Array:
        if model.attend is None:
            raise ConfigError("method ips selects patches by attention, and this model has none")
        return model.attend(*model.init(key), z, None)

    z = jax.ShapeDtypeStruct((1, grid.rows, grid.cols, width), jnp.float32)
    jax.eval_shape(attention, jax.random.key(0), z)


def select_patches(
    problem: Problem, weights: Weights, z: Array, batch: Batch, count: int, key: Array | None = None
) -> Array:
    """Selects each image's `count` patches of most attention: `int32 [B, M]`, padding last.

    `key` draws among equal patches; without it the first of them are taken.
    """
    assert problem.model.attend is not None
    images, patches = z.shape[:2]
    mask = valid_mask(batch, problem.grid)
    attention = problem.model.attend(*weights, z_map(problem, z), mask).reshape(images, patches)
    if mask is not None:
        attention = jnp.where(mask.reshape(images, patches), attention, -1)
    tie = (
        jnp.broadcast_to(jnp.arange(patches), attention.shape)
        if key is None
        else jax.random.uniform(key, attention.shape)
    )
    best = jnp.lexsort((tie, -attention), axis=-1)[:, :count].astype(jnp.int32)
    valid = jnp.take_along_axis(attention, best, axis=1) >= 0
    return unique_padding_ids(jnp.sort(jnp.where(valid, best, patches), axis=-1), patches)


def restrict_to_patches(batch: Batch, ids: Array) -> dict[str, Array]:
    """Returns the batch with no valid patches but `ids int [B, M]`."""
    return {**{name: x for name, x in batch.items() if name != "size"}, "patches": ids}


def ips_gradient(
    problem: Problem, weights: Weights, batch: Batch, key: Array, *, count: Callable[[Grid], int]
) -> Gradient:
    """Takes `full_gradient` through the `count(grid)` selected patches; the head sees no others."""
    constant, z = lax.stop_gradient((weights, encode_all(problem, weights, batch)))
    selection = named_key(key, "selection")
    ids = select_patches(problem, constant, z, batch, count(problem.grid), selection)
    return full_gradient(problem, weights, restrict_to_patches(batch, ids), key)


def ips_eval(
    problem: Problem, weights: Weights, batch: Batch, *, count: Callable[[Grid], int]
) -> Metrics:
    """Reads the selected patches with the head; arguments and results as `eval_step`'s."""
    z = encode_all(problem, weights, batch)
    ids = select_patches(problem, weights, z, batch, count(problem.grid))
    only, key = restrict_to_patches(batch, ids), jax.random.key(0)
    logits, _ = apply_head(problem, weights, z, only, key, train=False)
    return score_logits(problem, logits, batch)
