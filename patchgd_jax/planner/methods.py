"""Methods that a plan compares, each as a training and an evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from patchgd_jax.baselines.ips import selected
from patchgd_jax.baselines.registry import WHOLE_IMAGE, make_algorithm
from patchgd_jax.config import MethodName, ModelConfig, TrainConfig
from patchgd_jax.core.model import Params
from patchgd_jax.core.update import TrainState, init_state
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.engine.setup import make_problem, make_run_optimizer, make_run_task, method_grid
from patchgd_jax.errors import ConfigError, unknown_name
from patchgd_jax.models.registry import build_encoder, encoder_entry, encoder_norm
from patchgd_jax.planner.request import PlanRequest, tree_bytes

Method = Literal[
    "gd", "gd-extended", "gd-remat", "downscale", "patchwise", "fully-conv", "mil", "ips",
    "patchgd", "accumulate", "exact", "full",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
PATCHGD: tuple[Method, ...] = ("patchgd", "accumulate", "exact", "full")
"""Modes of `patchgd_jax train`."""
WITH_Z: tuple[Method, ...] = ("mil", "ips", *PATCHGD)
"""Methods that fill a latent block."""

EXAMPLES = 10**6
"""Training images, for the schedule; the memory is the same for any number."""

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
"""Statistical difference of each method from the reference, in one phrase."""


class Program(NamedTuple):
    """A pure function and the shapes to compile it for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct`."""
    donated: tuple[int, ...] = ()
    resident: int = 0
    """Bytes that stay on the device beside the arguments."""


class Step(NamedTuple):
    """Training and evaluation step of one method."""

    train: Program
    evaluate: Program
    state: TrainState
    """Shapes."""


def step_of(request: PlanRequest, method: Method, side: int | None = None) -> Step:
    """Builds the step of a method.

    Args:
        request: the run to plan.
        method: one of METHODS.
        side: longer side in pixels of the shrunk images of `downscale`. None: the patch's.

    Raises:
        ConfigError: for an unknown method, one that the encoder does not support, or conflicting
            settings.
    """
    require_supported(request, method)
    size = request.size
    if method == "downscale":
        size = downscaled_size(size, side or request.patchgd.patch)
    config, channels = trained_as(request, method), request.image[2]
    grid = method_grid(config, *size)
    preprocess, task = plain_preprocess(request, size), make_run_task(config, request.classes)
    problem = make_problem(config, grid, preprocess, task)
    optimizer = make_run_optimizer(config, EXAMPLES)
    state: TrainState = jax.eval_shape(partial(init_state, problem, optimizer), _key())
    steps = make_algorithm(config.method, config.baseline, config.patchgd)
    train = partial(steps.train_step, problem, optimizer)
    evaluate = partial(steps.eval_step, problem)
    images = jax.ShapeDtypeStruct((request.batch, *size, channels), np.uint8)
    batch = _batch(images)
    scored = _batch(jax.ShapeDtypeStruct((config.eval_batch_size, *images.shape[1:]), np.uint8))
    if request.slots is not None and config.method not in WHOLE_IMAGE:
        for arrays in (batch, scored):
            shape = (arrays["label"].shape[0], request.slots)
            arrays["patches"] = jax.ShapeDtypeStruct(shape, np.int32)
    # While it evaluates, the device also holds the rest of the state and a training batch.
    resident = tree_bytes((state.step, state.opt_state, images))
    return Step(
        Program(train, (state, batch, _key()), donated=(0,)),
        Program(evaluate, (state.weights, scored), resident=resident),
        state,
    )


def plain_preprocess(request: PlanRequest, size: tuple[int, int]) -> Preprocess:
    """Makes a preprocessing without effect, for images of `size`."""
    names, channels = tuple(map(str, range(request.classes))), request.image[2]
    return Preprocess((0.0,) * channels, (1.0,) * channels, 0, names, (size,))


def trained_as(request: PlanRequest, method: Method) -> TrainConfig:
    """Translates a method to settings of `train`."""
    config, mode = request.config, request.patchgd.mode
    name: str = method
    if method in PATCHGD:
        name, mode = "patchgd", cast(Any, method)
    elif method != "patchwise":
        mode = "full"
    elif mode not in ("patchgd", "accumulate"):
        mode = "accumulate"
    if method == "gd-remat":
        name = "gd"
        model = dataclasses.replace(config.model, remat="blocks")
        config = dataclasses.replace(config, model=model)
    draws = name == "patchgd" and mode in ("patchgd", "accumulate")
    importance = request.patchgd.importance if draws else "none"
    patchgd = dataclasses.replace(request.patchgd, mode=mode, importance=importance)
    return dataclasses.replace(config, method=cast(MethodName, name), patchgd=patchgd)


def encoder_inputs(request: PlanRequest, method: Method) -> tuple[int, tuple[int, int]]:
    """Counts the encoder's inputs in one backward pass (for mil, in one pass of the fill).

    Returns their number, and their height and width. Raises `ConfigError` if there are more inner
    steps than patches, or the patch is larger than the image.
    """
    patchgd, grid = request.patchgd, request.grid
    if method in ("gd", "gd-extended", "gd-remat", "fully-conv"):
        return request.batch, request.size
    if method == "downscale":
        return request.batch, (patchgd.patch, patchgd.patch)
    chunk = min(patchgd.fill_chunk, request.patches)
    if method in ("exact", "mil") or (method == "full" and patchgd.remat):
        per_image = chunk
    elif method == "full":
        per_image = request.patches
    elif method == "ips":
        top = request.config.baseline.top_patches
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
    height, width = request.size
    tables = encoder_entry(model.encoder).side_multiple > 1
    if method in ("gd", "gd-extended", "gd-remat") and tables and height != width:
        raise ConfigError(
            f"the image is not square: the planner supports the position table of {model.encoder} "
            "for square images only"
        )
    if method == "fully-conv":
        build_encoder(model, request.patchgd.patch, window=1)


def downscaled_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width, at least 1 px, of an image shrunk to a longer side of `side`."""
    height, width = size
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _batch(images: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    return {"image": images, "label": jax.ShapeDtypeStruct(images.shape[:1], np.int32)}
