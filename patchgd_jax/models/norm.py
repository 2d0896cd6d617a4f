"""The normalisation layers an encoder can be built with."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Norm = Literal["group", "batch"]


class Normalize(nn.Module):
    """GroupNorm or BatchNorm, chosen by name.

    BatchNorm's momentum is 0.9 (PyTorch's 0.1) and its statistics leave out masked patches.
    """

    kind: Norm
    dtype: Any = jnp.float32
    groups: int = 32
    zero_scale: bool = False
    """Start the scale at zero: for the last norm of a residual branch."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x [M, H, W, C]`; `mask bool [M]` is True for the patches that count."""
        scale_init = (
            nn.initializers.zeros_init() if self.zero_scale else nn.initializers.ones_init()
        )
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        if self.kind == "group":
            groups = min(self.groups, x.shape[-1])
            return nn.GroupNorm(
                num_groups=groups, dtype=self.dtype, param_dtype=param_dtype, scale_init=scale_init
            )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            dtype=self.dtype,
            param_dtype=param_dtype,
            scale_init=scale_init,
        )(x, mask=None if mask is None else mask[:, None, None, None])
