"""How settings are checked when they are made."""

from __future__ import annotations

from patchgd_jax.errors import ConfigError

NOT_SETTLED = (
    "{} is auto, which is not a number yet; patchgd_jax.planner.auto_settings.settled makes it one"
)


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
