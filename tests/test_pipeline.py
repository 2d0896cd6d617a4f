"""Batches: which examples, in which order, whatever the threads; and how errors come out."""

from __future__ import annotations

import numpy as np
import pytest

from patchgd_jax import DataError
from patchgd_jax.data.pipeline import TrainBatches, eval_batches


class Numbers:
    """Example i is an image of i's."""

    num_classes = 10
    fingerprint = "numbers"

    def __init__(self, count, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("image file is truncated")
        image = np.full((4, 4, 1), index, np.uint8)
        return {"image": image, "label": np.int64(index % 10), "id": np.int64(index)}


def ids(count, batches, start=0, threads=1, seed=0, batch_size=6):
    with TrainBatches(
        Numbers(count), batch_size=batch_size, seed=seed, start=start, threads=threads
    ) as stream:
        return [next(stream)["id"].tolist() for _ in range(batches)]


def test_batch_k_does_not_depend_on_where_a_run_starts_nor_on_threads():
    # 20 examples in batches of 6: batch 3 straddles two passes, 9 is two passes further.
    straight = ids(20, 12)
    for start, threads in [(0, 3), (3, 1), (3, 4), (9, 2)]:
        assert ids(20, 12 - start, start, threads) == straight[start:]


def test_every_pass_has_each_example_once_in_a_new_order():
    flat = np.concatenate(ids(20, 10))
    passes = flat.reshape(3, 20)
    for one in passes:
        assert sorted(one) == list(range(20))
    assert (passes[0] != passes[1]).any()
    assert (passes[0] != np.arange(20)).any()
    assert ids(20, 3, seed=1) != ids(20, 3)


def test_training_batches_hold_the_examples():
    with TrainBatches(Numbers(8), batch_size=4, seed=0, start=0, threads=1) as stream:
        batch = next(stream)
    assert batch["image"].shape == (4, 4, 4, 1)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["id"])


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_evaluation_has_each_example_once_and_says_what_is_padding(count):
    batches = list(eval_batches(Numbers(count), 6))
    assert all(len(b["label"]) == 6 for b in batches)
    real = np.concatenate([b["image"][b["weight"] > 0, 0, 0, 0] for b in batches])
    np.testing.assert_array_equal(real, np.arange(count))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_example_is_named(threads):
    source = Numbers(12, broken=7)
    stream = TrainBatches(source, batch_size=4, seed=0, start=0, threads=threads)
    with stream, pytest.raises(DataError, match="example 7: OSError: image file is truncated"):
        all(next(stream) for _ in range(3))
    with pytest.raises(DataError, match="example 7"):
        list(eval_batches(source, 4))
