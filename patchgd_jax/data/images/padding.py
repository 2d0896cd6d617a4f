"""Buckets images of many sizes into few padded sizes, each with its own compiled programs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_SIZES = 3
"""A size has a program for training and one for evaluation: six programs at most."""

_MAX_PARTS = 512
"""Number of possible cuts of a row of rectangles; memory is quadratic in it."""


class Sizes(NamedTuple):
    """Padded sizes, and their assignment to images."""

    boxes: tuple[tuple[int, int], ...]
    """Heights and widths, at most `MAX_SIZES` of them."""
    member: np.ndarray
    """`int64 [n]`, index into `boxes`."""
    padding: float
    """Share of the padded area that is padding."""


def padded_sizes(shapes: np.ndarray, count: int = MAX_SIZES) -> Sizes:
    """Finds few boxes for many rectangles, with little padding.

    The rectangles are sorted by area, height, width and aspect ratio in turn, and each order is cut
    into `count` runs of the least total area of bounding boxes (dynamic programming, exact for up
    to 512 different rectangles; of more, neighbours stay together). The best order wins, and each
    rectangle then takes the smallest box that holds it.

    Args:
        shapes: `int [n, 2]`, heights and widths, n >= 1.
        count: largest number of boxes.
    """
    distinct, inverse, members = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    height, width = distinct[:, 0], distinct[:, 1]
    orders = (
        np.lexsort((width, height * width)),
        np.lexsort((width, height)),
        np.lexsort((height, width)),
        np.lexsort((height, height / width)),
    )
    cuts = (_cut(distinct[order], members[order], count) for order in orders)
    boxes = min(cuts, key=lambda cut: cut[0])[1]
    boxes = sorted(set(boxes), key=lambda box: (box[0] * box[1], box))
    fits = (distinct[:, None] <= np.array(boxes)).all(-1)
    # Sorted by area: the first that fits is the smallest.
    chosen = fits.argmax(1)
    used = sorted(set(chosen.tolist()))
    member = np.searchsorted(used, chosen)[inverse].astype(np.int64)
    kept = tuple(boxes[i] for i in used)
    area = float(sum(kept[m][0] * kept[m][1] for m in member))
    return Sizes(kept, member, 1 - float(np.prod(shapes, axis=1).sum()) / area)


def _cut(
    shapes: np.ndarray, members: np.ndarray, count: int
) -> tuple[float, list[tuple[int, int]]]:
    """Finds the cheapest cut of a row of rectangles into at most `count` runs.

    Returns:
        The padded area, and the bounding boxes of the runs.
    """
    parts = np.unique(np.linspace(0, len(shapes), _MAX_PARTS, endpoint=False, dtype=np.int64))
    shapes = np.maximum.reduceat(shapes, parts)
    members = np.add.reduceat(members, parts)
    n = len(shapes)
    before = np.concatenate([[0], np.cumsum(members)])
    # cost[i, j]: padded area of the run i..j.
    tallest = np.stack([np.maximum.accumulate(np.r_[np.zeros(i), shapes[i:, 0]]) for i in range(n)])
    widest = np.stack([np.maximum.accumulate(np.r_[np.zeros(i), shapes[i:, 1]]) for i in range(n)])
    cost = tallest * widest * (before[None, 1:] - before[:n, None])
    best = [cost[0]]
    starts: list[np.ndarray] = [np.zeros(n, np.int64)]
    for _ in range(1, count):
        # The last run starts at i, after the best cut of 0..i - 1.
        total = np.full((n, n), np.inf)
        total[0] = cost[0]
        total[1:] = best[-1][:-1, None] + cost[1:]
        total[np.arange(n)[:, None] > np.arange(n)] = np.inf
        starts.append(total.argmin(0))
        best.append(total.min(0))
    boxes: list[tuple[int, int]] = []
    end, run = n - 1, count - 1
    while end >= 0:
        start = int(starts[run][end])
        boxes.append((int(tallest[start, end]), int(widest[start, end])))
        end, run = start - 1, max(0, run - 1)
    return float(best[-1][-1]), boxes
