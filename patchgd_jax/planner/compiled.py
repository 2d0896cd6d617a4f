"""Memory of a step as XLA compiles it, from shapes alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from patchgd_jax.engine.compiling import Compiled, allotted, compiler_options
from patchgd_jax.planner.methods import Method, Program, step_of
from patchgd_jax.planner.request import PlanRequest


def compile_program(program: Program) -> tuple[Compiled, Any]:
    """Compiles a program as `train` does; returns its memory and the compiled program."""
    # For training only: an evaluation recomputes nothing.
    options = compiler_options() if program.donated else None
    jitted = jax.jit(program.function, donate_argnums=program.donated, compiler_options=options)
    compiled = jitted.lower(*program.arguments).compile()
    return allotted(compiled, program.resident), compiled


def compiled_total(
    request: PlanRequest, method: Method, *, side: int | None = None, evaluation: bool = True
) -> int:
    """Compiles a method for its bytes: the larger of its training and its evaluation step.

    Arguments and errors are those of `step_of`; without `evaluation` only training is compiled.
    """
    step = step_of(request, method, side)
    programs = (step.train, step.evaluate) if evaluation else (step.train,)
    return max(compile_program(program)[0].total for program in programs)


class Line(NamedTuple):
    """Bytes as an affine function of a size: batch, patches, or pixels."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, int]]) -> Line:
        """Fits a line by least squares; a constant through one point."""
        if len({x for x, _ in points}) < 2:
            return cls(float(points[0][1]), 0.0)
        sizes, totals = np.array(points, np.float64).T
        slope, fixed = np.polyfit(sizes, totals, 1)
        return cls(float(fixed), float(slope))

    def at(self, size: float) -> float:
        """Evaluates the line: bytes at a size."""
        return self.fixed + self.slope * size

    def largest(self, budget: float) -> float:
        """Inverts the line: the size that takes the budget; infinite where size costs nothing."""
        if self.slope <= 0:
            return float("inf") if self.fixed <= budget else 0.0
        return max(0.0, (budget - self.fixed) / self.slope)
