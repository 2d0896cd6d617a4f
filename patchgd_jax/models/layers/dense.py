"""Dense layers and the dtype of parameters."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

SMALL = nn.initializers.truncated_normal(0.02)
"""Initial weights of ViT and ConvNeXt."""


def param_dtype(dtype: Any) -> Any:
    """The dtype of the parameters of a layer that computes in `dtype`: at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


def dense(features: int, dtype: Any, **options: Any) -> nn.Dense:
    """A dense layer that computes in `dtype` and keeps its parameters in at least float32."""
    return nn.Dense(features, dtype=dtype, param_dtype=param_dtype(dtype), **options)
