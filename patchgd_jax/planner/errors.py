"""Errors of the planner."""

from __future__ import annotations

from patchgd_jax.errors import PatchGDError


class MemoryBudgetError(PatchGDError):
    """The memory is not enough, and no smaller setting helps."""

    exit_code = 4


class MeasureError(PatchGDError):
    """A step to measure did not run."""

    exit_code = 4
