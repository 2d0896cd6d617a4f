"""Settings as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Container, Mapping
from typing import Any, Literal

from patchgd_jax.errors import ConfigError, unknown_name

SCHEMA = 1
"""Version of the stored settings and metrics; files without a number are of version 0."""

RENAMED: Mapping[str, str] = {}
"""Settings of schema 0 under their present names."""

REMOVED: Mapping[str, Container[Any] | None] = {"reader_workers": None}
"""Settings of schema 0 that are gone, with the values that describe the present behaviour; None:
any value, because the setting changed no result."""


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as plain JSON types."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to one level, named as their flags are: `data.size`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return nested


def migrate(values: Any, where: str = "config") -> dict[str, Any]:
    """Converts stored settings of any schema to those of this version.

    Args:
        values: JSON object of settings, nested or flat, with its number under `schema`.
        where: file, for errors.

    Returns:
        The settings as `flatten` names them.

    Raises:
        ConfigError: if they are of a later version, or set what this version no longer has.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {type(values).__name__}")
    flat = flatten(values)
    schema = flat.pop("schema", 0)
    if schema not in range(SCHEMA + 1):
        raise ConfigError(
            f"{where} has schema {schema!r}, this version reads up to {SCHEMA}; update patchgd-jax"
        )
    if schema == 0:
        flat = {RENAMED.get(name, name): value for name, value in flat.items()}
        for name, same in REMOVED.items():
            value = flat.pop(name, None)
            if same is not None and value is not None and value not in same:
                raise ConfigError(
                    f"{where}: {name} is {value!r}, a setting that patchgd-jax no longer has; use "
                    "the version that the run was started with (see its environment.json)"
                )
    return flat


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "config") -> Any:
    """Inverts `to_dict`; unknown keys and wrong types raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {type(values).__name__}")
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_name("setting", f"{where}.{key}", (f"{where}.{h}" for h in hints))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = from_dict(typing.cast(type, hint), value, f"{where}.{key}")
            continue
        arguments[key] = tuple(value) if isinstance(value, list) else value
        if not _matches(arguments[key], hint):
            raise ConfigError(f"{where}.{key} is {value!r}; expected {_type_name(hint)}")
    return cls(**arguments)


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        options = typing.get_args(hint)
        if options[1:] == (...,):
            return isinstance(value, tuple) and all(_matches(x, options[0]) for x in value)
        return (
            isinstance(value, tuple)
            and len(value) == len(options)
            and all(map(_matches, value, options))
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
