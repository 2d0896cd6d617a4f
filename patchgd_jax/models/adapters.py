"""PatchModels of Flax Linen and Flax NNX modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.errors import ConfigError


def _normalizer(
    mean: float | tuple[float, ...], std: float | tuple[float, ...], dtype: Any
) -> Callable[[jax.Array], jax.Array]:
    def normalize(patches: jax.Array) -> jax.Array:
        center, spread = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
        if jnp.issubdtype(patches.dtype, jnp.integer):
            patches = patches.astype(dtype) / 255
        return (patches.astype(dtype) - center) / spread

    return normalize


def from_linen(
    encoder: nn.Module,
    head: nn.Module,
    *,
    grid: Grid,
    channels: int,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    dtype: Any = jnp.float32,
) -> PatchModel:
    """Makes a PatchModel of two Flax Linen modules.

    Args:
        encoder: called as `encoder(patches, train=...)`, and with `mask=` if it takes one;
            `float [M, *grid.patch_shape, C]` to `[M, D]`.
        head: called as `head(z, mask, train=...)`; `float [B, rows, cols, D]` to `[B, classes]`.
            It may sow `attention`, `[B, rows, cols]`, into `intermediates`; see `attention_map`.
        grid: gives the shapes that the parameters are made for.
        channels: C.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        dtype: of the normalised patches.

    Integer patches are divided by 255; floating-point ones are taken to be in [0, 1] already.
    """
    normalize = _normalizer(mean, std, dtype)
    takes_mask = "mask" in inspect.signature(type(encoder).__call__).parameters

    def apply(
        module: nn.Module, part: str, params: Params, model_state: Params, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Params]:
        rng = kwargs.pop("rng")
        variables = {"params": params[part], **model_state[part]}
        # Passing what may change explicitly keeps a frozen pass from ever touching the state.
        mutable = list(model_state[part]) if kwargs["train"] else []
        out, changed = module.apply(
            variables, *args, rngs={"dropout": rng}, mutable=mutable, **kwargs
        )
        return out, {**model_state, part: {**model_state[part], **changed}}

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
        extra = {"mask": mask} if takes_mask else {}
        return apply(encoder, "encoder", params, model_state, x, train=train, rng=rng, **extra)

    def classify(
        params: Params,
        model_state: Params,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Params]:
        return apply(head, "head", params, model_state, z, mask, train=train, rng=rng)

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

    return PatchModel(init, encode, classify, attend)


def from_nnx(
    make_encoder: Callable[[nnx.Rngs], nnx.Module],
    make_head: Callable[[nnx.Rngs], nnx.Module],
    *,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    dtype: Any = jnp.float32,
) -> PatchModel:
    """Makes a PatchModel of two Flax NNX module constructors.

    Train and eval mode are set on every call, since NNX would otherwise silently keep the mode
    that a module had when it was split.

    Args:
        make_encoder: gives a module called as `encoder(patches)`.
        make_head: gives a module called as `head(z, mask)`.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        dtype: of the normalised patches.
    """
    normalize = _normalizer(mean, std, dtype)
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
        part: str, params: Params, model_state: Params, *args: Any, train: bool, rng: jax.Array
    ) -> tuple[jax.Array, Params]:
        # Making the module anew seeds all of its random streams; what it initialises besides is
        # replaced, and the compiler drops it.
        module = makers[part](nnx.Rngs(rng))
        for kind, values in ((nnx.Param, params[part]), (statistics, model_state[part])):
            state = nnx.state(module, kind)
            nnx.replace_by_pure_dict(state, values)
            nnx.update(module, state)
        if train:
            module.train()
        else:
            module.eval()
        out = module(*args)
        changed = nnx.to_pure_dict(nnx.state(module, statistics))
        return out, {**model_state, part: changed if train else model_state[part]}

    def encode(
        params: Params,
        model_state: Params,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Params]:
        return apply("encoder", params, model_state, normalize(patches), train=train, rng=rng)

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

    return PatchModel(init, encode, classify)


def rematerialised(model: PatchModel) -> PatchModel:
    """The model with an encoder that keeps nothing but its input for the backward pass."""

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
