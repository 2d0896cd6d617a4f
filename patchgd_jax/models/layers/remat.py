"""What an encoder keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "blocks", "everything"]

Policy = Callable[..., Any] | None
"""Of `jax.checkpoint`; None: nothing is kept."""

_PRODUCTS = "product"
_LEFT: ContextVar[dict[type[nn.Module], Policy] | None] = ContextVar("left", default=None)


def keep(x: jax.Array) -> jax.Array:
    """Marks what policy `dots` keeps: results of convolutions, and sums over whole maps."""
    return checkpoint_name(x, _PRODUCTS)


@contextmanager
def left_to_caller() -> Iterator[dict[type[nn.Module], Policy]]:
    """Blocks that are called herein do not follow their policy: that is their caller's to do.

    Yields:
        The policies by class of block, which grow as encoders are applied.
    """
    policies: dict[type[nn.Module], Policy] = {}
    token = _LEFT.set(policies)
    try:
        yield policies
    finally:
        _LEFT.reset(token)


def rematerialise(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Applies a policy to the class of one block of an encoder.

    `none` and `everything` leave it as it is: the latter is one `jax.checkpoint` around the whole
    encoder, which is its caller's to add.

    Args:
        block: called as `block(...)(x, train, mask)`.
        remat: the policy.
    """
    if remat in ("none", "everything"):
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(_PRODUCTS) if remat == "dots" else None
    if (left := _LEFT.get()) is not None:
        left[block] = policy
        return block
    # Of (self, x, train, mask), train is a Python bool.
    return nn.remat(block, policy=policy, static_argnums=(2,))
