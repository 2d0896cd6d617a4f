"""Padded sizes: every image fits, few sizes, and little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from patchgd_jax.data.images.padding import MAX_SIZES, padded_sizes


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
    return min(area(shapes, chosen) for chosen in itertools.combinations(boxes, count))


@pytest.mark.parametrize("seed", range(12))
def test_boxes_hold_all_and_are_near_the_best(seed):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, 7, (12, 2))
    sizes = padded_sizes(shapes)
    assert len(sizes.boxes) <= MAX_SIZES
    for (height, width), member in zip(shapes, sizes.member, strict=True):
        assert height <= sizes.boxes[member][0]
        assert width <= sizes.boxes[member][1]
    got = sum(np.prod(sizes.boxes[m]) for m in sizes.member)
    assert got == area(shapes, sizes.boxes)
    assert got <= 1.2 * best(shapes, MAX_SIZES)
    assert abs(sizes.padding - (1 - shapes.prod(1).sum() / got)) < 1e-12


def test_three_kinds_get_a_box_each():
    shapes = np.array([[4, 8]] * 5 + [[8, 4]] * 3 + [[2, 2]] * 9)
    sizes = padded_sizes(shapes)
    assert sizes.boxes == ((2, 2), (4, 8), (8, 4))
    np.testing.assert_array_equal(sizes.member, [1] * 5 + [2] * 3 + [0] * 9)
    assert sizes.padding == 0


def test_one_size_is_one_box():
    assert padded_sizes(np.array([[3, 5]] * 4)).boxes == ((3, 5),)


def test_three_hundred_sizes_are_quick_and_tight():
    rng = np.random.default_rng(0)
    shapes = np.unique(rng.integers(4, 60, (330, 2)), axis=0)
    sizes = padded_sizes(np.repeat(shapes, 3, axis=0))
    assert len(sizes.boxes) <= MAX_SIZES
    assert sizes.padding < 0.62
