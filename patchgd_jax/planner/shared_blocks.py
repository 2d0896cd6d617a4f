"""Blocks of one form are traced once.

A network repeats its blocks: of ResNet-50's sixteen, eight differ from all before them. Where only
shapes matter, the traces of the others and of their gradients are the first one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from patchgd_jax.models.layers.remat import Policy, left_to_caller

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


class _Form(NamedTuple):
    """All that a trace depends on but the shapes of what a block is given."""

    module: nn.Module
    """Without its name."""
    tree: Any
    """Of its arguments."""
    settings: tuple[Any, ...]
    """Arguments that are no arrays; None for those that are."""
    changed: tuple[str, ...]
    """Collections of variables that it changes."""
    platform: str
    rematerialised: bool
    policy: Policy


@contextmanager
def shared_blocks(platform: str) -> Iterator[None]:
    """Within it, a module directly below the one applied is traced once for each form.

    Its random numbers are not those of the network: this is for traces of which the shapes are
    used alone.

    Args:
        platform: that it is traced for; see `traced_for`.
    """

    def call(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        # One without a parent is in a transformation that a caching one must not be in.
        direct = len(module.path) == 1 and module.parent is not None
        if _INSIDE.get() or context.method_name != "__call__" or not direct:
            return method(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        # A module that it is given has its variables elsewhere.
        given = [*leaves, *(v for k, v in vars(module).items() if k != "parent")]
        if any(isinstance(value, nn.Module) for value in given):
            return method(*args, **kwargs)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        form = _Form(
            module=module.clone(parent=None, name=None),
            tree=tree,
            settings=tuple(None if isinstance(leaf, jax.Array) else leaf for leaf in leaves),
            changed=tuple(k for k in module.variables if module.is_mutable_collection(k)),
            platform=platform,
            rematerialised=type(module) in policies,
            policy=policies.get(type(module)),
        )
        try:
            hash(form)
        except TypeError:
            return method(*args, **kwargs)
        variables = dict(module.variables)
        params = variables.pop("params", {})
        keys = {name: key.rng for name, key in module.scope.rngs.items()}
        out, state = _block(form, params, arrays, variables, keys)
        for kind, values in state.items():
            for name, value in values.items():
                module.put_variable(kind, name, value)
        return out

    with left_to_caller() as policies, nn.intercept_methods(call):
        yield


def _apply(form: _Form, params: Any, arrays: Any, variables: Any, keys: Any) -> Any:
    given = iter(arrays)
    leaves = [next(given) if leaf is None else leaf for leaf in form.settings]
    args, kwargs = jax.tree.unflatten(form.tree, leaves)
    token = _INSIDE.set(True)
    try:
        variables = {"params": params, **variables}
        return form.module.apply(variables, *args, mutable=list(form.changed), rngs=keys, **kwargs)
    finally:
        _INSIDE.reset(token)


_block = jax.custom_vjp(jax.jit(_apply, static_argnums=0), nondiff_argnums=(0,))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _PullBack:
    """The backward pass of a block, without what it keeps."""

    tree: Any
    places: tuple[int, ...]
    """Of what it keeps, in the order of `tree`, among the block's inputs, outputs and the rest."""


@partial(jax.jit, static_argnums=(0, 1))
def _linearized(
    form: _Form, differentiated: bool, params: Any, arrays: Any, variables: Any, keys: Any
) -> Any:
    def apply(params: Any, some: Any) -> Any:
        return _apply(form, params, some if differentiated else arrays, variables, keys)

    if form.rematerialised:
        apply = jax.checkpoint(apply, policy=form.policy)
    out, pull_back, state = jax.vjp(apply, params, arrays if differentiated else (), has_aux=True)
    named = len(leaves := jax.tree.leaves((params, arrays, variables, keys, out, state)))
    place = {id(leaf): number for number, leaf in reversed([*enumerate(leaves)])}
    kept, tree = jax.tree.flatten(pull_back)
    for leaf in kept:
        if id(leaf) not in place:
            place[id(leaf)] = len(leaves)
            leaves.append(leaf)
    return (out, state), _PullBack(tree, tuple(place[id(leaf)] for leaf in kept)), leaves[named:]


def _forward(form: _Form, *primals: Any) -> Any:
    given = jax.tree.map(lambda primal: primal.value, primals)
    # What is made of the image alone has no gradient, and nothing is kept for one.
    differentiated = any(primal.perturbed for primal in jax.tree.leaves(primals[1]))
    out, pull_back, rest = _linearized(form, differentiated, *given)
    # An array that has a name outside of the block is kept under that name, and only once.
    leaves = [*jax.tree.leaves((given, out)), *rest]
    return out, (pull_back, [leaves[place] for place in pull_back.places])


@jax.jit
def _pulled(pull_back: Any, kept: Any, gradient: Any) -> Any:
    return jax.tree.unflatten(pull_back.tree, kept)(gradient)


def _backward(form: _Form, residuals: Any, gradients: Any) -> Any:
    params, arrays = _pulled(*residuals, gradients[0])
    return params, arrays or None, None, None


_block.defvjp(_forward, _backward, symbolic_zeros=True)
