"""How near the planner's figures are to XLA's and to a measured step.

Command:   python benchmarks/plan_accuracy.py [--redo estimate compiled measured lines]
Time:      about half an hour on two CPU cores for everything; what is not done again is taken from
           the result that there is
Expected:  estimate within 25 % of XLA's figure in 20 of 20 settings; a line through two compiles
           within 3 % of a compile on 12 shapes that it was not fitted on; XLA's figure with the
           calibration at least the measured peak, and at most 1.35 times it, in 20 of 20
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
from record import RESULTS, record

import patchgd_jax as pgd
from patchgd_jax.engine.compiling import use_compilation_cache
from patchgd_jax.planner import (
    Calibration,
    Estimator,
    Line,
    Measured,
    MeasureError,
    Method,
    PlanRequest,
    compile_program,
    measure,
    step_of,
)
from patchgd_jax.planner.estimate import Traces

TRACES = Traces()
PARTS = ("estimate", "compiled", "measured", "lines")
# Encoder, image side, patch, batch, method.
SETTINGS = [
    (encoder, side, 64, batch, method)
    for side, batch, method in (
        (256, 4, "accumulate"),
        (256, 4, "gd"),
        (512, 2, "exact"),
        (384, 2, "patchwise"),
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
    config = pgd.TrainConfig(
        data=pgd.DataConfig(channels=3),
        batch_size=batch,
        eval_batch_size=batch,
        model=pgd.ModelConfig(encoder=encoder),
        patchgd=pgd.PatchGDConfig(patch=patch, norm_policy="frozen"),
    )
    return PlanRequest(config, (side, side))


def compiled_step(encoder: str, side: int, batch: int, method: Method) -> int:
    plan = request(encoder, side, 64, batch)
    return compile_program(step_of(plan, method).train)[0].total


def lines_through_two() -> list[dict[str, Any]]:
    """How near lines are to compiles that they were not fitted on."""
    figures: list[dict[str, Any]] = []
    for encoder, side, method, known, asked in FITS:
        line = Line.through([(b, compiled_step(encoder, side, b, method)) for b in known])
        for batch in asked:
            truth, told = compiled_step(encoder, side, batch, method), round(line.at(batch))
            figure = {"encoder": encoder, "side": side, "method": method, "batch": batch}
            figures.append({**figure, "compiled": truth, "line": told})
            print(f"{encoder:<17}{side:>5} {method:<12}batch {batch:<4}line/XLA {told / truth:.3f}")
    return figures


def figure_of(
    encoder: str, side: int, patch: int, batch: int, method: Method, old: dict[str, Any], redo: Any
) -> dict[str, Any]:
    """One setting's figures: the old ones, or new ones where they are to be done again."""
    plan = request(encoder, side, patch, batch)
    figure: dict[str, Any] = {"encoder": encoder, "side": side, "batch": batch, "method": method}
    figure["estimate"] = old.get("estimate")
    if "estimate" in redo:
        figure["estimate"] = Estimator(plan, TRACES).row(method).total
    figure["compiled"] = old.get("compiled")
    if "compiled" in redo:
        figure["compiled"] = compiled_step(encoder, side, batch, method)
    if "measured" not in redo:
        return figure | {k: old[k] for k in ("measured", "error") if k in old}
    try:
        return figure | {"measured": measure(plan, method).peak}
    except MeasureError as error:
        return figure | {"error": str(error)}


def summary(figures: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [f["estimate"] / f["compiled"] for f in figures]
    result: dict[str, Any] = {
        "settings": len(figures),
        "estimate_within_25_percent": sum(abs(ratio - 1) <= 0.25 for ratio in ratios),
        "estimate_least": min(ratios),
        "estimate_most": max(ratios),
    }
    measured = [f for f in figures if "measured" in f]
    if measured:
        device = jax.devices()[0]
        runs = [
            Measured(f["measured"], f["compiled"], device.device_kind, device.platform)
            for f in measured
        ]
        factor = max(run.factor for run in runs)
        known = Calibration.of(device.platform, factor, measured=True)
        over = [known.expected(f["compiled"]) / f["measured"] for f in measured]
        result |= {
            "measured": len(measured),
            "factor": known.factor,
            "least": min(over),
            "most": max(over),
            "at_least_the_peak": sum(x >= 1 for x in over),
            "at_most_1.35": sum(x <= 1.35 for x in over),
        }
    off = [abs(f["line"] / f["compiled"] - 1) for f in lines]
    return result | {"lines": len(off), "lines_within_3_percent": sum(x <= 0.03 for x in off)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redo", nargs="+", choices=PARTS, default=PARTS)
    redo = parser.parse_args().redo
    use_compilation_cache()
    known: dict[str, Any] = {"settings": [], "lines": []}
    if set(redo) != set(PARTS):
        known = json.loads((RESULTS / "plan_accuracy.json").read_text())["figures"]
    names = ("encoder", "side", "batch", "method")
    old = {tuple(f[name] for name in names): f for f in known["settings"]}
    figures = []
    for encoder, side, patch, batch, method in SETTINGS:
        before = old.get((encoder, side, batch, method), {})
        figure = figure_of(encoder, side, patch, batch, method, before, redo)
        figures.append(figure)
        near = figure["estimate"] / figure["compiled"]
        print(f"{encoder:<17}{side:>5} {method:<12}estimate/XLA {near:.3f}  {figure}", flush=True)
    lines = lines_through_two() if "lines" in redo else known["lines"]
    print(summary(figures, lines))
    record(
        "plan_accuracy",
        {"summary": summary(figures, lines), "settings": figures, "lines": lines},
    )


if __name__ == "__main__":
    main()
