"""PatchModels made of Flax Linen and Flax NNX modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Attend, Init, Params, PatchModel
from patchgd_jax.errors import ConfigError

Channels = float | tuple[float, ...]
"""One value for all channels, or one for each."""


def from_linen(
    encoder: nn.Module,
    head: nn.Module,
    *,
    grid: Grid,
    channels: int,
    mean: Channels = 0.0,
    std: Channels = 1.0,
    dtype: Any = jnp.float32,
) -> PatchModel:
    """Makes a PatchModel of two Flax Linen modules.

    Integer patches are divided by 255; floating-point ones are expected in [0, 1].

    Args:
        encoder: called as `encoder(patches, train=...)`, and with `mask=` if it takes one;
            `float [M, *grid.patch_shape, C]` to `[M, D]`.
        head: called as `head(z, mask, train=...)`; `float [B, rows, cols, D]` to `[B, classes]`.
            It may sow `attention`, `[B, rows, cols]`, into `intermediates`; see `attention_map`.
        grid: determines the shapes of the parameters.
        channels: C.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        dtype: of the normalised patches.

    Raises:
        ConfigError: while a training step is traced, if patch ids are padded and the encoder keeps
            batch statistics but takes no mask.
    """
    modules = {"encoder": encoder, "head": head}

    def init(key: Array) -> tuple[Params, Params]:
        encoder_key, head_key = jax.random.split(key)
        patches = jnp.zeros((1, *grid.patch_shape, channels), dtype)
        latents, encoder_vars = encoder.init_with_output(encoder_key, patches, train=False)
        z = jnp.zeros((1, grid.rows, grid.cols, latents.shape[-1]), latents.dtype)
        head_vars = head.init(head_key, z, None, train=False)
        state = {"encoder": dict(encoder_vars), "head": dict(head_vars)}
        return {part: variables.pop("params", {}) for part, variables in state.items()}, state

    def apply(
        part: str, params: Params, batch_stats: Params, x: Array, mask: Any, **mode: Any
    ) -> tuple[Array, Params]:
        variables = {"params": params[part], **batch_stats[part]}
        train, rng = mode["train"], mode["rng"]
        arguments: tuple[Any, ...] = (x, mask)
        options: dict[str, Any] = {}
        if part == "encoder":
            keeps_statistics = bool(batch_stats[part].get("batch_stats"))
            arguments, options = (x,), _mask_argument(encoder, mask, train and keeps_statistics)
        # Listing the collections that may change keeps an eval pass from touching the state.
        mutable = list(batch_stats[part]) if train else []
        out, changed = modules[part].apply(
            variables, *arguments, train=train, rngs={"dropout": rng}, mutable=mutable, **options
        )
        return out, {**batch_stats, part: {**batch_stats[part], **changed}}

    def attend(params: Params, batch_stats: Params, z: Array, mask: Array | None) -> Array:
        variables = {"params": params["head"], **batch_stats["head"]}
        _, sown = head.apply(variables, z, mask, train=False, mutable=["intermediates"])
        try:
            return sown["intermediates"]["attention"][0]
        except KeyError as error:
            raise ConfigError(
                f"the head {type(head).__name__} has no attention to show; use --model.head "
                'attention or transformer, or sow("intermediates", "attention", ...) in your own'
            ) from error

    return _patch_model(init, apply, partial(_normalized, mean=mean, std=std, dtype=dtype), attend)


def from_nnx(
    make_encoder: Callable[[nnx.Rngs], nnx.Module],
    make_head: Callable[[nnx.Rngs], nnx.Module],
    *,
    mean: Channels = 0.0,
    std: Channels = 1.0,
    dtype: Any = jnp.float32,
) -> PatchModel:
    """Makes a PatchModel of two Flax NNX module constructors.

    Train and eval mode are set on every call: NNX would otherwise silently keep the mode in which
    a module was split.

    Args:
        make_encoder: makes a module called as `encoder(patches)`, and with `mask=` (`bool [M]` or
            None) if it takes one.
        make_head: makes a module called as `head(z, mask)`.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        dtype: of the normalised patches.

    Raises:
        ConfigError: while a training step is traced, if patch ids are padded and the encoder keeps
            batch statistics but takes no mask.
    """
    makers: dict[str, Callable[[nnx.Rngs], Any]] = {"encoder": make_encoder, "head": make_head}
    statistics = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))

    def init(key: Array) -> tuple[Params, Params]:
        keys = dict(zip(makers, jax.random.split(key), strict=True))
        modules = {part: make(nnx.Rngs(keys[part])) for part, make in makers.items()}
        params, state = (
            {part: nnx.to_pure_dict(nnx.state(module, kind)) for part, module in modules.items()}
            for kind in (nnx.Param, statistics)
        )
        return params, state

    def apply(
        part: str, params: Params, batch_stats: Params, x: Array, mask: Any, **mode: Any
    ) -> tuple[Array, Params]:
        # Making the module anew seeds its random streams; its initial values are replaced, and the
        # compiler drops them.
        module, train = makers[part](nnx.Rngs(mode["rng"])), mode["train"]
        for kind, values in ((nnx.Param, params[part]), (statistics, batch_stats[part])):
            state = nnx.state(module, kind)
            nnx.replace_by_pure_dict(state, values)
            nnx.update(module, state)
        (module.train if train else module.eval)()
        if part == "encoder":
            keeps_statistics = bool(nnx.state(module, nnx.BatchStat))
            out = module(x, **_mask_argument(module, mask, train and keeps_statistics))
        else:
            out = module(x, mask)
        changed = nnx.to_pure_dict(nnx.state(module, statistics))
        return out, {**batch_stats, part: changed if train else batch_stats[part]}

    return _patch_model(init, apply, partial(_normalized, mean=mean, std=std, dtype=dtype))


def rematerialised(model: PatchModel) -> PatchModel:
    """Wraps the encoder in `jax.checkpoint`: only its input is kept for the backward pass."""

    def encode(
        params: Params, batch_stats: Params, patches: Array, *, mask: Any = None, **mode: Any
    ) -> tuple[Array, Params]:
        @jax.checkpoint
        def again(params: Params, batch_stats: Params, patches: Array, mask: Any) -> Any:
            return model.encode(params, batch_stats, patches, mask=mask, **mode)

        return again(params, batch_stats, patches, mask)

    return model._replace(encode=encode)


def _patch_model(
    init: Init,
    apply: Callable[..., tuple[Array, Params]],
    normalize: Callable[[Array], Array],
    attend: Attend | None = None,
) -> PatchModel:
    """The pure functions of a model whose parts are run by `apply(part, params, ...)`."""

    def encode(
        params: Params, batch_stats: Params, patches: Array, *, mask: Any = None, **mode: Any
    ) -> tuple[Array, Params]:
        return apply("encoder", params, batch_stats, normalize(patches), mask, **mode)

    return PatchModel(init, encode, partial(apply, "head"), attend)


def _mask_argument(encoder: Any, mask: Array | None, moves_statistics: bool) -> dict[str, Any]:
    """The mask as a keyword argument, if the encoder takes one.

    Raises:
        ConfigError: if it takes none, and padding would enter its batch statistics.
    """
    if "mask" in inspect.signature(type(encoder).__call__).parameters:
        return {"mask": mask}
    if mask is not None and moves_statistics:
        raise ConfigError(
            f"the encoder {type(encoder).__name__} keeps batch statistics and takes no mask, so "
            "padding patches would be counted in them; give its __call__ an argument `mask` "
            "(bool [M] or None) and pass it on to the norm, or use a norm without batch statistics"
        )
    return {}


def _normalized(patches: Array, mean: Channels, std: Channels, dtype: Any) -> Array:
    center, spread = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
    if jnp.issubdtype(patches.dtype, jnp.integer):
        patches = patches.astype(dtype) / 255
    return (patches.astype(dtype) - center) / spread
