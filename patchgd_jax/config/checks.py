"""Checks of settings."""

from __future__ import annotations

from patchgd_jax.errors import ConfigError

UNRESOLVED = (
    "{} is auto, which is no number yet; resolve it with planner.auto_settings.resolve_auto"
)


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
