"""Executor of steps on whole images on one device."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from patchgd_jax.core.problem import Problem, Weights
from patchgd_jax.core.update import Metrics, TrainState
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.engine.base import Executor, HostBatch, Setup
from patchgd_jax.engine.compiling import allotted, compiler_options, release_memory


class Program(NamedTuple):
    """A compiled step for one padded size, and the names of its batch's arrays."""

    run: Any
    arrays: tuple[str, ...]

    def of(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Picks the arrays out of a batch."""
        return {name: batch[name] for name in self.arrays}


class ResidentExecutor(Executor):
    """Executes steps on whole images on one device."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._train: dict[int, Program] = {}
        self._eval: dict[int, Program] = {}

    def compile(self, state: TrainState) -> str:
        begun = time.monotonic()
        for number in range(len(self.setup.problems)):
            self._train[number] = self._compile_train(state, number)
            self._eval[number] = self._compile_eval(state.weights, number)
        release_memory()
        return f"Compiled {2 * len(self._train)} programs in {time.monotonic() - begun:.1f} s."

    def compiled_bytes(self) -> int | None:
        return max((allotted(program.run).total for program in self._train.values()), default=None)

    def _compile_train(self, state: TrainState, number: int) -> Program:
        size, weighted = self.setup.config.images_per_step, self.setup.data.weighted
        batch = self.setup.batch_spec(number, size, weight=weighted)
        return self._compile_step(state, number, batch)

    def _compile_step(self, state: TrainState, number: int, batch: dict[str, Any]) -> Program:
        """Compiles the train step of one padded size on the arrays of `batch`."""
        step = self._train_step(self.setup.problems[number])
        lowered = step.lower(state, self._laid_out(batch, number), self.setup.key)
        return Program(lowered.compile(), tuple(batch))

    def _compile_eval(self, weights: Weights, number: int) -> Program:
        size = self.setup.config.eval_batch_size
        batch = self.setup.batch_spec(number, size, weight=True)
        step = self._eval_step(self.setup.problems[number])
        lowered = step.lower(weights, self._laid_out(batch, number))
        return Program(lowered.compile(), tuple(batch))

    def _train_step(self, problem: Problem) -> jax.stages.Wrapped:
        step = partial(self.setup.algorithm.train_step, problem, self.setup.optimizer)
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())

    def _eval_step(self, problem: Problem) -> jax.stages.Wrapped:
        return jax.jit(partial(self.setup.algorithm.eval_step, problem))

    def _laid_out(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Returns the shapes of a batch of one padded size, with their layout over the devices."""
        return batch

    def _put(self, arrays: HostBatch, number: int, size: int) -> dict[str, Array]:
        """Sends the arrays of a batch of `size` examples to the devices."""
        return jax.device_put(dict(arrays))

    def _number(self, batch: HostBatch) -> int:
        return self.setup.data.shapes.index(batch["image"].shape[1:3])

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        number = self._number(batch)
        program = self._train[number]
        arrays = self._put(program.of(batch), number, self.setup.config.images_per_step)
        return program.run(state, arrays, self.setup.key)

    def evaluate(self, source: ExampleSource, weights: Weights, batch: HostBatch) -> Metrics:
        number = self._number(batch)
        if number not in self._eval:
            self._eval[number] = self._compile_eval(weights, number)
        program = self._eval[number]
        arrays = self._put(program.of(batch), number, self.setup.config.eval_batch_size)
        out = program.run(weights, arrays)
        return {"label": batch["label"], "weight": batch["weight"], **out}
