"""Real steps in a process of their own, whose peak counter is therefore clean.

The result over XLA's figure is the calibration factor of this kind of device and version of jaxlib:
the larger of those at two sizes. It is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from patchgd_jax.config import from_dict
from patchgd_jax.engine.compiling import release_memory, use_compilation_cache
from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.io.files import write_json
from patchgd_jax.planner.compiled import compile_program
from patchgd_jax.planner.errors import MeasureError
from patchgd_jax.planner.methods import Method, Program, step_of
from patchgd_jax.planner.request import PlanRequest, with_sampled
from patchgd_jax.planner.size import free_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Before there is a measurement. On the CPU, buffers inside of single operations are not XLA's; on a
# GPU, the scratch of its libraries.
_FIRST_GUESS = {"cpu": 1.4, "gpu": 1.15, "tpu": 1.05}
# What steps add to a process, however small they are.
_OVERHEAD = {"cpu": 20 * 2**20}
# The C library keeps freed blocks for the thread that freed them, and others take new ones: on two
# cores up to three times a small step, and of large ones, whose blocks go back to the system, this.
_KEPT = {"cpu": 40 * 2**20}
_MOST_COPIES = 2
# How high steps reach depends on how their threads meet: of several processes the highest counts.
_PROBES = 2
# On the CPU the peak of the first steps is up to a tenth below that of fifty. It takes no more of
# them once so many seconds are over.
_STEPS = {"cpu": 48}
_LEAST_STEPS = 2
_SECONDS = 10.0


class Calibration(NamedTuple):
    """What steps take on a device, given XLA's figure for one."""

    factor: float
    overhead: int
    """Bytes, whatever the step."""
    kept: int
    """Bytes of what was freed that the C library keeps at most; never more than twice XLA's
    figure."""
    measured: bool
    """Whether the factor was measured on this device, or is a first guess."""

    @classmethod
    def of(cls, platform: str, factor: float, *, measured: bool) -> Calibration:
        """The calibration of a platform (cpu, gpu or tpu) by its factor."""
        return cls(factor, _OVERHEAD.get(platform, 0), _KEPT.get(platform, 0), measured)

    def expected(self, compiled: float) -> int:
        """Bytes that steps will take at their highest moment."""
        kept = min(_MOST_COPIES * compiled, self.kept)
        return math.ceil(self.factor * compiled + kept) + self.overhead

    def within(self, budget: int) -> float:
        """The most that XLA's figure may be for steps to fit."""
        room = budget - self.overhead
        small = min(room / (self.factor + _MOST_COPIES), self.kept / _MOST_COPIES)
        return max((room - self.kept) / self.factor, small)


class Measured(NamedTuple):
    """Training steps as they ran."""

    peak: int
    """Bytes at the highest moment, arguments included."""
    compiled: int
    """XLA's figure for the same program."""
    device: str
    """Kind of device."""
    platform: str

    @property
    def factor(self) -> float:
        """The calibration factor of these steps; never less than 1."""
        unscaled = Calibration.of(self.platform, 0.0, measured=True).expected(self.compiled)
        return max(1.0, (self.peak - unscaled) / self.compiled)


def measure(
    request: PlanRequest, method: Method, *, platform: str | None = None, timeout: float = 1800
) -> Measured:
    """Runs training steps of a method on zeros in two new processes, and reads the higher peak.

    On the CPU it is the growth of the resident memory over that before the arrays were made; on
    other devices, what the allocator counted.

    Args:
        request: what is planned; an encoder of the user's own is not known to the new process.
        method: one of METHODS.
        platform: cpu, gpu or tpu; None: as here.
        timeout: seconds for each process.

    Raises:
        MeasureError: if the process fails, for want of memory say.
        ConfigError: if the peak cannot be read on this system.
    """
    platform = platform or jax.default_backend()
    if platform == "cpu" and not _CLEAR.exists():
        raise ConfigError(
            "the peak of a step on the CPU can only be read on Linux; use tier compile here"
        )
    environment = {**os.environ, "JAX_PLATFORMS": {"gpu": "cuda"}.get(platform, platform)}
    given = json.dumps({"request": asdict(request), "method": method})
    probes = [_probe(given, method, environment, timeout) for _ in range(_PROBES)]
    return max(probes, key=lambda probe: probe.peak)


def calibrate(
    request: PlanRequest, method: Method, *, platform: str | None = None, timeout: float = 1800
) -> Measured:
    """Measures a request and another size of it, and keeps the larger calibration factor.

    The factor of one size can be too low for others. The other size is twice the batch where that
    fits what is free, else half of it, or of the patches of an inner step.

    Args:
        request: as for `measure`.
        method: as for `measure`.
        platform: as for `measure`.
        timeout: as for `measure`.

    Returns:
        What was measured of the request itself.

    Raises:
        MeasureError: as `measure`, of the request itself.
        ConfigError: as `measure`.
    """
    measured = measure(request, method, platform=platform, timeout=timeout)
    keep_calibration(measured)
    device = jax.devices(platform)[0]
    other = other_size(request, measured.compiled, calibration(device), free_memory(device)[0])
    if other is not None:
        # Someone else may have taken what was free.
        with contextlib.suppress(MeasureError):
            keep_calibration(measure(other, method, platform=platform, timeout=timeout))
    return measured


def other_size(
    request: PlanRequest, compiled: int, known: Calibration, free: int
) -> PlanRequest | None:
    """The second size that `calibrate` measures; None if there is none.

    Args:
        request: the first size.
        compiled: XLA's figure for it in bytes; that for twice the batch is at most twice as much.
        known: what steps take given XLA's figure.
        free: bytes that steps may take.
    """
    if known.expected(2 * compiled) <= free:
        return dataclasses.replace(request, batch=2 * request.batch)
    if request.batch > 1:
        return dataclasses.replace(request, batch=request.batch // 2)
    if request.sampled > 1:
        return with_sampled(request, request.sampled // 2)
    return None


def _probe(given: str, method: Method, environment: dict[str, str], timeout: float) -> Measured:
    command = [sys.executable, "-m", "patchgd_jax.planner.measure"]
    try:
        result = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise MeasureError(
            f"measuring {method} took more than {timeout:.0f} s; plan with tier compile"
        ) from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        how = f"signal {-result.returncode}" if result.returncode < 0 else lines[-1][:300]
        raise MeasureError(
            f"a step of {method} did not run here ({how}); it may be too large for this device: "
            "plan a smaller one, or use tier compile"
        )
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def _status(name: str) -> int:
    line = next(li for li in _STATUS.read_text().splitlines() if li.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _zeros(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    # Written to, so that the memory is really there.
    return jax.device_put(np.full(leaf.shape, 0, leaf.dtype))


class PeakMeter:
    """The most memory that steps take from its making on.

    On the CPU it is the growth of the resident memory, which only Linux tells; on other devices it
    is what the allocator has counted since the process began. Pages of library files that the steps
    were the first to use are not in it: under a limit, the system drops them.

    Args:
        device: the steps run on.
    """

    def __init__(self, device: jax.Device) -> None:
        self._device = device
        self._before: int | None = None
        if device.platform != "cpu" or not _CLEAR.exists():
            return
        # The runtime's threads and their stacks are there before any step is.
        jax.block_until_ready(jax.jit(lambda x: (x @ x).sum())(np.ones((1024, 1024), np.float32)))
        release_memory()
        self._before, self._files = _status("VmRSS"), _status("RssFile")
        # Sets the peak to what is resident now.
        _CLEAR.write_text("5")

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._before is not None:
            files = max(0, _status("RssFile") - self._files)
            return _status("VmHWM") - self._before - files
        peak = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else int(peak)


def _run(program: Program) -> Measured:
    """Steps each of which has the state of the one before."""
    use_compilation_cache()
    figures, compiled = compile_program(program)
    device = jax.devices()[0]
    meter = PeakMeter(device)
    state, batch, key = jax.tree.map(_zeros, program.arguments)
    begun = time.monotonic()
    for number in range(_STEPS.get(device.platform, _LEAST_STEPS)):
        if number >= _LEAST_STEPS and time.monotonic() - begun > _SECONDS:
            break
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready((state, metrics))
    peak = meter.peak()
    assert peak is not None
    return Measured(peak, figures.total, device.device_kind, device.platform)


def _calibrations() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("patchgd-jax")) / "calibration.json"


def _version() -> str:
    from importlib.metadata import version

    return version("jaxlib")


def calibration(device: jax.Device) -> Calibration:
    """The calibration of a device for this version of jaxlib, or a first guess."""
    try:
        factors = json.loads(_calibrations().read_text(encoding="utf-8"))
        factor = float(factors[f"{device.device_kind} jaxlib {_version()}"])
    except (OSError, ValueError, KeyError, TypeError):
        guess = _FIRST_GUESS.get(device.platform, 1.4)
        return Calibration.of(device.platform, guess, measured=False)
    return Calibration.of(device.platform, max(1.0, factor), measured=True)


def keep_calibration(measured: Measured) -> float:
    """Keeps the largest factor that was measured for a device and version; returns it.

    A cache folder that cannot be written is no error: the next plan then measures again.
    """
    path, name = _calibrations(), f"{measured.device} jaxlib {_version()}"
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
        known = float(factors.get(name, 0.0))
    except (OSError, ValueError, TypeError, AttributeError):
        factors, known = {}, 0.0
    factors[name] = max(known, measured.factor)
    with contextlib.suppress(OSError, DiskError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, factors)
    return float(factors[name])


def _main() -> None:
    given = json.load(sys.stdin)
    request = from_dict(PlanRequest, json.loads(json.dumps(given["request"])), "request")
    print(json.dumps(_run(step_of(request, given["method"]).train)._asdict()))


if __name__ == "__main__":
    _main()
