"""Rematerialisation: what an encoder keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from typing import Literal

import jax
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "blocks", "everything"]

_PRODUCTS = "product"


def keep(x: Array) -> Array:
    """Marks what policy `dots` keeps: results of convolutions, and sums over whole maps."""
    return checkpoint_name(x, _PRODUCTS)


def rematerialise(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Applies a policy to the class of an encoder's blocks.

    `none` and `everything` leave it as it is: for the latter, `build_model` wraps the whole encoder
    in one `jax.checkpoint`.

    Args:
        block: called as `block(...)(x, train, mask)`.
        remat: the policy.
    """
    if remat in ("none", "everything"):
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(_PRODUCTS) if remat == "dots" else None
    # Of (self, x, train, mask), train is a Python bool.
    return nn.remat(block, policy=policy, static_argnums=(2,))
