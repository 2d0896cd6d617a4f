"""The methods that a plan compares, each as a step that compiles and runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from patchgd_jax.baselines.ips import require_attention, selected
from patchgd_jax.baselines.registry import WHOLE_IMAGE, frozen_entries, make_algorithm, method_model
from patchgd_jax.config import MethodName, ModelConfig, PatchGDConfig
from patchgd_jax.contrib.importance import importance_groups
from patchgd_jax.core.grid import Grid, WholeImage
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.optimizer import make_optimizer
from patchgd_jax.core.problem import Problem
from patchgd_jax.core.update import TrainState, init_state
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.depth import encoder_layers
from patchgd_jax.models.registry import (
    build_encoder,
    build_model,
    encoder_entry,
    encoder_norm,
    map_side,
)
from patchgd_jax.planner.request import PlanRequest, tree_bytes

Method = Literal[
    "gd",
    "gd-extended",
    "gd-remat",
    "downscale",
    "patchwise",
    "fully-conv",
    "mil",
    "ips",
    "patchgd",
    "accumulate",
    "exact",
    "full",
]
METHODS: tuple[Method, ...] = get_args(Method)
PATCHGD: tuple[Method, ...] = ("patchgd", "accumulate", "exact", "full")
"""Modes of `patchgd_jax train`."""
WITH_Z: tuple[Method, ...] = ("mil", "ips", *PATCHGD)
"""Methods that fill a latent block."""

ABOUT: dict[Method, str] = {
    "gd": "the reference: the gradient of the whole image",
    "gd-extended": "as gd, with PatchGD's head behind the encoder",
    "gd-remat": "the same gradient as gd, for about a third more computation",
    "downscale": "loses the detail below the new pixel size",
    "patchwise": "label noise: each patch is trained with its image's label",
    "fully-conv": "correlated updates: one loss per position, all of one image",
    "mil": "the encoder stays as it is: only the head learns",
    "ips": "only the patches with the most attention are trained, and seen",
    "patchgd": "updates from k patches while the rest of Z is stale",
    "accumulate": "one update; each patch's gradient sees the others' entries in Z as constants",
    "exact": "the gradient of all patches at the memory of one chunk; no batch statistics",
    "full": "the gradient of all patches, each encoded alone",
}
"""What a method changes statistically, in one phrase."""


class Program(NamedTuple):
    """A pure function and the shapes to compile it for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct`."""
    donated: tuple[int, ...] = ()
    resident: int = 0
    """Bytes that stay on the device beside the arguments while it runs."""


class Step(NamedTuple):
    """Training and evaluation by one method."""

    train: Program
    evaluate: Program
    state: TrainState
    """Shapes."""


def step_of(request: PlanRequest, method: Method, side: int | None = None) -> Step:
    """Builds the step of a method.

    Args:
        request: what is planned.
        method: one of METHODS.
        side: for `downscale`, the longer side in pixels that images are shrunk to.

    Raises:
        ConfigError: for an unknown method, one that the encoder does not support, or conflicting
            settings.
    """
    require_supported(request, method)
    image = request.image
    if method == "downscale":
        image = (*downscaled_size(image, side or request.patchgd.patch), image[2])
        request = dataclasses.replace(request, image=image)
    name, config, patchgd = trained_as(request, method)
    request = dataclasses.replace(request, patchgd=patchgd)
    channels, patch = image[2], patchgd.patch
    grid = WholeImage(*image[:2]) if name in WHOLE_IMAGE else request.grid
    window = map_side(config, patch, channels) if method == "fully-conv" else None
    model = model_of(config, grid, channels, request.classes, window)
    if name == "ips":
        require_attention(model, grid, config.latent_dim)
    optimizer = optimizer_of(request)
    stages = request.optimizer.freeze_stages
    frozen = frozen_entries(name, config, stages, patch=patch, channels=channels)
    sampler = None if patchgd.importance == "none" else importance_groups
    problem = Problem(model, grid, patchgd, augment=request.augment, frozen=frozen, sampler=sampler)
    state: TrainState = jax.eval_shape(partial(init_state, problem, optimizer), _key())
    steps = make_algorithm(name, request.baseline, patchgd)
    train = partial(steps.train_step, problem, optimizer)
    evaluate = partial(steps.eval_step, problem)
    images = jax.ShapeDtypeStruct((request.batch, *image), np.uint8)
    batch = _batch(images)
    scored = _batch(jax.ShapeDtypeStruct((request.eval_batch, *image), np.uint8))
    if request.slots is not None and name not in WHOLE_IMAGE:
        for arrays in (batch, scored):
            shape = (arrays["label"].shape[0], request.slots)
            arrays["patches"] = jax.ShapeDtypeStruct(shape, np.int32)
    return Step(
        train=Program(train, (state, batch, _key()), donated=(0,)),
        evaluate=Program(
            evaluate,
            (state.weights, scored),
            # The rest of the state, and a training batch.
            resident=tree_bytes((state.step, state.opt_state, images)),
        ),
        state=state,
    )


def trained_as(
    request: PlanRequest, method: Method
) -> tuple[MethodName, ModelConfig, PatchGDConfig]:
    """Translates a method to `train`'s name, model settings and PatchGD settings."""
    patchgd = request.patchgd
    if method in PATCHGD:
        return "patchgd", request.model, _in_mode(patchgd, method)
    if method == "gd-remat":
        model = dataclasses.replace(method_model("gd", request.model), remat="blocks")
        return "gd", model, _in_mode(patchgd, "full")
    name = cast(MethodName, method)
    if name == "patchwise":
        mode = patchgd.mode if patchgd.mode in ("patchgd", "accumulate") else "accumulate"
        return name, method_model(name, request.model), _in_mode(patchgd, mode)
    return name, method_model(name, request.model), _in_mode(patchgd, "full")


def _in_mode(patchgd: PatchGDConfig, mode: str) -> PatchGDConfig:
    if mode == patchgd.mode:
        return patchgd
    importance = patchgd.importance if mode in ("patchgd", "accumulate") else "none"
    return dataclasses.replace(patchgd, mode=cast(Any, mode), importance=importance)


def encoder_inputs(request: PlanRequest, method: Method) -> tuple[int, tuple[int, int]]:
    """Counts the encoder's inputs in one backward pass (for mil, in one pass of the fill).

    Returns:
        Their number, and their height and width.

    Raises:
        ConfigError: if there are more inner steps than patches, or the patch is larger than the
            image.
    """
    patchgd, grid = request.patchgd, request.grid
    if method in ("gd", "gd-extended", "gd-remat", "fully-conv"):
        return request.batch, request.image[:2]
    if method == "downscale":
        return request.batch, (patchgd.patch, patchgd.patch)
    chunk = min(patchgd.fill_chunk, request.patches)
    if method in ("exact", "mil") or (method == "full" and patchgd.remat):
        per_image = chunk
    elif method == "full":
        per_image = request.patches
    elif method == "ips":
        top = request.baseline.top_patches
        per_image = selected(grid, top=top, inner_steps=patchgd.num_inner_steps)
    else:
        per_image = request.sampled
    return request.batch * per_image, (grid.patch, grid.patch)


def z_bytes(request: PlanRequest, method: Method) -> int:
    """Bytes of the latent block of a batch; 0 for methods without one."""
    if method not in WITH_Z:
        return 0
    itemsize = jnp.dtype(request.model.dtype).itemsize
    return request.batch * request.grid.num_patches * request.model.latent_dim * itemsize


def encoder_shapes(model: ModelConfig, side: int, channels: int) -> Params:
    """Shapes of an encoder's variables for patches of `side` pixels."""
    encoder = build_encoder(model, side)
    patches = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return dict(jax.eval_shape(partial(encoder.init, train=False), _key(), patches))


def model_of(
    config: ModelConfig, grid: Grid, channels: int, classes: int = 1, window: int | None = None
) -> PatchModel:
    """Builds a model of images with mean 0 and standard deviation 1."""
    mean, std = (0.0,) * channels, (1.0,) * channels
    return build_model(
        config, grid=grid, channels=channels, classes=classes, mean=mean, std=std, window=window
    )


def require_supported(request: PlanRequest, method: Method) -> None:
    """Raises `ConfigError` for an unknown method, or one that the encoder does not support."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    model = request.model
    if method == "exact":
        moving = encoder_norm(model) == "batch" and request.patchgd.norm_policy != "frozen"
        if moving:
            raise ConfigError(
                "mode exact needs model.norm group, or patchgd.norm_policy frozen: batch "
                "statistics taken chunk by chunk are not those of the whole image"
            )
    height, width, _ = request.image
    tables = encoder_entry(model.encoder).side_multiple > 1
    if method in ("gd", "gd-extended", "gd-remat") and tables and height != width:
        raise ConfigError(
            f"the image is not square: the planner supports the position table of {model.encoder} "
            "for square images only"
        )
    if method == "fully-conv":
        build_encoder(model, request.patchgd.patch, window=1)
    if method == "mil" and request.augment.active:
        raise ConfigError("method mil keeps the features of each image; leave augment.* out")


def downscaled_size(image: tuple[int, int, int], side: int) -> tuple[int, int]:
    """Height and width, at least 1 px, of an image shrunk to a longer side of `side`."""
    height, width, _ = image
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def optimizer_of(request: PlanRequest) -> optax.GradientTransformation:
    """Builds the optimizer, for a run of any length: its memory is the same.

    Raises:
        ConfigError: for layer-wise rates of an encoder without known blocks.
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
        updates_per_step=request.patchgd.updates_per_step,
        depth=depth,
    )


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _batch(images: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    return {"image": images, "label": jax.ShapeDtypeStruct(images.shape[:1], np.int32)}
