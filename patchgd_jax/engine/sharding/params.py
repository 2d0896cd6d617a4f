"""Parameter sharding: rules that divide parameters among the devices of a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchgd_jax.core.model import PyTree
from patchgd_jax.engine.sharding.mesh import AXES, DATA, PATCH
from patchgd_jax.errors import ConfigError

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Regular expressions to search for in a parameter's path (`encoder/Conv_0/kernel`), each with the
mesh axis that divides every dimension, or None. The first match with as many dimensions counts; a
parameter without a match is whole on every device."""


def parse_rules(texts: Iterable[str]) -> Rules:
    """Parses rules such as `kernel$=-,-,-,data`, where `-` leaves a dimension whole."""
    rules = []
    for text in texts:
        pattern, _, axes = text.rpartition("=")
        names = axes.split(",")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"param_rules: {pattern!r} is no pattern: {error}") from error
        if not pattern or not set(names) <= {DATA, PATCH, "-"}:
            raise ConfigError(
                f"param_rules: {text!r} cannot be read; write a pattern, = and for each dimension "
                f"{DATA}, {PATCH} or -, such as kernel$=-,{DATA}"
            )
        rules.append((pattern, tuple(None if name == "-" else name for name in names)))
    return rules


def param_specs(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Finds the `PartitionSpec` of each leaf; ConfigError for a rule that does not fit it."""

    def spec(path: Any, leaf: Any) -> P:
        name = _path_text(path)
        for pattern, axes in rules:
            if leaf.ndim == len(axes) and re.search(pattern, name):
                _check_rule(name, leaf.shape, axes, mesh)
                return P(*axes)
        return P()

    return jax.tree_util.tree_map_with_path(spec, params)


def _path_text(path: Any) -> str:
    """Returns a leaf's path from its part on, such as `encoder/Conv_0/kernel`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    found = re.search(r"(?:^|/)((?:encoder|head)/.*)", name)
    return found[1] if found else name


def check_rules(params: PyTree, rules: Rules) -> None:
    """Raises `ConfigError` unless each rule matches some parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for pattern, axes in rules:
        if not any(
            leaf.ndim == len(axes) and re.search(pattern, _path_text(path)) for path, leaf in leaves
        ):
            known = ", ".join(f"{_path_text(path)} {list(leaf.shape)}" for path, leaf in leaves[:6])
            raise ConfigError(
                f"param_rules: {pattern!r} fits no parameter of {len(axes)} dimensions; there are "
                f"{known}, ..."
            )


def _check_rule(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> None:
    used = [axis for axis in axes if axis is not None]
    if not set(used) <= set(AXES) or len(set(used)) != len(used):
        raise ConfigError(f"{name} cannot be divided along {axes}; the axes are {DATA} and {PATCH}")
    sizes = [1 if axis is None else mesh.shape[axis] for axis in axes]
    if any(n % d for n, d in zip(shape, sizes, strict=True)):
        raise ConfigError(
            f"{name} of shape {list(shape)} cannot be divided along {axes} on a mesh of "
            f"{dict(mesh.shape)}; change its rule"
        )


def param_shardings(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Returns `param_specs` as shardings, for `device_put`, `jit` and restoring a checkpoint.

    `params` may be a whole `TrainState`, in whose optimizer state the parameters' paths occur
    again.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, rules, mesh))
