"""Batches of a source's examples: shuffled for training, padded for evaluation.

Training batch k is a pure function of (source, seed, k), for any number of reader threads and
hosts, so a resumed run starts at batch k and needs no iterator state.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator

import numpy as np

from patchgd_jax.data.loading.bad_images import BadTally, OnBad, Policy, RecordError
from patchgd_jax.data.loading.order import TrainOrder
from patchgd_jax.data.loading.reading import Reader
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import ConfigError

__all__ = ["BUFFER_BYTES", "ExampleSource", "RecordError", "TrainBatches", "eval_batches"]

BUFFER_BYTES = 256 * 2**20
"""Default memory of prefetched examples."""


class TrainBatches(
    Iterator[dict[str, np.ndarray]], contextlib.AbstractContextManager["TrainBatches"]
):
    """An endless iterator of training batches; a context manager that stops its threads.

    `TrainOrder` chooses the examples of each batch, all of one bucket.

    Args:
        source: the examples.
        batch_size: B of the whole batch, over all processes.
        seed: of the shuffling.
        start: number of the first batch.
        threads: number of reader threads.
        buffer_bytes: upper bound of the prefetched examples; a single batch may be larger.
        rows: the rows of each batch to read in this process.
        bad_images: raise: an unreadable example stops the run. substitute: the next readable one of
            its bucket replaces it.
        bad_limit: different unreadable examples that `substitute` tolerates (in this process).
        on_bad: called once for each of them, before its batch is returned.

    Raises:
        ConfigError: if `rows` is empty.
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
        buffer_bytes: int = BUFFER_BYTES,
        rows: slice = slice(None),
        bad_images: Policy = "raise",
        bad_limit: int = 10,
        on_bad: OnBad = lambda *bad: None,
    ) -> None:
        size = _row_count(batch_size, rows)
        self._tally = BadTally(source, policy=bad_images, limit=bad_limit, on_bad=on_bad)
        reader = Reader(source, self._tally, threads=threads, substitute=True)
        order = TrainOrder(reader.buckets, seed=seed, batch_size=batch_size)
        self._closed = False
        batches = (order(k, rows) for k in itertools.count(start))
        self._reads = reader.read_ahead(batches, size=size, buffer_bytes=buffer_bytes)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and the iteration."""
        self._closed = True
        self._reads.close()

    def __next__(self) -> dict[str, np.ndarray]:
        """Reads the next batch, of this process's rows.

        Returns:
            Each array of an example with a leading batch axis: `image` `uint8 [B, H, W, C]`,
            `label` `int32 [B]` and `id` `int64 [B]`. Labels that are not integers are `float32`,
            and may have a second axis.

        Raises:
            RecordError: if the policy for unreadable examples stops the run here; it closes.
            ValueError: if it is closed.
        """
        if self._closed:
            raise ValueError("these batches are closed")
        try:
            read = next(self._reads)
            self._tally.take(read.bad)
            if not read.good.all():
                raise self._tally.error("no readable example is left to replace unreadable ones")
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
    on_bad: OnBad = lambda *bad: None,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields all examples once, bucket by bucket, in order; pads the last batch of each bucket.

    Args:
        source: the examples.
        batch_size: B of the whole batch.
        rows: as for `TrainBatches`. The number of batches does not depend on it.
        threads: as for `TrainBatches`.
        buffer_bytes: as for `TrainBatches`.
        bad_images: raise: an unreadable example is an error. substitute: it is left out.
        bad_limit: as for `TrainBatches`.
        on_bad: as for `TrainBatches`.

    Yields:
        Batches as of `TrainBatches`, and `weight` `float32 [B]`: 1, or 0 for rows that are padding
        or unreadable, whose `id` is -1. Weights of the source itself apply to training only.

    Raises:
        ConfigError: if `rows` is empty.
        RecordError: by the policy, or if nothing can be read.
    """
    size = _row_count(batch_size, rows)
    tally = BadTally(source, policy=bad_images, limit=bad_limit, on_bad=on_bad)
    reader = Reader(source, tally, threads=threads, substitute=False)
    parts = (
        (number, bucket[first : first + batch_size][rows].tolist())
        for number, bucket in enumerate(reader.buckets)
        for first in range(0, len(bucket), batch_size)
    )
    reads = reader.read_ahead(parts, size=size, buffer_bytes=buffer_bytes)
    any_read = False
    with contextlib.closing(reads):
        for read in reads:
            tally.take(read.bad)
            if not read.good.any() and size == batch_size:
                continue
            any_read = True
            for array in read.arrays.values():
                # Padding only needs finite outputs. Other processes may have readable rows where
                # this one has none.
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


def _row_count(batch_size: int, rows: slice) -> int:
    count = len(range(batch_size)[rows])
    if count == 0:
        raise ConfigError(
            f"a batch of {batch_size} has no rows for this process; use fewer processes, or a "
            "larger batch_size or eval_batch_size"
        )
    return count


def _labels(labels: np.ndarray) -> np.ndarray:
    return labels.astype(np.int32 if labels.dtype.kind in "iu" else np.float32)
