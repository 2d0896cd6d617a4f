"""The memory planner: what training takes, why, and the largest setting that fits.

`PlanRequest` holds the settings that memory depends on. `Estimator` estimates every method's memory
on any device, `compiled_total` compiles for this one, `measure` runs real steps, and `solve` finds
the largest setting for a budget.
"""

from patchgd_jax.planner.compiled import Line, compile_program, compiled_total
from patchgd_jax.planner.errors import MeasureError, MemoryBudgetError
from patchgd_jax.planner.estimate import Estimator
from patchgd_jax.planner.explain import explain
from patchgd_jax.planner.layers import encoder_table
from patchgd_jax.planner.measure import (
    Calibration,
    Measured,
    PeakMeter,
    calibrate,
    calibration,
    keep_calibration,
    measure,
)
from patchgd_jax.planner.methods import METHODS, Method, step_of
from patchgd_jax.planner.request import PlanRequest
from patchgd_jax.planner.size import device_limit, free_memory, parse_size, show_size
from patchgd_jax.planner.solver import Quantity, solve

__all__ = [
    "METHODS", "Calibration", "Estimator", "Line", "MeasureError", "Measured", "MemoryBudgetError",
    "Method", "PeakMeter", "PlanRequest", "Quantity", "calibrate", "calibration",
    "compile_program", "compiled_total", "device_limit", "encoder_table", "explain", "free_memory",
    "keep_calibration", "measure", "parse_size", "show_size", "solve", "step_of",
]  # fmt: skip
