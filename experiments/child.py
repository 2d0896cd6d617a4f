"""The process of one run, which `runner` starts: trains it, or goes on with it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path

from measure import measure
from runs import ORIGIN, TRAINED

from patchgd_jax import TrainConfig
from patchgd_jax.config import from_dict
from patchgd_jax.errors import PatchGDError
from patchgd_jax.runs.folder import CONFIG
from patchgd_jax.runs.record.progress import ConsoleProgress
from patchgd_jax.runs.train import resume, train


def work(folder: Path) -> None:
    """Does what `origin.json` in the folder asks for."""
    wanted = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["wanted"]
    config: TrainConfig = from_dict(TrainConfig, wanted["config"], str(folder / ORIGIN))
    if wanted["start"] is not None:
        start = folder.parent / wanted["start"]["name"] / TRAINED
        config = dataclasses.replace(config, init_encoder=str(start.absolute()))
    trained, progress = folder / TRAINED, ConsoleProgress()
    if wanted["task"] == "measure":
        measure(config, trained, progress)
    elif (trained / CONFIG).exists():
        resume(trained, progress=progress)
    else:
        train(config, trained, progress=progress, budget=wanted["budget"])


def stop_without_runner() -> None:
    """Stops this process as SIGTERM does, after saving, once the runner has gone.

    Standard input is a pipe that nothing is written to; it ends with the runner, however that ends.
    """

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    stop_without_runner()
    try:
        work(Path(sys.argv[1]))
    except PatchGDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
