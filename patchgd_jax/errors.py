"""Errors a user can act on, each with the exit code the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchGDError(Exception):
    """Base of every error that is the input's or the machine's fault, not the program's."""

    exit_code = 1


class ConfigError(PatchGDError):
    """A setting, name or combination of settings that cannot work."""

    exit_code = 2


class DataError(PatchGDError):
    """A data set, image or label that cannot be used."""

    exit_code = 3


class DivergedError(PatchGDError):
    """The loss or a gradient is no longer finite."""

    exit_code = 5


class CheckpointError(PatchGDError):
    """No checkpoint that can be used: missing, damaged, or of another model."""

    exit_code = 6


class DiskError(PatchGDError):
    """A folder or file that cannot be written."""

    exit_code = 7


class DeviceError(PatchGDError):
    """The requested device is not there."""

    exit_code = 8


class Interrupted(PatchGDError):  # noqa: N818
    """The run was stopped by a signal, after saving; the exit code is 128 plus it, as in shells."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """An error for a name that is in no registry, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")
