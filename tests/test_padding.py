"""Padded sizes: every image fits, few sizes, and little padding."""

from __future__ import annotations

import itertools
import tracemalloc
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from patchgd_jax.data.images import padding
from patchgd_jax.data.images.padding import MAX_SIZES, padded_sizes

RECTANGLES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=12)


def area(shapes, boxes):
    """Padded area if each rectangle takes the smallest box that holds it; inf if none does."""
    total = 0
    for height, width in shapes:
        fits = [h * w for h, w in boxes if h >= height and w >= width]
        total += min(fits, default=np.inf)
    return total


def best(shapes, count):
    """By trying all sets of boxes whose sides are those of the rectangles."""
    sides = [sorted(set(shapes[:, axis].tolist())) for axis in (0, 1)]
    boxes = list(itertools.product(*sides))
    return min(
        area(shapes, chosen) for chosen in itertools.combinations_with_replacement(boxes, count)
    )


def check(shapes, sizes):
    """Every rectangle has the smallest box that holds it; returns the padded area."""
    assert len(sizes.boxes) <= MAX_SIZES
    boxes = np.array(sizes.boxes)[sizes.member]
    assert (shapes <= boxes).all()
    got = boxes.prod(1).sum()
    assert got == area(shapes, sizes.boxes)
    assert abs(sizes.padding - (1 - shapes.prod(1).sum() / got)) < 1e-12
    return got


@given(RECTANGLES)
@settings(max_examples=40, deadline=None)
def test_boxes_hold_all_and_are_near_the_best(rectangles):
    shapes = np.array(rectangles)
    exact = padded_sizes(shapes)
    got = check(shapes, exact)
    assert got <= 1.35 * best(shapes, MAX_SIZES)
    # With neighbours kept together the boxes are as valid; with parts for all, they are the same.
    with mock.patch.object(padding, "_MAX_PARTS", 4):
        check(shapes, padded_sizes(shapes))
    with mock.patch.object(padding, "_MAX_PARTS", len(shapes)):
        assert padded_sizes(shapes).boxes == exact.boxes


def test_three_kinds_get_a_box_each():
    shapes = np.array([[4, 8]] * 5 + [[8, 4]] * 3 + [[2, 2]] * 9)
    sizes = padded_sizes(shapes)
    assert sizes.boxes == ((2, 2), (4, 8), (8, 4))
    np.testing.assert_array_equal(sizes.member, [1] * 5 + [2] * 3 + [0] * 9)
    assert sizes.padding == 0


def test_one_size_is_one_box():
    assert padded_sizes(np.array([[3, 5]] * 4)).boxes == ((3, 5),)


def test_three_hundred_sizes_are_tight():
    rng = np.random.default_rng(0)
    shapes = np.unique(rng.integers(4, 60, (330, 2)), axis=0)
    sizes = padded_sizes(np.repeat(shapes, 3, axis=0))
    assert len(sizes.boxes) <= MAX_SIZES
    assert sizes.padding < 0.62


def test_many_sizes_need_little_memory_and_lose_little():
    # As many as PANDA has slides; a cut between any two of them would take 5 GiB.
    shapes = np.random.default_rng(0).integers(4, 400, (10_616, 2))
    tracemalloc.start()
    sizes = padded_sizes(shapes)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    got = check(shapes, sizes)
    with mock.patch.object(padding, "_MAX_PARTS", 64):
        assert check(shapes, padded_sizes(shapes)) <= 1.05 * got
