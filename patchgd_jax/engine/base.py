"""What a run is made of, and what carries out its steps."""

from __future__ import annotations

import abc
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from patchgd_jax.baselines.registry import Method
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.step import TrainState
from patchgd_jax.core.tasks import Task
from patchgd_jax.data.loading.bad_records import OnBad
from patchgd_jax.data.loading.pipeline import TrainBatches, eval_batches
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.run_data import RunData
from patchgd_jax.errors import ConfigError

HostBatch = Mapping[str, np.ndarray]


class Setup(NamedTuple):
    """What a run is made of."""

    config: TrainConfig
    data: RunData
    method: Method
    """Its steps; a mesh and streaming have those of PatchGD."""
    grids: tuple[Grid, ...]
    """By padded size, as `data.shapes`."""
    models: tuple[PatchModel, ...]
    """The model for each grid."""
    optimizer: optax.GradientTransformation
    task: Task
    frozen: frozenset[str]
    """The encoder's entries that are not trained."""
    key: jax.Array
    """The run's."""

    @property
    def patch_grids(self) -> tuple[PatchGrid, ...]:
        """The grids of a method that cuts images into patches."""
        grids = tuple(grid for grid in self.grids if isinstance(grid, PatchGrid))
        assert len(grids) == len(self.grids)
        return grids

    def batch_spec(self, number: int, size: int, *, weight: bool) -> dict[str, Any]:
        """Shapes and dtypes of the arrays that a step takes of a batch.

        Args:
            number: of the padded size.
            size: B.
            weight: whether examples have weights.
        """
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


class Execution(abc.ABC):
    """Carries out the steps of a run.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.read_wait = 0.0
        """Seconds so far that steps themselves have waited for pixels."""

    def layout(self, like: TrainState) -> TrainState:
        """The state's `jax.ShapeDtypeStruct`s with the shardings that it has on the devices."""
        return like

    def place(self, state: TrainState) -> TrainState:
        """Lays a state over the devices, of which every process has all."""
        return state

    def own_rows(self, size: int) -> range:
        """The places in a batch of `size` of the examples that this process reads."""
        return range(size)

    def train_batches(self, start: int, on_bad: OnBad) -> TrainBatches:
        """This process's rows of the batches from number `start` on, as `train` takes them."""
        config = self.setup.config
        size = config.images_per_step
        own = self.own_rows(size)
        return TrainBatches(
            self._examples(self.setup.data.train),
            batch_size=size,
            seed=config.seed,
            start=start,
            threads=config.reader_threads,
            buffer_bytes=config.reader_mib * 2**20,
            rows=slice(own.start, own.stop),
            bad_images=config.data.bad_images,
            bad_limit=config.data.bad_limit,
            on_bad=on_bad,
        )

    def eval_batches(
        self, source: ExampleSource, on_bad: OnBad
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """This process's rows of all examples of a source, in batches as `score` takes them."""
        config = self.setup.config
        own = self.own_rows(config.eval_batch_size)
        return eval_batches(
            self._examples(source),
            config.eval_batch_size,
            rows=slice(own.start, own.stop),
            threads=config.reader_threads,
            buffer_bytes=config.reader_mib * 2**20,
            bad_images=config.data.bad_images,
            bad_limit=config.data.bad_limit,
            on_bad=on_bad,
        )

    def _examples(self, source: ExampleSource) -> ExampleSource:
        """What batches are made of."""
        return source

    @abc.abstractmethod
    def compile(self, state: TrainState) -> str:
        """Compiles what it can before a batch needs it.

        Args:
            state: of arrays or `jax.ShapeDtypeStruct`.

        Returns:
            What was done, a line for the user.
        """

    def compiled_bytes(self) -> int | None:
        """What the largest program takes of a device by XLA; None if none is compiled yet."""
        return None

    @abc.abstractmethod
    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """An outer step; see `step.train_step`. It may consume `state`.

        Returns before the device has finished.
        """

    @abc.abstractmethod
    def score(
        self, source: ExampleSource, params: Params, model_state: Params, batch: HostBatch
    ) -> dict[str, Any]:
        """Scores a batch of a source.

        Returns:
            What `step.eval_step` does, and `label` and `weight`; of the whole batch, also where
            this process read some of it. Rows that are padding may be left out.
        """


def check_budget(setup: Setup, budget: int) -> None:
    """Checks that a store of so many bytes holds the latents of any image.

    Raises:
        ConfigError: if not.
    """
    entry = 8 + 4 * setup.config.model.latent_dim
    largest = max(grid.num_patches for grid in setup.grids) * entry
    if largest > budget:
        raise ConfigError(
            f"stream.store_mib {setup.config.stream.store_mib} holds no image's latents, which "
            f"take {largest / 2**20:.1f} MiB each (times {len(setup.grids)} padded sizes); raise it"
        )
