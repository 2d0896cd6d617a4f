"""Steps on images that stay in their files: patches are read while the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import jax
import numpy as np

from patchgd_jax.core.model import Params
from patchgd_jax.core.step import TrainState
from patchgd_jax.data.images.regions import RegionSource
from patchgd_jax.data.protocols import ExampleSource, RegionExamples, Unread, as_regions
from patchgd_jax.engine.base import Execution, HostBatch, Setup, check_budget
from patchgd_jax.engine.streaming.latent_store import LatentStore
from patchgd_jax.engine.streaming.step import StreamedStep


class StreamedExecution(Execution):
    """Images of which no more than some chunks of patches are in memory.

    Raises:
        ConfigError: for settings that streaming cannot have.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config, stream = setup.config, setup.config.stream
        assert setup.data.regions_level is not None
        # Each padded size has latents of its own form, and its share of the memory.
        budget = stream.store_mib * 2**20 // len(setup.grids)
        if stream.max_age:
            check_budget(setup, budget)
        self._steps = [
            StreamedStep(
                model,
                setup.optimizer,
                grid,
                config.patchgd,
                setup.task,
                augment=config.augment,
                frozen=setup.frozen,
                level=setup.data.regions_level,
                buffers=stream.buffers,
                readers=stream.readers,
                micro_batch=stream.micro_batch,
                max_age=stream.max_age,
                store=LatentStore(budget, stream.store_dir) if stream.max_age else None,
            )
            for grid, model in zip(setup.patch_grids, setup.models, strict=True)
        ]

    def _examples(self, source: ExampleSource) -> ExampleSource:
        return Unread(as_regions(source))

    def compile(self, state: TrainState) -> str:
        """Compiles nothing: a step's programs are small, and compiled as it meets them."""
        return "Images are streamed; programs are compiled as they are needed."

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """See `Execution`."""
        source = as_regions(self.setup.data.train)
        step = self._step_of(source, batch)
        waited = step.read_wait
        with _opened(source, batch) as (images, names):
            new_state, metrics = step.train(
                state, images, _labels(batch, "label", "patches", "weight"), self.setup.key, names
            )
        self.read_wait += step.read_wait - waited
        return new_state, metrics

    def score(
        self, source: ExampleSource, params: Params, model_state: Params, batch: HostBatch
    ) -> dict[str, Any]:
        """See `Execution`."""
        regions = as_regions(source)
        # Rows that are padding are not read: an image may be a large one.
        real = np.flatnonzero(batch["weight"] > 0)
        micro = self.setup.config.stream.micro_batch or 1
        rows = np.resize(real, -(-len(real) // micro) * micro)
        part = {name: values[rows] for name, values in batch.items()}
        with _opened(regions, part) as (images, names):
            out = self._step_of(regions, part).evaluate(
                params, model_state, images, _labels(part, "label", "patches"), names
            )
        out = {name: values[: len(real)] for name, values in out.items()}
        return {**out, "label": batch["label"][real], "weight": batch["weight"][real]}

    def _step_of(self, source: RegionExamples, batch: HostBatch) -> StreamedStep:
        return self._steps[source.padded_size(int(batch["id"].max()))]


def _labels(batch: HostBatch, *names: str) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in names if name in batch}


@contextmanager
def _opened(
    source: RegionExamples, batch: HostBatch
) -> Iterator[tuple[list[RegionSource], list[str]]]:
    """The images of a batch, and what they are called."""
    numbers = batch["id"].tolist()
    with ExitStack() as stack:
        images = [stack.enter_context(closing(source.open(number))) for number in numbers]
        yield images, [source.describe(number) for number in numbers]
