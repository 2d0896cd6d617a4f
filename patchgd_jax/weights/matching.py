"""Matches the tensors of a weight file to the parameters of a model.

Published weights hold an encoder without our latent layer, and a classifier that we do not use.
Our own exports (`export.py`) hold a whole model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from patchgd_jax.config import ModelConfig
from patchgd_jax.core.model import Params
from patchgd_jax.errors import ConfigError, DataError
from patchgd_jax.weights.files import WeightFile, read_weights
from patchgd_jax.weights.hub import locate_weights
from patchgd_jax.weights.published import (
    LATENT_LAYER,
    PUBLISHED,
    PublishedNames,
    flax_path,
    published_name,
    to_flax_layout,
    to_published_layout,
)

TensorPath = tuple[str, ...]
"""Part and collection first: `("encoder", "params", "Conv_0", "kernel")`."""

OWN_PREFIX = "patchgd."
METADATA_KEY = "patchgd_jax"
"""Entry of an export's safetensors header: JSON with `version`, `settings` and `preprocess`."""

_LISTED = 10


class StartingPoint(NamedTuple):
    """Values for a model's parameters, with the input scaling that they need."""

    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    into: Callable[[Params, Params], tuple[Params, Params]]
    """Replaces the entries of `(params, batch_stats)` that it has; raises if one does not fit."""


def tensor_paths(params: Params, batch_stats: Params) -> dict[TensorPath, Any]:
    """Lists every leaf of a model by its path."""
    return {
        _tensor_path(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path((params, batch_stats))[0]
    }


def _tensor_path(path: tuple[Any, ...]) -> TensorPath:
    tree, part, *rest = path
    # Batch statistics have collection names; the parameters are one collection.
    collection = ("params",) if tree.idx == 0 else ()
    return (part.key, *collection, *(entry.key for entry in rest))


def tensor_names(encoder: str, paths: Iterable[TensorPath]) -> dict[TensorPath, str]:
    """Names a model's tensors for an export.

    The encoder's have their published names, except the latent layer. That layer, the head, and
    encoders without published names (or with another norm than the published one) have ours: the
    path with `patchgd.` before it.
    """
    paths = list(paths)
    names = {path: OWN_PREFIX + ".".join(path) for path in paths}
    backbone = [path for path in paths if path[0] == "encoder" and path[2] != LATENT_LAYER]
    table = PUBLISHED.get(encoder)
    if table is not None:
        try:
            names.update({path: published_name(table, path[1:]) for path in backbone})
        except ConfigError:
            # No model loads a mixture, so all of the encoder keeps our names.
            names.update({path: OWN_PREFIX + ".".join(path) for path in backbone})
    return names


def weights_start(
    model: ModelConfig, weights: str, message: Callable[[str], None]
) -> StartingPoint:
    """Reads a weight file as a starting point for a model.

    `weights` and the errors are those of `locate_weights` and `read_weights`; `message` gets one
    line for a download, and one for the loaded tensors. Raises `ConfigError` also for weights of
    another encoder.
    """
    file = read_weights(locate_weights(weights, model.encoder, message))
    export = _read_export(file)
    table = PUBLISHED.get(model.encoder)
    if export is not None:
        mean, std = export.mean, export.std
    elif table is not None:
        mean, std = table.mean, table.std
    else:
        raise ConfigError(
            f"{file.path} is no export of patchgd-jax, and there are no published weights of the "
            f"encoder {model.encoder}; there are of {', '.join(PUBLISHED)}"
        )

    def into(params: Params, batch_stats: Params) -> tuple[Params, Params]:
        wanted = tensor_paths(params, batch_stats)
        fit = _match(file, model.encoder, wanted, whole=export is not None)
        if model.allow_partial and any(map(_is_head, fit.problems)):
            fit = fit.without_head()
        fit.check(file.path, model, export)
        new = sorted({"/".join(path[:1] + path[2:3]) for path in wanted.keys() - fit.placed.keys()})
        message(
            f"The model starts from {file.path}: {len(fit.placed)} tensors; "
            f"new are {_listed(new) if new else 'none'}."
        )

        def value(path: tuple[Any, ...], leaf: Any) -> Any:
            placed = fit.placed.get(_tensor_path(path))
            return leaf if placed is None else jax.device_put(placed)

        return jax.tree_util.tree_map_with_path(value, (params, batch_stats))

    return StartingPoint(mean, std, into)


class _Export(NamedTuple):
    """Header of an export."""

    settings: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _read_export(file: WeightFile) -> _Export | None:
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
        mean, std = (tuple(map(float, values["preprocess"][name])) for name in ("mean", "std"))
        settings = dict(values["settings"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"the header of weight file {file.path} is damaged: {error!r}") from error
    if not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
        raise DataError(f"weight file {file.path} scales its input by {std}")
    return _Export(settings, mean, std)


@dataclass
class _Fit:
    """Result of matching a file's tensors to a model's parameters."""

    placed: dict[TensorPath, np.ndarray] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    """Description of the problem, by key."""

    @property
    def problems(self) -> list[str]:
        """All keys that do not fit."""
        return [*self.missing, *self.unexpected, *self.misshapen]

    def without_head(self) -> _Fit:
        """Returns the match of the encoder alone."""
        return _Fit(
            {path: value for path, value in self.placed.items() if path[0] != "head"},
            [key for key in self.missing if not _is_head(key)],
            [key for key in self.unexpected if not _is_head(key)],
            {key: what for key, what in self.misshapen.items() if not _is_head(key)},
        )

    def check(self, path: Path, model: ModelConfig, export: _Export | None) -> None:
        """Raises one error that names all tensors that do not fit, or are not finite."""
        if self.problems:
            groups = {
                "missing": self.missing,
                "unexpected": self.unexpected,
                "of another shape": [f"{key} {what}" for key, what in self.misshapen.items()],
            }
            lines = [f"{len(g)} {name}: {_listed(g)}" for name, g in groups.items() if g]
            if export is not None:
                was = ", ".join(f"{name} {value}" for name, value in export.settings.items())
                lines.append(f"they were exported from a model with {was}")
                if all(map(_is_head, self.problems)):
                    lines.append("to start with a new head, add --model.allow-partial")
            text = "\n  ".join(lines)
            raise ConfigError(f"weights {path} do not fit the encoder {model.encoder}:\n  {text}")
        broken = ["/".join(name) for name, a in self.placed.items() if not np.isfinite(a).all()]
        if broken:
            raise DataError(
                f"weights {path} are not finite (NaN, infinity, or beyond float32) in "
                f"{len(broken)} tensors: {_listed(broken)}"
            )


def _is_head(key: str) -> bool:
    return key.startswith(f"{OWN_PREFIX}head.")


def _listed(names: list[str]) -> str:
    # A hostile file may put terminal commands in names.
    shown = [name if name.isprintable() else ascii(name) for name in names[:_LISTED]]
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name[:200] for name in shown) + more


def _match(
    file: WeightFile, encoder: str, wanted: Mapping[TensorPath, Any], *, whole: bool
) -> _Fit:
    """Matches a file's tensors to the model's leaves `wanted`.

    `whole`: the file is an export of a whole model, not a published encoder.
    """
    names = tensor_names(encoder, wanted)
    table = PUBLISHED.get(encoder)
    if not whole:
        names = {p: k for p, k in names.items() if p[0] == "encoder" and p[2] != LATENT_LAYER}
        if any(key.startswith(OWN_PREFIX) for key in names.values()):
            raise ConfigError(
                f"published weights of {encoder} need the norm they were trained with; "
                "set --model.norm batch"
            )
    paths = {key: path for path, key in names.items()}
    fit, seen = _Fit(), set()
    for key, array in file.tensors.items():
        path = paths.get(key)
        if not whole:
            assert table is not None
            if re.fullmatch(table.classifier, key) or re.fullmatch(table.ignored, key):
                continue
            # Published names may differ from those that we write.
            inner = flax_path(table, key)
            path = None if inner is None else ("encoder", *inner)
        if path not in names or path in seen:
            fit.unexpected.append(key)
            continue
        seen.add(path)
        leaf = wanted[path]
        published = None if key.startswith(OWN_PREFIX) else table
        value = _in_layout(published, key, array, leaf.shape)
        if value is None:
            needed = _published_shape(published, key, leaf.shape)
            is_now = f"is {array.dtype}{list(array.shape)}"
            fit.misshapen[key] = f"{is_now}, the model needs {leaf.dtype}{needed}"
        else:
            # Beyond float32 becomes infinite, which is reported.
            with np.errstate(over="ignore"):
                fit.placed[path] = np.ascontiguousarray(value, leaf.dtype)
    fit.missing = [key for path, key in names.items() if path not in seen]
    return fit


def _in_layout(
    table: PublishedNames | None, key: str, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Converts a file's tensor to the model's layout; None if type or shape do not fit."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    if table is not None:
        array = to_flax_layout(table, key, array, shape)
    return array if array.shape == shape else None


def _published_shape(table: PublishedNames | None, key: str, shape: tuple[int, ...]) -> list[int]:
    if table is None:
        return list(shape)
    # Broadcasting makes no copy.
    return list(to_published_layout(table, key, np.broadcast_to(np.float32(0), shape)).shape)
