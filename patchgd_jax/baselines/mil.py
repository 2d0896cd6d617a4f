"""Multiple-instance learning on features that are kept: the encoder stays as it is.

Source: Ilse et al., Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, on features
of an encoder that was trained before, as Lu et al., arXiv 2004.09666, have it.
"""

from __future__ import annotations

import jax
from jax import lax

from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.augment import Augment
from patchgd_jax.core.gradients import Batch, Gradient, head_loss, stream
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.step import eval_fill
from patchgd_jax.core.tasks import Task

FEATURES = "z"
"""Entry of a batch: the latents of its patches, `float [B, N, D]`, in the place of its images."""


def mil_gradient(
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: PatchModel,
    grid: Grid,
    patchgd: PatchGDConfig,
    task: Task,
    augment: Augment | None = None,
) -> Gradient:
    """The head's gradient on the features of the patches; none reaches the encoder.

    Arguments are those of `gradients.full_gradient`; a batch that has `FEATURES` needs no images.
    """
    if FEATURES in batch:
        z = batch[FEATURES]
    else:
        z = eval_fill(
            params, model_state, batch, model=model, grid=grid, fill_chunk=patchgd.fill_chunk
        )
    z = lax.stop_gradient(z)

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        return head_loss(
            params, model_state, z, batch, stream(key, "head"), model=model, grid=grid, task=task
        )

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradient(grads, new_state, loss, logits)
