"""Slices of maps that the taps of a kernel meet.

Written in `lax`: tracing thousands of array operators takes most of a trace's time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array, lax


class Reach(NamedTuple):
    """Along one axis, the outputs that a kernel tap contributes to and the inputs it reads."""

    first: int
    last: int
    start: int

    @classmethod
    def of(cls, tap: int, inputs: int, outputs: int, stride: int, padding: int) -> Reach:
        """The reach of a tap between axes of so many inputs and outputs."""
        first = max(0, -((tap - padding) // stride))
        last = min(outputs - 1, (inputs - 1 + padding - tap) // stride)
        return cls(first, last, first * stride + tap - padding)

    def inputs(self, stride: int) -> slice:
        """The inputs that the tap reads."""
        return slice(self.start, self.start + stride * (self.last - self.first) + 1, stride)

    def outputs(self) -> slice:
        """The outputs that the tap contributes to."""
        return slice(self.first, self.last + 1)

    def margin(self, outputs: int) -> tuple[int, int]:
        """The numbers of outputs before and after those that the tap contributes to."""
        return self.first, outputs - 1 - self.last


def reaches(
    x: tuple[int, ...], y: tuple[int, ...], side: int, stride: int, padding: int
) -> list[tuple[int, int, Reach, Reach]]:
    """The taps that touch any pixel at all, with what they touch."""
    return [
        (i, j, rows, cols)
        for i in range(side)
        for j in range(side)
        if (rows := Reach.of(i, x[1], y[1], stride, padding)).last >= rows.first
        and (cols := Reach.of(j, x[2], y[2], stride, padding)).last >= cols.first
    ]


def output_size(shape: tuple[int, ...], side: int, stride: int, padding: int) -> tuple[int, int]:
    """Rows and columns of a convolution's result for `x` of a shape `[M, H, W, C]`."""
    return (
        (shape[1] + 2 * padding - side) // stride + 1,
        (shape[2] + 2 * padding - side) // stride + 1,
    )


def crop(x: Array, rows: slice, cols: slice) -> Array:
    """`x[:, rows, cols]` of `x [M, H, W, C]`, for slices within it."""
    count, _, _, channels = x.shape
    start, stop = (0, rows.start, cols.start, 0), (count, rows.stop, cols.stop, channels)
    if rows.step in (None, 1) and cols.step in (None, 1):
        return x if stop == x.shape and not any(start) else lax.slice(x, start, stop)
    return lax.slice(x, start, stop, (1, rows.step or 1, cols.step or 1, 1))


def tap(w: Array, i: int, j: int) -> Array:
    """`w[i, j]` of `w [k, k, C, F]`."""
    return lax.squeeze(lax.slice(w, (i, j, 0, 0), (i + 1, j + 1, *w.shape[2:])), (0, 1))


def pad(x: Array, rows: tuple[int, int], cols: tuple[int, int]) -> Array:
    """`x [M, H, W, C]` with zeros before and after its rows and columns."""
    if not any((*rows, *cols)):
        return x
    around = [(0, 0, 0), (*rows, 0), (*cols, 0), (0, 0, 0)]
    return lax.pad(x, np.zeros((), x.dtype), around)
