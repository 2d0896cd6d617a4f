"""`patchgd-jax plan`: memory of a run, and the largest setting that fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from patchgd_jax.cli.options import PROGRAM, parse_options
from patchgd_jax.config import TrainConfig, flatten, to_dict
from patchgd_jax.config.presets import get_preset

if TYPE_CHECKING:
    from patchgd_jax.planner import Estimator, Method
    from patchgd_jax.planner.report import PlanRow


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`, beside the settings of `train`."""

    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    budget: str | None = None
    """Memory to fit in, such as 8GiB, or auto for the device's memory. None: no budget."""
    methods: tuple[str, ...] = ("all",)
    """Methods to compare: gd, gd-extended, gd-remat, downscale, patchwise, fully-conv, mil, ips,
    and PatchGD's modes patchgd, accumulate, exact, full; or all."""
    tier: Literal["estimate", "compile", "profile"] = "estimate"
    """estimate: from shapes, for any device, in seconds, within about 25 % of the compiled figure.
    compile: XLA's own figure. profile: as compile, and real steps of the run's own method in
    separate processes; it calibrates later plans."""
    solve: tuple[str, ...] = ()
    """Find the largest batch, fraction, patch or image that fits the budget, checked by a
    compile."""
    explain: Annotated[bool, FlagCreatePairsOff] = False
    """Work out the textbook sums, and show why training takes more."""
    layers: Annotated[bool, FlagCreatePairsOff] = False
    """Show the memory of each layer of the encoder for one patch."""
    plot: str | None = None
    """PNG file to draw: memory against image side, for each method."""
    as_json: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False
    """Print one JSON object."""


def plan_command(arguments: Sequence[str]) -> None:
    """Estimate a run's memory for each method, and find the largest setting that fits."""
    about = "Plan a run; --budget 8GiB sets the limit; only --tier profile allocates memory."
    options, preset = parse_options(PlanOptions, "plan", about, arguments)
    result = make_plan(options, preset)
    print(json.dumps(result.pop("json"), indent=2) if options.as_json else result["text"])


def make_plan(options: PlanOptions, preset: str = "default") -> dict[str, Any]:
    """Makes a plan; the printed `train` command starts from `preset`.

    Returns:
        `text`, and `json` with the same figures in bytes.

    Raises:
        ConfigError: for an unknown size, method or quantity, or settings that no method supports.
        DeviceError: if the device is missing.
        MemoryBudgetError: if the budget is below the parameters, or the smallest value of a
            quantity in `solve` does not fit.
    """
    from patchgd_jax import planner
    from patchgd_jax.baselines.registry import WHOLE_IMAGE
    from patchgd_jax.engine.build import check_settings
    from patchgd_jax.errors import ConfigError, unknown_name
    from patchgd_jax.planner.methods import encoder_inputs
    from patchgd_jax.planner.report import layer_lines, method_lines, plot_sweep, sweep
    from patchgd_jax.planner.run_plan import plan_of, planned_method

    show_size = planner.show_size
    for name in options.methods:
        if options.methods != ("all",) and name not in planner.METHODS:
            raise unknown_name("method", name, planner.METHODS)
    given = options.budget not in (None, "auto")
    budget, source = planner.parse_size(options.budget or "") if given else None, "given"
    if options.solve and options.budget is None:
        raise ConfigError("--solve needs a --budget: a size such as 8GiB, or auto")
    config, device = _resolved(options)
    # The size of generated images is known without drawing any.
    generated = config.data.generated
    request = planner.PlanRequest.from_config(config) if generated else plan_of(config).requests[0]
    if options.budget == "auto":
        budget, source = planner.device_limit(device)
    chosen, measured = planned_method(config), {}
    if options.tier == "profile":
        peak = planner.calibrate(request, chosen, platform=device.platform).peak
        measured = {chosen: peak}
    known = planner.calibration(device)
    estimator = planner.Estimator(request)
    room = None if budget is None else known.within(budget)
    rows, refused = _rows(options, estimator, room, measured)
    if not rows:
        check_settings(config)
        raise ConfigError(refused.get(chosen, min(refused.values())))
    least = min(plan.row.parameters for plan in rows)
    if budget is not None and budget < least:
        raise planner.MemoryBudgetError(
            f"the budget of {show_size(budget)} is below the parameters, which alone take "
            f"{show_size(least)}; give more memory, or take a smaller --model.encoder"
        )

    height, width, channels = request.image
    seen = f", seen whole ({config.method})"
    if config.method not in WHOLE_IMAGE:
        patches = f"{request.sampled} of {request.grid.num_patches}"
        seen = f"; patches of {request.patchgd.patch} px, {patches} at a time"
    lines = [
        f"{request.model.encoder} + {request.model.head}, {request.model.dtype}, "
        f"{config.optimizer.name}; images {height} x {width} x {channels}, batch "
        f"{request.batch}{seen}",
        f"Steps take {known.factor:.2f} times XLA's figure on {device.device_kind}"
        + (f" and up to {show_size(known.overhead + known.kept)}" if known.overhead else "")
        + (" (measured here)." if known.measured else " (a first guess: --tier profile)."),
    ]
    if budget is not None:
        lines.append(f"Budget: {show_size(budget)} ({source}).")
    lines += ["", *method_lines(rows, refused, budget, known)]
    figures: dict[str, Any] = {
        "request": {**dataclasses.asdict(request), "image": request.image},
        "budget": budget,
        "calibration": known._asdict(),
        "methods": [plan.as_dict(budget, known) for plan in rows],
        "not_possible": refused,
    }
    if options.layers or options.as_json:
        table = planner.encoder_table(request.model, channels, (request.patchgd.patch,) * 2)
        lines += ["", "The encoder, one patch:", *layer_lines(table)]
        figures["layers"] = [layer._asdict() for layer in table.layers]
    if options.explain:
        plan = next((p for p in rows if p.row.method == chosen), rows[0])
        _, size = encoder_inputs(request, plan.row.method)
        table = planner.encoder_table(request.model, channels, size)
        figures["explanation"] = planner.explain(request, table, plan.row, compiled=plan.compiled)
        lines += ["", *figures["explanation"]]
    figures["answers"] = []
    quantities: Any = options.solve
    for quantity in quantities:
        answer = planner.solve(request, chosen, quantity, budget or 0, expected=known.expected)
        command = train_arguments(config, answer.request, preset)
        lines += [
            "",
            f"Largest {quantity} for {chosen}: {answer.value:g}, {show_size(answer.bytes)} "
            f"({answer.compiles} compiles)",
            f"Run:  {command}",
        ]
        answered = {k: v for k, v in answer._asdict().items() if k != "request"}
        figures["answers"].append({**answered, "command": command})
    if options.plot is not None:
        longest = max(height, width)
        sides = sorted({s for p in range(-3, 4) if (s := int(longest * 2.0**p)) >= 32})
        swept = sweep(estimator, [p.row.method for p in rows], sides)
        plot_sweep(swept, budget, Path(options.plot))
        lines += ["", f"Wrote {options.plot}"]
    return {"text": "\n".join(lines), "json": figures}


def _resolved(options: PlanOptions) -> tuple[TrainConfig, Any]:
    """Resolves all settings of the run, and selects its device."""
    from patchgd_jax.baselines.registry import resolve_method
    from patchgd_jax.data.sources.channels import resolve_channels
    from patchgd_jax.engine.compiling import use_compilation_cache
    from patchgd_jax.engine.devices import select_device
    from patchgd_jax.models.registry import head_entry
    from patchgd_jax.planner.auto_settings import is_resolved, resolve_auto
    from patchgd_jax.runs.record.progress import StderrProgress

    # Methods without Z would not look it up.
    head_entry(options.config.model.head)
    config = resolve_method(resolve_channels(options.config))
    device = select_device(config.device)
    use_compilation_cache()
    if not is_resolved(config):
        budget = None if options.budget == "auto" else options.budget
        config = resolve_auto(config, budget, StderrProgress().message)
    return config, device


def _rows(
    options: PlanOptions, estimator: Estimator, room: float | None, measured: dict[Method, int]
) -> tuple[list[PlanRow], dict[Method, str]]:
    """Returns each method's figures, or the reason why it is not possible."""
    from patchgd_jax import planner
    from patchgd_jax.errors import ConfigError
    from patchgd_jax.planner.report import PlanRow

    wanted: Any = planner.METHODS if options.methods == ("all",) else options.methods
    rows: list[PlanRow] = []
    refused: dict[Method, str] = {}
    for method in wanted:
        try:
            side = estimator.largest_side(room) if method == "downscale" else None
            row, compiled = estimator.row(method, side), None
            if options.tier != "estimate":
                compiled = planner.compiled_total(estimator.request, method, side=side)
        except ConfigError as error:
            refused[method] = str(error)
        else:
            rows.append(PlanRow(row, compiled, measured.get(method), side))
    return rows, refused


def train_arguments(config: TrainConfig, request: Any, preset: str) -> str:
    """Writes the `train` command of a request, with the settings that differ from the preset."""
    batch = {"batch_size": request.batch, "eval_batch_size": request.config.eval_batch_size}
    data = config.data
    if data.fit == "resize":
        height, width = (side * data.downscale for side in request.size)
        data = dataclasses.replace(data, size=(height, width))
    wanted = dataclasses.replace(config, data=data, patchgd=request.patchgd, **batch)
    base, now = flatten(to_dict(get_preset(preset))), flatten(to_dict(wanted))
    words = [PROGRAM, "train", *([preset] if preset != "default" else [])]
    for name, value in now.items():
        if value != base[name]:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)
