"""PatchGD and the methods it is compared with, by the name in `TrainConfig.method`.

All share encoder, data, optimizer, metrics and checkpoints. gd, gd-extended and downscale are the
mode `full` on a grid of one patch, the whole image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from patchgd_jax.baselines.fully_conv import fully_conv_eval, fully_conv_gradient
from patchgd_jax.baselines.ips import ips_eval, ips_gradient, selected
from patchgd_jax.baselines.mil import FEATURES, mil_gradient
from patchgd_jax.baselines.patchwise import patchwise_eval, patchwise_step
from patchgd_jax.config import BaselineConfig, MethodName, ModelConfig, PatchGDConfig, TrainConfig
from patchgd_jax.core.forward import eval_step
from patchgd_jax.core.problem import Batch, Problem, Weights
from patchgd_jax.core.step import train_step
from patchgd_jax.core.update import Metrics, TrainStep, make_train_step
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.depth import encoder_layers
from patchgd_jax.models.registry import build_encoder

__all__ = [
    "FEATURES",
    "WHOLE_IMAGE",
    "Algorithm",
    "frozen_entries",
    "make_algorithm",
    "method_model",
    "resolve_method",
]

WHOLE_IMAGE = frozenset({"gd", "gd-extended", "downscale", "fully-conv"})
"""Methods whose encoder sees the whole image at once."""
_NO_Z = frozenset({"gd", "downscale", "patchwise", "fully-conv"})
"""Methods without PatchGD's head: a dense layer reads one latent."""


def resolve_method(config: TrainConfig) -> TrainConfig:
    """Sets the settings that the run's method decides; resolving again changes nothing.

    Where there are no inner steps, `patchgd.mode` becomes full; for `downscale`, the images' size
    becomes that of the shrunk ones. Raises `ConfigError` for settings that the method cannot have.
    """
    method, patchgd = config.method, config.patchgd
    _check_read(config)
    if method == "patchgd":
        return config
    if method == "patchwise":
        if patchgd.mode not in ("patchgd", "accumulate"):
            raise ConfigError(
                f"patchgd.mode {patchgd.mode} with method patchwise: its patches know nothing of "
                "each other, so mode accumulate has the gradient of all of them; use that"
            )
        return config
    if method in WHOLE_IMAGE and config.data.empty.method != "none":
        raise ConfigError(
            f"data.empty leaves patches out, but method {method} sees the whole image; set "
            "data.empty.method none"
        )
    config = dataclasses.replace(config, patchgd=dataclasses.replace(patchgd, mode="full"))
    return _shrunk(config) if method == "downscale" else config


_READ_BY = {
    "side": {"downscale"},
    "pooling": {"patchwise", "fully-conv"},
    "positions": {"fully-conv"},
    "top_patches": {"ips"},
}
"""The methods that use each setting of `BaselineConfig`."""


def _check_read(config: TrainConfig) -> None:
    """Raises `ConfigError` for settings that the method does not use."""
    method, usual = config.method, BaselineConfig()
    for name, methods in _READ_BY.items():
        if getattr(config.baseline, name) != getattr(usual, name) and method not in methods:
            raise ConfigError(
                f"baseline.{name} is about method {' and '.join(sorted(methods))}, not {method}; "
                "leave it out"
            )
    if method == "patchgd":
        return
    if config.patchgd.encoder_grad_scale != 1:
        raise ConfigError(
            "patchgd.encoder_grad_scale undoes what PatchGD does to the encoder's gradient; method "
            f"{method} does not do it, so leave it out"
        )
    if config.patchgd.remat:
        raise ConfigError(
            f"patchgd.remat is about mode full of method patchgd; for {method}, use --model.remat "
            "blocks or everything"
        )
    if method == "mil" and config.optimizer.freeze_stages:
        raise ConfigError("method mil trains no stage of the encoder; leave freeze_stages out")


def _shrunk(config: TrainConfig) -> TrainConfig:
    """Returns the run with images whose longer side is `baseline.side`."""
    data, side = config.data, config.baseline.side or config.patchgd.patch
    longer = max(data.size)
    if data.generated:
        factor = longer // side
        if factor * side != longer or any(length % factor for length in data.size):
            raise ConfigError(
                f"baseline.side {side}: generated images of {data.size[0]} x {data.size[1]} px are "
                "shrunk by whole factors; use a side that divides theirs"
            )
        if data.downscale not in (1, factor):
            raise ConfigError(
                f"data.downscale {data.downscale} and baseline.side {side} both shrink the images; "
                "leave data.downscale out"
            )
        return dataclasses.replace(config, data=dataclasses.replace(data, downscale=factor))
    if data.fit == "native":
        raise ConfigError("method downscale shrinks all images to one size; use --data.fit resize")
    if longer <= side:
        return config
    height, width = (max(1, round(length * side / longer)) for length in data.size)
    return dataclasses.replace(config, data=dataclasses.replace(data, size=(height, width)))


def method_model(method: MethodName, model: ModelConfig) -> ModelConfig:
    """Returns the settings of a method's model: without Z, a dense layer is the head."""
    return dataclasses.replace(model, head="linear", dropout=None) if method in _NO_Z else model


def frozen_entries(
    method: MethodName, model: ModelConfig, stages: int, *, patch: int, channels: int
) -> frozenset[str]:
    """Lists the encoder's top-level entries that are not trained: for method mil, all of them.

    `stages` is `optimizer.freeze_stages`, at most those that the encoder has, else a `ConfigError`.
    """
    encoder = build_encoder(model, patch)
    if method == "mil":
        patches = jax.ShapeDtypeStruct((1, patch, patch, channels), jnp.float32)
        variables = jax.eval_shape(partial(encoder.init, train=False), jax.random.key(0), patches)
        return frozenset(variables["params"])
    if not stages:
        return frozenset()
    return encoder_layers(encoder, patch=patch, channels=channels).until(stages)


class Algorithm(NamedTuple):
    """A method's train step and eval step, with the arguments of PatchGD's."""

    train_step: TrainStep
    eval_step: Callable[[Problem, Weights, Batch], Metrics]


def make_algorithm(
    method: MethodName, baseline: BaselineConfig, patchgd: PatchGDConfig
) -> Algorithm:
    """Makes the steps of a method; `resolve_method` gives the `patchgd` that it needs."""
    pooling = baseline.pooling
    if method == "patchwise":
        return Algorithm(patchwise_step(pooling), partial(patchwise_eval, pooling=pooling))
    if method == "fully-conv":
        gradient = partial(fully_conv_gradient, positions=baseline.positions, pooling=pooling)
        return Algorithm(make_train_step(gradient), partial(fully_conv_eval, pooling=pooling))
    if method == "mil":
        return Algorithm(make_train_step(mil_gradient), eval_step)
    if method == "ips":
        steps = patchgd.num_inner_steps
        count = partial(selected, top=baseline.top_patches, inner_steps=steps)
        gradient = partial(ips_gradient, count=count)
        return Algorithm(make_train_step(gradient), partial(ips_eval, count=count))
    return Algorithm(train_step, eval_step)
