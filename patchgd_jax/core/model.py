"""PatchModel: the contract between the PatchGD steps and a model library.

Three pure functions, as Optax has two for an optimizer. `step.py` knows nothing else of a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from patchgd_jax.core.grid import Grid
from patchgd_jax.errors import ConfigError

Tree = Any
"""A pytree of arrays."""
Parts = dict[str, Tree]
"""A pytree with one entry each for `encoder` (theta1) and `head` (theta2)."""


class Init(Protocol):
    """Makes the parameters and the model state (batch statistics)."""

    def __call__(self, key: jax.Array) -> tuple[Parts, Parts]:
        """Returns `(params, model_state)`, both with the entries `encoder` and `head`."""
        ...


class Encode(Protocol):
    """theta1: patches to latents."""

    def __call__(
        self,
        params: Parts,
        model_state: Parts,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        """Encodes patches.

        Args:
            params: of both parts.
            model_state: of both parts.
            patches: `[M, *grid.patch_shape, C]`, as the images come (uint8); normalised here.
            train: whether dropout is on and batch statistics are taken from this batch.
            rng: PRNG key for dropout.
            mask: `bool [M]`, False for patches that batch statistics must leave out.

        Returns:
            latents `float [M, D]` and the new model state.
        """
        ...


class Classify(Protocol):
    """theta2: the latent block to logits."""

    def __call__(
        self,
        params: Parts,
        model_state: Parts,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Parts]:
        """Classifies `z float [B, rows, cols, D]`.

        Args:
            params: of both parts.
            model_state: of both parts.
            z: the latent block; `z[b, r, c]` is the patch at pixel `(r * stride, c * stride)`.
            mask: `bool [B, rows, cols]`, False where a patch is nothing but padding; None if
                every patch is real.
            train: whether dropout is on and batch statistics are taken from this batch.
            rng: PRNG key for dropout.

        Returns:
            logits `float [B, classes]` and the new model state.
        """
        ...


class Attend(Protocol):
    """How much the head looks at each patch."""

    def __call__(
        self, params: Parts, model_state: Parts, z: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """Weights `float [B, rows, cols]` of a pass in eval mode; arguments as in `Classify`."""
        ...


class PatchModel(NamedTuple):
    """An encoder and a head as pure functions over `{"encoder": ..., "head": ...}` trees."""

    init: Init
    encode: Encode
    classify: Classify
    attend: Attend | None = None
    """None where the head has no attention to show."""


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
        module: nn.Module, part: str, params: Parts, model_state: Parts, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Parts]:
        rng = kwargs.pop("rng")
        variables = {"params": params[part], **model_state[part]}
        # Passing what may change explicitly keeps a frozen pass from ever touching the state.
        mutable = list(model_state[part]) if kwargs["train"] else []
        out, changed = module.apply(
            variables, *args, rngs={"dropout": rng}, mutable=mutable, **kwargs
        )
        return out, {**model_state, part: {**model_state[part], **changed}}

    def init(key: jax.Array) -> tuple[Parts, Parts]:
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
        params: Parts,
        model_state: Parts,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        x = normalize(patches)
        extra = {"mask": mask} if takes_mask else {}
        return apply(encoder, "encoder", params, model_state, x, train=train, rng=rng, **extra)

    def classify(
        params: Parts,
        model_state: Parts,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Parts]:
        return apply(head, "head", params, model_state, z, mask, train=train, rng=rng)

    def attend(
        params: Parts, model_state: Parts, z: jax.Array, mask: jax.Array | None
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

    def init(key: jax.Array) -> tuple[Parts, Parts]:
        params, model_state = {}, {}
        for part, part_key in zip(makers, jax.random.split(key), strict=True):
            module = makers[part](nnx.Rngs(part_key))
            params[part] = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            model_state[part] = nnx.to_pure_dict(nnx.state(module, statistics))
        return params, model_state

    def apply(
        part: str, params: Parts, model_state: Parts, *args: Any, train: bool, rng: jax.Array
    ) -> tuple[jax.Array, Parts]:
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
        params: Parts,
        model_state: Parts,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        return apply("encoder", params, model_state, normalize(patches), train=train, rng=rng)

    def classify(
        params: Parts,
        model_state: Parts,
        z: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        rng: jax.Array,
    ) -> tuple[jax.Array, Parts]:
        return apply("head", params, model_state, z, mask, train=train, rng=rng)

    return PatchModel(init, encode, classify)


def rematerialised(model: PatchModel) -> PatchModel:
    """The model with an encoder that keeps nothing but its input for the backward pass."""

    def encode(
        params: Parts,
        model_state: Parts,
        patches: jax.Array,
        *,
        train: bool,
        rng: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        @jax.checkpoint
        def again(params: Parts, model_state: Parts, patches: jax.Array, mask: Any) -> Any:
            return model.encode(params, model_state, patches, train=train, rng=rng, mask=mask)

        return again(params, model_state, patches, mask)

    return model._replace(encode=encode)


def split_frozen(params: Parts, frozen: frozenset[str]) -> tuple[Parts, Parts]:
    """Divides parameters into those that are trained and those that stay as they are.

    Args:
        params: of both parts.
        frozen: entries of the encoder.

    Returns:
        Two trees with the entries `encoder` and `head`; the second one's head is empty.

    Raises:
        ConfigError: for an entry that is not there.
    """
    encoder = params["encoder"]
    missing = frozen - set(encoder)
    if missing:
        raise ConfigError(f"the encoder has no {', '.join(sorted(missing))} to freeze")
    trained = {name: tree for name, tree in encoder.items() if name not in frozen}
    fixed = {name: tree for name, tree in encoder.items() if name in frozen}
    return {**params, "encoder": trained}, {"encoder": fixed, "head": {}}


def join_frozen(trained: Parts, fixed: Parts) -> Parts:
    """The inverse of `split_frozen`."""
    return {**trained, "encoder": {**trained["encoder"], **fixed["encoder"]}}


def with_fixed(model: PatchModel, fixed: Callable[[], Parts]) -> PatchModel:
    """The model as a function of the other parameters: no gradient of the fixed ones ever is."""

    def encode(params: Parts, *args: Any, **kwargs: Any) -> tuple[jax.Array, Parts]:
        return model.encode(join_frozen(params, fixed()), *args, **kwargs)

    def classify(params: Parts, *args: Any, **kwargs: Any) -> tuple[jax.Array, Parts]:
        return model.classify(join_frozen(params, fixed()), *args, **kwargs)

    return model._replace(encode=encode, classify=classify)
