"""Reads weight files as NumPy arrays: safetensors, and PyTorch's `.pth` without executing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.errors import ConfigError, DataError
from patchgd_jax.io.files import atomic_file
from patchgd_jax.io.text import first_line

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# Keys under which training scripts store the state dict beside other values.
_WRAPPERS = ("state_dict", "model")


class WeightFile(NamedTuple):
    """The content of a weight file."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    """By name; bfloat16 as `ml_dtypes.bfloat16`."""
    metadata: Mapping[str, str]
    """Metadata of a safetensors header; empty for other files."""


def read_weights(path: Path) -> WeightFile:
    """Reads a whole weight file without executing anything in it.

    Args:
        path: `.safetensors`, or `.pth`, `.pt` or `.bin`, which need PyTorch.

    Raises:
        DataError: for a damaged file, one that holds more than tensors, or another kind of file.
        ConfigError: if PyTorch is needed and missing.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return WeightFile(path, _read_torch(path), {})
    raise DataError(f"weight file {path} is none of {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        # The library refuses a header that is too long, and bytes that no tensor covers.
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return WeightFile(path, tensors, file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise DataError(f"weight file {path} is damaged or no safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs PyTorch: install patchgd-jax[torch], or name a .safetensors file"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or hostile pickle can raise anything.
        reason = first_line(error).split(". ")[0]
        raise DataError(
            f"weight file {path} is damaged, or holds more than tensors (nothing of it was "
            f"executed): {reason}"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"weight file {path} holds no tensors by name")
    return {str(name): _to_numpy(path, str(name), value) for name, value in content.items()}


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    if not isinstance(value, torch.Tensor):
        raise DataError(
            f"weight file {path}: {name} is no tensor but of type {type(value).__name__}; "
            "save the model's state_dict"
        )
    try:
        value = value.detach()
        # A view may claim to be far larger than the file.
        if value.nbytes > value.untyped_storage().nbytes():
            raise DataError(f"weight file {path}: {name} claims more bytes than the file holds")
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise DataError(f"weight file {path}: {name} is no plain tensor: {error}") from error


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with `atomic_file`."""
    from safetensors.numpy import save

    # The library ignores strides.
    content = save({name: np.ascontiguousarray(a) for name, a in tensors.items()}, dict(metadata))
    with atomic_file(path) as partial:
        partial.write_bytes(content)
