"""The process group of a run: joining, collectives on the host, error checks and a watchdog."""

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
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchgd_jax._version import __version__
from patchgd_jax.errors import ConfigError, PatchGDError
from patchgd_jax.io.text import first_line

START_SECONDS = 45
HEARTBEAT_SECONDS = 15
STEP_SECONDS = 600.0
"""Longest time of a step before the watchdog ends a process."""
_LEAVE_SECONDS = 3
"""Time that process 0 gives the others to end before it does."""


class PeerError(PatchGDError):
    """Another process of the run failed, or never started."""

    exit_code = 9


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_seconds: int | None = None,
    heartbeat_seconds: int | None = None,
) -> bool:
    """Joins the process group of a run; must be called before anything else of jax.

    Arguments that are None come from `PATCHGD_COORDINATOR`, `PATCHGD_PROCESSES`, `PATCHGD_PROCESS`,
    `PATCHGD_JAX_START_SECONDS` and `PATCHGD_JAX_HEARTBEAT_SECONDS`. Without the first three, a run
    has several processes if srun, Open MPI or GKE started them; jax then finds the rest.

    Args:
        coordinator: `host:port` of process 0; or `auto`, for jax to find everything: needed on
            Cloud TPU slices outside GKE.
        processes: number of processes.
        process: number of this one, from 0.
        start_seconds: time within which all must have started; 45 by default. Otherwise the process
            ends with `ConfigError`'s exit code and a message.
        heartbeat_seconds: silence after which a process counts as dead and the others end; 15 by
            default.

    Returns:
        Whether the run has several processes. None of jax's devices are started yet.

    Raises:
        ConfigError: if only some of the first three are given, or their values are invalid.
    """
    coordinator = coordinator or os.environ.get("PATCHGD_COORDINATOR")
    processes = _number("PATCHGD_PROCESSES", processes)
    process = _number("PATCHGD_PROCESS", process)
    start = _number("PATCHGD_JAX_START_SECONDS", start_seconds) or START_SECONDS
    heartbeat = _number("PATCHGD_JAX_HEARTBEAT_SECONDS", heartbeat_seconds) or HEARTBEAT_SECONDS
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        if not _in_cluster():
            return False
    elif coordinator == "auto":
        coordinator = processes = process = None
    elif any(value is None for value in given):
        raise ConfigError(
            "of coordinator, number of processes and process number only some are given; give all "
            "three, or none where Slurm or a TPU's environment sets them"
        )
    options: dict[str, Any] = {}
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise ConfigError(f"process {process} of {processes}: it must be in 0..{processes - 1}")
        if not coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"coordinator {coordinator!r} is not host:port; add the port")
        options = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            # Otherwise every network interface of the machine would take connections.
            "coordinator_bind_address": coordinator,
            "cluster_detection_method": "deactivate",
        }
    message = (
        f"not all of the {processes or ''} processes of the run came up within {start} s "
        f"(coordinator {coordinator or 'of the cluster'}); start all of them with the same "
        "coordinator, and see that its port can be reached"
    )
    # Its handler of SIGTERM would replace the run's own, which saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    with deadline(start, message, ConfigError.exit_code):
        try:
            jax.distributed.initialize(
                **options,
                # Later than the deadline: jax would end the process with a signal.
                initialization_timeout=start + 15,
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=max(heartbeat, HEARTBEAT_SECONDS),
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot join the other processes: {first_line(error)}") from error
    return True


def multiprocess_requested() -> bool:
    """Whether the environment starts several processes, joined or not."""
    return "PATCHGD_PROCESSES" in os.environ or _in_cluster()


def _in_cluster() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    # A Slurm job alone is one process, its script, until srun starts more.
    tasks = [os.environ.get(n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return "," in hosts or any(number.isdigit() and int(number) > 1 for number in tasks)


def is_multiprocess() -> bool:
    """Whether the run has several processes; starts no devices in a process alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that logs, shows progress and writes files."""
    return not is_multiprocess() or jax.process_index() == 0


def check_same(settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same settings (JSON values by name) and versions.

    Raises `ConfigError` on all processes, with at most ten differences.
    """
    if not is_multiprocess():
        return
    first, *others = _gather({"version": __version__, "jax version": jax.__version__, **settings})
    lines = [
        f"{name}: process {number} has {other.get(name)!r}, process 0 has {first.get(name)!r}"
        for number, other in enumerate(others, start=1)
        for name in sorted(first.keys() | other.keys())
        if other.get(name) != first.get(name)
    ]
    if lines:
        listed = "\n  ".join(lines[:10])
        raise ConfigError(f"the processes differ; give all the same settings:\n  {listed}")


def _gather(own: Any) -> list[Any]:
    """Gathers a JSON value of every process, in their order; all must call it."""
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(own, sort_keys=True, default=str).encode(), np.uint8)
    with watchdog():
        lengths = process_allgather(np.int32(len(text)))
        texts = process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]


@contextmanager
def raise_together() -> Iterator[None]:
    """Raises in all processes if the body raises in one. All must enter; none may wait in the body.

    The others raise a `PatchGDError` with the message and exit code of the first that failed.
    """
    if not is_multiprocess():
        yield
        return
    own: PatchGDError | None = None
    try:
        yield
    except PatchGDError as error:
        own = error
    for number, failure in enumerate(_gather(own and [own.exit_code, str(own)])):
        if failure is not None:
            if own is not None:
                raise own
            theirs = PatchGDError(f"process {number}: {failure[1]}")
            theirs.exit_code = failure[0]
            raise theirs


def broadcast_from_first(find: Callable[[], Any]) -> Any:
    """Returns the JSON value that `find` gives in process 0; raises as `raise_together`."""
    if not is_multiprocess():
        return find()
    value = None
    with raise_together():
        if is_first():
            value = find()
    return _gather(value)[0]


class StopConsensus:
    """Maximum of a number over all processes, delayed by one exchange so that none waits."""

    def __init__(self) -> None:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("all",))
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._count = len(devices)
        # Virtual devices share the cores' threads: exchanges in flight would starve the steps.
        self._one_by_one = devices.flat[0].platform == "cpu"
        self._pending: Array | None = None

    def exchange(self, number: int) -> int:
        """Sends this process's number (>= 0); returns the previous exchange's maximum, or 0."""
        before = 0 if self._pending is None else int(self._pending)
        own = jax.make_array_from_callback(
            (self._count,), self._each, lambda _: np.array([number], np.int32)
        )
        self._pending = self._largest(own)
        if self._one_by_one:
            self._pending.block_until_ready()
        return before


@contextmanager
def watchdog(seconds: float = STEP_SECONDS) -> Iterator[None]:
    """Ends this process if a computation shared with others fails or exceeds the time.

    The body must wait for results: a step that was only dispatched has not failed yet. Cleaning up
    would wait for the others, so the process ends at once, with `PeerError.exit_code`. Does nothing
    in a run of one process.
    """
    if not is_multiprocess():
        yield
        return
    process = f"process {jax.process_index()}"
    advice = "Resume the run from its last checkpoint"
    late = (
        f"{process} waited {seconds:.0f} s for the others; one has stopped or does something else. "
        f"{advice}"
    )
    with deadline(seconds, late, PeerError.exit_code):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            _end(
                f"{process}: a computation shared with other processes has failed; one of them has "
                f"probably died ({first_line(error)}). {advice}",
                PeerError.exit_code,
            )


@contextmanager
def deadline(seconds: float, message: str, exit_code: int) -> Iterator[None]:
    """Ends the process with a message, wherever it hangs, if the body takes longer."""
    timer = threading.Timer(seconds, _end, (message, exit_code))
    timer.daemon = True
    timer.start()
    # The timer needs the interpreter, which the hanging code may hold; this does not.
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _end(message: str, exit_code: int) -> None:
    os.write(2, f"error: {message}\n".encode())
    os._exit(exit_code)


def exit_now(exit_code: int) -> None:
    """Ends a failed process of several at once, after flushing its output.

    At an ordinary exit jax would wait for the others, and then end the process with a signal.
    """
    if exit_code and is_multiprocess():
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
