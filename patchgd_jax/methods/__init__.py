"""PatchGD and the methods it is compared with, as steps of one training loop.

All share encoder, data, optimizer, metrics and checkpoints. A method is named by
`TrainConfig.method`; `settled_method` fits the other settings to it, and `make_method` gives its
steps. gd, gd-extended and downscale are the mode `full` on a grid of one patch, the whole image.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from patchgd_jax.config import BaselineConfig, MethodName, ModelConfig, PatchGDConfig, TrainConfig
from patchgd_jax.errors import ConfigError
from patchgd_jax.methods.base import Method, one_update
from patchgd_jax.methods.fully_conv import fully_conv_eval, fully_conv_gradient
from patchgd_jax.methods.ips import ips_eval, ips_gradient, selected
from patchgd_jax.methods.mil import FEATURES, mil_gradient
from patchgd_jax.methods.patchwise import patchwise_eval, patchwise_step
from patchgd_jax.step import eval_step, train_step

__all__ = [
    "FEATURES",
    "WHOLE_IMAGE",
    "Method",
    "make_method",
    "method_model",
    "settled_method",
]

WHOLE_IMAGE = frozenset({"gd", "gd-extended", "downscale", "fully-conv"})
"""Methods whose encoder sees the whole image at once."""
_NO_Z = frozenset({"gd", "downscale", "patchwise", "fully-conv"})
"""Methods without PatchGD's head: a dense layer reads one latent."""


def settled_method(config: TrainConfig) -> TrainConfig:
    """The same run with the settings that its method decides.

    Where there are no inner steps, `patchgd.mode` becomes full; for `downscale`, the images' size
    becomes that of the shrunk ones. What is settled stays as it is.

    Raises:
        ConfigError: for settings that the method cannot have.
    """
    method, patchgd = config.method, config.patchgd
    if method == "patchgd":
        return config
    if method == "patchwise":
        if patchgd.mode not in ("patchgd", "accumulate"):
            raise ConfigError(
                f"patchgd.mode {patchgd.mode} with method patchwise: its patches know nothing of "
                "each other, so the gradient of all is that of mode accumulate; use that"
            )
        return config
    if method in WHOLE_IMAGE and config.data.empty.method != "none":
        raise ConfigError(
            f"data.empty leaves patches out, but method {method} sees the whole image; set "
            "data.empty.method none"
        )
    config = dataclasses.replace(
        config, patchgd=dataclasses.replace(patchgd, mode="full", remat=False)
    )
    return _shrunk(config) if method == "downscale" else config


def _shrunk(config: TrainConfig) -> TrainConfig:
    """The run with images whose longer side is `baseline.side`."""
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
    """The settings of the model that a method trains: without Z, a dense layer is the head."""
    return dataclasses.replace(model, head="linear", dropout=None) if method in _NO_Z else model


def make_method(method: MethodName, baseline: BaselineConfig, patchgd: PatchGDConfig) -> Method:
    """The steps of a method; see `settled_method` for what its `patchgd` must be."""
    if method == "patchwise":
        return Method(
            partial(patchwise_step, pooling=baseline.pooling),
            partial(patchwise_eval, pooling=baseline.pooling),
        )
    if method == "fully-conv":
        gradient = partial(
            fully_conv_gradient, positions=baseline.positions, pooling=baseline.pooling
        )
        return Method(one_update(gradient), partial(fully_conv_eval, pooling=baseline.pooling))
    if method == "mil":
        return Method(one_update(mil_gradient), eval_step)
    if method == "ips":
        inner_steps = patchgd.num_inner_steps
        count = partial(selected, top=baseline.top_patches, inner_steps=inner_steps)
        return Method(
            one_update(partial(ips_gradient, count=count)), partial(ips_eval, count=count)
        )
    return Method(train_step, eval_step)
