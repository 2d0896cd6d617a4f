"""Finds the largest batch, sampling fraction, patch or image that fits a budget.

Memory is nearly affine in each: two small compiles give a line, and the line an answer, which is
compiled with the next larger setting. Where memory is not affine, as where XLA takes another
convolution kernel, the search continues between the two settings nearest to the budget. Large sizes
compile as fast as small ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.registry import encoder_entry
from patchgd_jax.planner.compiled import Line, compiled_total
from patchgd_jax.planner.errors import MemoryBudgetError
from patchgd_jax.planner.methods import Method
from patchgd_jax.planner.request import PlanRequest, with_inner_steps, with_sampled
from patchgd_jax.planner.size import show_size

Quantity = Literal["batch", "fraction", "patch", "image"]
_LARGEST_BATCH = 4096
_LARGEST_SIDE = 2**17
_MOST_COMPILES = 10


class Answer(NamedTuple):
    """The largest setting that fits."""

    quantity: Quantity
    value: float
    """Images, a share of the patches, or pixels of a side."""
    request: PlanRequest
    """With that setting."""
    bytes: int
    """Expected bytes, from a compile of this very setting."""
    compiles: int
    next_value: float | None
    """The next larger setting. None: there is none."""
    next_bytes: int | None
    """Bytes of the next larger setting, by the line; more than the budget."""


class _Setting(NamedTuple):
    value: float
    size: float
    """The number that memory is affine in."""
    request: PlanRequest


def _settings(
    request: PlanRequest, quantity: Quantity, most_inner_steps: int | None
) -> list[_Setting]:
    """Lists the settings of a quantity, the smallest first."""
    patchgd = request.patchgd
    if quantity == "batch":
        batches = range(1, _LARGEST_BATCH + 1)
        least = request.config.eval_batch_size
        change = request.changed
        return [
            _Setting(b, b, change(batch_size=b, eval_batch_size=min(b, least))) for b in batches
        ]
    if quantity == "fraction":
        # From the most inner steps on; of those that sample equally many patches, the fewest.
        patches = request.patches
        epsilon = patchgd.epsilon if patchgd.mode == "patchgd" else 1
        most = patches if most_inner_steps is None else min(patches, most_inner_steps)
        steps = [j for j in range(1, most + 1) if j % epsilon == 0]
        if not steps:
            raise ConfigError(
                f"patchgd.epsilon {epsilon} is more than the {most} inner steps there can be"
            )
        fewest = {math.ceil(patches / inner): inner for inner in reversed(steps)}
        return [
            _Setting(1 / fewest[count], count, with_inner_steps(request, fewest[count]))
            for count in sorted(fewest)
        ]
    if quantity == "patch":
        entry = encoder_entry(request.model.encoder)
        unit = max(32, entry.side_multiple)
        sides = [s for s in range(unit, min(request.size) + 1, unit) if s >= entry.smallest_side]
        others = [
            request.changed(patchgd=dataclasses.replace(patchgd, patch=s, stride=None))
            for s in sides
        ]
    else:
        sides = list(range(patchgd.patch, _LARGEST_SIDE + 1, patchgd.patch))
        others = [dataclasses.replace(request, size=(s, s)) for s in sides]
    sampled = request.sampled
    return [
        _Setting(s, s * s, with_sampled(other, min(sampled, other.grid.num_patches)))
        for s, other in zip(sides, others, strict=True)
    ]


def solve(
    request: PlanRequest,
    method: Method,
    quantity: Quantity,
    budget: int,
    *,
    expected: Callable[[int], int] = lambda compiled: compiled,
    total: Callable[[PlanRequest], int] | None = None,
    most_inner_steps: int | None = None,
) -> Answer:
    """Finds the largest setting of one quantity that fits.

    For `patch` and `image`, the number of patches in an inner step stays the same.

    Args:
        request: the run to plan; its other settings stay.
        method: one of METHODS.
        quantity: the setting to maximise.
        budget: bytes.
        expected: bytes of a step as a function of the compiled figure: `Calibration.expected`.
        total: bytes of a setting. None: `compiled_total` of the method.
        most_inner_steps: most inner steps of a fraction. None: the patches of an image.

    Raises:
        MemoryBudgetError: if even the smallest setting does not fit.
        ConfigError: for an unknown quantity, or an epsilon that is more than the inner steps.
    """
    if quantity not in get_args(Quantity):
        raise unknown_name("quantity", quantity, get_args(Quantity))
    settings = _settings(request, quantity, most_inner_steps)
    known: dict[int, int] = {}

    def measure(index: int) -> int:
        if index not in known:
            of = total or (lambda r: compiled_total(r, method))
            known[index] = expected(of(settings[index].request))
        return known[index]

    last = len(settings) - 1
    if measure(0) > budget:
        raise MemoryBudgetError(
            f"{method} does not fit {show_size(budget)} with any {quantity}: with the smallest, "
            f"{settings[0].value:g}, it needs {show_size(known[0])}; give it more memory, take a "
            "smaller model or patch, or choose another method"
        )
    measure(min(last, max(1, min(3, last // 4))))
    while len(known) < _MOST_COMPILES:
        guess = _next_guess(known, settings, budget)
        if guess is None:
            break
        measure(guess)
    best = max(i for i, size in known.items() if size <= budget)
    chosen = settings[best]
    answer = Answer(quantity, chosen.value, chosen.request, known[best], len(known), None, None)
    if best == last:
        return answer
    above = settings[best + 1]
    estimated = math.ceil(_line(known, settings, best).at(above.size))
    return answer._replace(next_value=above.value, next_bytes=known.get(best + 1, estimated))


def _line(known: dict[int, int], settings: list[_Setting], near: int) -> Line:
    """Fits the line through the two compiled settings nearest to one."""
    nearest = sorted(known, key=lambda i: abs(settings[i].size - settings[near].size))[:2]
    return Line.through([(settings[i].size, known[i]) for i in nearest])


def _next_guess(known: dict[int, int], settings: list[_Setting], budget: int) -> int | None:
    """Chooses the setting to compile next; None if the largest that fits is known."""
    fits = max(i for i, size in known.items() if size <= budget)
    exceeds = min((i for i, size in known.items() if size > budget), default=len(settings))
    if exceeds <= fits + 1:
        return None
    if exceeds == len(settings):
        largest = _line(known, settings, fits).largest(budget)
    else:
        sides = [size <= budget for size in known.values()]
        if len(sides) >= 4 and sides[-1] == sides[-2]:
            # Twice on the same side of the budget: memory is not a line here.
            return (fits + exceeds) // 2
        points = [(settings[i].size, known[i]) for i in (fits, exceeds)]
        largest = Line.through(points).largest(budget)
    between = [settings[i].size for i in range(fits + 1, exceeds)]
    return fits + max(1, bisect.bisect_right(between, largest))
