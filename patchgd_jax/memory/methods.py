"""The ways to train on large images that a plan compares, each as a step that compiles and runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from patchgd_jax.config import ModelConfig
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.grid import PatchGrid
from patchgd_jax.memory.request import PlanRequest, tree_bytes
from patchgd_jax.models import build_encoder, build_model, encoder_norm
from patchgd_jax.models.conv import SHORTEST, traced_for
from patchgd_jax.models.depth import encoder_layers
from patchgd_jax.optimizer import make_optimizer
from patchgd_jax.patch_model import Parts
from patchgd_jax.step import TrainState, eval_step, init_state, train_step

Method = Literal[
    "gd",
    "gd-extended",
    "gd-remat",
    "downscaled",
    "patch-wise",
    "fully-convolutional",
    "patchgd",
    "accumulate",
    "exact",
    "full",
]
METHODS: tuple[Method, ...] = get_args(Method)
WHOLE_IMAGE: tuple[Method, ...] = ("gd", "gd-extended", "gd-remat", "fully-convolutional")
"""Methods whose encoder sees the whole image at once."""
PATCHGD: tuple[Method, ...] = ("patchgd", "accumulate", "exact", "full")
"""Modes of `patchgd_jax train`."""

ABOUT: dict[Method, str] = {
    "gd": "the reference: the gradient of the whole image",
    "gd-extended": "as gd, with PatchGD's head behind the encoder",
    "gd-remat": "the same gradient as gd, for about a third more computation",
    "downscaled": "loses the detail below the new pixel size",
    "patch-wise": "label noise: every patch is told its image's label",
    "fully-convolutional": "correlated updates: one loss per position, all of one image",
    "patchgd": "updates from k patches while the rest of Z is stale",
    "accumulate": "one update; each patch's gradient sees the others' entries in Z as constants",
    "exact": "the gradient of all patches at the memory of one chunk; no batch statistics",
    "full": "the gradient of all patches, each encoded alone",
}
"""What a method changes statistically, in one phrase."""


class Program(NamedTuple):
    """A pure function and the shapes it is to be compiled for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct`."""
    donated: tuple[int, ...] = ()
    resident: int = 0
    """Bytes that stay on the device beside the arguments while it runs."""


class EncoderShapes(NamedTuple):
    """What a trace of an encoder's initialisation for a patch tells."""

    variables: Parts
    """Shapes."""
    has_map: bool
    """Whether its last layer before the latent returns a map: the encoder is convolutional."""


class Step(NamedTuple):
    """Training and evaluation by one method, and what the columns of its row are made of."""

    train: Program
    evaluate: Program
    state: TrainState
    """Shapes."""
    images: jax.ShapeDtypeStruct
    """One training batch."""


def step_of(request: PlanRequest, method: Method, side: int | None = None) -> Step:
    """The step of a method.

    Args:
        request: what is planned.
        method: one of METHODS.
        side: for `downscaled`, the longer side in pixels that images are shrunk to.

    Raises:
        ConfigError: for an unknown method, one that the encoder does not support, or settings
            that cannot be together.
    """
    require_supported(request, method)
    if method in PATCHGD:
        return _patchgd_step(request, method)
    if method == "fully-convolutional":
        return _convolutional_step(request)
    count, size = encoder_inputs(request, method)
    scored = request.eval_batch
    if method == "patch-wise":
        scored *= min(request.patchgd.fill_chunk, request.patches)
    if method == "downscaled":
        size = downscaled_size(request.image, side or request.patchgd.patch)
    model = request.model if method == "gd-extended" else linear_model(request)
    if method == "gd-remat":
        model = dataclasses.replace(model, remat="blocks")
    return _whole_step(request, model, size, count, scored)


def linear_model(request: PlanRequest) -> ModelConfig:
    """The model of a method without Z: the encoder, and a dense layer behind it."""
    return dataclasses.replace(request.model, head="linear", dropout=None)


def encoder_inputs(request: PlanRequest, method: Method) -> tuple[int, tuple[int, int]]:
    """How many inputs the encoder sees at once where a gradient is taken, and their size.

    Raises:
        ConfigError: if there are more inner steps than patches, or the patch is larger than the
            image.
    """
    patchgd, grid = request.patchgd, request.grid
    if method in ("gd", "gd-extended", "gd-remat", "fully-convolutional"):
        return request.batch, request.image[:2]
    if method == "downscaled":
        return request.batch, (patchgd.patch, patchgd.patch)
    chunk = min(patchgd.fill_chunk, request.patches)
    if method == "exact" or (method == "full" and patchgd.remat):
        per_image = chunk
    elif method == "full":
        per_image = request.patches
    else:
        per_image = request.sampled
    return request.batch * per_image, (grid.patch, grid.patch)


def z_bytes(request: PlanRequest, method: Method) -> int:
    """Bytes of the latent block of a batch; 0 for methods without one."""
    if method not in PATCHGD:
        return 0
    itemsize = jnp.dtype(request.model.dtype).itemsize
    return request.batch * request.grid.num_patches * request.model.latent_dim * itemsize


def encoder_shapes(model: ModelConfig, side: int, channels: int) -> EncoderShapes:
    """Traces the initialisation of an encoder for patches of `side` pixels."""
    encoder, last = build_encoder(model, side), _LastLayer()
    patches = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    with traced_for(SHORTEST), nn.intercept_methods(last):
        variables = jax.eval_shape(partial(encoder.init, train=False), _key(), patches)
    return EncoderShapes(dict(variables), last.ndim == 4)


class _LastLayer:
    """Notes, of the encoder's layers that return a map or tokens, the one that was applied last."""

    def __init__(self) -> None:
        self.name = ""
        self.ndim = 0

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = method(*args, **kwargs)
        if len(context.module.path) == 1 and getattr(out, "ndim", 0) in (3, 4):
            # No array: in a rematerialised block, those that are seen here have no gradient.
            self.name, self.ndim = context.module.name, out.ndim
        return out


def require_supported(
    request: PlanRequest, method: Method, shapes: EncoderShapes | None = None
) -> None:
    """Checks that there is a method of that name, and that it goes with the encoder.

    Args:
        request: what is planned.
        method: one of METHODS.
        shapes: of the encoder for a patch; None: they are traced here if needed.

    Raises:
        ConfigError: if not.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    model, channels, patch = request.model, request.image[2], request.patchgd.patch
    if method == "exact":
        moving = encoder_norm(model) == "batch" and request.patchgd.norm_policy != "frozen"
        if moving:
            raise ConfigError(
                "mode exact needs model.norm group, or patchgd.norm_policy frozen: batch "
                "statistics taken chunk by chunk are not those of the whole image"
            )
    height, width, _ = request.image
    convolutional = method == "fully-convolutional"
    if convolutional or (method in WHOLE_IMAGE and height != width):
        shapes = shapes or encoder_shapes(model, patch, channels)
        if not shapes.has_map:
            what = "an image that is not square"
            if convolutional:
                what = "fully-convolutional training"
            raise ConfigError(f"{what}: {_no_map(build_encoder(model, patch))}")


def _no_map(encoder: nn.Module) -> str:
    return f"the encoder {type(encoder).__name__} has no map of features"


def downscaled_size(image: tuple[int, int, int], side: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to `side`, at least 1 px."""
    height, width, _ = image
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def optimizer_of(request: PlanRequest, *, patchgd: bool = True) -> optax.GradientTransformation:
    """The optimizer; its memory does not depend on the length of the run.

    Raises:
        ConfigError: for layer-wise rates of an encoder whose blocks cannot be told.
    """
    depth = None
    if request.optimizer.layer_decay != 1:
        patch = request.patchgd.patch
        encoder = build_encoder(request.model, patch)
        depth = encoder_layers(encoder, patch=patch, channels=request.image[2]).depth
    return make_optimizer(
        request.optimizer,
        total_steps=1000,
        steps_per_epoch=100,
        updates_per_step=request.patchgd.updates_per_step if patchgd else 1,
        depth=depth,
    )


def _frozen(request: PlanRequest) -> frozenset[str]:
    stages, patch = request.optimizer.freeze_stages, request.patchgd.patch
    if not stages:
        return frozenset()
    encoder = build_encoder(request.model, patch)
    return encoder_layers(encoder, patch=patch, channels=request.image[2]).until(stages)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _batch(images: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    return {"image": images, "label": jax.ShapeDtypeStruct(images.shape[:1], np.int32)}


def _images(count: int, size: tuple[int, int], channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *size, channels), np.uint8)


def _resident(state: TrainState, images: jax.ShapeDtypeStruct) -> int:
    """Bytes of a run that an evaluation step is not given: the rest of the state, a batch."""
    return tree_bytes((state.step, state.opt_state, images))


def _patchgd_step(request: PlanRequest, method: Method) -> Step:
    patchgd = request.patchgd
    if method != patchgd.mode:
        patchgd = dataclasses.replace(patchgd, mode=cast(Any, method))
    grid = request.grid
    model = build_model(
        request.model,
        grid=grid,
        channels=request.image[2],
        classes=request.classes,
        mean=(0.0,) * request.image[2],
        std=(1.0,) * request.image[2],
    )
    request = dataclasses.replace(request, patchgd=patchgd)
    optimizer, frozen = optimizer_of(request), _frozen(request)
    init = partial(init_state, model=model, optimizer=optimizer, frozen=frozen)
    state: TrainState = jax.eval_shape(init, _key())
    step = partial(
        train_step,
        model=model,
        optimizer=optimizer,
        grid=grid,
        patchgd=patchgd,
        augment=request.augment,
        frozen=frozen,
    )
    score = partial(eval_step, model=model, grid=grid, fill_chunk=patchgd.fill_chunk)
    images = _images(request.batch, request.image[:2], request.image[2])
    batch = _batch(images)
    scored = _batch(_images(request.eval_batch, request.image[:2], request.image[2]))
    if request.slots is not None:
        for arrays in (batch, scored):
            shape = (arrays["label"].shape[0], request.slots)
            arrays["patches"] = jax.ShapeDtypeStruct(shape, np.int32)
    return Step(
        train=Program(step, (state, batch, _key()), donated=(0,)),
        evaluate=Program(
            score, (state.params, state.model_state, scored), resident=_resident(state, images)
        ),
        state=state,
        images=images,
    )


def _whole_step(
    request: PlanRequest, config: ModelConfig, size: tuple[int, int], count: int, scored: int
) -> Step:
    """Plain training: the encoder sees each input once and whole, and a head reads its latent."""
    channels = request.image[2]
    side = min(size)
    model = build_model(
        config,
        grid=PatchGrid(side, side, side),
        channels=channels,
        classes=request.classes,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    optimizer = optimizer_of(request, patchgd=False)
    init = partial(init_state, model=model, optimizer=optimizer)
    state: TrainState = jax.eval_shape(init, _key())

    def logits_of(
        params: Parts, model_state: Parts, images: jax.Array, key: jax.Array, train: bool
    ) -> tuple[jax.Array, Parts]:
        z, model_state = model.encode(params, model_state, images, train=train, rng=key)
        return model.classify(params, model_state, z[:, None, None], None, train=train, rng=key)

    return _plain(request, logits_of, optimizer, state, size, count, scored)


def _convolutional_step(request: PlanRequest) -> Step:
    """One pass over the image and one loss at every position of the encoder's last map."""
    channels, patch = request.image[2], request.patchgd.patch
    encoder = build_encoder(request.model, patch)
    optimizer = optimizer_of(request, patchgd=False)

    def init(key: jax.Array) -> TrainState:
        patches = jnp.zeros((1, patch, patch, channels))
        variables = dict(encoder.init(key, patches, train=False))
        features, _ = feature_map(encoder, variables, patches, False)
        head = {
            "kernel": jnp.zeros((features.shape[-1], request.classes)),
            "bias": jnp.zeros(request.classes),
        }
        params = {"encoder": variables.pop("params"), "head": head}
        model_state = {"encoder": variables, "head": {}}
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params))

    state: TrainState = jax.eval_shape(init, _key())

    def logits_of(
        params: Parts, model_state: Parts, images: jax.Array, key: jax.Array, train: bool
    ) -> tuple[jax.Array, Parts]:
        dtype = jnp.dtype(request.model.dtype)
        variables = {"params": params["encoder"], **model_state["encoder"]}
        see: Callable[..., Any] = partial(feature_map, encoder, train=train, key=key)
        if request.model.remat == "everything":
            see = jax.checkpoint(see)
        x, changed = see(variables, images.astype(dtype) / 255)
        head = params["head"]
        logits = (x @ head["kernel"].astype(dtype) + head["bias"].astype(dtype)).astype(jnp.float32)
        kept = {**model_state["encoder"], **changed}
        return logits, {**model_state, "encoder": kept}

    return _plain(
        request,
        logits_of,
        optimizer,
        state,
        request.image[:2],
        request.batch,
        request.eval_batch,
    )


def _plain(
    request: PlanRequest,
    logits_of: Callable[..., tuple[jax.Array, Parts]],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    size: tuple[int, int],
    count: int,
    scored: int,
) -> Step:
    def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
        labels = labels.reshape(-1, *(1,) * (logits.ndim - 2))
        labels = jnp.broadcast_to(labels, logits.shape[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def train(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def loss_of(params: Parts) -> tuple[jax.Array, Parts]:
            logits, model_state = logits_of(params, state.model_state, batch["image"], key, True)
            return losses(logits, batch["label"]).mean(), model_state

        (loss, model_state), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, model_state, opt_state), loss

    def evaluate(params: Parts, model_state: Parts, batch: dict[str, jax.Array]) -> jax.Array:
        return logits_of(params, model_state, batch["image"], jax.random.key(0), False)[0]

    images = _images(count, size, request.image[2])
    return Step(
        train=Program(train, (state, _batch(images), _key()), donated=(0,)),
        evaluate=Program(
            evaluate,
            (state.params, state.model_state, _batch(_images(scored, size, request.image[2]))),
            resident=_resident(state, images),
        ),
        state=state,
        images=images,
    )


def feature_map(
    encoder: nn.Module, variables: Any, x: jax.Array, train: bool, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """The map `[M, h, w, F]` that the last of the encoder's layers before its latent returns.

    Returns:
        The map, and what the pass changes in the model state.

    Raises:
        ConfigError: if that is no map: the encoder is not convolutional.
    """
    last = _LastLayer()
    with nn.intercept_methods(last):
        _, changed = encoder.apply(
            variables,
            x,
            train=train,
            mutable=[*(name for name in variables if name != "params" and train), "intermediates"],
            rngs={} if key is None else {"dropout": key},
            capture_intermediates=lambda module, name: len(module.path) == 1,
        )
    seen = changed.pop("intermediates")
    if last.ndim != 4:
        raise ConfigError(_no_map(encoder))
    return seen[last.name]["__call__"][0], changed
