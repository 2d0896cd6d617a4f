"""PatchModel: the contract between the PatchGD steps and a model library.

Three pure functions, as Optax has two for an optimizer. `step.py` knows nothing else of a model.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any
"""A pytree of arrays."""
Params = dict[str, PyTree]
"""A pytree with one entry each for `encoder` (theta1) and `head` (theta2)."""


class Init(Protocol):
    """Makes the parameters and the model state (batch statistics)."""

    def __call__(self, key: jax.Array) -> tuple[Params, Params]:
        """Returns `(params, model_state)`, both with the entries `encoder` and `head`."""
        ...


class Encode(Protocol):
    """theta1: patches to latents."""

    def __call__(
        self,
        params: Params,
        model_state: Params,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Params]:
        """Encodes patches.

        Args:
            params: of both parts.
            model_state: of both parts.
            patches: `[M, *grid.patch_shape, C]`, as the images come (uint8); normalised here.
            train: whether dropout is on and batch statistics are taken from this batch.
            rng: PRNG key for dropout.
            mask: `bool [M]`, False for patches that batch statistics must leave out.

        Returns:
            latents `float [M, D]` and the new model state.
        """
        ...


class Classify(Protocol):
    """theta2: the latent block to logits."""

    def __call__(
        self,
        params: Params,
        model_state: Params,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Params]:
        """Classifies `z float [B, rows, cols, D]`.

        Args:
            params: of both parts.
            model_state: of both parts.
            z: the latent block; `z[b, r, c]` is the patch at pixel `(r * stride, c * stride)`.
            mask: `bool [B, rows, cols]`, False where a patch is nothing but padding; None if
                every patch is real.
            train: whether dropout is on and batch statistics are taken from this batch.
            rng: PRNG key for dropout.

        Returns:
            logits `float [B, classes]` and the new model state.
        """
        ...


class Attend(Protocol):
    """How much the head looks at each patch."""

    def __call__(
        self, params: Params, model_state: Params, z: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """Weights `float [B, rows, cols]` of a pass in eval mode; arguments as in `Classify`."""
        ...


class PatchModel(NamedTuple):
    """An encoder and a head as pure functions over `{"encoder": ..., "head": ...}` trees."""

    init: Init
    encode: Encode
    classify: Classify
    attend: Attend | None = None
    """None where the head has no attention to show."""
