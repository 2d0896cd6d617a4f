"""Parsing of commands: parameters of a function, or options on top of a preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from patchgd_jax.config.presets import PRESETS, preset_argument

PROGRAM = "patchgd-jax"

Options = TypeVar("Options")
Command = Callable[[Sequence[str]], None]
"""Parses its arguments and runs; the first line of its docstring is its help."""


def command(name: str) -> Callable[[Callable[..., None]], Command]:
    """Makes a function a command, whose parameters are parsed from the arguments."""

    def decorate(function: Callable[..., None]) -> Command:
        def run(arguments: Sequence[str]) -> None:
            tyro.cli(function, prog=f"{PROGRAM} {name}", args=list(arguments))

        run.__doc__ = str(function.__doc__).partition("\n")[0]
        return run

    return decorate


def parse_options(
    kind: type[Options], command: str, about: str, arguments: Sequence[str], **given: Any
) -> tuple[Options, str]:
    """Parses options of a dataclass with a field `config`; returns them and the preset's name.

    `given` are defaults of other fields, such as `tyro.MISSING`.
    """
    preset, default, rest = preset_argument(arguments)
    make: Any = kind
    options = tyro.cli(
        kind,
        prog=f"{PROGRAM} {command} {preset}",
        description=(
            f"{about} Usage: {PROGRAM} {command} [PRESET] [--SETTING VALUE ...]. Presets: "
            f"{', '.join(PRESETS)}. The defaults shown are those of the preset {preset!r}."
        ),
        args=rest,
        default=make(config=default, **given),
    )
    return options, preset
