"""Memory sizes as text, and what a device has."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import NamedTuple

import jax

from patchgd_jax.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_CGROUP = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_MACHINE = "the machine's memory"


def parse_size(text: str) -> int:
    """Bytes of `8GiB`, `512 MiB`, `8GB` (10^9) or `1073741824`.

    Raises:
        ConfigError: for anything else, and for sizes that are not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(
            f"the size {text!r} cannot be read; write a number and a unit, 8GiB or 500MB say"
        )
    size = int(float(match[1]) * {**_UNITS, **_BINARY}[(match[2] or "").lower()])
    if size < 1:
        raise ConfigError(f"the size {text!r} is not positive")
    return size


def show_size(size: float) -> str:
    """A size with a unit that suits it."""
    if abs(size) >= 2**40:
        return f"{size / 2**40:.2f} TiB"
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if abs(size) >= 2**20 else f"{size / 2**10:.1f} KiB"


class _Limit(NamedTuple):
    """Something that bounds the memory of this process."""

    size: int
    used: int
    """What this process has of it."""
    source: str


def device_limit(device: jax.Device) -> tuple[int, str]:
    """What a device lets this process have in bytes, and where the figure is from.

    For the CPU it is the smallest of the machine's memory, its control group's limit, and this
    process's own (`ulimit -d` and `-v`).
    """
    limit = min(_limits(device))
    return limit.size, limit.source


def free_memory(device: jax.Device) -> tuple[int, str]:
    """What this process can still take of a device in bytes, and of what it is the rest."""
    limits = _limits(device)
    if device.platform == "cpu":
        import psutil

        # Other processes have their share.
        machine = psutil.virtual_memory()
        limits.append(_Limit(machine.total, machine.total - machine.available, _MACHINE))
    limit = min(limits, key=lambda limit: limit.size - limit.used)
    return (
        max(1, limit.size - limit.used),
        f"what is free of {show_size(limit.size)}, {limit.source}",
    )


def _limits(device: jax.Device) -> list[_Limit]:
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        source = f"JAX's allocator on {device.device_kind}"
        return [_Limit(int(stats["bytes_limit"]), int(stats.get("bytes_in_use", 0)), source)]
    # Here, because a machine with an accelerator may lack it.
    import psutil

    used = psutil.Process().memory_info()
    limits = [_Limit(int(psutil.virtual_memory().total), int(used.rss), _MACHINE)]
    for path in _CGROUP:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(_Limit(int(text), int(used.rss), f"the control group ({path})"))
    for kind, count, name in (
        (resource.RLIMIT_DATA, getattr(used, "data", used.rss), "ulimit -d"),
        (resource.RLIMIT_AS, used.vms, "ulimit -v"),
    ):
        size, _ = resource.getrlimit(kind)
        if size != resource.RLIM_INFINITY:
            limits.append(_Limit(size, int(count), name))
    return limits
