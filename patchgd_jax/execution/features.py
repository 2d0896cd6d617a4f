"""Steps on features that are computed once: the encoder stays as it is (method mil)."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from patchgd_jax.execution.base import HostBatch, Setup, check_budget
from patchgd_jax.execution.resident import Program, ResidentExecution
from patchgd_jax.latent_store import LatentStore
from patchgd_jax.memory.compiled import allotted
from patchgd_jax.methods import FEATURES
from patchgd_jax.step import TrainState, eval_fill


class FeatureExecution(ResidentExecution):
    """Encodes a training image at its first visit, and keeps its Z on the host; it is still read.

    Z of the images visited last is kept, within `stream.store_mib` of memory or on the disk of
    `stream.store_dir`; the others are encoded again. Validation images are always encoded.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        stream = setup.config.stream
        self._encode: dict[int, Program] = {}
        # A store is for latents of one shape.
        budget = stream.store_mib * 2**20 // len(setup.grids)
        check_budget(setup, budget)
        self._stores = [LatentStore(budget, stream.store_dir) for _ in setup.grids]

    def compiled_bytes(self) -> int | None:
        """See `Execution`; encoding is a program of its own."""
        encode = [allotted(program.run).total for program in self._encode.values()]
        step = super().compiled_bytes()
        return None if step is None else max(step, *encode)

    def _compile_train(self, state: TrainState, number: int) -> Program:
        """Compiles the encoding as well, and a step on what it gives."""
        setup, config = self.setup, self.setup.config
        size = config.images_per_step
        encode = jax.jit(
            partial(
                eval_fill,
                model=setup.models[number],
                grid=setup.grids[number],
                fill_chunk=config.patchgd.fill_chunk,
            )
        )
        batch = setup.batch_spec(number, size, weight=setup.data.weighted)
        lowered = encode.lower(state.params, state.model_state, batch)
        self._encode[number] = Program(lowered.compile(), tuple(batch))
        z = jax.eval_shape(encode, state.params, state.model_state, batch)
        del batch["image"]
        return self._compile_step(state, number, {**batch, FEATURES: z})

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """See `Execution`."""
        number = self._number(batch)
        store, names = self._stores[number], [str(index) for index in batch["id"].tolist()]
        kept = [store.get(name) for name in names]
        if any(latents is None for latents in kept):
            program = self._encode[number]
            arrays = jax.device_put(program.of(batch))
            z = np.asarray(jax.device_get(program.run(state.params, state.model_state, arrays)))
            when = np.zeros(z.shape[1], np.int64)
            for place, name in enumerate(names):
                if kept[place] is None:
                    store.put(name, z[place], when)
        else:
            z = np.stack([latents.z for latents in kept if latents is not None])
        return super().train(state, {**batch, FEATURES: z})
