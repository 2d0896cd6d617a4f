"""Executor of steps on stored latents of a frozen encoder (method mil)."""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any

import jax
import numpy as np

from patchgd_jax.baselines.registry import FEATURES
from patchgd_jax.core.forward import encode_all
from patchgd_jax.core.update import Metrics, TrainState
from patchgd_jax.data.protocols import ExampleSource, ReadOtherwise
from patchgd_jax.engine.base import HostBatch, Setup, check_budget
from patchgd_jax.engine.compiling import allotted
from patchgd_jax.engine.resident import Program, ResidentExecutor
from patchgd_jax.engine.streaming.latent_store import LatentStore

_KEPT = "kept"
"""Entry of a batch: `bool [B]`, examples with stored latents instead of pixels."""


class _Features:
    """A thread-safe store of Z of recently visited train images, for one padded size."""

    def __init__(self, store: LatentStore, latents: jax.ShapeDtypeStruct) -> None:
        self.latents = latents
        self._store = store
        self._lock = Lock()

    def get(self, index: int) -> np.ndarray | None:
        """Returns the Z `[N, D]` of an example, if it is stored."""
        with self._lock:
            stored = self._store.get(str(index))
        return None if stored is None else stored.z

    def put(self, index: int, z: np.ndarray) -> None:
        """Stores the Z of an example."""
        with self._lock:
            self._store.put(str(index), z, np.zeros(len(z), np.int64))


class _Visited(ReadOtherwise):
    """Train examples; the pixels of those with stored Z are not read."""

    def __init__(self, source: ExampleSource, features: dict[tuple[int, ...], _Features]) -> None:
        super().__init__(source)
        self._features = features
        self._rest: dict[int, tuple[tuple[int, ...], dict[str, Any]]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the source's example, with `FEATURES` and `_KEPT`."""
        if index in self._rest:
            shape, rest = self._rest[index]
            z = self._features[shape[:2]].get(int(rest["id"]))
            if z is not None:
                nothing = np.broadcast_to(np.uint8(0), shape)
                return {**rest, "image": nothing, FEATURES: z, _KEPT: True}
        example = self.source[index]
        shape = example["image"].shape
        self._rest[index] = shape, {k: v for k, v in example.items() if k != "image"}
        latents = self._features[shape[:2]].latents
        return {**example, FEATURES: np.zeros(latents.shape, latents.dtype), _KEPT: False}


class FeatureExecutor(ResidentExecutor):
    """Encodes a train image at its first visit, and stores its Z on the host.

    Z of the last visited images is stored, within `stream.store_mib` of memory or on the disk of
    `stream.store_dir`; the others are read and encoded again. Validation images are always encoded.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._encode: dict[int, Program] = {}
        self._features: dict[tuple[int, ...], _Features] = {}
        # Each padded size has a store of its own.
        self._budget = setup.config.stream.store_mib * 2**20 // len(setup.problems)
        check_budget(setup, self._budget)

    def compiled_bytes(self) -> int | None:
        # Encoding is a program of its own.
        encode = [allotted(program.run).total for program in self._encode.values()]
        step = super().compiled_bytes()
        return None if step is None else max(step, *encode)

    def _examples(self, source: ExampleSource) -> ExampleSource:
        return _Visited(source, self._features) if source is self.setup.data.train else source

    def _compile_train(self, state: TrainState, number: int) -> Program:
        """Compiles the encoding, and a step on its latents."""
        setup, config = self.setup, self.setup.config
        size = config.images_per_step
        encode = jax.jit(partial(encode_all, setup.problems[number]))
        batch = setup.batch_spec(number, size, weight=setup.data.weighted)
        lowered = encode.lower(state.weights, batch)
        self._encode[number] = Program(lowered.compile(), tuple(batch))
        z = jax.eval_shape(encode, state.weights, batch)
        latents = jax.ShapeDtypeStruct(z.shape[1:], z.dtype)
        store = LatentStore(self._budget, config.stream.store_dir)
        self._features[setup.data.shapes[number]] = _Features(store, latents)
        del batch["image"]
        return self._compile_step(state, number, {**batch, FEATURES: z})

    def train(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        number = self._number(batch)
        features, program = self._features[self.setup.data.shapes[number]], self._encode[number]
        indices = batch["id"].tolist()
        read = batch.get(_KEPT, np.zeros(len(indices), bool))
        # Latents may have been stored since the batch was read.
        kept = [
            batch[FEATURES][row] if read[row] else features.get(index)
            for row, index in enumerate(indices)
        ]
        if any(z is None for z in kept):
            arrays = jax.device_put(program.of(batch))
            encoded = jax.device_get(program.run(state.weights, arrays))
            for row, index in enumerate(indices):
                if kept[row] is None:
                    kept[row] = encoded[row]
                    features.put(index, encoded[row])
        z = np.stack([latents for latents in kept if latents is not None])
        return super().train(state, {**batch, FEATURES: z})
