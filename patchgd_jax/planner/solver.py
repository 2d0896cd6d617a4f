"""The largest batch, sampling fraction, patch or image that fits a budget.

Two small compiles give a line, and the line an answer. It is compiled, and so is the next larger
setting; where the law is no line, as where a convolution takes another kernel, the search goes on
between the two nearest to the budget. A step of the same form compiles as fast for large sizes as
for small ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.registry import encoder_entry
from patchgd_jax.planner.compiled import Line, compiled_total
from patchgd_jax.planner.errors import MemoryBudgetError
from patchgd_jax.planner.methods import Method
from patchgd_jax.planner.request import PlanRequest, with_inner_steps, with_sampled
from patchgd_jax.planner.size import show_size

Quantity = Literal["batch", "fraction", "patch", "image"]
QUANTITIES: tuple[Quantity, ...] = ("batch", "fraction", "patch", "image")

_LARGEST_BATCH = 4096
_LARGEST_SIDE = 2**17
_MOST_COMPILES = 10

Total = Callable[[PlanRequest], int]
"""Bytes that a setting takes."""


class Answer(NamedTuple):
    """The largest setting that fits."""

    quantity: Quantity
    value: float
    """Images, a share of the patches, or pixels of a side."""
    request: PlanRequest
    """With that setting."""
    bytes: int
    """What it is expected to take, from a compile of this very setting."""
    compiles: int
    next_value: float | None
    """The next larger setting; None if this is the largest there can be."""
    next_bytes: int | None
    """What the next larger setting takes, by the line; more than the budget."""


class _Scale(NamedTuple):
    """The settings in question, numbered from the smallest on."""

    length: int
    request: Callable[[int], PlanRequest]
    size: Callable[[int], float]
    """What memory is affine in."""
    value: Callable[[int], float]


def _scale(request: PlanRequest, quantity: Quantity, most_inner_steps: int | None) -> _Scale:
    height, width, channels = request.image
    if quantity == "batch":

        def with_batch(index: int) -> PlanRequest:
            scored = min(request.eval_batch, index + 1)
            return dataclasses.replace(request, batch=index + 1, eval_batch=scored)

        return _Scale(_LARGEST_BATCH, with_batch, lambda i: i + 1, lambda i: i + 1)
    if quantity == "fraction":
        # From the most inner steps on; of those that sample equally many patches, the fewest.
        patches, patchgd = request.patches, request.patchgd
        epsilon = patchgd.epsilon if patchgd.mode == "patchgd" else 1
        most = patches if most_inner_steps is None else min(patches, most_inner_steps)
        steps = [j for j in range(1, most + 1) if j % epsilon == 0]
        if not steps:
            raise ConfigError(
                f"patchgd.epsilon {epsilon} is more than the {most} inner steps there can be"
            )
        fewest = {math.ceil(patches / inner): inner for inner in reversed(steps)}
        inner_steps = [fewest[count] for count in sorted(fewest)]
        return _Scale(
            len(inner_steps),
            lambda i: with_inner_steps(request, inner_steps[i]),
            lambda i: math.ceil(patches / inner_steps[i]),
            lambda i: 1 / inner_steps[i],
        )
    sampled = request.sampled
    if quantity == "patch":
        entry = encoder_entry(request.model.encoder)
        unit = max(32, entry.side_multiple)
        sides = [s for s in range(unit, min(height, width) + 1, unit) if s >= entry.smallest_side]

        def with_patch(index: int) -> PlanRequest:
            patchgd = dataclasses.replace(request.patchgd, patch=sides[index], stride=None)
            other = dataclasses.replace(request, patchgd=patchgd)
            return with_sampled(other, min(sampled, other.grid.num_patches))

        return _Scale(len(sides), with_patch, lambda i: sides[i] ** 2, lambda i: sides[i])
    patch = request.patchgd.patch

    def with_image(index: int) -> PlanRequest:
        side = patch * (index + 1)
        other = dataclasses.replace(request, image=(side, side, channels))
        return with_sampled(other, min(sampled, other.grid.num_patches))

    def pixels(index: int) -> float:
        return (patch * (index + 1)) ** 2

    return _Scale(_LARGEST_SIDE // patch, with_image, pixels, lambda i: patch * (i + 1))


def solve(
    request: PlanRequest,
    method: Method,
    quantity: Quantity,
    budget: int,
    *,
    expected: Callable[[int], int] = lambda compiled: compiled,
    total: Total | None = None,
    most_inner_steps: int | None = None,
) -> Answer:
    """Finds the largest setting of one quantity that fits.

    For `patch` and `image`, the number of patches in an inner step stays what it is.

    Args:
        request: what is planned; its other settings stay.
        method: one of METHODS.
        quantity: what is to be as large as possible.
        budget: bytes.
        expected: what a step takes, given XLA's figure: `Calibration.expected`.
        total: bytes of a setting; None: `compiled_total` of the method.
        most_inner_steps: that a fraction may lead to; None: the patches of an image.

    Raises:
        MemoryBudgetError: if even the smallest setting does not fit.
        ConfigError: for an unknown quantity, or an epsilon that is more than the inner steps.
    """
    if quantity not in QUANTITIES:
        raise unknown_name("quantity", quantity, QUANTITIES)
    scale = _scale(request, quantity, most_inner_steps)
    known: dict[int, int] = {}

    def measure(index: int) -> int:
        if index not in known:
            of = total or (lambda r: compiled_total(r, method))
            known[index] = expected(of(scale.request(index)))
        return known[index]

    last = scale.length - 1
    if measure(0) > budget:
        raise MemoryBudgetError(
            f"{method} does not fit {show_size(budget)} with any {quantity}: with the smallest, "
            f"{scale.value(0):g}, it needs {show_size(known[0])}; give it more memory, take a "
            "smaller model or patch, or choose another method"
        )
    measure(min(last, max(1, min(3, last // 4))))
    while len(known) < _MOST_COMPILES:
        guess = _next_guess(known, scale, budget)
        if guess is None:
            break
        measure(guess)
    best = max(i for i, size in known.items() if size <= budget)
    following = best + 1 if best < last else None
    line = _line(known, scale, best)
    return Answer(
        quantity=quantity,
        value=scale.value(best),
        request=scale.request(best),
        bytes=known[best],
        compiles=len(known),
        next_value=None if following is None else scale.value(following),
        next_bytes=None
        if following is None
        else known.get(following, math.ceil(line.at(scale.size(following)))),
    )


def _line(known: dict[int, int], scale: _Scale, near: int) -> Line:
    """The line through the two compiled settings that are nearest to one."""
    nearest = sorted(known, key=lambda i: abs(scale.size(i) - scale.size(near)))[:2]
    return Line.through([(scale.size(i), known[i]) for i in nearest])


def _next_guess(known: dict[int, int], scale: _Scale, budget: int) -> int | None:
    """The setting to compile next; None if the largest that fits is known."""
    fits = max(i for i, size in known.items() if size <= budget)
    exceeds = min((i for i, size in known.items() if size > budget), default=scale.length)
    if exceeds <= fits + 1:
        return None
    sides = [size <= budget for size in known.values()]
    if exceeds < scale.length and len(sides) >= 4 and len(set(sides[-2:])) == 1:
        # Twice on the same side of the budget: the law is not a line here.
        return (fits + exceeds) // 2
    if exceeds < scale.length:
        points = [(scale.size(i), known[i]) for i in (fits, exceeds)]
        largest = Line.through(points).largest(budget)
    else:
        largest = _line(known, scale, fits).largest(budget)
    low, high = fits + 1, exceeds - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scale.size(middle) <= largest else (low, middle - 1)
    return low
