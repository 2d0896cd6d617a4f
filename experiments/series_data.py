"""Series whose label takes detail and most of the series: which of four tones occurs most often?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PITCHES = (0.16, 0.24, 0.32, 0.4)
"""Of the tones, in cycles per step: too high to be seen when four steps are averaged to one."""
CLASSES = len(PITCHES)
NOISE = 0.4
"""Standard deviation of the noise; a tone's amplitude is 1."""


class Samples(NamedTuple):
    """Series and what is known of them."""

    series: np.ndarray
    """`float32 [n, T, 1]`."""
    labels: np.ndarray
    """`int32 [n]`, the most frequent tone."""
    early: np.ndarray
    """`int [n, CLASSES]`, how many of each tone begin in the first quarter."""


def make_samples(count: int, *, length: int, tone: int, seed: int) -> Samples:
    """Makes series of noise with short tones at random places.

    Args:
        count: n.
        length: T, at least 14 times `tone`.
        tone: steps of a tone.
        seed: each series is a function of it and of its own number only.
    """
    steps = np.arange(tone)
    # They rise and fade: an edge would be a sound of its own.
    shapes = np.sin(2 * np.pi * np.outer(PITCHES, steps)) * np.sin(np.pi * (steps + 0.5) / tone)
    series = np.zeros((count, length, 1), np.float32)
    labels = np.zeros(count, np.int32)
    early = np.zeros((count, CLASSES), int)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        labels[number] = rng.integers(CLASSES)
        times = rng.integers(1, 4, CLASSES)
        times[labels[number]] = 5
        kinds = rng.permutation(np.repeat(np.arange(CLASSES), times))
        # The free steps are shared out among the gaps, so tones never overlap.
        starts = np.sort(rng.integers(0, length - len(kinds) * tone + 1, len(kinds)))
        starts += np.arange(len(kinds)) * tone
        series[number, :, 0] = NOISE * rng.normal(size=length)
        for kind, start in zip(kinds, starts, strict=True):
            series[number, start : start + tone, 0] += shapes[kind]
        np.add.at(early[number], kinds[starts < length // 4], 1)
    return Samples(series, labels, early)


def counting_a_quarter(samples: Samples) -> float:
    """Accuracy of counting the first quarter's tones without error; ties are broken by chance."""
    best = samples.early == samples.early.max(1, keepdims=True)
    return float((best[np.arange(len(best)), samples.labels] / best.sum(1)).mean())
