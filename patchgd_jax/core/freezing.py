"""Partition of the parameters into trainable and frozen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.errors import ConfigError


def partition_frozen(params: Params, frozen: frozenset[str]) -> tuple[Params, Params]:
    """Splits parameters into trainable ones and the encoder's `frozen` entries.

    Both trees have the entries `encoder` and `head`; the frozen head is empty. Raises `ConfigError`
    if the encoder lacks an entry.
    """
    encoder = params["encoder"]
    if missing := frozen - set(encoder):
        raise ConfigError(f"the encoder has no {', '.join(sorted(missing))} to freeze")
    trainable = {name: tree for name, tree in encoder.items() if name not in frozen}
    rest = {name: tree for name, tree in encoder.items() if name in frozen}
    return {**params, "encoder": trainable}, {"encoder": rest, "head": {}}


def combine_frozen(trainable: Params, frozen: Params) -> Params:
    """Inverts `partition_frozen`."""
    return {**trainable, "encoder": {**trainable["encoder"], **frozen["encoder"]}}


def close_over_frozen(model: PatchModel, frozen: Callable[[], Params]) -> PatchModel:
    """Closes a model over frozen parameters: it takes, and is differentiated by, the others."""

    def encode(params: Params, *args: Any, **kwargs: Any) -> tuple[Array, Params]:
        return model.encode(combine_frozen(params, frozen()), *args, **kwargs)

    def classify(params: Params, *args: Any, **kwargs: Any) -> tuple[Array, Params]:
        return model.classify(combine_frozen(params, frozen()), *args, **kwargs)

    return model._replace(encode=encode, classify=classify)
