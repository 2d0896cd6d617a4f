"""Example sources for tests."""

from __future__ import annotations

import threading

import numpy as np


class Numbers:
    """Example i is an image of i's; each bucket has its own height.

    Args:
        sizes: number of examples of each bucket.
        broken: examples that raise.
        more: further entries of every example.
    """

    class_names = tuple("0123456789")
    fingerprint = "numbers"

    def __init__(self, *sizes, broken=(), **more):
        self.broken, self.more = set(broken), more
        # Indices of a bucket are spread over the source, and not in order.
        mixed = np.random.default_rng(0).permutation(sum(sizes))
        parts = np.split(mixed, np.cumsum(sizes)[:-1])
        self.buckets = tuple(parts) if len(sizes) > 1 else (np.arange(sizes[0]),)
        self.height = {int(i): 3 + b for b, part in enumerate(self.buckets) for i in part}

    def __len__(self):
        return len(self.height)

    def describe(self, index):
        return f"images/{index}.png"

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("image file is truncated")
        return {
            "image": np.full((self.height[index], 4, 1), index, np.uint16),
            "label": np.int64(index % 10),
            "id": np.int64(index),
            **self.more,
        }


class Watched(Numbers):
    """Counts what is being read; where a `barrier` is set, every read waits for it.

    Args:
        size: number of examples.
    """

    def __init__(self, size):
        super().__init__(size)
        self.barrier: threading.Barrier | None = None
        self.count = threading.Condition()
        self.reads = self.reading = self.most_reading = self.handed = self.most_waiting = 0

    def __getitem__(self, index):
        with self.count:
            self.reads += 1
            self.reading += 1
            self.most_reading = max(self.most_reading, self.reading)
            self.most_waiting = max(self.most_waiting, self.reads - self.handed)
            self.count.notify_all()
        if self.barrier is not None:
            self.barrier.wait(20)
        example = super().__getitem__(index)
        with self.count:
            self.reading -= 1
        return {**example, "image": np.zeros((32, 32, 1), np.uint8)}

    def wait_for(self, reads):
        """Whether so many examples have been asked for within 20 s."""
        with self.count:
            return self.count.wait_for(lambda: self.reads >= reads, 20)
