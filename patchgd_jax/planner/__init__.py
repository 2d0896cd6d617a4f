"""The memory planner: what training takes, why, and the largest setting that fits.

`PlanRequest` says what is planned. `method_table` gives every method's memory by formula,
`compiled_total` by XLA, `measure` by real steps, and `solve` the largest setting for a budget.
"""

from patchgd_jax.engine.compiling import Compiled
from patchgd_jax.planner.compiled import Line, compile_program, compiled_total
from patchgd_jax.planner.errors import MeasureError, MemoryBudgetError
from patchgd_jax.planner.explain import explain
from patchgd_jax.planner.formula import Formula, Row, method_table
from patchgd_jax.planner.layers import Layer, LayerTable, encoder_table, layer_table
from patchgd_jax.planner.liveness import TracedProgram
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
from patchgd_jax.planner.solver import QUANTITIES, Answer, Quantity, solve

__all__ = [
    "METHODS",
    "QUANTITIES",
    "Answer",
    "Calibration",
    "Compiled",
    "Formula",
    "Layer",
    "LayerTable",
    "Line",
    "MeasureError",
    "Measured",
    "MemoryBudgetError",
    "Method",
    "PeakMeter",
    "PlanRequest",
    "Quantity",
    "Row",
    "TracedProgram",
    "calibrate",
    "calibration",
    "compile_program",
    "compiled_total",
    "device_limit",
    "encoder_table",
    "explain",
    "free_memory",
    "keep_calibration",
    "layer_table",
    "measure",
    "method_table",
    "parse_size",
    "show_size",
    "solve",
    "step_of",
]
