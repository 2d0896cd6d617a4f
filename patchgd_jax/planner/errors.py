"""What the planner says when nothing fits."""

from __future__ import annotations

from patchgd_jax.errors import PatchGDError


class MemoryBudgetError(PatchGDError):
    """The memory that is there is not enough, and no smaller setting helps."""

    exit_code = 4


class MeasureError(PatchGDError):
    """A step that was to be measured did not run."""

    exit_code = 4
