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
from jax import lax

from patchgd_jax.baselines.base import Metrics, scores
from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.augment import Augment
from patchgd_jax.core.gradients import Batch, Gradient, full_gradient, patch_mask, read_z, stream
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.sampling import without_repeats
from patchgd_jax.core.step import eval_fill
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.errors import ConfigError


def selected(grid: Grid, *, top: int | None, inner_steps: int) -> int:
    """M: `top`, or as many patches as PatchGD re-encodes at a time, and no more than there are."""
    return min(grid.num_patches, top or -(-grid.num_patches // inner_steps))


def require_attention(model: PatchModel, grid: Grid, width: int) -> None:
    """Refuses a head without attention before anything is compiled.

    Args:
        model: the model.
        grid: the patch grid.
        width: D, of a latent.

    Raises:
        ConfigError: if it has none.
    """

    def attention(key: jax.Array, z: jax.Array) -> jax.Array:
        if model.attend is None:
            raise ConfigError("method ips selects patches by attention, and this model has none")
        return model.attend(*model.init(key), z, None)

    z = jax.ShapeDtypeStruct((1, grid.rows, grid.cols, width), jnp.float32)
    jax.eval_shape(attention, jax.random.key(0), z)


def select_patches(
    params: Params,
    model_state: Params,
    z: jax.Array,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    count: int,
    key: jax.Array | None = None,
) -> jax.Array:
    """The patches of each image with the most attention.

    Args:
        params: of both parts.
        model_state: of both parts.
        z: `float [B, N, D]`.
        batch: which patches count.
        model: one that `require_attention` has passed.
        grid: the patch grid.
        count: M, at most N.
        key: PRNG key that equal patches are drawn with. None: the first of them are taken.

    Returns:
        `int32 [B, M]` in order; slots without a patch are N and more, at the end.
    """
    assert model.attend is not None
    images, patches = z.shape[:2]
    mask = patch_mask(batch, grid)
    attention = model.attend(
        params, model_state, z.reshape(images, grid.rows, grid.cols, -1), mask
    ).reshape(images, patches)
    if mask is not None:
        attention = jnp.where(mask.reshape(images, patches), attention, -1)
    tie = (
        jnp.broadcast_to(jnp.arange(patches), attention.shape)
        if key is None
        else jax.random.uniform(key, attention.shape)
    )
    best = jnp.lexsort((tie, -attention), axis=-1)[:, :count].astype(jnp.int32)
    counts = jnp.take_along_axis(attention, best, axis=1) >= 0
    return without_repeats(jnp.sort(jnp.where(counts, best, patches), axis=-1), patches)


def only(batch: Batch, ids: jax.Array) -> dict[str, jax.Array]:
    """The batch with no patches but `ids int [B, M]`."""
    return {**{name: x for name, x in batch.items() if name != "size"}, "patches": ids}


def ips_gradient(
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: Augment | None,
    count: Callable[[Grid], int],
) -> Gradient:
    """End-to-end autodiff through the selected patches, which are all that the head sees.

    Arguments are those of `gradients.full_gradient`; `count` gives M, the patches that are selected
    of an image.
    """
    z = eval_fill(params, model_state, batch, model=model, grid=grid, fill_chunk=patchgd.fill_chunk)
    ids = select_patches(
        lax.stop_gradient(params),
        model_state,
        lax.stop_gradient(z),
        batch,
        model=model,
        grid=grid,
        count=count(grid),
        key=stream(key, "selection"),
    )
    return full_gradient(
        params,
        model_state,
        only(batch, ids),
        key,
        model=model,
        grid=grid,
        chunk=patchgd.fill_chunk,
        train_encoder=patchgd.norm_policy != "frozen",
        remat=False,
        task=task,
        augment=augment,
    )


def ips_eval(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    model: PatchModel,
    grid: Grid,
    fill_chunk: int,
    task: Task = SINGLE_LABEL,
    count: Callable[[Grid], int],
) -> Metrics:
    """The head reads the selected patches; arguments and results of `step.eval_step`."""
    z = eval_fill(params, model_state, batch, model=model, grid=grid, fill_chunk=fill_chunk)
    ids = select_patches(params, model_state, z, batch, model=model, grid=grid, count=count(grid))
    logits, _, _ = read_z(
        params,
        model_state,
        z,
        only(batch, ids),
        jax.random.key(0),
        model=model,
        grid=grid,
        train=False,
        task=task,
    )
    return scores(logits, batch, task)
