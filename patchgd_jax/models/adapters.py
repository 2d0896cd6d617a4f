"""PatchModels made of Flax Linen and Flax NNX modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

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

    def init(key: jax.Array) -> tuple[Params, Params]:
        encoder_key, head_key = jax.random.split(key)
        patches = jnp.zeros((1, *grid.patch_shape, channels), dtype)
        latents, encoder_vars = encoder.init_with_output(encoder_key, patches, train=False)
        z = jnp.zeros((1, grid.rows, grid.cols, latents.shape[-1]), latents.dtype)
        head_vars = head.init(head_key, z, None, train=False)
        params, state = {}, {}
        for part, variables in (("encoder", encoder_vars), ("head", head_vars)):
            variables = dict(variables)
            params[part] = variables.pop("params", {})
            state[part] = variables
        return params, state

    def apply(
        part: str, params: Params, model_state: Params, x: jax.Array, mask: Any, **mode: Any
    ) -> tuple[jax.Array, Params]:
        variables = {"params": params[part], **model_state[part]}
        train, rng = mode["train"], mode["rng"]
        arguments: tuple[Any, ...] = (x, mask)
        options: dict[str, Any] = {}
        if part == "encoder":
            keeps_statistics = bool(model_state[part].get("batch_stats"))
            arguments, options = (x,), _mask_argument(encoder, mask, train and keeps_statistics)
        # Listing the collections that may change keeps an eval pass from touching the state.
        mutable = list(model_state[part]) if train else []
        out, changed = modules[part].apply(
            variables, *arguments, train=train, rngs={"dropout": rng}, mutable=mutable, **options
        )
        return out, {**model_state, part: {**model_state[part], **changed}}

    def attend(
        params: Params, model_state: Params, z: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        variables = {"params": params["head"], **model_state["head"]}
        _, sown = head.apply(variables, z, mask, train=False, mutable=["intermediates"])
        try:
            return sown["intermediates"]["attention"][0]
        except KeyError as error:
            raise ConfigError(
                f"the head {type(head).__name__} has no attention to show; use --model.head "
                'attention or transformer, or sow("intermediates", "attention", ...) in your own'
            ) from error

    return _patch_model(init, apply, _normalizer(mean, std, dtype), attend)


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

    def init(key: jax.Array) -> tuple[Params, Params]:
        params, model_state = {}, {}
        for part, part_key in zip(makers, jax.random.split(key), strict=True):
            module = makers[part](nnx.Rngs(part_key))
            params[part] = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            model_state[part] = nnx.to_pure_dict(nnx.state(module, statistics))
        return params, model_state

    def apply(
        part: str, params: Params, model_state: Params, x: jax.Array, mask: Any, **mode: Any
    ) -> tuple[jax.Array, Params]:
        # Making the module anew seeds its random streams; its initial values are replaced, and the
        # compiler drops them.
        module, train = makers[part](nnx.Rngs(mode["rng"])), mode["train"]
        for kind, values in ((nnx.Param, params[part]), (statistics, model_state[part])):
            state = nnx.state(module, kind)
            nnx.replace_by_pure_dict(state, values)
            nnx.update(module, state)
        if train:
            module.train()
        else:
            module.eval()
        if part == "encoder":
            keeps_statistics = bool(nnx.state(module, nnx.BatchStat))
            out = module(x, **_mask_argument(module, mask, train and keeps_statistics))
        else:
            out = module(x, mask)
        changed = nnx.to_pure_dict(nnx.state(module, statistics))
        return out, {**model_state, part: changed if train else model_state[part]}

    return _patch_model(init, apply, _normalizer(mean, std, dtype))


def rematerialised(model: PatchModel) -> PatchModel:
    """Wraps the encoder in `jax.checkpoint`: only its input is kept for the backward pass."""

    def encode(
        params: Params,
        model_state: Params,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Params]:
        @jax.checkpoint
        def again(params: Params, model_state: Params, patches: jax.Array, mask: Any) -> Any:
            return model.encode(params, model_state, patches, train=train, rng=rng, mask=mask)

        return again(params, model_state, patches, mask)

    return model._replace(encode=encode)


def _patch_model(
    init: Init,
    apply: Callable[..., tuple[jax.Array, Params]],
    normalize: Callable[[jax.Array], jax.Array],
    attend: Attend | None = None,
) -> PatchModel:
    """The pure functions of a model whose parts are run by `apply(part, params, ...)`."""

    def encode(
        params: Params,
        model_state: Params,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Params]:
        x = normalize(patches)
        return apply("encoder", params, model_state, x, mask, train=train, rng=rng)

    def classify(
        params: Params,
        model_state: Params,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Params]:
        return apply("head", params, model_state, z, mask, train=train, rng=rng)

    return PatchModel(init, encode, classify, attend)


def _mask_argument(encoder: Any, mask: jax.Array | None, moves_statistics: bool) -> dict[str, Any]:
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


def _normalizer(mean: Channels, std: Channels, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    def normalize(patches: jax.Array) -> jax.Array:
        center, spread = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
        if jnp.issubdtype(patches.dtype, jnp.integer):
            patches = patches.astype(dtype) / 255
        return (patches.astype(dtype) - center) / spread

    return normalize
