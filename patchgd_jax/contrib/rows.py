"""Spatial partitioning: devices along the mesh axis `rows` share each patch.

For patches whose activations exceed one device. The compiler divides the encoder, and sends the
rows of its maps that a neighbour needs.
"""

from __future__ import annotations

from typing import Any, cast

from jax import Array, lax

from patchgd_jax.core.model import Params, PatchModel


def divide_rows(model: PatchModel, sharding: Any) -> PatchModel:
    """Returns a model (built with `rows_sharded`) whose patches `[M, p, p, C]` are sharded."""

    def encode(params: Params, state: Params, patches: Array, **options: Any) -> Any:
        patches = lax.with_sharding_constraint(patches, sharding)
        return model.encode(params, state, patches, **options)

    return model._replace(encode=cast(Any, encode))
