"""Order of training examples: a pure function of (buckets, seed, batch number)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_SCHEDULE, _PASS = 0x5C4ED, 0x9A55
"""Separate the random numbers of the schedule and of a pass from others with the same seed."""
_FEW = 1024
"""With at least this many examples a block cipher shuffles a pass, as in recorded runs."""


class TrainOrder:
    """The examples of batch k, for every k from 0 on.

    Each bucket is an endless stream, shuffled anew on every pass; batches take turns between the
    buckets in proportion to their sizes, and a batch may straddle two passes.

    Args:
        buckets: indices of examples with equal shapes, `int64 [n]` each, none empty.
        seed: of the order.
        batch_size: B.
    """

    def __init__(self, buckets: Sequence[np.ndarray], *, seed: int, batch_size: int) -> None:
        self._buckets = tuple(buckets)
        self._seed = seed
        self._batch_size = batch_size
        # Neighbouring batches are from the same pass of a bucket, or from two.
        self._pass = lru_cache(maxsize=2 * len(self._buckets))(self._shuffled)

    def __call__(self, k: int, rows: slice = slice(None)) -> tuple[int, list[int]]:
        """Returns the bucket of batch k, and the source indices of the batch's `rows`."""
        bucket, turn = self._turn(k)
        indices, first = self._buckets[bucket], turn * self._batch_size
        places = (divmod(first + row, len(indices)) for row in range(self._batch_size)[rows])
        return bucket, [int(self._pass(bucket, number)[place]) for number, place in places]

    def _shuffled(self, bucket: int, number: int) -> np.ndarray:
        """A bucket's indices in the order of its pass `number`."""
        indices, seed = self._buckets[bucket], self._seed + bucket
        if len(indices) >= _FEW:
            (first,) = np.random.SeedSequence([seed, 1]).generate_state(1)
            return indices[cipher_permutation(len(indices), (int(first) + number) % 2**32)]
        moment = np.random.default_rng([_PASS, seed, number]).random(len(indices))
        return indices[np.argsort(moment, kind="stable")]

    def _turn(self, k: int) -> tuple[int, int]:
        """The bucket of batch k, and the number of its earlier batches."""
        if len(self._buckets) == 1:
            return 0, k
        sizes = tuple(map(len, self._buckets))
        cycle, place = divmod(k, sum(sizes))
        bucket, turn = _schedule(sizes, self._seed, cycle)
        chosen = int(bucket[place])
        return chosen, cycle * sizes[chosen] + int(turn[place])


def cipher_permutation(count: int, seed: int) -> np.ndarray:
    """Permutes `0..count - 1` by four rounds of the block cipher Simon (eprint 2013/404).

    Numbers outside the range are encrypted again until they are in it (cycle walking). Equal to
    Grain's `shuffle`, which recorded runs used.

    Returns:
        `int64 [count]`.
    """
    word = max(16, (count - 1).bit_length() + 1) // 2
    mask = 2**word - 1

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << by | x >> (word - by)) & mask

    keys = [key & mask for key in _seed_sequence(seed, 4)]
    out, outside = np.arange(count), np.arange(count)
    while len(outside):
        left, right = out[outside] >> word, out[outside] & mask
        for key in keys:
            mixed = rotated(right, 1) & rotated(right, 8) ^ rotated(right, 2)
            left, right = right, left ^ mixed ^ key
        out[outside] = left << word | right
        outside = outside[out[outside] >= count]
    return out


def _seed_sequence(seed: int, count: int) -> list[int]:
    """Expands a seed to 2..6 32-bit words as C++'s `std::seed_seq{seed}.generate` does.

    The constants are those of the C++ standard, [rand.util.seedseq].
    """
    out = [0x8B8B8B8B] * count
    half = (count - 1) // 2
    first, second = (count - half) // 2, (count - half) // 2 + half

    def scramble(x: int) -> int:
        x %= 2**32
        return x ^ x >> 27

    for k in range(2 * count):
        here, near, far = k % count, (k + first) % count, (k + second) % count
        before = out[(k - 1) % count]
        if k < count:
            one = 1664525 * scramble(out[here] ^ out[near] ^ before) % 2**32
            two = (one + here + (1 if k == 0 else seed if k == 1 else 0)) % 2**32
            out[near], out[far] = (out[near] + one) % 2**32, (out[far] + two) % 2**32
        else:
            one = 1566083941 * scramble(out[here] + out[near] + before) % 2**32
            two = (one - here) % 2**32
            out[near], out[far] = out[near] ^ one, out[far] ^ two
        out[here] = two
    return out


@lru_cache(maxsize=2)
def _schedule(sizes: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders the buckets in a cycle of `sum(sizes)` batches.

    A bucket of size n has n batches, each at a random moment of its own n-th of the cycle. So any
    run of batches is shared in proportion to the sizes, within one or two.

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
