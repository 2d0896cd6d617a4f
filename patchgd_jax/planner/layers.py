"""The layer table: parameters, output, residuals and products of each module, from one trace."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from patchgd_jax.config import ModelConfig
from patchgd_jax.core.grid import WholeImage
from patchgd_jax.models.registry import build_model
from patchgd_jax.planner.request import leaf_bytes, tree_bytes

Path = tuple[str, ...]


class Layer(NamedTuple):
    """A module of the network, without its submodules, which have rows of their own."""

    name: str
    """Path, such as `Bottleneck_0/Conv_1`; `(encoder)` is the network itself."""
    kind: str
    """Name of the module's class."""
    output: tuple[int, ...]
    parameters: int
    parameter_bytes: int
    output_bytes: int
    kept_bytes: int
    """Residuals for the backward pass."""
    flops: int
    """Operations of the forward pass: two for each multiplication and addition."""

    @property
    def unfolded_bytes(self) -> int:
        """Bytes of the left operand, where a convolution runs as one matrix product."""
        if not self.flops:
            return 0
        return self.flops // 2 // self.output[-1] * self.output_bytes // int(np.prod(self.output))


class LayerTable(NamedTuple):
    """The layers of a network in the order of their first use."""

    layers: tuple[Layer, ...]
    residuals: tuple[Any, ...]
    """Shapes of the arrays that are kept for the backward pass."""

    def total(self, column: str) -> int:
        """Sums a column of numbers."""
        return sum(getattr(layer, column) for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """Bytes of parameters, gradients and residuals."""
        return 2 * self.total("parameter_bytes") + self.total("kept_bytes")

    @property
    def inference_bytes(self) -> int:
        """Bytes of parameters, and of the largest output with the next one."""
        outputs = [0, *(layer.output_bytes for layer in self.layers if layer.output), 0]
        return self.total("parameter_bytes") + max(map(sum, pairwise(outputs)))

    def kept_by_block(self) -> Counter[str]:
        """Sums residuals over each top-level module."""
        kept: Counter[str] = Counter()
        for layer in self.layers:
            kept[layer.name.split("/")[0]] += layer.kept_bytes
        return kept


def residuals(function: Callable[..., Any], params: Any, *arguments: Any) -> list[jax.Array]:
    """Lists the arrays that `jax.vjp` of a function keeps, each once, without `params`."""
    _, pull_back = jax.vjp(lambda p: function(p, *arguments), params)
    given = {id(leaf) for leaf in jax.tree.leaves(params)}
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(pull_back)}
    return [leaf for key, leaf in kept.items() if key not in given]


def _layer_table(encode: Callable[..., Any], params: Any, *arguments: Any) -> LayerTable:
    """Traces `encode(params, *arguments)`, which applies Linen modules, and its residuals.

    `params` are shapes by module name, `arguments` shapes; the result of `encode` is an array.
    """
    modules: dict[Path, tuple[str, Any]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path, kind = tuple(context.module.path), type(context.module).__name__
        modules.setdefault(path, (kind, None))
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and hasattr(out, "shape"):
            modules[path] = (kind, jax.ShapeDtypeStruct(out.shape, out.dtype))
        return out

    with nn.intercept_methods(record):
        traced = jax.make_jaxpr(partial(residuals, encode))(params, *arguments)
    modules.setdefault((), ("encoder", None))
    # JAX names the operations of a module by its path.
    scopes = {var: eqn.source_info.name_stack for eqn in traced.jaxpr.eqns for var in eqn.outvars}
    kept: Counter[Path] = Counter()
    for var, aval in zip(traced.jaxpr.outvars, traced.out_avals, strict=True):
        # Literals cannot be looked up, and are of no module.
        scope = scopes.get(var, "") if getattr(var, "val", None) is None else ""
        kept[_module_of(str(scope), modules)] += leaf_bytes(aval)
    own: dict[Path, dict[str, Any]] = {path: {} for path in modules}
    for keys, leaf in jax.tree.leaves_with_path(params):
        names = tuple(str(key.key) for key in keys)
        path = next(names[:end] for end in range(len(names) - 1, -1, -1) if names[:end] in own)
        own[path]["/".join(names[len(path) :])] = leaf
    layers = [
        Layer(
            name="/".join(path) or "(encoder)",
            kind=kind,
            output=() if output is None else output.shape,
            parameters=sum(leaf.size for leaf in own[path].values()),
            parameter_bytes=tree_bytes(own[path]),
            output_bytes=tree_bytes(output),
            kept_bytes=kept[path],
            flops=_flops(own[path], output),
        )
        for path, (kind, output) in modules.items()
    ]
    return LayerTable(tuple(layers), tuple(traced.out_avals))


def _module_of(scope: str, modules: dict[Path, Any]) -> Path:
    """Finds the innermost module among the names of an operation's scopes."""
    path: Path = ()
    for part in scope.split("/"):
        # A transformation puts its name around that of the outermost scope: jvp(Conv_0).
        while wrapped := re.fullmatch(r"[\w-]+\((.*)\)", part):
            part = wrapped[1]
        if (*path, part) in modules:
            path = (*path, part)
    return path


def _flops(own: dict[str, Any], output: Any) -> int:
    """Counts two operations for each weight of the kernel at each position of the output."""
    kernel = own.get("kernel")
    if kernel is None or output is None:
        return 0
    features = own["bias"].size if "bias" in own else kernel.shape[-1]
    return int(2 * kernel.size * (output.size // features))


def encoder_table(
    config: ModelConfig, channels: int, size: tuple[int, int], inputs: int = 1
) -> LayerTable:
    """Makes the layer table of an encoder in training, for `inputs` inputs in one pass.

    `size` is height and width of an input in pixels.
    """
    # The parameters of a convolution do not depend on the size; position tables are for squares.
    square = WholeImage(min(size), min(size))
    config = dataclasses.replace(config, head="linear", dropout=None)
    model = build_model(config, grid=square, channels=channels, classes=1, mean=0.0, std=1.0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, stats = jax.eval_shape(model.init, key)
    images = jax.ShapeDtypeStruct((inputs, *size, channels), np.uint8)

    def encode(encoder: Any, stats: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        weights = {**params, "encoder": encoder}
        return model.encode(weights, stats, images, train=True, rng=key)[0]

    return _layer_table(encode, params["encoder"], stats, images, key)
