"""Selection of the device that a run uses."""

from __future__ import annotations

import os

import jax

from patchgd_jax.errors import DeviceError


def select_device(name: str, *, shared: bool = False) -> jax.Device:
    """Makes a platform (auto, cpu, gpu or tpu) JAX's only one; returns this process's first device.

    Must run before any other use of JAX. `shared`: several devices share the work. Raises
    `DeviceError` if the platform is missing, or if this process already uses another.
    """
    if name != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}[name])
    if shared and str(getattr(jax.config, "jax_platforms", None) or "").startswith("cpu"):
        # XLA:CPU starts independent collectives in any order, and one that waits keeps its thread:
        # with as few threads as cores, virtual devices can deadlock.
        os.environ.setdefault("NPROC", "32")
    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:
        # A missing CUDA plugin shows as an AssertionError without a message.
        install = {"gpu": "patchgd-jax[cuda13] or [cuda12]", "tpu": "patchgd-jax[tpu]"}.get(name)
        hint = f"; install {install}, or use --device cpu" if install else ""
        raise DeviceError(f"no {name} device{hint} ({error or 'no plugin for it'})") from error
    if name not in ("auto", device.platform):
        raise DeviceError(
            f"no {name} device: this process already uses JAX on {device.platform}; "
            "choose the device before any other use of JAX, or start a new process"
        )
    return device
