"""PatchModel: the contract between the PatchGD steps and a model library.

Three pure functions, as Optax has two for an optimizer; the steps use nothing else of a model.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jax import Array

PyTree = Any
"""A pytree of arrays."""
Params = dict[str, PyTree]
"""A pytree with the entries `encoder` (theta1) and `head` (theta2)."""


class Init(Protocol):
    """Initialises the parameters and the batch statistics."""

    def __call__(self, key: Array) -> tuple[Params, Params]:
        """Returns `(params, batch_stats)`, both with the entries `encoder` and `head`."""
        ...


class Encode(Protocol):
    """The encoder, theta1: patches to latents."""

    def __call__(
        self,
        params: Params,
        batch_stats: Params,
        patches: Array,
        *,
        train: bool,
        rng: Array,
        mask: Array | None = None,
    ) -> tuple[Array, Params]:
        """Encodes patches.

        Args:
            params: encoder and head parameters.
            batch_stats: encoder and head batch statistics.
            patches: `[M, *grid.patch_shape, C]`, in the dtype of the images; normalised here.
            train: whether to apply dropout and to use the statistics of this batch.
            rng: PRNG key for dropout.
            mask: `bool [M]`, False for patches to leave out of batch statistics; None to use all.

        Returns:
            latents `float [M, D]` and the new batch statistics.
        """
        ...


class Classify(Protocol):
    """The head, theta2: the latent block to logits."""

    def __call__(
        self,
        params: Params,
        batch_stats: Params,
        z: Array,
        mask: Array | None,
        *,
        train: bool,
        rng: Array,
    ) -> tuple[Array, Params]:
        """Classifies `z float [B, rows, cols, D]`; other arguments as in `Encode`.

        Args:
            params: encoder and head parameters.
            batch_stats: encoder and head batch statistics.
            z: the latent block; `z[b, r, c]` is the patch at pixel `(r * stride, c * stride)`.
            mask: `bool [B, rows, cols]`, False where a patch is only padding; None if none is.
            train: whether to apply dropout and to use the statistics of this batch.
            rng: PRNG key for dropout.

        Returns:
            logits `float [B, classes]` and the new batch statistics.
        """
        ...


class Attend(Protocol):
    """The head's attention to each patch."""

    def __call__(self, params: Params, batch_stats: Params, z: Array, mask: Array | None) -> Array:
        """Returns weights `float [B, rows, cols]` in eval mode; arguments as in `Classify`."""
        ...


class PatchModel(NamedTuple):
    """An encoder and a head as pure functions over `{"encoder": ..., "head": ...}` trees."""

    init: Init
    encode: Encode
    classify: Classify
    attend: Attend | None = None
    """None if the model has no attention."""
