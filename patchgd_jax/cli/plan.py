"""`patchgd-jax plan`: what a run will take, and the largest one that fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from patchgd_jax.config import TrainConfig, flatten, to_dict
from patchgd_jax.config.presets import PRESETS, get_preset, preset_argument

if TYPE_CHECKING:
    from patchgd_jax.planner import PlanRequest

_PROGRAM = "patchgd-jax"


@dataclass(frozen=True)
class PlanOptions:
    """A plan; every other setting is one of `train`."""

    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    budget: str | None = None
    """Memory to fit in: 8GiB, say, or auto for what the device has. None: nothing is to fit."""
    methods: tuple[str, ...] = ("all",)
    """Methods to compare: gd, gd-extended, gd-remat, downscale, patchwise, fully-conv, mil, ips,
    and PatchGD's modes patchgd, accumulate, exact, full; or all."""
    tier: Literal["formula", "compile", "measure"] = "formula"
    """formula: sums over traced shapes, in seconds. compile: XLA's own figure. measure: as compile,
    and real steps of the run's own method in a process of their own; it calibrates later plans."""
    solve: tuple[str, ...] = ()
    """What is to be as large as the budget allows: batch, fraction, patch or image. It is proved by
    a compile."""
    explain: Annotated[bool, FlagCreatePairsOff] = False
    """Work the sums out that are done by hand, and say why the truth is more."""
    layers: Annotated[bool, FlagCreatePairsOff] = False
    """Show what each layer of the encoder takes for one patch."""
    plot: str | None = None
    """PNG file to draw: memory against the image's side, for each method."""
    as_json: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False
    """Print one JSON object."""


def plan_command(arguments: Sequence[str]) -> None:
    """Say what memory a run takes by every method, and the largest setting that fits."""
    preset, default, rest = preset_argument(arguments)
    options = tyro.cli(
        PlanOptions,
        prog=f"{_PROGRAM} plan {preset}",
        description=(
            f"Plan a run: {_PROGRAM} plan [PRESET] [--budget 8GiB] [--SETTING VALUE ...]. Presets: "
            f"{', '.join(PRESETS)}. Nothing is allocated but with --tier measure."
        ),
        args=rest,
        default=PlanOptions(config=default),
    )
    result = make_plan(options, preset)
    print(json.dumps(result.pop("json"), indent=2) if options.as_json else result["text"])


def make_plan(options: PlanOptions, preset: str = "default") -> dict[str, Any]:
    """Makes a plan.

    Args:
        options: what to plan and how.
        preset: where the settings started, for the command that is printed.

    Returns:
        `text`, and `json` with the same figures in bytes.

    Raises:
        ConfigError: for a size, method, quantity or setting that cannot be.
        DeviceError: if the device is not there.
        MemoryBudgetError: if the budget is below the parameters, or what is to be solved for does
            not fit at its smallest.
    """
    from patchgd_jax.baselines.registry import resolve_method
    from patchgd_jax.data.sources.channels import with_channels
    from patchgd_jax.engine.compiling import use_compilation_cache
    from patchgd_jax.engine.devices import select_device
    from patchgd_jax.errors import ConfigError, unknown_name
    from patchgd_jax.planner import (
        METHODS,
        Formula,
        MemoryBudgetError,
        PlanRequest,
        calibrate,
        calibration,
        compiled_total,
        device_limit,
        encoder_table,
        explain,
        parse_size,
        show_size,
        solve,
    )
    from patchgd_jax.planner.auto_settings import is_settled, settled
    from patchgd_jax.planner.methods import Method, encoder_inputs
    from patchgd_jax.planner.report import (
        PlanRow,
        layer_lines,
        method_lines,
        plot_sweep,
        sweep,
    )
    from patchgd_jax.planner.run_plan import plan_of, planned_method
    from patchgd_jax.runs.progress import StderrProgress

    wanted: tuple[Method, ...] = METHODS
    if options.methods != ("all",):
        for name in options.methods:
            if name not in METHODS:
                raise unknown_name("method", name, METHODS)
        wanted = options.methods  # type: ignore[assignment]
    budget = parse_size(options.budget) if options.budget not in (None, "auto") else None
    if options.solve and options.budget is None:
        raise ConfigError("--solve needs a --budget: a size such as 8GiB, or auto")
    config = resolve_method(with_channels(options.config))
    device = select_device(config.device)
    if not is_settled(config):
        given = None if options.budget == "auto" else options.budget
        config = settled(config, given, StderrProgress())
    # The size of generated images is known without drawing any.
    generated = config.data.generated
    request = PlanRequest.from_config(config) if generated else plan_of(config).requests[0]
    source = "given"
    if options.budget == "auto":
        budget, source = device_limit(device)
    use_compilation_cache()
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    chosen = planned_method(config)
    known = calibration(device)
    measured = None
    if options.tier == "measure":
        measured = calibrate(request, chosen, platform=device.platform)
        known = calibration(device)

    formula = Formula(request, platform)
    rows: list[PlanRow] = []
    refused: dict[Method, str] = {}
    for method in wanted:
        side = None
        try:
            if method == "downscale":
                side = formula.largest_side(None if budget is None else known.within(budget))
            row = formula.row(method, side)
            compiled = None
            if options.tier != "formula":
                compiled = compiled_total(request, method, side=side)
        except ConfigError as error:
            refused[method] = str(error)
            continue
        peak = measured.peak if measured is not None and method == chosen else None
        rows.append(PlanRow(row, compiled, peak, side))
    if not rows and len(wanted) == 1:
        raise ConfigError(f"{wanted[0]}: {refused[wanted[0]]}")
    least = min(plan.row.parameters for plan in rows)
    if budget is not None and budget < least:
        raise MemoryBudgetError(
            f"the budget of {show_size(budget)} is below the parameters, which alone take "
            f"{show_size(least)}; give more memory, or take a smaller --model.encoder"
        )

    height, width, channels = request.image
    lines = [
        f"{request.model.encoder} + {request.model.head}, {request.model.dtype}, "
        f"{request.optimizer.name}; images {height} x {width} x {channels}, batch "
        f"{request.batch}" + _patches_told(request, config.method),
        f"Steps take {known.factor:.2f} times XLA's figure on {device.device_kind}"
        + (f" and up to {show_size(known.overhead + known.kept)}" if known.overhead else "")
        + (" (measured here)." if known.measured else " (a first guess: --tier measure)."),
    ]
    if budget is not None:
        lines.append(f"Budget: {show_size(budget)} ({source}).")
    lines += ["", *method_lines(rows, refused, budget, known)]
    figures: dict[str, Any] = {
        "request": dataclasses.asdict(request),
        "budget": budget,
        "calibration": known._asdict(),
        "methods": [plan.as_dict(budget, known) for plan in rows],
        "not_possible": refused,
    }
    if options.layers or options.as_json:
        table = encoder_table(request)
        lines += ["", "The encoder, one patch:", *layer_lines(table)]
        figures["layers"] = [layer._asdict() for layer in table.layers]
    if options.explain:
        plan = next((p for p in rows if p.row.method == chosen), rows[0])
        _, size = encoder_inputs(request, plan.row.method)
        table = encoder_table(request, side=size)
        said = explain(request, table, plan.row, compiled=plan.compiled)
        lines += ["", *said]
        figures["explanation"] = said
    figures["answers"] = []
    for quantity in options.solve:
        answer = solve(request, chosen, quantity, budget or 0, expected=known.expected)  # type: ignore[arg-type]
        command = train_arguments(config, answer.request, preset)
        lines += [
            "",
            f"Largest {quantity} for {chosen}: {answer.value:g}, {show_size(answer.bytes)} "
            f"({answer.compiles} compiles)",
            f"Run:  {command}",
        ]
        figures["answers"].append(
            {
                **{k: v for k, v in answer._asdict().items() if k != "request"},
                "command": command,
            }
        )
    if options.plot is not None:
        longest = max(height, width)
        sides = sorted({s for p in range(-3, 4) if (s := int(longest * 2.0**p)) >= 32})
        plot_sweep(sweep(formula, [p.row.method for p in rows], sides), budget, Path(options.plot))
        lines += ["", f"Wrote {options.plot}"]
    return {"text": "\n".join(lines), "json": figures}


def _patches_told(request: PlanRequest, method: str) -> str:
    from patchgd_jax.baselines.registry import WHOLE_IMAGE

    if method in WHOLE_IMAGE:
        return f", seen whole ({method})"
    return (
        f"; patches of {request.patchgd.patch} px, {request.sampled} of "
        f"{request.grid.num_patches} at a time"
    )


def train_arguments(config: TrainConfig, request: Any, preset: str) -> str:
    """The command that trains with a request's settings, where they differ from the preset's."""
    batch = {"batch_size": request.batch, "eval_batch_size": request.eval_batch}
    data = config.data
    if data.fit == "resize":
        height, width = (side * data.downscale for side in request.image[:2])
        data = dataclasses.replace(data, size=(height, width))
    wanted = dataclasses.replace(config, data=data, patchgd=request.patchgd, **batch)
    base, now = flatten(to_dict(get_preset(preset))), flatten(to_dict(wanted))
    words = [_PROGRAM, "train", *([preset] if preset != "default" else [])]
    for name, value in now.items():
        if value != base[name]:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)
