"""Which examples a training batch has: a pure function of (buckets, seed, number of the batch)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

_SCHEDULE, _PASS = 0x5C4ED, 0x9A55
"""Set the random numbers of the schedule and of a pass apart from others with the same seed."""

_FEW = 1024
"""Below so many examples Grain's shuffle is slow, 2 ms for each of 16: it draws below 2^16 until
one of them comes."""


class TrainOrder:
    """The examples of batch k, for every k from 0 on.

    Each bucket is an endless stream, shuffled anew on every pass; batches take turns between the
    buckets as their sizes are, and a batch may straddle two passes.

    Args:
        buckets: indices of examples with equal shapes, `int64 [n]` each, none empty.
        seed: of the order.
        batch_size: B.
    """

    def __init__(self, buckets: Sequence[np.ndarray], *, seed: int, batch_size: int) -> None:
        self._buckets = tuple(buckets)
        self._seed = seed
        self._batch_size = batch_size

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_streams", None)
        return state

    @cached_property
    def _streams(self) -> list[Any]:
        import grain

        return [
            _Passes(indices, self._seed + number)
            if len(indices) < _FEW
            else grain.MapDataset.source(indices).seed(self._seed + number).shuffle().repeat(None)
            for number, indices in enumerate(self._buckets)
        ]

    def __call__(self, k: int, rows: slice = slice(None)) -> tuple[int, list[int]]:
        """The bucket that batch k is from, and the indices of the batch's `rows`."""
        bucket, turn = self._turn(k)
        stream, first = self._streams[bucket], turn * self._batch_size
        return bucket, [int(stream[first + row]) for row in range(self._batch_size)[rows]]

    def _turn(self, k: int) -> tuple[int, int]:
        """The bucket of batch k, and how many earlier batches are from it."""
        if len(self._buckets) == 1:
            return 0, k
        sizes = tuple(map(len, self._buckets))
        cycle, place = divmod(k, sum(sizes))
        bucket, turn = _schedule(sizes, self._seed, cycle)
        chosen = int(bucket[place])
        return chosen, cycle * sizes[chosen] + int(turn[place])


class _Passes:
    """An endless stream of a few indices, shuffled anew on every pass."""

    def __init__(self, indices: np.ndarray, seed: int) -> None:
        self._indices = indices
        # Neighbouring batches are from the same pass, or from two.
        self._pass = lru_cache(maxsize=2)(partial(_shuffled, len(indices), seed))

    def __getitem__(self, place: int) -> int:
        number, within = divmod(place, len(self._indices))
        return int(self._indices[self._pass(number)[within]])


def _shuffled(count: int, seed: int, number: int) -> np.ndarray:
    moment = np.random.default_rng([_PASS, seed, number]).random(count)
    return np.argsort(moment, kind="stable")


@lru_cache(maxsize=2)
def _schedule(sizes: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """An order of as many batches as there are examples, with as many per bucket as it has.

    A bucket's i-th batch has a random moment in the i-th of its equal parts of the cycle. So the
    batches of any stretch are shared out as the sizes are, but for one or two, and no bucket has a
    long run.

    Returns:
        The bucket of each batch, and its number among the bucket's batches of this cycle;
        `int64 [sum(sizes)]` both.
    """
    rng = np.random.default_rng([_SCHEDULE, seed, cycle])
    moment = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in sizes])
    order = np.argsort(moment, kind="stable")
    bucket = np.repeat(np.arange(len(sizes)), sizes)
    turn = np.concatenate([np.arange(n) for n in sizes])
    return bucket[order], turn[order]
