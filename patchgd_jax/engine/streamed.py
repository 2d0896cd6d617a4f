"""Executor of steps on images that are read from their files patch by patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np

from patchgd_jax.core.problem import Weights
from patchgd_jax.core.update import Metrics, TrainState
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.protocols import ExampleSource, RegionExamples, Unread, as_regions
from patchgd_jax.engine.base import Executor, HostBatch, Setup, check_budget
from patchgd_jax.engine.streaming.latent_store import LatentStore
from patchgd_jax.engine.streaming.step import StreamedStep


class StreamedExecutor(Executor):
    """Executes steps with only a few chunks of patches in memory."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        stream = setup.config.stream
        assert setup.data.regions_level is not None
        # Each padded size has a store of its own.
        budget = stream.store_mib * 2**20 // len(setup.problems)
        if stream.max_age:
            check_budget(setup, budget)
        self._steps = [
            StreamedStep(
                problem,
                setup.optimizer,
                stream,
                level=setup.data.regions_level,
                store=LatentStore(budget, stream.store_dir) if stream.max_age else None,
            )
            for problem in setup.problems
        ]

    def _examples(self, source: ExampleSource) -> ExampleSource:
        return Unread(as_regions(source))

    def compile(self, state: TrainState) -> str:
        # A step's programs are small.
        return "Images are streamed; programs are compiled at first use."

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        source = as_regions(self.setup.data.train)
        step = self._step_of(source, batch)
        waited = step.read_wait
        with _opened(source, batch) as (images, names):
            new_state, metrics = step.train(
                state, images, _labels(batch, "label", "patches", "weight"), self.setup.key, names
            )
        self.read_wait += step.read_wait - waited
        return new_state, metrics

    def evaluate(self, source: ExampleSource, weights: Weights, batch: HostBatch) -> Metrics:
        regions = as_regions(source)
        # Padding rows repeat an image, which may be large, and are not read.
        real = np.flatnonzero(batch["weight"] > 0)
        micro = self.setup.config.stream.micro_batch or 1
        rows = np.resize(real, -(-len(real) // micro) * micro)
        part = {name: values[rows] for name, values in batch.items()}
        with _opened(regions, part) as (images, names):
            scored = self._step_of(regions, part).evaluate(
                weights, images, _labels(part, "label", "patches"), names
            )
        out: dict[str, Any] = {name: values[: len(real)] for name, values in scored.items()}
        return {**out, "label": batch["label"][real], "weight": batch["weight"][real]}

    def _step_of(self, source: RegionExamples, batch: HostBatch) -> StreamedStep:
        return self._steps[source.padded_size(int(batch["id"].max()))]


def _labels(batch: HostBatch, *names: str) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in names if name in batch}


@contextmanager
def _opened(
    source: RegionExamples, batch: HostBatch
) -> Iterator[tuple[list[RegionSource], list[str]]]:
    """Opens the images of a batch, and names them."""
    numbers = batch["id"].tolist()
    with ExitStack() as stack:
        images = [stack.enter_context(closing(source.open(number))) for number in numbers]
        yield images, [source.describe(number) for number in numbers]
