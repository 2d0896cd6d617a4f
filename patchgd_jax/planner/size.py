"""Memory sizes as text, and the memory of a device."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import NamedTuple

import jax

from patchgd_jax.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Limit and use of the control group, version 2 and 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), "memory.current"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), "memory.usage_in_bytes"),
)
# File pages that the system drops when memory is short, in memory.stat of version 1 and 2.
_DROPPED = ("total_inactive_file ", "inactive_file ")
_MACHINE = "the machine's memory"


def parse_size(text: str) -> int:
    """Parses a size such as `8GiB`, `512 MiB`, `8GB` (10^9) or `1073741824` to bytes.

    Raises:
        ConfigError: for anything else, and for sizes that are not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(
            f"the size {text!r} cannot be read; write a number and a unit, such as 8GiB or 500MB"
        )
    size = int(float(match[1]) * {**_UNITS, **_BINARY}[(match[2] or "").lower()])
    if size < 1:
        raise ConfigError(f"the size {text!r} is not positive")
    return size


def show_size(size: float) -> str:
    """Formats a size with a suitable unit."""
    if abs(size) >= 2**40:
        return f"{size / 2**40:.2f} TiB"
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if abs(size) >= 2**20 else f"{size / 2**10:.1f} KiB"


class _Limit(NamedTuple):
    """A bound on memory."""

    size: int
    used: int
    """By all that share the bound."""
    source: str


def device_limit(device: jax.Device) -> tuple[int, str]:
    """Finds the bytes of a device that this process may have, and the source of the figure.

    For the CPU it is the smallest of the machine's memory, its control group's limit, and this
    process's own (`ulimit -d` and `-v`).
    """
    limit = min(_limits(device))
    return limit.size, limit.source


def free_memory(device: jax.Device) -> tuple[int, str]:
    """Finds the bytes of a device that are free for this process, and the source of the figure."""
    limit = min(_limits(device), key=lambda limit: limit.size - limit.used)
    source = f"what is free of {show_size(limit.size)}, {limit.source}"
    return max(1, limit.size - limit.used), source


def _limits(device: jax.Device) -> list[_Limit]:
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        source = f"JAX's allocator on {device.device_kind}"
        return [_Limit(int(stats["bytes_limit"]), int(stats.get("bytes_in_use", 0)), source)]
    # Here, because a machine with an accelerator may lack it.
    import psutil

    machine, own = psutil.virtual_memory(), psutil.Process().memory_info()
    limits = [_Limit(machine.total, machine.total - machine.available, _MACHINE)]
    for path, use in _CGROUPS:
        size, total, stat = (_read(path.with_name(n)) for n in (path.name, use, "memory.stat"))
        if size.isdigit():
            dropped = [int(x.split()[1]) for x in stat.splitlines() if x.startswith(_DROPPED)]
            used = int(total or 0) - max(dropped, default=0)
            source = f"the control group ({path})"
            limits.append(_Limit(int(size), max(own.rss, used), source))
    for kind, count, name in (
        (resource.RLIMIT_DATA, getattr(own, "data", own.rss), "ulimit -d"),
        (resource.RLIMIT_AS, own.vms, "ulimit -v"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(_Limit(soft, int(count), name))
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
