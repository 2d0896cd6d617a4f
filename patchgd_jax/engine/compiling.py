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

    On the CPU, jax 0.10 undoes `jax.checkpoint`: it drops the barriers around recomputed operations
    and then merges these with the first computation. Without that pass remat saves memory.
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
    """Bytes that stay on the device beside the program's arguments."""

    @property
    def total(self) -> int:
        """Bytes that must fit at once."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.resident


def allotted(compiled: Any, resident: int = 0) -> Compiled:
    """Reads the memory that XLA allots to a compiled program.

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
    """Returns memory freed by compilation to the system; glibc keeps several hundred MB."""
    if sys.platform == "linux":
        # Other C libraries than glibc keep nothing and have no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def use_compilation_cache() -> str:
    """Keeps compiled programs between processes, in a folder only this user can write.

    A folder set by the environment or the caller stays. Returns a phrase for the user: where they
    are kept, or why they are not.
    """
    chosen = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen is not None:
        return f"kept in {chosen}"
    import platformdirs

    path = Path(platformdirs.user_cache_dir("patchgd-jax")) / "xla"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        # Users who can write here could make this process run their code.
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return f"not kept: {path} can be written by others; remove it or make it private"
    except OSError as error:
        return f"not kept: {path}: {error.strerror}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return f"kept in {path}"
