"""Steps on whole images that several devices share, in one process or in many."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from patchgd_jax.compiling import compiler_options
from patchgd_jax.data.source import ExampleSource
from patchgd_jax.execution.base import HostBatch, Setup
from patchgd_jax.execution.resident import ResidentExecution
from patchgd_jax.patch_model import Parts
from patchgd_jax.sharding import (
    PATCH,
    Bands,
    Rules,
    batch_shardings,
    check_rules,
    own_images,
    param_shardings,
    replicated,
    shard_batch,
    sharded_eval_step,
    sharded_train_step,
)
from patchgd_jax.step import TrainState


class MeshExecution(ResidentExecution):
    """Images and their patches laid over a mesh of devices.

    Args:
        setup: of the run.
        mesh: from `make_mesh`, which the batch, the evaluation batch and the strata fit.
        rules: how parameters are divided.

    Raises:
        ConfigError: if the mesh does not fit a grid, or for a rule that fits no parameter.
    """

    def __init__(self, setup: Setup, mesh: Mesh, rules: Rules) -> None:
        super().__init__(setup)
        self._mesh, self._rules = mesh, rules
        self._bands = [Bands(grid, mesh.shape[PATCH]) for grid in setup.grids]
        params, _ = jax.eval_shape(setup.models[0].init, setup.key)
        check_rules(params, rules)
        # Virtual devices share the cores' threads: steps in flight would starve each other.
        self._one_by_one = mesh.devices.flat[0].platform == "cpu"

    def layout(self, like: TrainState) -> TrainState:
        """See `Execution`."""
        laid_out: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            param_shardings(like, self._rules, self._mesh),
        )
        return laid_out

    def place(self, state: TrainState) -> TrainState:
        """See `Execution`."""
        shardings = param_shardings(state, self._rules, self._mesh)
        placed: TrainState = jax.device_put(jax.tree.map(np.asarray, state), shardings)
        return placed

    def own_rows(self, size: int) -> range:
        """See `Execution`."""
        return own_images(self._mesh, size)

    def _train_step(self, **arguments: Any) -> jax.stages.Wrapped:
        step = partial(sharded_train_step, mesh=self._mesh, rules=self._rules, **arguments)
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())

    def _score_step(self, **arguments: Any) -> jax.stages.Wrapped:
        arguments |= {"mesh": self._mesh, "rules": self._rules}

        def score(params: Parts, model_state: Parts, batch: dict[str, Any]) -> dict[str, Any]:
            # Of the whole batch, also what this process did not read.
            known = {"label": batch["label"], "weight": batch["weight"]}
            return {**sharded_eval_step(params, model_state, batch, **arguments), **known}

        return jax.jit(score, out_shardings=replicated(self._mesh))

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

    def _put(self, arrays: HostBatch, number: int, size: int) -> dict[str, jax.Array]:
        first = self.own_rows(size).start
        return shard_batch(arrays, self.setup.grids[number], self._mesh, first=first, total=size)

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """See `Execution`."""
        return self._ended(super().train(state, batch))

    def score(
        self, source: ExampleSource, params: Parts, model_state: Parts, batch: HostBatch
    ) -> dict[str, Any]:
        """See `Execution`."""
        return self._ended(super().score(source, params, model_state, batch))

    def _ended(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self._one_by_one else result
