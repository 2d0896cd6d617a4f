"""Profiles real steps in processes of their own, whose peak counters start clean.

The peak over the compiled figure, the larger of two sizes, is the calibration factor of this kind
of device and version of jaxlib. It is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
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
# Before there is a measurement: buffers that XLA does not count, inside of single operations (CPU)
# and of libraries (GPU).
_FIRST_GUESS = {"cpu": 1.4, "gpu": 1.15, "tpu": 1.05}
# What steps of any size add to a process.
_OVERHEAD = {"cpu": 20 * 2**20}
# The C library keeps freed blocks for the thread that freed them; other threads take new ones: on
# two cores up to three times a small step, and this of large ones, whose blocks go back.
_KEPT = {"cpu": 40 * 2**20}
_MOST_COPIES = 2
# The peak depends on how threads happen to overlap: of several processes the highest counts.
_PROBES = 2
# On the CPU the peak of the first steps is up to a tenth below that of fifty. No more are run after
# so many seconds.
_STEPS = {"cpu": 48}
_LEAST_STEPS = 2
_SECONDS = 10.0
_TIMEOUT = 1800


class Calibration(NamedTuple):
    """Relation between the compiled figure of a step and its peak on a device."""

    factor: float
    overhead: int
    """Bytes for a step of any size."""
    kept: int
    """Most bytes of freed memory that the C library keeps; at most twice the compiled figure."""
    measured: bool
    """Whether the factor was measured on this device, or is a first guess."""

    @classmethod
    def of(cls, platform: str, factor: float, *, measured: bool) -> Calibration:
        """Makes the calibration of a platform (cpu, gpu or tpu)."""
        return cls(factor, _OVERHEAD.get(platform, 0), _KEPT.get(platform, 0), measured)

    def expected(self, compiled: float) -> int:
        """Predicts the peak of steps in bytes, from the compiled figure."""
        kept = min(_MOST_COPIES * compiled, self.kept)
        return math.ceil(self.factor * compiled + kept) + self.overhead

    def within(self, budget: int) -> float:
        """Inverts `expected`: the largest compiled figure of steps that fit a budget."""
        room = budget - self.overhead
        small = min(room / (self.factor + _MOST_COPIES), self.kept / _MOST_COPIES)
        return max((room - self.kept) / self.factor, small)


class Measured(NamedTuple):
    """Memory of training steps that ran."""

    peak: int
    """Bytes, arguments included."""
    compiled: int
    """Bytes by XLA for the same program."""
    device: str
    """Kind of device."""
    platform: str

    @property
    def factor(self) -> float:
        """The calibration factor of these steps, at least 1."""
        unscaled = Calibration.of(self.platform, 0.0, measured=True).expected(self.compiled)
        return max(1.0, (self.peak - unscaled) / self.compiled)


def measure(request: PlanRequest, method: Method, *, platform: str | None = None) -> Measured:
    """Measures training steps of a method on zeros in two new processes; the higher peak counts.

    Args:
        request: the run to plan; the new process does not know encoders registered here.
        method: one of METHODS.
        platform: cpu, gpu or tpu; None: as here.

    Raises:
        MeasureError: if a process fails, such as for lack of memory.
        ConfigError: if the peak cannot be read on this system.
    """
    platform = platform or jax.default_backend()
    if platform == "cpu" and not _CLEAR.exists():
        raise ConfigError(
            "the peak of a step on the CPU can only be read on Linux; use --tier compile here"
        )
    environment = {**os.environ, "JAX_PLATFORMS": {"gpu": "cuda"}.get(platform, platform)}
    given = json.dumps({"request": asdict(request), "method": method})
    probes = [_probe(given, method, environment) for _ in range(_PROBES)]
    return max(probes, key=lambda probe: probe.peak)


def calibrate(request: PlanRequest, method: Method, *, platform: str | None = None) -> Measured:
    """Measures a request and a second size of it (`other_size`), and keeps the larger factor.

    Arguments and errors are those of `measure`; the result is that of the request itself.
    """
    measured = measure(request, method, platform=platform)
    keep_calibration(measured)
    device = jax.devices(platform)[0]
    other = other_size(request, measured.compiled, calibration(device), free_memory(device)[0])
    if other is not None:
        # Other processes may have taken the free memory.
        with contextlib.suppress(MeasureError):
            keep_calibration(measure(other, method, platform=platform))
    return measured


def other_size(
    request: PlanRequest, compiled: int, known: Calibration, free: int
) -> PlanRequest | None:
    """Chooses twice the batch where that fits, else half of it, or of an inner step's patches.

    Args:
        request: the first size.
        compiled: bytes by XLA for it; twice the batch takes at most twice as much.
        known: calibration of the device.
        free: bytes that steps may take.

    Returns:
        The second size, or None if there is none.
    """
    if known.expected(2 * compiled) <= free:
        return request.changed(batch_size=2 * request.batch)
    if request.batch > 1:
        return request.changed(batch_size=request.batch // 2)
    if request.sampled > 1:
        return with_sampled(request, request.sampled // 2)
    return None


def _probe(given: str, method: Method, environment: dict[str, str]) -> Measured:
    command = [sys.executable, "-m", "patchgd_jax.planner.measure"]
    try:
        result = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise MeasureError(
            f"measuring {method} took more than {_TIMEOUT} s; use --tier compile"
        ) from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        how = f"signal {-result.returncode}" if result.returncode < 0 else lines[-1][:300]
        raise MeasureError(
            f"a step of {method} did not run here ({how}); it may be too large for this device: "
            "plan a smaller one, or use --tier compile"
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
    """Measures the peak memory of steps from its construction on.

    On the CPU it is the growth of the resident memory, known on Linux only, without pages of
    library files, which the system drops under a limit. On other devices it is the allocator's peak
    since the process began.
    """

    def __init__(self, device: jax.Device) -> None:
        self._device = device
        self._before: int | None = None
        if device.platform != "cpu" or not _CLEAR.exists():
            return
        # Starts the runtime's threads, whose stacks would count as a step's.
        jax.block_until_ready(jax.jit(lambda x: (x @ x).sum())(np.ones((1024, 1024), np.float32)))
        release_memory()
        self._before, self._files = _status("VmRSS"), _status("RssFile")
        # Resets the peak to the memory resident now.
        _CLEAR.write_text("5")

    def peak(self) -> int | None:
        """Reads the peak in bytes; None where the system does not count it."""
        if self._before is not None:
            files = max(0, _status("RssFile") - self._files)
            return _status("VmHWM") - self._before - files
        peak = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else int(peak)


def _run(program: Program) -> Measured:
    """Runs steps, each on the state of the previous one."""
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


def _factors() -> dict[str, float]:
    """Measured factors by device and version; none if the file is missing or damaged."""
    try:
        factors = json.loads(_calibrations().read_text(encoding="utf-8"))
        return {name: float(factor) for name, factor in factors.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def calibration(device: jax.Device) -> Calibration:
    """Reads the calibration of a device for this version of jaxlib, or guesses."""
    factor = _factors().get(f"{device.device_kind} jaxlib {version('jaxlib')}")
    guess = _FIRST_GUESS.get(device.platform, 1.4)
    return Calibration.of(device.platform, factor or guess, measured=factor is not None)


def keep_calibration(measured: Measured) -> float:
    """Keeps and returns the largest measured factor of a device and version.

    A cache folder that cannot be written is no error: the next plan then measures again.
    """
    factors, name = _factors(), f"{measured.device} jaxlib {version('jaxlib')}"
    factors[name] = max(factors.get(name, 0.0), measured.factor)
    with contextlib.suppress(OSError, DiskError):
        _calibrations().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(_calibrations(), factors)
    return factors[name]


def _main() -> None:
    given = json.load(sys.stdin)
    request = from_dict(PlanRequest, given["request"], "request")
    print(json.dumps(_run(step_of(request, given["method"]).train)._asdict()))


if __name__ == "__main__":
    _main()
