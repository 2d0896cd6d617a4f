"""Steps on whole images that the device holds."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from patchgd_jax.core.model import Params
from patchgd_jax.core.step import TrainState
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.engine.base import Execution, HostBatch, Setup
from patchgd_jax.engine.compiling import compiler_options, release_memory
from patchgd_jax.planner.compiled import allotted


class Program(NamedTuple):
    """A compiled step for one padded size, and the arrays of a batch that it takes."""

    run: Any
    arrays: tuple[str, ...]

    def of(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """What it takes of a batch."""
        return {name: batch[name] for name in self.arrays}


class ResidentExecution(Execution):
    """Whole images on one device."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._train: dict[int, Program] = {}
        self._score: dict[int, Program] = {}

    def compile(self, state: TrainState) -> str:
        """Compiles training and evaluation for each padded size; see `Execution`."""
        begun = time.monotonic()
        for number in range(len(self.setup.grids)):
            self._train[number] = self._compile_train(state, number)
            self._score[number] = self._compile_score(state.params, state.model_state, number)
        release_memory()
        return f"Compiled {2 * len(self._train)} programs in {time.monotonic() - begun:.1f} s."

    def compiled_bytes(self) -> int | None:
        """See `Execution`."""
        totals = [allotted(program.run).total for program in self._train.values()]
        return max(totals, default=None)

    def _compile_train(self, state: TrainState, number: int) -> Program:
        setup = self.setup
        size, weighted = setup.config.images_per_step, setup.data.weighted
        return self._compile_step(state, number, setup.batch_spec(number, size, weight=weighted))

    def _compile_step(self, state: TrainState, number: int, batch: dict[str, Any]) -> Program:
        """The training step of one padded size on the arrays of `batch`."""
        setup, config = self.setup, self.setup.config
        step = self._train_step(
            model=setup.models[number],
            optimizer=setup.optimizer,
            grid=setup.grids[number],
            patchgd=config.patchgd,
            task=setup.task,
            augment=config.augment,
            frozen=setup.frozen,
        )
        lowered = step.lower(state, self._laid_out(batch, number), setup.key)
        return Program(lowered.compile(), tuple(batch))

    def _compile_score(self, params: Params, model_state: Params, number: int) -> Program:
        setup, config = self.setup, self.setup.config
        step = self._score_step(
            model=setup.models[number],
            grid=setup.grids[number],
            fill_chunk=config.patchgd.fill_chunk,
            task=setup.task,
        )
        batch = setup.batch_spec(number, config.eval_batch_size, weight=True)
        lowered = step.lower(params, model_state, self._laid_out(batch, number))
        return Program(lowered.compile(), tuple(batch))

    def _train_step(self, **arguments: Any) -> jax.stages.Wrapped:
        step = partial(self.setup.method.train_step, **arguments)
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())

    def _score_step(self, **arguments: Any) -> jax.stages.Wrapped:
        return jax.jit(partial(self.setup.method.eval_step, **arguments))

    def _laid_out(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """The shapes of a batch of one padded size as they are on the devices."""
        return batch

    def _put(self, arrays: HostBatch, number: int, size: int) -> dict[str, jax.Array]:
        """Sends the arrays of a batch of `size` examples to the devices."""
        on_device: dict[str, jax.Array] = jax.device_put(dict(arrays))
        return on_device

    def _number(self, batch: HostBatch) -> int:
        return self.setup.data.shapes.index(batch["image"].shape[1:3])

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """See `Execution`."""
        number = self._number(batch)
        program = self._train[number]
        arrays = self._put(program.of(batch), number, self.setup.config.images_per_step)
        new_state, metrics = program.run(state, arrays, self.setup.key)
        return new_state, metrics

    def score(
        self, source: ExampleSource, params: Params, model_state: Params, batch: HostBatch
    ) -> dict[str, Any]:
        """See `Execution`."""
        number = self._number(batch)
        if number not in self._score:
            self._score[number] = self._compile_score(params, model_state, number)
        program = self._score[number]
        arrays = self._put(program.of(batch), number, self.setup.config.eval_batch_size)
        out = program.run(params, model_state, arrays)
        return {"label": batch["label"], "weight": batch["weight"], **out}
