"""A device-neutral estimate of every method's memory: nothing is compiled or allocated.

Exact, from shapes: parameters, gradients, optimizer state, input images, Z, and the residuals that
`jax.vjp` of encoder and head keeps. Added is an allowance for the working set of the backward pass:
the encoder's inputs as floats, raw and normalised, and the larger of the left operand of its
largest product and the recomputed residuals of its largest block. Compilers reuse and copy buffers
differently: expect up to 25 % more or less (`benchmarks/plan_accuracy.py`); `--tier compile` gives
the figure of the present device.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from patchgd_jax.baselines.registry import method_model
from patchgd_jax.config import ModelConfig
from patchgd_jax.core.freezing import partition_frozen
from patchgd_jax.core.grid import WholeImage
from patchgd_jax.engine.setup import make_model, make_run_optimizer, run_frozen
from patchgd_jax.models.registry import encoder_entry, head_entry
from patchgd_jax.planner.layers import LayerTable, encoder_table, residuals
from patchgd_jax.planner.methods import (
    EXAMPLES,
    PATCHGD,
    WITH_Z,
    Method,
    downscaled_size,
    encoder_inputs,
    encoder_shapes,
    plain_preprocess,
    require_supported,
    trained_as,
    z_bytes,
)
from patchgd_jax.planner.request import PlanRequest, leaf_bytes, tree_bytes, with_sampled

_TRACED = 31
"""Inputs of a trace: a prime, so that residuals that grow with them are known by their size."""


class Row(NamedTuple):
    """Memory of a method in bytes, for one training step."""

    method: Method
    parameters: int
    """With batch statistics."""
    gradients: int
    optimizer: int
    activations: int
    """Residuals of `jax.vjp`, of encoder and head."""
    input: int
    z: int
    workspace: int
    """The rest of the total; negative where gradients take the place of residuals."""
    total: int


class Traces:
    """Cached traces that several estimates share."""

    def __init__(self) -> None:
        self.table: Callable[..., LayerTable] = cache(encoder_table)
        self.encoder: Callable[..., Any] = cache(encoder_shapes)
        self.head = cache(_head)


class Estimator:
    """Estimates the methods of one request; `traces` of earlier requests are reused."""

    def __init__(self, request: PlanRequest, traces: Traces | None = None) -> None:
        self.request = request
        self._whole = request.size
        self._traces = traces or Traces()

    def resized(self, height: int, width: int) -> Estimator:
        """Estimates for another image size, with at most as many patches in an inner step.

        Residuals of whole images are scaled by pixels, which attention over tokens outgrows.
        """
        other = copy.copy(self)
        resized = dataclasses.replace(self.request, size=(height, width), slots=None)
        other.request = with_sampled(resized, self.request.sampled)
        return other

    def row(self, method: Method, side: int | None = None) -> Row:
        """Estimates a method.

        Args:
            method: one of METHODS.
            side: longer side in pixels for `downscale`. None: the patch's.

        Raises:
            ConfigError: if the encoder does not support the method, or settings conflict.
        """
        request = self.request
        require_supported(request, method)
        run = trained_as(request, method)
        config, patchgd = method_model(run.method, run.model), run.patchgd
        count, size = encoder_inputs(request, method)
        if method == "downscale":
            size = downscaled_size(request.size, side or patchgd.patch)
        grid = request.grid if method in WITH_Z else WholeImage(*size)
        channels = request.image[2]
        head, head_kept = self._traces.head(config, grid.rows, grid.cols, request.classes)
        # The kernels of a convolution are the same for every size; a table of positions is not.
        single = encoder_entry(config.encoder).side_multiple == 1
        plain = dataclasses.replace(config, remat="none", head="linear", dropout=None)
        encoder = self._traces.encoder(plain, patchgd.patch if single else min(size), channels)
        if method == "ips":
            # Raises for a head without attention.
            make_model(run, grid, plain_preprocess(request, size))

        variables = {"encoder": encoder, "head": head}
        params = {part: tree.get("params", {}) for part, tree in variables.items()}
        frozen = frozenset(params["encoder"]) if method == "mil" else run_frozen(run)
        trained, _ = partition_frozen(params, frozen)
        gradients = tree_bytes(trained)
        parameters = tree_bytes(variables)
        optimizer = tree_bytes(jax.eval_shape(make_run_optimizer(run, EXAMPLES).init, trained))
        images, z = request.batch * math.prod(request.image), z_bytes(request, method)
        given = images if method in (*WITH_Z, "patchwise") else count * math.prod(size) * channels

        kept, working = self.encoder_bytes(config, size, count)
        if method == "mil":
            kept = 0
        if method in WITH_Z:
            kept += request.batch * head_kept + z
        # Gradients come as residuals go: about half of them stand beside the most residuals.
        peak = max(kept + working + gradients // 2, gradients)
        if method in PATCHGD and (method != "full" or patchgd.remat):
            # The sum over groups of patches, beside the gradients of one.
            peak += gradients
        elif method == "patchwise":
            # As compiled, the sum takes the place of residuals.
            peak = max(peak, 2 * gradients)
        total = parameters + optimizer + given + z + peak
        rest = peak - gradients - kept
        return Row(method, parameters, gradients, optimizer, kept, given, z, rest, total)

    def largest_side(self, budget: float | None) -> int:
        """Finds the longest side in pixels that `downscale` can have within `budget` bytes.

        Without a budget it is the patch's side. The side is a multiple of the encoder's
        `side_multiple`, from the patch's side to the image's own.
        """
        patch, longest = self.request.patchgd.patch, max(self.request.size)
        if budget is None:
            return patch
        unit = max(1, encoder_entry(self.request.model.encoder).side_multiple)
        low, high = patch // unit, longest // unit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.row("downscale", middle * unit).total <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * unit

    def encoder_bytes(
        self, config: ModelConfig, size: tuple[int, int], count: int
    ) -> tuple[int, int]:
        """Estimates the residuals of `count` inputs, and the working set of their backward pass."""
        patch, channels = (self.request.patchgd.patch,) * 2, self.request.image[2]
        traced = size if size == patch else self._whole
        config = dataclasses.replace(config, head="linear", dropout=None)
        inputs = count * math.prod(size) / math.prod(traced)
        table = self._traces.table(config, channels, traced, _TRACED)
        grows = sum(leaf_bytes(x) for x in table.residuals if x.size % _TRACED == 0)
        fixed = table.total("kept_bytes") - grows

        again = 0.0
        if config.remat != "none":
            # By the blocks for a patch, in proportion to the pixels.
            plain = dataclasses.replace(config, remat="none")
            blocks = self._traces.table(plain, channels, patch, _TRACED).kept_by_block()
            kept = self._traces.table(config, channels, patch, _TRACED).kept_by_block()
            each = [size - kept[block] for block, size in blocks.items()]
            again = sum(each) if config.remat == "everything" else max(each)
            again *= math.prod(traced) / math.prod(patch)
        floats = math.prod(traced) * channels * jnp.dtype(config.dtype).itemsize
        unfolded = max(layer.unfolded_bytes for layer in table.layers)
        working = (2 * floats + max(unfolded, again) / _TRACED) * inputs
        return fixed + round(grows / _TRACED * inputs), round(working)


def _head(config: ModelConfig, rows: int, cols: int, classes: int) -> tuple[Any, int]:
    """Returns shapes of a head's variables, and bytes of its residuals for one image."""
    dropout = {} if config.dropout is None else {"dropout": config.dropout}
    head = head_entry(config.head).build(classes=classes, **dropout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    z = jax.ShapeDtypeStruct((_TRACED, rows, cols, config.latent_dim), config.dtype)
    variables = dict(jax.eval_shape(partial(head.init, train=False), key, z, None))
    stats = {name: tree for name, tree in variables.items() if name != "params"}

    def read(given: Any, stats: Any, key: jax.Array) -> Any:
        params, z = given
        options = {"train": True, "rngs": {"dropout": key}, "mutable": list(stats)}
        return head.apply({"params": params, **stats}, z, None, **options)[0]

    kept = jax.eval_shape(partial(residuals, read), (variables.get("params", {}), z), stats, key)
    return variables, tree_bytes([x for x in kept if x.size % _TRACED == 0]) // _TRACED
