"""Multiple-instance learning on stored features: the encoder is frozen.

Source: Ilse et al., Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, on features
of an encoder that was trained before, as Lu et al., arXiv 2004.09666, have it.
"""

from __future__ import annotations

from jax import Array, lax

from patchgd_jax.core.forward import encode_all
from patchgd_jax.core.gradients import z_gradient
from patchgd_jax.core.problem import Batch, Problem, Weights, named_key
from patchgd_jax.core.update import Gradient

FEATURES = "z"
"""Entry of a batch: the latents of its patches, `float [B, N, D]`, instead of its images."""


def mil_gradient(problem: Problem, weights: Weights, batch: Batch, key: Array) -> Gradient:
    """Takes the head's gradient on the patches' latents; arguments as `full_gradient`'s.

    No gradient reaches the encoder. A batch that has `FEATURES` needs no images.
    """
    z = batch[FEATURES] if FEATURES in batch else encode_all(problem, weights, batch)
    return z_gradient(problem, weights, lax.stop_gradient(z), batch, named_key(key, "head"))[0]
