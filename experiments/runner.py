"""The command line of the experiments: trains what is missing, and reports on all of it.

    python experiments/NAME.py --scale smoke|cpu|paper [--seeds N] [--out DIR] [--only LABEL ...]

Each run is trained in a process of its own, so that its peak memory is its own. What is finished is
not trained again, and what was interrupted goes on, so the same command continues an experiment.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from collect import collect
from report import Figure, accuracy_against_memory, write_report
from runs import FAILURE, SCALES, Row, Run, Scale, runs_of

from patchgd_jax.errors import ConfigError, DiskError, PatchGDError, unknown_name
from patchgd_jax.io.files import write_json
from patchgd_jax.runs.signals import StopRequest, interrupted

RESULTS = Path(__file__).parent / "results"
_SEEDS = {"smoke": 1, "cpu": 3, "paper": 3}
_CHILD = Path(__file__).parent / "child.py"

Rows = Callable[[Scale, Path], list[Row]]
"""The rows of an experiment at a scale; the folder may take data that is made for them."""


def main(name: str, rows: Rows, figure: Figure = accuracy_against_memory) -> None:
    """Runs an experiment by the command line, and ends the process.

    Args:
        name: of the experiment, and of the files with its results.
        rows: makes its rows.
        figure: draws its picture.
    """
    try:
        _experiment(name, rows, figure)
    except PatchGDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _experiment(name: str, rows: Rows, figure: Figure) -> None:
    options = _options(name)
    if options.scale not in SCALES:
        raise unknown_name("scale", options.scale, SCALES)
    scale: Scale = options.scale
    seeds = _SEEDS[scale] if options.seeds is None else options.seeds
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; at least 1")
    with _folder(name, scale, options.out) as out, _locked(out) as lock:
        chosen = rows(scale, out)
        known = {row.label: row for row in chosen}
        for label in options.only:
            if label not in known:
                raise unknown_name("label", label, known)
        if options.only:
            chosen = [known[label] for label in known if label in options.only]
        runs = runs_of(chosen, seeds, out)
        for run in runs:
            run.check(accept_other_commit=options.accept_other_commit)
        with StopRequest() as stop:
            for number, run in enumerate(runs, 1):
                _say(f"[{number}/{len(runs)}] {run.row.label}, seed {run.seed}: ", end="")
                if not run.finished:
                    _train(run, scale, lock, stop)
                _say(collect(run).told())
        # A part of the experiment must not take the place of the whole.
        whole = not options.only and seeds >= _SEEDS[scale]
        results = [collect(run) for run in runs if run.row in chosen]
        where = RESULTS if scale == "cpu" and whole else out
        _say("\n" + write_report(name, scale, results, figure, where))
    codes = [run.failure["exit_code"] for run in runs if run.failure and not run.finished]
    if codes:
        _say(f"{len(codes)} runs failed; the same command tries them again")
        sys.exit(codes[0])


def _options(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", required=True, help=", ".join(SCALES))
    parser.add_argument("--seeds", type=int, help="seeds of each row; 3, or 1 at scale smoke")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the runs; runs/{name}-SCALE, or a temporary one at scale smoke",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="these rows alone")
    parser.add_argument(
        "--accept-other-commit",
        action="store_true",
        help="keep runs that other code has trained, and go on with them",
    )
    return parser.parse_args()


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def _folder(name: str, scale: Scale, out: Path | None) -> Any:
    """A context manager of the folder of the runs."""
    if out is None and scale == "smoke":
        return _temporary()
    return nullcontext(out or Path("runs") / f"{name}-{scale}")


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Keeps a second runner out of a folder.

    Yields:
        A descriptor that holds the lock. A child that has it, too, keeps the lock while it saves,
        if this process is killed before it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise ConfigError(
            f"another process is at work in {out}; wait for it, or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def _train(run: Run, scale: Scale, lock: int, stop: StopRequest) -> None:
    """Trains a run in a process of its own; if that fails, it writes down why.

    Raises:
        Interrupted: if a signal came, after the run has saved itself.
    """
    if not stop.signal_number:
        run.claim()
        code = _in_process(run, scale, lock, stop)
    if stop.signal_number:
        _say("stopped")
        raise interrupted(stop.signal_number, "after saving; the same command goes on from here")
    if code:
        errors = run.folder / "errors.txt"
        lines = errors.read_text(encoding="utf-8").splitlines() if errors.exists() else []
        # Of a process that a signal ended, what a shell gives it.
        shown = code if code > 0 else 128 - code
        failure = {"exit_code": shown, "reason": _reason(code, lines)}
        write_json(run.folder / FAILURE, failure)


def _in_process(run: Run, scale: Scale, lock: int, stop: StopRequest) -> int:
    environment = dict(os.environ)
    if scale == "smoke":
        # Half the time goes into compiling; what the programs are like does not matter here.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    with (
        (run.folder / "output.txt").open("ab") as output,
        (run.folder / "errors.txt").open("wb") as errors,
    ):
        # A session of its own: Ctrl-C in a terminal must reach the child once, not twice, because
        # the second one ends it without saving.
        process = subprocess.Popen(
            [sys.executable, str(_CHILD), str(run.folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,
            pass_fds=(lock,),
        )
        told = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop.signal_number and not told:
                    process.send_signal(stop.signal_number)
                    told = True


def _reason(code: int, lines: Sequence[str]) -> str:
    """Why a process failed, in one line."""
    if code < 0:
        guess = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{guess}"
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or [line for line in lines if line.strip()] or [f"exit code {code}"])[-1]
