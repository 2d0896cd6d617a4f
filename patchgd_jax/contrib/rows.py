"""Spatial partitioning: devices along the mesh axis `rows` share each patch.

For patches whose activations exceed one device. The compiler divides the encoder, and sends the
rows of its maps that a neighbour needs.
"""

from __future__ import annotations

from typing import Any, cast

import jax
from jax import lax

from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.models.layers.conv import rows_divided


def divide_rows(model: PatchModel, sharding: Any) -> PatchModel:
    """Returns the model with its patches `[M, p, p, C]` divided along their rows.

    Args:
        model: the model.
        sharding: of the patches, a `jax.sharding.NamedSharding` or `PartitionSpec`.
    """

    def encode(params: Params, state: Params, patches: jax.Array, **options: Any) -> Any:
        patches = lax.with_sharding_constraint(patches, sharding)
        with rows_divided():
            return model.encode(params, state, patches, **options)

    return model._replace(encode=cast(Any, encode))
