"""`Setup` (model, data, optimizer of a run) and the `Executor` interface."""

from __future__ import annotations

import abc
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from patchgd_jax.baselines.registry import Algorithm
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.problem import Problem, Weights
from patchgd_jax.core.tasks import Task
from patchgd_jax.core.update import Metrics, TrainState
from patchgd_jax.data.loading.bad_images import OnBad
from patchgd_jax.data.loading.pipeline import TrainBatches, eval_batches
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.run_data import RunData
from patchgd_jax.errors import ConfigError

HostBatch = Mapping[str, np.ndarray]


class Setup(NamedTuple):
    """The static objects of a run."""

    config: TrainConfig
    data: RunData
    algorithm: Algorithm
    """The method's steps; on a mesh and streamed it is always PatchGD's."""
    problems: tuple[Problem, ...]
    """The static part of a step for each padded size, as `data.shapes`."""
    optimizer: Optimizer
    key: Array
    """Key of the run."""

    @property
    def task(self) -> Task:
        """The task of the run."""
        return self.problems[0].task

    @property
    def patch_grids(self) -> tuple[PatchGrid, ...]:
        """The grids of a method that cuts images into patches."""
        grids = tuple(p.grid for p in self.problems if isinstance(p.grid, PatchGrid))
        assert len(grids) == len(self.problems)
        return grids

    def batch_spec(self, number: int, size: int, *, weight: bool) -> dict[str, Any]:
        """Returns shapes and dtypes of a step's batch of padded size `number`."""
        shape = (size, *self.data.shapes[number], self.config.data.num_channels)
        arrays = {
            "image": jax.ShapeDtypeStruct(shape, np.uint8),
            "label": self.task.label_spec(size, self.data.num_classes),
        }
        slots = self.data.slots[number]
        if slots is not None:
            arrays["patches"] = jax.ShapeDtypeStruct((size, slots), np.int32)
        if weight:
            arrays["weight"] = jax.ShapeDtypeStruct((size,), np.float32)
        return arrays


class Executor(abc.ABC):
    """Executes the steps of a run."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.read_wait = 0.0
        """Seconds so far that steps themselves waited for pixels."""

    def layout(self, like: TrainState) -> TrainState:
        """Returns the state's `jax.ShapeDtypeStruct`s with their shardings."""
        return like

    def place(self, state: TrainState) -> TrainState:
        """Lays a state, which every process holds whole, over the devices."""
        return state

    def local_rows(self, size: int) -> range:
        """Returns the places in a batch of `size` of the examples that this process reads."""
        return range(size)

    def train_batches(self, start: int, on_bad: OnBad) -> TrainBatches:
        """Iterates over this process's rows of the train batches from number `start` on."""
        config, source = self.setup.config, self._examples(self.setup.data.train)
        size = config.images_per_step
        options = self._reading(size, on_bad)
        return TrainBatches(source, batch_size=size, seed=config.seed, start=start, **options)

    def eval_batches(
        self, source: ExampleSource, on_bad: OnBad
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Iterates over this process's rows of the eval batches of a source."""
        size = self.setup.config.eval_batch_size
        return eval_batches(self._examples(source), size, **self._reading(size, on_bad))

    def _reading(self, size: int, on_bad: OnBad) -> dict[str, Any]:
        config, own = self.setup.config, self.local_rows(size)
        return {
            "rows": slice(own.start, own.stop),
            "threads": config.reader_threads,
            "buffer_bytes": config.reader_mib * 2**20,
            "bad_images": config.data.bad_images,
            "bad_limit": config.data.bad_limit,
            "on_bad": on_bad,
        }

    def _examples(self, source: ExampleSource) -> ExampleSource:
        """Wraps a source for reading batches from it."""
        return source

    @abc.abstractmethod
    def compile(self, state: TrainState) -> str:
        """Compiles programs ahead of the first step; returns a line for the user."""

    def compiled_bytes(self) -> int | None:
        """Returns the device memory of the largest program by XLA; None before any is compiled."""
        return None

    @abc.abstractmethod
    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        """Runs an outer step without waiting for it; `state` may be donated."""

    @abc.abstractmethod
    def evaluate(self, source: ExampleSource, weights: Weights, batch: HostBatch) -> Metrics:
        """Evaluates a batch of a source.

        Returns the results of `forward.eval_step` with `label` and `weight`, for the whole batch
        even if this process read only some of it. Padding rows may be left out.
        """


def check_budget(setup: Setup, budget: int) -> None:
    """Raises `ConfigError` unless a store of `budget` bytes holds the latents of any image."""
    entry = 8 + 4 * setup.config.model.latent_dim
    largest = max(problem.grid.num_patches for problem in setup.problems) * entry
    if largest > budget:
        raise ConfigError(
            f"stream.store_mib {setup.config.stream.store_mib} holds no image's latents, which "
            f"take {largest / 2**20:.1f} MiB each (times {len(setup.problems)} sizes); raise it"
        )
