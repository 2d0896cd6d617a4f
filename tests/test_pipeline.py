"""Batches: which examples, in which order, however they are read; and how errors come out."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sources import Numbers, Watched

from patchgd_jax import ConfigError, DataError
from patchgd_jax.data.loading.bad_images import BadRecord
from patchgd_jax.data.loading.order import TrainOrder, cipher_permutation
from patchgd_jax.data.loading.pipeline import RecordError, TrainBatches, eval_batches


def take(source, count, *, batch_size=6, seed=0, start=0, threads=1, **options):
    """The first batches of a stream."""
    with TrainBatches(
        source, batch_size=batch_size, seed=seed, start=start, threads=threads, **options
    ) as stream:
        return list(itertools.islice(stream, count))


def ids(*arguments, **options):
    return [batch["id"].tolist() for batch in take(*arguments, **options)]


def same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


# Which examples a batch has.


def test_the_order_is_that_of_earlier_versions():
    # What recorded results were trained on; past the first pass, too.
    assert ids(Numbers(20), 2) == [[14, 10, 16, 8, 7, 0], [19, 11, 2, 4, 1, 18]]
    assert ids(Numbers(20), 1, start=9) == [[14, 0, 2, 4, 5, 17]]
    assert ids(Numbers(20), 1, seed=7) == [[14, 13, 15, 1, 4, 3]]
    for k, first in {
        0: [6923, 3272, 1398, 6824, 9453, 7574],
        599: [2210, 3808, 6898, 4374, 7338, 900],
        600: [473, 2331, 4942, 925, 7858, 7378],
    }.items():
        assert ids(Numbers(9600), 1, batch_size=16, start=k)[0][:6] == first


# Values that Grain 0.2.18 gave, for sizes on both sides of a change of the cipher's block.
GRAIN = {
    (1024, 4, 0): {0: [297, 371, 706, 141], 12345: [169, 944, 887, 311]},
    (1500, 5, 5): {0: [700, 107, 952, 368, 196], 12345: [1158, 1371, 592, 1120, 1221]},
    (20000, 4, 2147483647): {0: [12164, 6895, 17614, 13205], 12345: [6987, 1519, 5714, 8764]},
    (65536, 4, 1): {0: [33637, 64106, 32223, 9435], 12345: [30949, 111, 45728, 63082]},
    (65538, 4, 1): {0: [24138, 8146, 41287, 58279], 12345: [39815, 34627, 62924, 20676]},
}


@pytest.mark.parametrize(("size", "batch_size", "seed"), GRAIN)
def test_one_large_bucket_is_in_the_order_that_grain_had(size, batch_size, seed):
    order = TrainOrder([np.arange(size)], seed=seed, batch_size=batch_size)
    assert {k: order(k)[1] for k in (0, 12345)} == GRAIN[size, batch_size, seed]


@given(st.integers(1024, 70_000), st.integers(0, 2**32 - 1))
@example(2**16 + 1, 0)
@settings(max_examples=30, deadline=None)
def test_a_large_pass_has_each_example_once(size, seed):
    assert (np.sort(cipher_permutation(size, seed)) == np.arange(size)).all()


@pytest.mark.parametrize("sizes", [(20,), (20, 9, 2)])
def test_batch_k_does_not_depend_on_where_a_run_starts_nor_on_threads(sizes):
    # Batches of 6 straddle passes, and the last bucket is smaller than one.
    source = Numbers(*sizes)
    straight = take(source, 35)
    for start, threads in [(0, 3), (3, 4), (9, 1), (32, 2)]:
        same(take(source, 35 - start, start=start, threads=threads), straight[start:])


def test_every_pass_has_each_example_once_in_a_new_order():
    flat = np.concatenate(ids(Numbers(20), 10))
    passes = flat.reshape(3, 20)
    for one in passes:
        assert sorted(one) == list(range(20))
    assert (passes[0] != passes[1]).any()
    assert (passes[0] != np.arange(20)).any()
    assert ids(Numbers(20), 3, seed=1) != ids(Numbers(20), 3)


def test_in_a_small_bucket_every_example_is_as_likely_at_every_place():
    size, passes = 5, 2000
    order = TrainOrder([np.arange(size)], seed=0, batch_size=size)
    seen = np.array([order(k)[1] for k in range(passes)])
    counts = np.array([np.bincount(place, minlength=size) for place in seen.T])
    expected = passes / size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 1 / size))
    assert len({tuple(one) for one in seen.tolist()}) == 120
    assert order(2**40)[1] != order(2**40 + 1)[1]


def test_training_batches_hold_the_examples():
    source = Numbers(8, weight=np.float32(2), size=np.array([3, 4], np.int32))
    (batch,) = take(source, 1, batch_size=4)
    assert batch["image"].shape == (4, 3, 4, 1)
    assert batch["label"].dtype == np.int32
    assert batch["weight"].dtype == np.float32
    assert batch["size"].tolist() == [[3, 4]] * 4
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["id"])
    np.testing.assert_array_equal(batch["label"], batch["id"] % 10)


def test_labels_that_are_no_integers_become_float32():
    class Several(Numbers):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": np.array([0.5, index])}

    (batch,) = take(Several(8), 1, batch_size=4)
    assert batch["label"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"][:, 1], batch["id"])


def test_each_bucket_makes_passes_of_its_own():
    sizes = (60, 30, 5)
    source = Numbers(*sizes)
    seen = [[], [], []]
    for batch in take(source, 150):
        # Stacking itself needs equal shapes, but the bucket must also be the examples' own.
        bucket = batch["image"].shape[1] - 3
        assert {source.height[i] for i in batch["id"].tolist()} == {3 + bucket}
        seen[bucket] += batch["id"].tolist()
    for bucket, size in enumerate(sizes):
        whole = len(seen[bucket]) // size
        assert whole > 5
        passes = np.array(seen[bucket][: whole * size]).reshape(whole, size)
        expected = np.sort(source.buckets[bucket])
        np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(expected, (whole, 1)))
        if size > 5:
            assert len({tuple(one) for one in passes}) == whole
    # Buckets of one size are not shuffled alike.
    order = TrainOrder([np.arange(20), np.arange(20)], seed=0, batch_size=20)
    firsts = {}
    for k in range(40):
        bucket, indices = order(k)
        firsts.setdefault(bucket, indices)
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("sizes", [(700, 200, 100), (500, 500), (997, 3)])
@pytest.mark.parametrize("seed", [0, 3])
def test_buckets_take_turns_in_proportion_to_their_sizes(sizes, seed):
    batch_size = 10
    buckets = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    order = TrainOrder(buckets, seed=seed, batch_size=batch_size)
    of = np.array([order(k, slice(0))[0] for k in range(2 * sum(sizes))])
    epoch = sum(sizes) // batch_size
    for bucket, size in enumerate(sizes):
        there = of == bucket
        # Any epoch, wherever it starts, has the bucket's share of batches, but for a few.
        share = np.convolve(there, np.ones(epoch, int), "valid")
        assert abs(share - size / batch_size).max() <= 3
        # As many batches as examples are batch_size epochs, and exact.
        assert there[: sum(sizes)].sum() == size
        rest = sum(sizes) / (sum(sizes) - size)
        runs = [len(list(run)) for other, run in itertools.groupby(there) if other]
        assert max(runs) <= 3 * rest
    # Shuffled: neither every cycle nor every seed is alike.
    assert (of[: sum(sizes)] != of[sum(sizes) :]).any()


@pytest.mark.parametrize("sizes", [(20,), (20, 9, 2)])
@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 3, 8)])
def test_the_rows_that_processes_read_make_the_batch(sizes, cuts):
    source = Numbers(*sizes, broken={3, 4})
    options = {"batch_size": 8, "bad_images": "substitute", "start": 2}
    whole = take(source, 9, **options)
    parts = [take(source, 9, rows=slice(*cut), **options) for cut in itertools.pairwise(cuts)]
    joined = [
        {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        for pieces in zip(*parts, strict=True)
    ]
    same(joined, whole)


def test_rows_that_a_batch_has_none_of_are_named():
    with pytest.raises(ConfigError, match="a batch of 6 has no rows for this process"):
        take(Numbers(20), 1, rows=slice(6, 8))
    with pytest.raises(ConfigError, match="a batch of 6 has no rows for this process"):
        next(eval_batches(Numbers(20), 6, rows=slice(6, 8)))


# Reading ahead.


def test_threads_read_the_examples_of_one_batch_together():
    # Nobody passes the barrier before three are there.
    source = Watched(12)
    stream = TrainBatches(source, batch_size=3, seed=0, start=0, threads=3, buffer_bytes=0)
    source.barrier = threading.Barrier(3)
    with stream:
        for _ in range(4):
            next(stream)
    assert source.most_reading == 3


def test_training_and_evaluation_read_while_the_consumer_is_busy():
    source = Watched(12)
    # With room for no more than one batch.
    with TrainBatches(source, batch_size=3, seed=0, start=0, threads=1, buffer_bytes=0) as stream:
        next(stream)
        # The first example is read once more, to learn its shape.
        assert source.wait_for(1 + 2 * 3)
    source = Watched(12)
    scored = eval_batches(source, 3, buffer_bytes=0)
    next(scored)
    assert source.wait_for(1 + 2 * 3)
    scored.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_what_waits_stays_within_the_budget(threads, ahead):
    source, size = Watched(40), 5
    example = 1024 + 8 + 8
    # Rows are padded to 64 bytes; a little more than so many batches beside the threads' examples.
    budget = (ahead * size + threads) * (example + 120)
    source.reads = -1
    with TrainBatches(
        source, batch_size=size, seed=0, start=0, threads=threads, buffer_bytes=budget
    ) as stream:
        for _ in range(12):
            next(stream)
            with source.count:
                source.handed += size
        # One batch is on its way to the consumer while the next is asked for.
        assert source.most_waiting <= (max(ahead, 1) + 1) * size
        assert source.most_waiting * example <= max(budget, size * example) + size * example
        assert source.most_reading <= threads


def test_closing_stops_the_threads():
    def reading():
        return [t for t in threading.enumerate() if t.name.startswith("read-examples")]

    stream = TrainBatches(Numbers(20), batch_size=4, seed=0, start=0, threads=3)
    with stream:
        next(stream)
        assert reading()
    assert not reading()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    stream.close()
    scored = eval_batches(Numbers(20), 4, threads=3)
    next(scored)
    assert reading()
    scored.close()
    assert not reading()
    list(eval_batches(Numbers(20), 4, threads=3))
    assert not reading()


# Evaluation.


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
@pytest.mark.parametrize("threads", [1, 4])
def test_evaluation_has_each_example_once_and_says_what_is_padding(count, threads):
    batches = list(eval_batches(Numbers(count), 6, threads=threads))
    assert all(len(b["label"]) == 6 for b in batches)
    real = np.concatenate([b["image"][b["weight"] > 0, 0, 0, 0] for b in batches])
    np.testing.assert_array_equal(real, np.arange(count))
    for batch in batches:
        padding = batch["weight"] == 0
        assert (batch["id"][padding] == -1).all()
        # As ever: padding repeats the batch's first example.
        assert (batch["image"][padding] == batch["image"][0]).all()
        assert (batch["label"][padding] == batch["label"][0]).all()


def test_evaluation_goes_from_bucket_to_bucket():
    source = Numbers(7, 3, 4, weight=np.float32(0))
    batches = list(eval_batches(source, 4))
    assert [b["image"].shape[1] for b in batches] == [3, 3, 4, 5]
    # The source's own weight is for training: no example is left out because of it.
    assert [b["weight"].tolist() for b in batches] == [[1] * 4, [1, 1, 1, 0], [1, 1, 1, 0], [1] * 4]
    found = np.concatenate([b["id"][b["weight"] > 0] for b in batches])
    np.testing.assert_array_equal(found, np.concatenate(source.buckets))


def test_evaluation_leaves_unreadable_examples_out():
    # All of the third batch is unreadable, and so are the first example and all of a bucket.
    source = Numbers(20, broken={0, 5, 8, 9, 10, 11})
    source.buckets = (np.arange(0, 18), np.arange(18, 20))
    source.broken |= {18, 19}
    reports = []
    batches = list(
        eval_batches(source, 4, bad_images="substitute", on_bad=lambda *bad: reports.append(bad))
    )
    assert sorted(reports) == [
        (i, f"images/{i}.png", "OSError: image file is truncated") for i in sorted(source.broken)
    ]
    found = np.concatenate([b["id"][b["weight"] > 0] for b in batches])
    assert found.tolist() == [1, 2, 3, 4, 6, 7, 12, 13, 14, 15, 16, 17]
    for batch in batches:
        assert ((batch["id"] == -1) == (batch["weight"] == 0)).all()
        real = batch["image"][batch["weight"] > 0, 0, 0, 0]
        assert np.isin(batch["image"][:, 0, 0, 0], real).all()
    with pytest.raises(
        RecordError, match=r"^8 unreadable examples are more than data\.bad_limit 7"
    ):
        list(eval_batches(source, 4, bad_images="substitute", bad_limit=7))


# Unreadable examples.


@pytest.mark.parametrize("threads", [1, 3])
def test_an_unreadable_example_ends_the_run_at_its_batch(threads):
    source = Numbers(12, broken={7})
    # With seed 0 example 7 is in batch 1 of three.
    order = TrainOrder(source.buckets, seed=0, batch_size=4)
    where = next(k for k in range(3) if 7 in order(k)[1])
    with TrainBatches(source, batch_size=4, seed=0, start=0, threads=threads) as stream:
        for _ in range(where):
            next(stream)
        with pytest.raises(RecordError) as caught:
            next(stream)
        with pytest.raises(ValueError, match="closed"):
            next(stream)
    text = "example 7 (images/7.png): OSError: image file is truncated; repair it"
    assert str(caught.value).startswith(text)
    assert caught.value.exit_code == 3
    (record,) = caught.value.records
    assert record == BadRecord(7, "images/7.png", "OSError: image file is truncated")
    with pytest.raises(RecordError, match="example 7"):
        list(eval_batches(source, 4, threads=threads))


def test_a_reader_that_names_the_file_is_not_interrupted():
    class Named(Numbers):
        def __getitem__(self, index):
            raise DataError(f"cannot read image images/{index}.png: it has no pixels")

    with pytest.raises(RecordError, match=r"^example 0: cannot read image images/0.png: it has no"):
        take(Named(1), 1)


@pytest.mark.parametrize("sizes", [(20,), (12, 8)])
def test_the_next_readable_example_of_the_bucket_takes_the_place(sizes):
    whole = take(Numbers(*sizes), 20)
    source = Numbers(*sizes)
    bucket = source.buckets[-1].tolist()
    # Two that follow each other, and the last of the bucket, whose next is its first.
    source.broken = {bucket[2], bucket[3], bucket[-1]}
    substitute = {bucket[2]: bucket[4], bucket[3]: bucket[4], bucket[-1]: bucket[0]}
    reports = []
    got = take(
        source, 20, threads=3, bad_images="substitute", on_bad=lambda *bad: reports.append(bad)
    )
    for batch, original in zip(got, whole, strict=True):
        expected = [substitute.get(i, i) for i in original["id"].tolist()]
        assert batch["id"].tolist() == expected
        assert batch["label"].tolist() == [i % 10 for i in expected]
        assert (batch["image"] == batch["id"][:, None, None, None]).all()
    # Once each, although they come again on every pass.
    assert sorted(i for i, _, _ in reports) == sorted(source.broken)
    same(take(source, 13, start=7, bad_images="substitute"), got[7:])


def test_too_many_unreadable_examples_end_the_run_after_all():
    source, reports = Numbers(30, broken=range(5, 16)), []
    options = {"bad_images": "substitute", "on_bad": lambda *bad: reports.append(bad)}
    take(source, 20, bad_limit=11, **options)
    assert len(reports) == 11
    reports.clear()
    with pytest.raises(RecordError, match="11 unreadable examples are more than") as caught:
        take(source, 20, **options)
    assert len(reports) == 11
    for index in source.broken:
        assert f"\n  example {index} (images/{index}.png): OSError" in str(caught.value)
    assert [(r.index, r.description, r.reason) for r in caught.value.records] == reports


def test_a_bucket_of_which_nothing_can_be_read_is_left_out():
    source = Numbers(12, 3)
    source.broken = set(source.buckets[1].tolist())
    reports = []
    got = take(source, 10, bad_images="substitute", on_bad=lambda *bad: reports.append(bad[0]))
    assert reports == source.buckets[1].tolist()
    assert {i for batch in got for i in batch["id"].tolist()} == set(source.buckets[0].tolist())
    with pytest.raises(RecordError, match="repair it"):
        take(source, 10)


def test_data_without_any_readable_example_is_an_error():
    with pytest.raises(RecordError, match="no example that can be read:\n  example 0"):
        take(Numbers(3, broken=range(3)), 1, bad_images="substitute")
    with pytest.raises(DataError, match="no examples"):
        take(Numbers(0), 1)


def test_an_example_unlike_its_bucket_is_unreadable():
    source = Numbers(8)
    source.height[5] = 9
    with pytest.raises(RecordError, match=r"example 5 .*image uint16\[9, 4, 1\].*\[3, 4, 1\]"):
        take(source, 2, batch_size=4)
    ids_ = ids(source, 2, batch_size=4, bad_images="substitute")
    assert 5 not in np.concatenate(ids_)


def test_a_missing_package_is_no_unreadable_example():
    class Needs(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise ConfigError("pip install 'patchgd-jax[wsi]'")
            return super().__getitem__(index)

    with pytest.raises(ConfigError, match="wsi"):
        take(Needs(8), 8, bad_images="substitute")
    with pytest.raises(ConfigError, match="wsi"):
        list(eval_batches(Needs(8), 8, bad_images="substitute"))
