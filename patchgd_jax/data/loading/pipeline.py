"""From an example source to batches: shuffled for training, padded for evaluation.

Training batch k is a pure function of (source, seed, k), whatever the number of reader threads,
worker processes and hosts, so a resumed run starts at batch k and needs no iterator state.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Self

import numpy as np

from patchgd_jax.data.loading.bad_records import BadTally, OnBad, Policy, RecordError
from patchgd_jax.data.loading.order import TrainOrder
from patchgd_jax.data.loading.reading import Read, Reader, read_ahead
from patchgd_jax.data.loading.workers import check_main, read_in_workers
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import ConfigError

__all__ = ["BUFFER_BYTES", "ExampleSource", "RecordError", "TrainBatches", "eval_batches"]

BUFFER_BYTES = 256 * 2**20
"""Upper bound of what waits, decoded, for the next step."""


def _ignore(index: int, description: str, reason: str) -> None:
    """Nobody wants to know."""


class TrainBatches:
    """An endless iterator of training batches; a context manager that stops its threads.

    Every pass over the source is shuffled anew; a batch may straddle two passes, so none is short.
    Of a source with several buckets a batch has examples of one only; buckets take turns in
    proportion to their sizes, and each makes passes of its own.

    A script that uses workers must run inside `if __name__ == "__main__":`, because each of them
    imports it.

    Args:
        source: the examples.
        batch_size: B of the whole batch, over all processes.
        seed: of the shuffling.
        start: number of the first batch.
        threads: threads that read examples ahead of time, in each of the workers if there are any.
        workers: processes that read, at most as many as batches may wait; 0: the threads of this
            one do.
        buffer_bytes: upper bound of what waits for the next step, but for a single batch, which may
            be larger.
        rows: the rows of each batch that this process reads.
        bad_images: raise: an unreadable example ends the run. substitute: the next readable one of
            its bucket takes its place.
        bad_limit: different unreadable examples that `substitute` bears (in this process).
        on_bad: called in this process, once for each of them, before its batch is returned.

    Raises:
        ConfigError: if there are no such rows.
        RecordError: if nothing can be read.
    """

    def __init__(
        self,
        source: ExampleSource,
        *,
        batch_size: int,
        seed: int,
        start: int,
        threads: int,
        workers: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
        rows: slice = slice(None),
        bad_images: Policy = "raise",
        bad_limit: int = 10,
        on_bad: OnBad = _ignore,
    ) -> None:
        if workers:
            check_main()
        rows = slice(*rows.indices(batch_size))
        size = rows.stop - rows.start
        if size <= 0:
            raise ConfigError(
                f"a batch of {batch_size} has no rows for this process; use fewer processes, or a "
                "larger batch_size"
            )
        self._tally = BadTally(source, policy=bad_images, limit=bad_limit, on_bad=on_bad)
        reader = Reader(source, self._tally, threads=threads, substitute=True)
        order = TrainOrder(reader.buckets, seed=seed, batch_size=batch_size)
        self._closed = False
        self._reads: Generator[Read, None, None]
        if workers:
            ahead = _ahead(reader, size, workers * threads, 2 * workers, buffer_bytes)
            workers = min(workers, ahead)
            self._reads = read_in_workers(
                reader, order, rows, start=start, workers=workers, ahead=ahead
            )
            # For a program that ends without closing; before multiprocessing would wait for them.
            atexit.register(self._reads.close)
        else:
            ahead = _ahead(reader, size, threads, 2 * threads, buffer_bytes)
            numbers = itertools.count(start)
            self._reads = read_ahead(
                reader, (order(k, rows) for k in numbers), size=size, ahead=ahead
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops threads and processes; there are no batches after it."""
        self._closed = True
        atexit.unregister(self._reads.close)
        self._reads.close()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, of B rows or this process's part of them.

        Returns:
            Each array of an example with an axis in front: `image` `uint8 [B, H, W, C]`, `label`
            `int32 [B]` and `id` `int64 [B]`. Labels that are no integers are `float32`, and may
            have a second axis.

        Raises:
            RecordError: if the policy about unreadable examples ends the run here; it closes.
            DataError: if a worker died; it closes.
            ValueError: if it is closed.
        """
        if self._closed:
            raise ValueError("these batches are closed")
        try:
            read = next(self._reads)
            self._tally.take(read.bad)
            if not read.good.all():
                raise self._tally.error("nothing is left to take the place of unreadable examples")
        except BaseException:
            self.close()
            raise
        return {**read.arrays, "label": _labels(read.arrays["label"])}


def eval_batches(
    source: ExampleSource,
    batch_size: int,
    *,
    rows: slice = slice(None),
    threads: int = 1,
    buffer_bytes: int = BUFFER_BYTES,
    bad_images: Policy = "raise",
    bad_limit: int = 10,
    on_bad: OnBad = _ignore,
) -> Generator[dict[str, np.ndarray], None, None]:
    """All examples once, bucket after bucket, in order; the last batch of each bucket is padded.

    Args:
        source: the examples.
        batch_size: B of the whole batch.
        rows: the rows of it that this process reads; as many batches come whatever they are.
        threads: threads that read examples ahead of time.
        buffer_bytes: upper bound of what waits for the next step, but for a single batch.
        bad_images: raise: an unreadable example is an error. substitute: it is left out.
        bad_limit: different unreadable examples that `substitute` bears.
        on_bad: called once for each of them, before its batch is returned.

    Yields:
        Each array of an example with an axis of its rows in front; labels as in training. `weight`
        `float32` is 1, and 0 for rows that are padding or unreadable, whose `id` is -1; a
        weight of the source's own is for training.

    Raises:
        RecordError: as the policy says, or if nothing can be read.
    """
    tally = BadTally(source, policy=bad_images, limit=bad_limit, on_bad=on_bad)
    reader = Reader(source, tally, threads=threads, substitute=False)
    size = len(range(batch_size)[rows])
    parts = (
        (number, bucket[first : first + batch_size][rows].tolist())
        for number, bucket in enumerate(reader.buckets)
        for first in range(0, len(bucket), batch_size)
    )
    ahead = _ahead(reader, size, threads, 2 * threads, buffer_bytes)
    reads = read_ahead(reader, parts, size=size, ahead=ahead)
    any_read = False
    with contextlib.closing(reads):
        for read in reads:
            tally.take(read.bad)
            if not read.good.any() and size == batch_size:
                continue
            any_read = True
            for array in read.arrays.values():
                # Any real example will do: the model's outputs must be finite. Other processes may
                # have some where this one has none.
                array[~read.good] = array[read.good.argmax()] if read.good.any() else 0
            read.arrays["id"][~read.good] = -1
            yield {
                **read.arrays,
                "label": _labels(read.arrays["label"]),
                "weight": read.good.astype(np.float32),
            }
            del read
    if not any_read:
        raise tally.error("no example can be read any more")


def _ahead(reader: Reader, rows: int, threads: int, most: int, buffer_bytes: int) -> int:
    """How many batches may be read ahead, beside the example that each thread is at."""
    spare = buffer_bytes - threads * reader.example_bytes
    return int(np.clip(spare // reader.batch_bytes(rows), 1, most))


def _labels(labels: np.ndarray) -> np.ndarray:
    return labels.astype(np.int32 if labels.dtype.kind in "iu" else np.float32)
