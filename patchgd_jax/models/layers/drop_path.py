"""Stochastic depth: in training, a block's residual branch is dropped for some patches."""

from __future__ import annotations

from flax import linen as nn
from jax import Array


def drop_rates(last: float, blocks: int) -> tuple[float, ...]:
    """The rate of each block, from 0 in the first to `last` in the last (arXiv 1603.09382)."""
    return tuple(last * index / max(1, blocks - 1) for index in range(blocks))


def drop_path(rate: float, branch: Array, train: bool) -> Array:
    """Zeroes `branch [M, ...]` for a share `rate` of the patches and enlarges the others.

    Called inside a module's `__call__`; the draw is from the random stream `dropout`.
    """
    axes = tuple(range(1, branch.ndim))
    return nn.Dropout(rate, broadcast_dims=axes, deterministic=not train)(branch)
