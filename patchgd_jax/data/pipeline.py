"""From an example source to batches: shuffled for training, padded for evaluation.

Training batch k is a pure function of (source, seed, k), whatever the number of reader threads, so
a resumed run starts at batch k and needs no iterator state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, Self

import numpy as np

from patchgd_jax.errors import DataError

PREFETCH_BYTES = 256 * 2**20
"""Upper bound of what waits, decoded, for the training step."""


class ExampleSource(Protocol):
    """Random access to examples; stateless and picklable."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that changes whenever an example would."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` `uint8 [H, W, C]`, `label` and `id`."""
        ...


class _Named:
    """A source whose errors say which example failed."""

    def __init__(self, source: ExampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._source[int(index)]
        except Exception as error:
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise DataError(f"example {index}: {kind}{error}") from error


class TrainBatches:
    """An endless iterator of training batches; a context manager that stops its threads.

    Every pass over the source is shuffled anew; a batch may straddle two passes, so none is short.

    Args:
        source: the examples.
        batch_size: B.
        seed: of the shuffling.
        start: number of the first batch.
        threads: threads that make examples ahead of time.
    """

    def __init__(
        self, source: ExampleSource, *, batch_size: int, seed: int, start: int, threads: int
    ) -> None:
        import grain

        example_bytes = sum(np.asarray(v).nbytes for v in source[0].values())
        # Grain's default would keep 500 batches, 25 GB of them at 4096 px.
        ahead = int(np.clip(PREFETCH_BYTES // (example_bytes * batch_size), 1, 2 * threads))
        self._iterator = iter(
            grain.MapDataset.source(_Named(source))
            .seed(seed)
            .shuffle()
            .repeat(None)
            .batch(batch_size, drop_remainder=True)[start:]
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._iterator.close()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """`image` `uint8 [B, H, W, C]`, `label` `int32 [B]` and `id` `int64 [B]`.

        Labels that are no integers are `float32`, and may have a second axis.
        """
        batch = next(self._iterator)
        return {**batch, "label": _labels(batch["label"])}


def _labels(values: Any) -> np.ndarray:
    labels = np.asarray(values)
    return labels.astype(np.int32 if labels.dtype.kind in "iu" else np.float32)


def eval_batches(source: ExampleSource, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in order; the last batch is padded.

    Yields:
        `image` `uint8 [B, H, W, C]`, `label` as in training and `weight` `float32 [B]`, which is 0
        for padding.
    """
    named = _Named(source)
    for start in range(0, len(source), batch_size):
        examples = [named[i] for i in range(start, min(start + batch_size, len(source)))]
        missing = batch_size - len(examples)
        padded = examples + [examples[0]] * missing
        yield {
            "image": np.stack([e["image"] for e in padded]),
            "label": _labels([e["label"] for e in padded]),
            "weight": np.array([1] * len(examples) + [0] * missing, np.float32),
        }
