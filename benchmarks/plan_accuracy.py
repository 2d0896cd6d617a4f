"""How near the planner's figures are to XLA's and to a measured step.

Command:   python benchmarks/plan_accuracy.py [--minutes 2]
Time:      about fifteen minutes on two CPU cores for everything; it stops after --minutes
Expected:  formula within 15 % of XLA's figure in 20 of 20 settings; a line through two compiles
           within 3 % of a compile on 12 shapes that it was not fitted on; XLA's figure with the
           calibration at least the measured peak, and at most 1.35 times it, in 20 of 20
"""

from __future__ import annotations

import argparse
import time

import jax
from record import record

import patchgd_jax as pgd
from patchgd_jax.compiling import use_compilation_cache
from patchgd_jax.memory import (
    Formula,
    Line,
    MeasureError,
    Method,
    PlanRequest,
    compile_program,
    measure,
    step_of,
)
from patchgd_jax.memory.measure import Calibration

# Encoder, image side, patch, batch, method.
SETTINGS = [
    (encoder, side, 64, batch, method)
    for side, batch, method in (
        (256, 4, "accumulate"),
        (256, 4, "gd"),
        (512, 2, "exact"),
        (384, 2, "patch-wise"),
    )
    for encoder in ("small-cnn", "deit-tiny", "resnet18", "mobilenet-v2", "convnext-v2-atto")
]
# Encoder, image side and method; the batches of the two compiles, and of those that are foretold.
FITS = [
    ("small-cnn", 256, "accumulate", (4, 16), (6, 8, 10, 12)),
    ("small-cnn", 512, "exact", (2, 8), (3, 4, 5, 6)),
    ("deit-tiny", 256, "accumulate", (4, 16), (6, 8, 10, 12)),
]


def request(encoder: str, side: int, patch: int, batch: int) -> PlanRequest:
    return PlanRequest(
        image=(side, side, 3),
        batch=batch,
        eval_batch=batch,
        model=pgd.ModelConfig(encoder=encoder),
        patchgd=pgd.PatchGDConfig(patch=patch, norm_policy="frozen"),
    )


def compiled_step(encoder: str, side: int, batch: int, method: Method) -> int:
    plan = request(encoder, side, 64, batch)
    return compile_program(step_of(plan, method).train)[0].total


def lines_through_two(until: float) -> list[dict[str, object]]:
    """How near lines are to compiles that they were not fitted on."""
    figures: list[dict[str, object]] = []
    for encoder, side, method, known, asked in FITS:
        if time.monotonic() > until:
            break
        line = Line.through([(b, compiled_step(encoder, side, b, method)) for b in known])
        for batch in asked:
            truth, told = compiled_step(encoder, side, batch, method), round(line.at(batch))
            figure = {"encoder": encoder, "side": side, "method": method, "batch": batch}
            figures.append({**figure, "compiled": truth, "line": told})
            print(f"{encoder:<17}{side:>5} {method:<12}batch {batch:<4}line/XLA {told / truth:.3f}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--no-measure", action="store_true")
    options = parser.parse_args()
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    use_compilation_cache()
    begun, figures = time.monotonic(), []
    for encoder, side, patch, batch, method in SETTINGS:
        if time.monotonic() - begun > 60 * options.minutes:
            break
        plan = request(encoder, side, patch, batch)
        formula = Formula(plan, platform).row(method).total
        compiled = compiled_step(encoder, side, batch, method)
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
        print(
            f"{encoder:<17}{side:>5} {method:<12}formula/XLA {formula / compiled:.3f}  {figure}",
            flush=True,
        )
    near = sum(abs(f["formula"] / f["compiled"] - 1) <= 0.15 for f in figures)
    summary = {"settings": len(figures), "formula_within_15_percent": near}
    measured = [f for f in figures if "measured" in f]
    if measured:
        factor = max(f["factor"] for f in measured)
        known = Calibration.of(jax.default_backend(), factor, measured=True)
        over = [known.expected(f["compiled"]) / f["measured"] for f in measured]
        summary |= {
            "measured": len(measured),
            "factor": known.factor,
            "least": min(over),
            "most": max(over),
            "at_least_the_peak": sum(x >= 1 for x in over),
            "at_most_1.35": sum(x <= 1.35 for x in over),
        }
    lines = lines_through_two(begun + 60 * options.minutes)
    off = [abs(f["line"] / f["compiled"] - 1) for f in lines]
    summary |= {"lines": len(off), "lines_within_3_percent": sum(x <= 0.03 for x in off)}
    print(summary)
    record("plan_accuracy", {"summary": summary, "settings": figures, "lines": lines})


if __name__ == "__main__":
    main()
