"""How near the planner's figures are to XLA's and to a measured step.

Command:   python benchmarks/plan_accuracy.py [--minutes 2]
Time:      about ten minutes on two CPU cores for all settings; it stops after --minutes
Expected:  formula within 15 % of XLA's figure; XLA's figure with the calibration at least the
           measured peak, and at most 1.35 times it
"""

from __future__ import annotations

import argparse
import time

import jax
from record import record

import patchgd_jax as pgd
from patchgd_jax.memory import (
    Formula,
    MeasureError,
    PlanRequest,
    compile_program,
    measure,
    step_of,
)
from patchgd_jax.memory.measure import Calibration

# Encoder, image side, patch, batch, method.
SETTINGS = [
    (encoder, side, 64, batch, method)
    for encoder in ("small-cnn", "deit-tiny", "resnet18", "mobilenet-v2", "convnext-v2-atto")
    for side, batch, method in (
        (256, 4, "gd"),
        (256, 4, "accumulate"),
        (512, 2, "exact"),
        (384, 2, "patch-wise"),
    )
]


def request(encoder: str, side: int, patch: int, batch: int) -> PlanRequest:
    return PlanRequest(
        image=(side, side, 3),
        batch=batch,
        eval_batch=batch,
        model=pgd.ModelConfig(encoder=encoder),
        patchgd=pgd.PatchGDConfig(patch=patch, norm_policy="frozen"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--no-measure", action="store_true")
    options = parser.parse_args()
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    begun, figures = time.monotonic(), []
    for encoder, side, patch, batch, method in SETTINGS:
        if time.monotonic() - begun > 60 * options.minutes:
            break
        plan = request(encoder, side, patch, batch)
        formula = Formula(plan, platform).row(method).total
        compiled = compile_program(step_of(plan, method).train)[0].total
        figure = {
            "encoder": encoder,
            "side": side,
            "batch": batch,
            "method": method,
            "formula": formula,
            "compiled": compiled,
        }
        if not options.no_measure:
            try:
                run = measure(plan, method)
                figure |= {"measured": run.peak, "factor": run.factor}
            except MeasureError as error:
                figure["error"] = str(error)
        figures.append(figure)
        print(f"{encoder:<17}{side:>5} {method:<12}formula/XLA {formula / compiled:.3f}  {figure}")
    near = sum(abs(f["formula"] / f["compiled"] - 1) <= 0.15 for f in figures)
    summary = {"settings": len(figures), "formula_within_15_percent": near}
    measured = [f for f in figures if "measured" in f]
    if measured:
        known = Calibration(max(f["factor"] for f in measured), 24 * 2**20, True)
        over = [known.expected(f["compiled"]) / f["measured"] for f in measured]
        summary |= {"factor": known.factor, "least": min(over), "most": max(over)}
    print(summary)
    record("plan_accuracy", {"summary": summary, "settings": figures})


if __name__ == "__main__":
    main()
