"""Compilation: the options programs need, the memory XLA allots them, and the persistent cache."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax


def compiler_options() -> dict[str, bool | int | str | float]:
    """Returns options for `jax.jit(..., compiler_options=)`, for the current backend.

    On the CPU, jax 0.10 undoes `jax.checkpoint`: it drops the barriers around what is to be
    computed again, and then finds it to be there already. Without that pass a remat policy saves
    what it promises.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


class Compiled(NamedTuple):
    """Memory of one compiled program in bytes, as XLA allots it."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int
    """Outputs that lie in donated arguments."""
    resident: int
    """What stays on the device beside the program's arguments."""

    @property
    def total(self) -> int:
        """All that must fit at once."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.resident


def allotted(compiled: Any, resident: int = 0) -> Compiled:
    """Reads what XLA allots to a compiled program.

    Its `peak_memory_in_bytes` is not used: on the CPU it leaves the temporary buffers out.
    """
    analysis: Any = compiled.memory_analysis()
    return Compiled(
        arguments=int(analysis.argument_size_in_bytes),
        outputs=int(analysis.output_size_in_bytes),
        temporary=int(analysis.temp_size_in_bytes),
        aliased=int(analysis.alias_size_in_bytes),
        resident=resident,
    )


def release_memory() -> None:
    """Gives memory that compilation freed back to the system; glibc keeps several hundred MB."""
    if sys.platform == "linux":
        # Other C libraries than glibc keep nothing and have no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def use_compilation_cache() -> str:
    """Keeps compiled programs between processes, in a folder only this user can write.

    A folder that the environment or the caller has set stays. Returns where they are kept, or why
    they are not, to show to the user.
    """
    chosen = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen is not None:
        return f"kept in {chosen}"
    import platformdirs

    path = Path(platformdirs.user_cache_dir("patchgd-jax")) / "xla"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        # Whoever can write here can make this process run code of theirs.
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return f"not kept: {path} can be written by others; remove it or make it private"
    except OSError as error:
        return f"not kept: {path}: {error.strerror}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return f"kept in {path}"
