"""The command line: `patchgd-jax train | resume | evaluate | predict | ...`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

from patchgd_jax._version import __version__
from patchgd_jax.cli.data import data_command
from patchgd_jax.cli.options import PROGRAM, Command, command, parse_options
from patchgd_jax.cli.plan import plan_command
from patchgd_jax.config import TrainConfig, to_dict
from patchgd_jax.config.presets import PRESETS, get_preset
from patchgd_jax.errors import ConfigError, PatchGDError, unknown_name

if TYPE_CHECKING:
    from patchgd_jax.runs.record.progress import Progress

Device = Literal["auto", "cpu", "gpu", "tpu"]
Checkpoint = Literal["best", "last"]
AsJson = Annotated[bool, arg(name="json"), FlagCreatePairsOff]


@dataclass(frozen=True)
class RunOptions:
    """Settings of a run, and options beside them."""

    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    budget: str | None = None
    """Memory that auto settings must fit, such as 8GiB. None: the device's free memory."""


@dataclass(frozen=True)
class Peers:
    """The process group of a run; options left out come from the environment."""

    coordinator: str | None = None
    """host:port of process 0 of a run of several processes; auto: jax finds it (Cloud TPU). None:
    $PATCHGD_COORDINATOR, or Slurm, Open MPI or GKE, if there are several."""
    processes: int | None = None
    """Number of processes of the run. None: $PATCHGD_PROCESSES."""
    process: int | None = None
    """Number of this process, from 0. None: $PATCHGD_PROCESS."""

    def join(self, device: str) -> Progress:
        """Joins the other processes, if any; returns the progress display of this one."""
        from patchgd_jax.engine.devices import select_device
        from patchgd_jax.engine.distributed import check_same, initialize, is_first
        from patchgd_jax.runs.record.progress import ConsoleProgress, Progress

        if initialize(self.coordinator, self.processes, self.process):
            select_device(device, shared=True)
            # At once: a first exchange does not wait for long, and reading data may differ.
            check_same({})
        return ConsoleProgress() if is_first() else Progress()


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of `train`."""

    peers: Annotated[Peers, arg(name="")] = field(default_factory=Peers)
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Compile everything, run two steps, an evaluation batch, a save and a restore, and compare the
    memory with the plan; no run folder is left."""


def train_command(arguments: Sequence[str]) -> None:
    """Train a model: train [PRESET] [--SETTING VALUE ...]."""
    options, run_dir = run_options(TrainOptions, "train", "Train a model.", arguments)
    progress = options.peers.join(options.config.device)

    if options.dry_run:
        from patchgd_jax.runs.dry_run import dry_run

        dry_run(options.config, progress, budget=options.budget)
        return

    from patchgd_jax.engine.distributed import broadcast_from_first, is_first
    from patchgd_jax.runs.folder import EXAMPLES
    from patchgd_jax.runs.train import train

    # Its name may be the time, which processes do not share.
    run_dir = broadcast_from_first(lambda: run_dir)
    config = dataclasses.replace(options.config, run_dir=run_dir)
    train(config, run_dir, progress=progress, budget=options.budget)
    if not is_first():
        return
    examples = sorted((Path(run_dir) / EXAMPLES).glob("*.png"))
    image = examples[0] if examples else "IMAGE"
    print(f"Try it on an image:  {PROGRAM} predict {run_dir} {image}")


Options = TypeVar("Options", bound=RunOptions)


def run_options(
    kind: type[Options], command: str, about: str, arguments: Sequence[str]
) -> tuple[Options, str]:
    """Parses options on top of a preset's settings; returns them and the run folder."""
    options, preset = parse_options(kind, command, about, arguments)
    run_dir = options.config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{preset}"
    config = dataclasses.replace(options.config, run_dir=run_dir)
    return dataclasses.replace(options, config=config), run_dir


def cross_validate_command(arguments: Sequence[str]) -> None:
    """Train a run for each fold of your images, and average their scores."""
    options, folder = run_options(
        RunOptions, "cross-validate", "Train a run for each fold.", arguments
    )

    from patchgd_jax.runs.cross_validation import RESULT, cross_validate
    from patchgd_jax.runs.record.progress import ConsoleProgress, describe

    result = cross_validate(options.config, folder, progress=ConsoleProgress, budget=options.budget)
    print()
    for fold, score in result["folds"].items():
        print(f"fold {fold}  {describe(score)}")
    for name, mean in result["mean"].items():
        print(f"{name}: {mean:.4f} +- {result['std'][name]:.4f} (standard deviation over folds)")
    print(f"Written to {Path(folder) / RESULT}")


@command("resume")
def resume_command(
    run: Positional[str],
    accept_changed_data: FlagCreatePairsOff[bool] = False,
    mesh: str | None = None,
    peers: Annotated[Peers, arg(name="")] = Peers(),
) -> None:
    """Continue an interrupted run from its newest intact checkpoint.

    Args:
        run: Run folder.
        accept_changed_data: Go on although images, labels or splits have changed.
        mesh: How the devices now share the work: data=2,patch=4, or auto. None: as before.
        peers: The processes of the run.
    """
    from patchgd_jax.runs.folder import RunFolder
    from patchgd_jax.runs.train import resume

    progress = peers.join(RunFolder(run).config().device)
    resume(run, progress=progress, accept_changed_data=accept_changed_data, mesh=mesh)


@command("evaluate")
def evaluate_command(
    run: Positional[str],
    split: Literal["validation", "test"] = "validation",
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a run's checkpoint again, and compare with the run's log.

    Args:
        run: Run folder.
        split: Images to score: validation (it chose the best checkpoint), or the held-out test.
        checkpoint: The one with the best validation score, or the last.
        device: Device to run on.
        as_json: Print one JSON object.
    """
    model, progress = _load(run, checkpoint, device)
    metrics = model.evaluate(progress, split)
    if as_json:
        print(json.dumps(metrics))
        return
    from patchgd_jax.runs.record.progress import describe

    print(f"step {metrics['step']}: {describe(metrics)}")
    recorded = metrics["recorded"]
    if split == "validation":
        print(f"recorded in training: {describe(recorded) if recorded else 'nothing'}")
    if "confusion_matrix" not in metrics:
        return
    print("confusion matrix (rows: label, columns: prediction):")
    for name, row in zip(model.preprocess.class_names, metrics["confusion_matrix"], strict=True):
        print(f"{name:>6} " + " ".join(f"{count:5d}" for count in row))


@command("predict")
def predict_command(
    run: Positional[str],
    images: Positional[tuple[str, ...]],
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Label image files of any size with a trained run.

    Args:
        run: Run folder.
        images: Image files or slides.
        checkpoint: The one with the best validation score, or the last.
        device: Device to run on.
        as_json: Print one JSON list.
    """
    if not images:
        raise ConfigError(f"no image named; usage: {PROGRAM} predict RUN IMAGE [IMAGE ...]")
    model, _ = _load(run, checkpoint, device)
    results = model.predict_files(images)
    if as_json:
        print(json.dumps(results))
        return
    for result in results:
        odds = sorted(result.get("probabilities", {}).items(), key=lambda item: -item[1])
        listed = "  ".join(f"{name}: {value:.3f}" for name, value in odds)
        label = result["label"]
        if isinstance(label, list):
            label = ", ".join(label) or "none"
        print(f"{result['image']}  label {label}{f'  ({listed})' if listed else ''}")


@command("export")
def export_command(
    run: Positional[str], to: Literal["safetensors"] = "safetensors", output: str | None = None
) -> None:
    """Write a run's best model as model.safetensors and preprocess.json.

    The encoder has the tensor names of torchvision or timm where it has published ones; latent
    layer and head stand beside it under names that begin with `patchgd.`.

    Args:
        run: Run folder.
        to: File format.
        output: Folder to make; must not hold anything. None: RUN/export.
    """
    from patchgd_jax.engine.devices import select_device
    from patchgd_jax.runs.export import export_run
    from patchgd_jax.runs.record.progress import StderrProgress

    select_device("cpu")
    print(f"Weights: {export_run(run, output, StderrProgress())}")


@command("presets")
def presets_command(name: Positional[str | None] = None) -> None:
    """List the presets, or show every setting of one as JSON.

    Args:
        name: Preset to show.
    """
    if name is not None:
        print(json.dumps(to_dict(get_preset(name)), indent=2))
        return
    for key, preset in PRESETS.items():
        print(f"{key:<14} {preset.about}")


def _load(run: str, checkpoint: Checkpoint, device: Device) -> tuple[Any, Any]:
    from patchgd_jax.engine.compiling import use_compilation_cache
    from patchgd_jax.engine.devices import select_device
    from patchgd_jax.runs.predict import TrainedModel
    from patchgd_jax.runs.record.progress import StderrProgress

    select_device(device)
    use_compilation_cache()
    progress = StderrProgress()
    return TrainedModel(run, checkpoint, progress), progress


COMMANDS: dict[str, Command] = {
    "train": train_command,
    "resume": resume_command,
    "cross-validate": cross_validate_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "export": export_command,
    "presets": presets_command,
    "data": data_command,
    "plan": plan_command,
}


def _usage() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND [ARGUMENTS] [--debug]",
        "",
        "Train an ordinary network on very large images, end to end, with Patch Gradient Descent.",
        "",
        *(f"  {name:<14} {function.__doc__}" for name, function in COMMANDS.items()),
        "",
        f"{PROGRAM} COMMAND --help shows a command's settings. --debug adds tracebacks to errors.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for a defect, or that of a `PatchGDError`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        COMMANDS[name](rest)
        sys.stdout.flush()
        return 0
    except PatchGDError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of the output has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(
            f"error: a defect of {PROGRAM}: {type(error).__name__}: {error}\n"
            "Please report it with the output of the same command and --debug.",
            file=sys.stderr,
        )
        return 1


def run() -> None:
    """Entry point of the console script."""
    code = main()
    if code:
        from patchgd_jax.engine.distributed import exit_now

        exit_now(code)
    sys.exit(code)
