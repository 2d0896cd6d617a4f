"""Options on top of a preset, as `train`, `cross-validate` and `plan` take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from patchgd_jax.config.presets import PRESETS, preset_argument

PROGRAM = "patchgd-jax"

Options = TypeVar("Options")


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
