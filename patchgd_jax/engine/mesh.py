"""Executor of steps on a mesh of devices, in one process or in several."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchgd_jax.core.problem import Problem, Weights
from patchgd_jax.core.update import Metrics, TrainState
from patchgd_jax.data.protocols import Band, BandExamples, ExampleSource, as_regions
from patchgd_jax.engine.base import HostBatch, Setup
from patchgd_jax.engine.compiling import compiler_options
from patchgd_jax.engine.resident import ResidentExecutor
from patchgd_jax.engine.sharding.layout import sharded_eval_step, sharded_train_step
from patchgd_jax.engine.sharding.mesh import (
    PATCH,
    Bands,
    batch_shardings,
    own_images,
    own_pixels,
    shard_batch,
)
from patchgd_jax.engine.sharding.params import Rules, check_rules, param_shardings


class MeshExecutor(ResidentExecutor):
    """Executes steps on images and patches that are laid over a mesh.

    The mesh is from `make_mesh`; the batch, the evaluation batch and the strata fit it. Raises
    `ConfigError` if it does not fit a grid, or for a rule that fits no parameter.
    """

    def __init__(self, setup: Setup, mesh: Mesh, rules: Rules) -> None:
        super().__init__(setup)
        self._mesh, self._rules = mesh, rules
        self._bands = [Bands(grid, mesh.shape[PATCH]) for grid in setup.patch_grids]
        params, _ = jax.eval_shape(setup.problems[0].model.init, setup.key)
        check_rules(params, rules)
        self._rows, self._shapes = self._own_parts()
        # Virtual devices share the cores' threads: steps in flight would starve each other.
        self._one_by_one = mesh.devices.flat[0].platform == "cpu"

    def _own_parts(self) -> tuple[list[slice] | None, list[tuple[int, int]]]:
        """Returns the pixel rows that this process reads for each padded size, and their shapes.

        The rows are None if images are read whole: if this process needs all rows, if the images
        cannot be read by regions, or if the parts' shapes would not identify the padded size.
        """
        grids = self.setup.patch_grids
        whole = [(grid.height, grid.width) for grid in grids]
        rows = [own_pixels(self._mesh, grid) for grid in grids]
        shapes = [(own.stop - own.start, grid.width) for own, grid in zip(rows, grids, strict=True)]
        parts = any(shape[0] < grid.height for shape, grid in zip(shapes, grids, strict=True))
        if not parts or self.setup.data.regions_level is None or len(set(shapes)) < len(shapes):
            return None, whole
        return rows, shapes

    def layout(self, like: TrainState) -> TrainState:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            param_shardings(like, self._rules, self._mesh),
        )

    def place(self, state: TrainState) -> TrainState:
        shardings = param_shardings(state, self._rules, self._mesh)
        return jax.device_put(jax.tree.map(np.asarray, state), shardings)

    def _examples(self, source: ExampleSource) -> ExampleSource:
        """Returns this process's bands of the images, where they can be read by regions."""
        level = self.setup.data.regions_level
        if self._rows is None or level is None:
            return source
        bands = [
            Band(rows.start, rows.stop - rows.start, grid.width)
            for rows, grid in zip(self._rows, self.setup.patch_grids, strict=True)
        ]
        return BandExamples(as_regions(source), bands, level)

    def _number(self, batch: HostBatch) -> int:
        return self._shapes.index(batch["image"].shape[1:3])

    def local_rows(self, size: int) -> range:
        return own_images(self._mesh, size)

    def _train_step(self, problem: Problem) -> jax.stages.Wrapped:
        step = partial(
            sharded_train_step, problem, self.setup.optimizer, mesh=self._mesh, rules=self._rules
        )
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())

    def _eval_step(self, problem: Problem) -> jax.stages.Wrapped:
        def evaluate(weights: Weights, batch: dict[str, Any]) -> Metrics:
            # Those of the whole batch, with the rows that other processes read.
            known = {"label": batch["label"], "weight": batch["weight"]}
            step = partial(sharded_eval_step, mesh=self._mesh, rules=self._rules)
            return {**step(problem, weights, batch), **known}

        return jax.jit(evaluate, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def _laid_out(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        shardings = batch_shardings(batch, self._mesh)
        bands = self._bands[number]
        shapes = {name: spec.shape for name, spec in batch.items()}
        size, _, width, channels = shapes["image"]
        shapes["image"] = (size, bands.count * bands.height, width, channels)
        return {
            name: jax.ShapeDtypeStruct(shapes[name], spec.dtype, sharding=shardings[name])
            for name, spec in batch.items()
        }

    def _put(self, arrays: HostBatch, number: int, size: int) -> dict[str, Array]:
        first = self.local_rows(size).start
        rows = None if self._rows is None else self._rows[number]
        grid = self.setup.patch_grids[number]
        return shard_batch(arrays, grid, self._mesh, first=first, total=size, rows=rows)

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        return self._finished(super().train(state, batch))

    def evaluate(self, source: ExampleSource, weights: Weights, batch: HostBatch) -> Metrics:
        return self._finished(super().evaluate(source, weights, batch))

    def _finished(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self._one_by_one else result
