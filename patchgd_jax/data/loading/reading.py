"""Reads examples into batches, several at a time; an unreadable one never stops the others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.data.loading.bad_records import BadTally
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import DataError, PatchGDError

Bad = list[tuple[int, str]]
"""Index and reason of examples that could not be read."""
_Spec = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]

_PROBES = 10


class Read(NamedTuple):
    """A batch as it was read."""

    arrays: dict[str, np.ndarray]
    """`[B, ...]` each; rows that are not `good` hold anything."""
    good: np.ndarray
    """`bool [B]`: which rows hold an example."""
    bad: Bad
    """What could not be read, in the order of the rows."""


class Reader:
    """Reads examples in threads, straight into their batch; picklable.

    Args:
        source: the examples.
        tally: told of the examples of a bucket that has none that can be read.
        threads: number of threads.
        substitute: whether the next readable example of its bucket takes the place of one that is
            unreadable; otherwise the row stays empty.

    Raises:
        RecordError: if nothing can be read, or the tally says so.
    """

    def __init__(
        self, source: ExampleSource, tally: BadTally, *, threads: int, substitute: bool
    ) -> None:
        self._source = source
        self._threads = threads
        # One more than this and the tally ends the run anyway.
        self._passes = tally.tolerated if substitute else 0
        self.buckets: list[np.ndarray] = []
        """Indices by bucket, without the buckets that have nothing readable."""
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

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_pool", None)
        return state

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="read-examples")

    @property
    def example_bytes(self) -> int:
        """Bytes of the largest example."""
        return self.batch_bytes(1)

    def batch_bytes(self, size: int) -> int:
        """Bytes that `arrays` needs for a batch of `size`, of whichever bucket."""
        return max(
            sum(_aligned(size * _nbytes(array)) for array in spec.values()) for spec in self._specs
        )

    def arrays(
        self, bucket: int, size: int, memory: memoryview | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of a batch of `size`, uninitialised; in that memory, or in new one."""
        arrays, offset = {}, 0
        for name, (shape, dtype) in self._specs[bucket].items():
            if memory is None:
                arrays[name] = np.empty((size, *shape), dtype)
            else:
                arrays[name] = np.ndarray((size, *shape), dtype, memory, offset)
                offset += _aligned(arrays[name].nbytes)
        return arrays

    def start(self, bucket: int, indices: list[int], arrays: dict[str, np.ndarray]) -> Job:
        """Starts reading examples of a bucket into the first rows of its `arrays`."""
        rows = [
            self._pool.submit(self._fill, arrays, row, bucket, index)
            for row, index in enumerate(indices)
        ]
        return Job(arrays, rows)

    def close(self) -> None:
        """Stops the threads; each finishes the example it is at."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(cancel_futures=True)

    def _probe(self, bucket: np.ndarray, tries: int) -> tuple[_Spec | None, Bad]:
        """The shapes of a bucket's first readable example."""
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
        """An example, or None and why there is none."""
        try:
            example = {name: np.asarray(v) for name, v in self._source[index].items()}
        except DataError as error:
            return None, str(error)
        except PatchGDError:
            # A setting or a missing package: no other example would fare better.
            raise
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
        found = _spec(example)
        if expected is not None and found != expected:
            return None, f"it has {_text(found)}, where others like it have {_text(expected)}"
        return example, ""


class Job:
    """A batch that is being read.

    Args:
        arrays: what it is read into.
        rows: the work at the first rows: whether it filled the row, and what was unreadable.
    """

    def __init__(self, arrays: dict[str, np.ndarray], rows: list[Future[tuple[bool, Bad]]]) -> None:
        self._arrays = arrays
        self._rows = rows

    def result(self) -> Read:
        """Waits for the batch."""
        # All at once: to wake up for every row would take time from the threads that read.
        wait(self._rows, return_when=FIRST_EXCEPTION)
        size = len(next(iter(self._arrays.values())))
        good, bad = np.zeros(size, bool), []
        for row, future in enumerate(self._rows):
            good[row], found = future.result()
            bad += found
        return Read(self._arrays, good, bad)


def read_ahead(
    reader: Reader, batches: Iterable[tuple[int, list[int]]], *, size: int, ahead: int
) -> Generator[Read, None, None]:
    """Reads batches, up to `ahead` of them before they are asked for.

    Args:
        reader: closed at the end, and when the generator is closed.
        batches: bucket and indices of each.
        size: rows of a batch.
        ahead: at least 1.
    """
    jobs_to_do = (
        reader.start(bucket, indices, reader.arrays(bucket, size)) for bucket, indices in batches
    )
    try:
        jobs = deque(islice(jobs_to_do, ahead))
        while jobs:
            # Not before it is complete: no more than `ahead` batches are ever in the making.
            read = jobs.popleft().result()
            jobs.extend(islice(jobs_to_do, 1))
            yield read
            del read
    finally:
        reader.close()


def _spec(example: dict[str, np.ndarray]) -> _Spec:
    return {name: (value.shape, value.dtype) for name, value in example.items()}


def _nbytes(array: tuple[tuple[int, ...], np.dtype[Any]]) -> int:
    shape, dtype = array
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _text(spec: _Spec) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in spec.items())
