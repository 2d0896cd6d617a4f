"""The layer table: what each layer has, makes, keeps for its backward pass, and computes.

Every figure is of one trace for shapes. What a layer keeps is what `jax.vjp` returns with it, told
apart by the name of the operation that made it, so that the sums are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.extend import core

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.models.registry import build_model
from patchgd_jax.planner.request import PlanRequest, leaf_bytes, tree_bytes

Path = tuple[str, ...]


class Layer(NamedTuple):
    """A module of the network; what its own submodules have is in their rows, not in its."""

    name: str
    """Its path, `Bottleneck_0/Conv_1` say; the network itself is `(encoder)` or `(head)`."""
    kind: str
    """Its class."""
    output: tuple[int, ...]
    parameters: int
    parameter_bytes: int
    output_bytes: int
    kept_bytes: int
    """Kept for the backward pass."""
    flops: int
    """Of the products in its forward pass: two for each multiplication and addition."""


class LayerTable(NamedTuple):
    """The layers of a network in the order of their first use, and sums over them."""

    layers: tuple[Layer, ...]

    def total(self, column: str) -> int:
        """The sum of a column of numbers."""
        return sum(getattr(layer, column) for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """A backward pass costs two forward passes: one product for each operand's gradient."""
        return 3 * self.total("flops")

    @property
    def training_bytes(self) -> int:
        """Parameters, their gradients, and what is kept for the backward pass."""
        return 2 * self.total("parameter_bytes") + self.total("kept_bytes")

    @property
    def inference_bytes(self) -> int:
        """Parameters, and the largest output with the one that it is made of."""
        outputs = [0, *(layer.output_bytes for layer in self.layers if layer.output)]
        pair = max(a + b for a, b in zip(outputs, outputs[1:] or [0], strict=False))
        return self.total("parameter_bytes") + pair


def layer_table(
    function: Callable[..., Any], params: Any, *arguments: Any, name: str = "network"
) -> LayerTable:
    """Traces a function of Linen modules and says what each of them takes.

    Args:
        function: of `params` and the other arguments to an array; it applies Linen modules whose
            parameters are `params` as a tree by module name.
        params: shapes of the parameters that a gradient is taken of.
        arguments: shapes of the rest.
        name: of the row of the function itself.
    """
    modules: dict[Path, tuple[str, tuple[int, ...], int]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = tuple(context.module.path)
        modules.setdefault(path, (type(context.module).__name__, (), 0))
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and hasattr(out, "shape"):
            modules[path] = (modules[path][0], tuple(out.shape), leaf_bytes(out))
        return out

    def kept(params: Any, *arguments: Any) -> list[Any]:
        _, pull_back = jax.vjp(lambda p: function(p, *arguments), params)
        given = {id(leaf) for leaf in jax.tree.leaves(params)}
        return [leaf for leaf in jax.tree.leaves(pull_back) if id(leaf) not in given]

    traced = jax.make_jaxpr(kept)(params, *arguments).jaxpr
    with nn.intercept_methods(record):
        forward = jax.make_jaxpr(function)(params, *arguments).jaxpr
    modules.setdefault((), (name, (), 0))

    makers = {var: eqn for eqn in traced.eqns for var in eqn.outvars}
    kept_bytes: dict[Path, int] = {}
    for var in traced.outvars:
        eqn = makers.get(var) if not isinstance(var, core.Literal) else None
        path = _module_of(_stack(eqn), modules) if eqn is not None else ()
        kept_bytes[path] = kept_bytes.get(path, 0) + leaf_bytes(var.aval)
    flops: dict[Path, int] = {}
    for stack, count in _products(forward, (), 1):
        path = _module_of(stack, modules)
        flops[path] = flops.get(path, 0) + count
    own: dict[Path, list[Any]] = {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = tuple(str(key.key) for key in keys[:-1])
        while path not in modules:
            path = path[:-1]
        own.setdefault(path, []).append(leaf)
    return LayerTable(
        tuple(
            Layer(
                name="/".join(path) or f"({name})",
                kind=kind,
                output=output,
                parameters=sum(leaf.size for leaf in own.get(path, [])),
                parameter_bytes=tree_bytes(own.get(path, [])),
                output_bytes=size,
                kept_bytes=kept_bytes.get(path, 0),
                flops=flops.get(path, 0),
            )
            for path, (kind, output, size) in modules.items()
        )
    )


def _stack(eqn: Any) -> tuple[str, ...]:
    return tuple(str(eqn.source_info.name_stack).split("/"))


def _module_of(stack: tuple[str, ...], modules: dict[Path, Any]) -> Path:
    """The innermost module among the names of an operation's scopes."""
    path: Path = ()
    for part in stack:
        # A transformation puts its name around that of the outermost scope: jvp(Conv_0).
        while wrapped := re.fullmatch(r"[\w-]+\((.*)\)", part):
            part = wrapped[1]
        if (*path, part) in modules:
            path = (*path, part)
    return path


def _products(jaxpr: Any, stack: tuple[str, ...], times: int) -> list[tuple[tuple[str, ...], int]]:
    """FLOPs of every product of matrices and every convolution, with the names of its scopes."""
    found = []
    platforms: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        name, here = eqn.primitive.name, (*stack, *_stack(eqn))
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = int(np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted]))
            found.append((here, 2 * times * eqn.outvars[0].aval.size * depth))
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            depth = kernel.size // features
            found.append((here, 2 * times * eqn.outvars[0].aval.size * depth))
        elif name == "platform_index":
            platforms[eqn.outvars[0]] = eqn.params["platforms"]
        elif name == "cond" and eqn.invars[0] in platforms:
            # What serves every platform is the textbook's form, and it comes last.
            body = eqn.params["branches"][platforms[eqn.invars[0]].index(None)]
            found += _products(body.jaxpr, here, times)
        else:
            rounds = eqn.params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(
                [v for k, v in eqn.params.items() if "jaxpr" in k],
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            ):
                body = inner.jaxpr if hasattr(inner, "jaxpr") else inner
                if hasattr(body, "eqns"):
                    found += _products(body, here, times * rounds)
    return found


def encoder_table(
    request: PlanRequest, *, inputs: int = 1, side: tuple[int, int] | None = None
) -> LayerTable:
    """The layer table of the encoder that a request names, in training.

    Args:
        request: what is planned.
        inputs: how many there are at once.
        side: height and width of an input in pixels; None: a patch.
    """
    size = side or (request.patchgd.patch,) * 2
    channels = request.image[2]
    model = build_model(
        request.model,
        grid=PatchGrid(min(size), min(size), min(size)),
        channels=channels,
        classes=request.classes,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, model_state = jax.eval_shape(model.init, key)
    images = jax.ShapeDtypeStruct((inputs, *size, channels), np.uint8)

    def encode(encoder: Any, model_state: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        parts = {**params, "encoder": encoder}
        return model.encode(parts, model_state, images, train=True, rng=key)[0]

    return layer_table(encode, params["encoder"], model_state, images, key, name="encoder")
