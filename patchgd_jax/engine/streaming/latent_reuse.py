"""Reuse of cached latents from earlier visits of an image, up to a maximum age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from patchgd_jax.engine.streaming.latent_store import NEVER, LatentStore


class Visit(NamedTuple):
    """Reused entries of a batch's Z, before the fill."""

    z: np.ndarray
    """`[B, N, D]`: the reused entries, zero elsewhere."""
    missing: np.ndarray
    """`bool [B, N]`, the patches that the fill must encode."""
    when: np.ndarray
    """`int64 [B, N]`, the outer step in which each entry is computed once the fill is done."""
    ages: np.ndarray
    """`int64`, outer steps since then, of all valid patches."""


class LatentReuse:
    """Reuses entries of Z that are at most `max_age` outer steps old.

    The age of an entry counts from its last computation, in a fill or in an inner step. Where inner
    steps draw only some of the patches, the entries reach `max_age` at different times, and the
    re-fill of an image is spread over its visits.
    """

    def __init__(self, store: LatentStore, max_age: int) -> None:
        self.store, self.max_age = store, max_age
        self._pending: list[tuple[Sequence[str], Array, np.ndarray]] = []

    def begin(
        self, step: int, names: Sequence[str], valid: np.ndarray, width: int, dtype: np.dtype
    ) -> Visit:
        """Looks up the images of an outer step; `valid` `bool [B, N]` marks the valid patches."""
        for images, latents, computed in self._pending:
            for name, row, steps in zip(images, np.asarray(latents), computed, strict=True):
                self.store.put(name, row, steps)
        self._pending.clear()
        z = np.zeros((*valid.shape, width), dtype)
        when = np.full(valid.shape, NEVER, np.int64)
        for row, name in enumerate(names):
            stored = self.store.get(name)
            if stored is not None:
                age = step - stored.when
                # Entries of this or a later step are from an earlier run of the same steps.
                usable = valid[row] & (age > 0) & (age <= self.max_age)
                z[row, usable] = stored.z[usable]
                when[row, usable] = stored.when[usable]
        missing = valid & (when == NEVER)
        when[missing] = step
        return Visit(z, missing, when, step - when[valid])

    def finish(self, names: Sequence[str], z: Array, when: np.ndarray) -> None:
        """Stores the images' Z `[b, N, D]`, and the steps `when int64 [b, N]` of its entries.

        Z is fetched when the next step begins: fetching it now would wait for this one.
        """
        self._pending.append((names, z, when))
