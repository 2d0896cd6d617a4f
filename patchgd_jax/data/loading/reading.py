"""Reads examples into batches in threads; an unreadable one does not stop the others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.data.loading.bad_images import BadTally
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import DataError, PatchGDError

Bad = list[tuple[int, str]]
"""Index and reason of examples that could not be read."""
_Spec = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]

_PROBES = 10


class Read(NamedTuple):
    """A batch as read."""

    arrays: dict[str, np.ndarray]
    """`[B, ...]` each; undefined in rows that are not `good`."""
    good: np.ndarray
    """`bool [B]`: rows that hold an example."""
    bad: Bad
    """Unreadable examples, in the order of the rows."""


class Reader:
    """Reads examples in threads, straight into their batch.

    Args:
        source: the examples.
        tally: counts the examples of wholly unreadable buckets.
        threads: number of threads.
        substitute: whether the next readable example of its bucket replaces an unreadable one;
            otherwise the row stays empty.

    Raises:
        DataError: if the source is empty.
        RecordError: if nothing can be read, or by the tally's policy.
    """

    def __init__(
        self, source: ExampleSource, tally: BadTally, *, threads: int, substitute: bool
    ) -> None:
        self._source = source
        self._threads = threads
        # With one more than this the tally stops the run anyway.
        self._passes = tally.tolerated if substitute else 0
        self.buckets: list[np.ndarray] = []
        """Indices by bucket, without wholly unreadable buckets."""
        self._specs: list[_Spec] = []
        for bucket in source.buckets:
            spec, bad = self._probe(bucket, max(_PROBES, tally.tolerated + 1))
            if spec is None:
                tally.take(bad)
            else:
                self.buckets.append(bucket)
                self._specs.append(spec)
        if not len(source):
            raise DataError("the data has no examples")
        if not self.buckets:
            raise tally.error("the data has no example that can be read")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-examples")

    def read_ahead(
        self, batches: Iterable[tuple[int, list[int]]], *, size: int, buffer_bytes: int
    ) -> Generator[Read, None, None]:
        """Prefetches batches, at most two per thread; stops the threads at the end.

        Args:
            batches: bucket and indices of each.
            size: rows of a batch.
            buffer_bytes: upper bound of the prefetched examples; a single batch may be larger.
        """
        largest = max(
            sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())
            for spec in self._specs
        )
        # Each thread holds another example.
        ahead = (buffer_bytes // largest - self._threads) // size
        jobs_to_do = (self._start(bucket, indices, size) for bucket, indices in batches)
        try:
            jobs = deque(islice(jobs_to_do, min(max(ahead, 1), 2 * self._threads)))
            while jobs:
                # Starts a batch only after one is complete, to bound their number.
                read = _finished(*jobs.popleft())
                jobs.extend(islice(jobs_to_do, 1))
                yield read
                del read
        finally:
            # Each thread finishes its current example.
            self._pool.shutdown(cancel_futures=True)

    def _start(self, bucket: int, indices: list[int], size: int) -> _Job:
        arrays = {
            name: np.empty((size, *shape), dtype)
            for name, (shape, dtype) in self._specs[bucket].items()
        }
        rows = [
            self._pool.submit(self._fill, arrays, row, bucket, index)
            for row, index in enumerate(indices)
        ]
        return arrays, rows

    def _probe(self, bucket: np.ndarray, tries: int) -> tuple[_Spec | None, Bad]:
        """Finds the shapes of a bucket's first readable example, and the unreadable ones."""
        bad: Bad = []
        for index in map(int, bucket[:tries]):
            example, reason = self._read(index)
            if example is not None:
                return _spec(example), bad
            bad.append((index, reason))
        return None, bad

    def _fill(
        self, arrays: dict[str, np.ndarray], row: int, bucket: int, index: int
    ) -> tuple[bool, Bad]:
        """Fills a row; returns success, and the unreadable examples."""
        bad: Bad = []
        for candidate in islice(self._candidates(bucket, index), 1 + self._passes):
            example, reason = self._read(candidate, self._specs[bucket])
            if example is not None:
                for name, value in example.items():
                    arrays[name][row] = value
                return True, bad
            bad.append((candidate, reason))
        return False, bad

    def _candidates(self, bucket: int, index: int) -> Iterator[int]:
        yield index
        indices = self.buckets[bucket]
        place = int(np.flatnonzero(indices == index)[0])
        yield from map(int, np.roll(indices, -place)[1:])

    def _read(
        self, index: int, expected: _Spec | None = None
    ) -> tuple[dict[str, np.ndarray] | None, str]:
        """Reads an example; None and the reason if it cannot be read."""
        try:
            example = {name: np.asarray(v) for name, v in self._source[index].items()}
        except DataError as error:
            return None, str(error)
        except PatchGDError:
            # A setting or a missing package concerns all examples.
            raise
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
        found = _spec(example)
        if expected is not None and found != expected:
            return None, f"it has {_text(found)}, where others like it have {_text(expected)}"
        return example, ""


_Job = tuple[dict[str, np.ndarray], list[Future[tuple[bool, Bad]]]]
"""An unfinished batch: its arrays, and the futures of its first rows."""


def _finished(arrays: dict[str, np.ndarray], rows: list[Future[tuple[bool, Bad]]]) -> Read:
    # All at once: to wake up for every row would take time from the reader threads.
    wait(rows, return_when=FIRST_EXCEPTION)
    good, bad = np.zeros(len(next(iter(arrays.values()))), bool), []
    for row, future in enumerate(rows):
        good[row], found = future.result()
        bad += found
    return Read(arrays, good, bad)


def _spec(example: dict[str, np.ndarray]) -> _Spec:
    return {name: (value.shape, value.dtype) for name, value in example.items()}


def _text(spec: _Spec) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in spec.items())
