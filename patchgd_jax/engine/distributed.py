"""Several processes, on one machine or on many: they start together, agree, and end together."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchgd_jax._version import __version__
from patchgd_jax.errors import ConfigError, PatchGDError
from patchgd_jax.io.text import first_line

START_SECONDS = 45
"""How long the others may take to come up."""
HEARTBEAT_SECONDS = 15
"""How long a process may be silent before the others end."""
STEP_SECONDS = 600.0
"""How long a step may take before a watched process ends."""
_LEAVE_SECONDS = 3
"""How long process 0 lets the others end before it does."""


class PeerError(PatchGDError):
    """Another process of the run has failed, or never came up."""

    exit_code = 9


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> bool:
    """Joins the processes of a run. Call it before anything else of jax.

    What is not given is taken from `PATCHGD_COORDINATOR`, `PATCHGD_PROCESSES` and
    `PATCHGD_PROCESS`. Without these, a run is of several processes if srun, Open MPI or GKE say so;
    jax then finds the rest.

    Args:
        coordinator: `host:port` of process 0; or `auto`, for jax to find everything: needed on
            Cloud TPU slices outside GKE.
        processes: how many there are.
        process: this one's number, from 0.
        start_seconds: until when all must have come up.
        heartbeat_seconds: after which the others of a process that has died are ended.

    Returns:
        Whether the run is one of processes that join. None of jax's devices are started yet.

    Raises:
        ConfigError: if only some of the three are given, or they make no sense. If not all come up
            in time, the process ends with that error's exit code and a message.
    """
    coordinator = coordinator or os.environ.get("PATCHGD_COORDINATOR")
    processes = _number("PATCHGD_PROCESSES", processes)
    process = _number("PATCHGD_PROCESS", process)
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        if not _in_cluster():
            return False
    elif coordinator == "auto":
        coordinator = processes = process = None
    elif any(value is None for value in given):
        raise ConfigError(
            "of coordinator, number of processes and process number only some are given; give all "
            "three, or none where Slurm or a TPU's environment has them"
        )
    options: dict[str, Any] = {}
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise ConfigError(f"process {process} of {processes}: it must be in 0..{processes - 1}")
        port = coordinator.rpartition(":")[2]
        if not port.isdigit():
            raise ConfigError(f"coordinator {coordinator!r} is not host:port")
        options = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            # Otherwise every network interface of the machine would take connections.
            "coordinator_bind_address": coordinator,
            "cluster_detection_method": "deactivate",
        }
    text = (
        f"not all of the {processes or ''} processes of the run came up within {start_seconds} s "
        f"(coordinator {coordinator or 'of the cluster'}); start all of them with the same "
        "coordinator, and see that its port can be reached"
    )
    # Its handler of SIGTERM would take the place of the run's own, which saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    with ended_after(start_seconds, text, ConfigError.exit_code):
        try:
            jax.distributed.initialize(
                **options,
                # Later than the end above: jax would end the process with a signal.
                initialization_timeout=start_seconds + 15,
                heartbeat_timeout_seconds=heartbeat_seconds,
                shutdown_timeout_seconds=heartbeat_seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot join the other processes: {first_line(error)}") from error
    return True


def several_asked_for() -> bool:
    """Whether the environment says that this process is one of several, joined or not."""
    return "PATCHGD_PROCESSES" in os.environ or _in_cluster()


def _in_cluster() -> bool:
    """Whether the environment is that of one of several processes.

    A job alone says nothing: its script is one process, until srun starts more.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = [os.environ.get(n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return "," in hosts or any(number.isdigit() and int(number) > 1 for number in tasks)


def several() -> bool:
    """Whether this process is one of several; asking a process alone does not start devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that logs, shows progress and writes files."""
    return not several() or jax.process_index() == 0


def check_same(settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same settings and the same versions.

    Args:
        settings: JSON values by name, of which those that may differ are left out.

    Raises:
        ConfigError: on all processes, with what differs between which, at most ten entries.
    """
    if not several():
        return
    every = _gather({"version": __version__, "jax version": jax.__version__, **settings})
    first = every[0]
    lines = [
        f"{name}: process {number} has {other.get(name)!r}, process 0 has {first.get(name)!r}"
        for number, other in enumerate(every)
        for name in sorted(first.keys() | other.keys())
        if other.get(name) != first.get(name)
    ]
    if lines:
        listed = "\n  ".join(lines[:10])
        raise ConfigError(f"the processes of the run differ; start all of them alike:\n  {listed}")


def _gather(own: Any) -> list[Any]:
    """A JSON value of each process, in their order; every process must call it."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(own, sort_keys=True, default=str).encode(), np.uint8)
    with watched():
        lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(text)] = text
        texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]


@contextmanager
def all_or_none() -> Iterator[None]:
    """What one process cannot do, none does: all raise if one does.

    Every process must come here, and none may wait for another within.

    Raises:
        PatchGDError: with the message and exit code of the first process that failed.
    """
    if not several():
        yield
        return
    failure: PatchGDError | None = None
    try:
        yield
    except PatchGDError as error:
        failure = error
    told = [failure.exit_code, str(failure)] if failure else None
    for number, other in enumerate(_gather(told)):
        if other is not None:
            if failure is not None:
                raise failure
            theirs = PatchGDError(f"process {number}: {other[1]}")
            theirs.exit_code = other[0]
            raise theirs


def from_first(find: Callable[[], Any]) -> Any:
    """A JSON value that process 0 finds; all have it, or all raise as `all_or_none`."""
    if not several():
        return find()
    value = None
    with all_or_none():
        if is_first():
            value = find()
    return _gather(value)[0]


class Agreement:
    """A number that processes agree on while they train: the largest that any of them has.

    Each exchange gives the result of the one before, so that none waits for the others' devices.
    """

    def __init__(self) -> None:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("all",))
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._count = len(devices)
        # Virtual devices share the cores' threads: exchanges in flight would starve the steps.
        self._one_by_one = devices.flat[0].platform == "cpu"
        self._pending: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """Gives this process's number, not negative; returns what all agreed on before, or 0."""
        before = 0 if self._pending is None else int(self._pending)
        own = jax.make_array_from_callback(
            (self._count,), self._each, lambda _: np.array([number], np.int32)
        )
        self._pending = self._largest(own)
        if self._one_by_one:
            self._pending.block_until_ready()
        return before


@contextmanager
def watched(seconds: float = STEP_SECONDS) -> Iterator[None]:
    """Ends this process if what is done herein with others fails or takes too long.

    Results must be waited for herein: a step that was only dispatched has not failed yet. Cleaning
    up would wait for the others, so the process ends at once, with `PeerError.exit_code`; what has
    been saved stays. A single process is left alone.
    """
    if not several():
        yield
        return
    text = (
        f"process {jax.process_index()} waited {seconds:.0f} s for the others; one has stopped or "
        "does something else. Resume the run from its last checkpoint"
    )
    with ended_after(seconds, text, PeerError.exit_code):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            _end(
                f"process {jax.process_index()}: a computation shared with other processes has "
                f"failed; one of them has probably died ({first_line(error)}). Resume the run "
                "from its last checkpoint",
                PeerError.exit_code,
            )


@contextmanager
def ended_after(seconds: float, text: str, exit_code: int) -> Iterator[None]:
    """Ends the process with a message, wherever it hangs, unless this is left in time."""
    timer = threading.Timer(seconds, _end, (text, exit_code))
    timer.daemon = True
    timer.start()
    # The timer needs the interpreter, which whatever hangs may hold; this does not.
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _end(text: str, exit_code: int) -> None:
    os.write(2, f"error: {text}\n".encode())
    os._exit(exit_code)


def end_now(exit_code: int) -> None:
    """Ends a process of several that has failed, after what it has printed is out.

    At an ordinary exit jax would wait for the others, and then end the process with a signal.
    """
    if exit_code and several():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            # Without process 0 jax ends the others with a signal; they are about to end themselves.
            time.sleep(_LEAVE_SECONDS)
        os._exit(exit_code)


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(name)
    if given is not None or text is None:
        return given
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a number") from None
