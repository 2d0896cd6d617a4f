"""Makes the objects of a run from its config: grids, models, problems and optimizer."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from patchgd_jax.baselines.ips import require_attention
from patchgd_jax.baselines.registry import WHOLE_IMAGE, frozen_entries, make_algorithm, method_model
from patchgd_jax.config import TrainConfig
from patchgd_jax.contrib.importance import importance_groups
from patchgd_jax.core.grid import Grid, PatchGrid, WholeImage
from patchgd_jax.core.model import PatchModel
from patchgd_jax.core.optimizer import Optimizer, make_optimizer, with_ema
from patchgd_jax.core.problem import Problem
from patchgd_jax.core.sampling import group_size
from patchgd_jax.core.tasks import Task, make_task
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import RunData
from patchgd_jax.engine.base import Setup
from patchgd_jax.engine.sharding.layout import model_options
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.depth import encoder_layers
from patchgd_jax.models.registry import (
    build_encoder,
    build_model,
    encoder_entry,
    head_entry,
    map_side,
)


def make_grid(config: TrainConfig, height: int, width: int, background: int = 0) -> PatchGrid:
    """Makes the patch grid for images of one size."""
    return PatchGrid(height, width, config.patchgd.patch, config.patchgd.stride or 0, background)


def method_grid(config: TrainConfig, height: int, width: int, background: int = 0) -> Grid:
    """Makes the grid of the run's method for images of one size."""
    if config.method not in WHOLE_IMAGE:
        return make_grid(config, height, width, background)
    if config.augment.turns and height != width:
        raise ConfigError(
            f"augment.turns with method {config.method}: an image of {height} x {width} px cannot "
            "be turned by 90 degrees without changing its shape; leave it out"
        )
    if config.method == "fully-conv":
        # Checks the windows, which are as large as patches.
        make_grid(config, height, width)
    return WholeImage(height, width)


def samples_patches(config: TrainConfig) -> bool:
    """Tells whether the number of inner steps sets the number of patches encoded at a time."""
    return config.patchgd.mode in ("patchgd", "accumulate") or (
        config.method == "ips" and config.baseline.top_patches is None
    )


def training_grids(config: TrainConfig, data: RunData) -> tuple[Grid, ...]:
    """Makes the grid of each padded size, and checks it against the sampling and the head.

    Raises `ConfigError` if the patch is larger than the image, there are more inner steps than
    patches, or there are several grids for a head that takes one.
    """
    grids = tuple(method_grid(config, *shape, data.background) for shape in data.shapes)
    for grid, slots in zip(grids, data.slots, strict=True):
        if samples_patches(config):
            group_size(slots or grid.num_patches, config.patchgd.num_inner_steps)
    if config.method in WHOLE_IMAGE and encoder_entry(config.model.encoder).side_multiple > 1:
        sizes = {grid.patch_shape for grid in grids}
        if len(sizes) > 1:
            raise ConfigError(
                f"{config.model.encoder} has a table of positions for one image size, but these "
                f"images have {len(sizes)}; use --data.fit resize, or another encoder"
            )
    head = method_model(config.method, config.model).head
    if len({(grid.rows, grid.cols) for grid in grids}) > 1 and head_entry(head).fixed_grid:
        raise ConfigError(
            f"the head {head} takes one grid of patches, but these images have "
            f"{len(grids)} sizes; use --data.fit resize, or --model.head attention"
        )
    return grids


def make_model(
    config: TrainConfig, grid: Grid, preprocess: Preprocess, mesh: Mesh | None = None
) -> PatchModel:
    """Makes the model for one grid; ConfigError for a name or head that the method cannot train."""
    classes, channels = len(preprocess.class_names), config.data.num_channels
    options = {} if mesh is None else model_options(mesh)
    if config.method == "fully-conv":
        options["window"] = map_side(config.model, config.patchgd.patch, channels)
    model = build_model(
        method_model(config.method, config.model),
        grid=grid,
        channels=channels,
        classes=make_run_task(config, classes).num_outputs(classes),
        mean=preprocess.mean,
        std=preprocess.std,
        **options,
    )
    if config.method == "ips":
        require_attention(model, grid, config.model.latent_dim)
    return model


def make_run_task(config: TrainConfig, classes: int) -> Task:
    """Makes the task, and checks it against the number of classes of the data."""
    task = config.task
    if config.data.panda is not None and task.name == "single-label" and task.best_metric is None:
        # The challenge's own measure.
        task = dataclasses.replace(task, best_metric="quadratic_weighted_kappa")
    return make_task(task, classes)


def run_frozen(config: TrainConfig) -> frozenset[str]:
    """Lists the encoder's top-level entries that a run does not train."""
    return frozen_entries(
        config.method,
        config.model,
        config.optimizer.freeze_stages,
        patch=config.patchgd.patch,
        channels=config.data.num_channels,
    )


def make_run_optimizer(config: TrainConfig, examples: int) -> Optimizer:
    """Makes the optimizer for a run over `examples` training images."""
    depth = None
    if config.optimizer.layer_decay != 1:
        patch = config.patchgd.patch
        encoder = build_encoder(config.model, patch)
        depth = encoder_layers(encoder, patch=patch, channels=config.data.num_channels).depth
    return make_optimizer(
        config.optimizer,
        total_steps=config.total_steps(examples),
        steps_per_epoch=config.steps_per_epoch(examples),
        updates_per_step=config.patchgd.updates_per_step,
        depth=depth,
    )


def make_problem(
    config: TrainConfig, grid: Grid, preprocess: Preprocess, task: Task, mesh: Mesh | None = None
) -> Problem:
    """Makes the static part of a run's steps for one grid; raises as `make_model`."""
    return Problem(
        make_model(config, grid, preprocess, mesh),
        grid,
        config.patchgd,
        task,
        config.augment,
        frozen=run_frozen(config),
        sampler=None if config.patchgd.importance == "none" else importance_groups,
    )


def make_setup(
    config: TrainConfig,
    data: RunData,
    preprocess: Preprocess,
    optimizer: Optimizer | None = None,
    mesh: Mesh | None = None,
) -> Setup:
    """Makes the problems, steps and optimizer of a run; raises `ConfigError` if they do not fit.

    `optimizer` replaces the config's, of which freezing and the EMA stay.
    """
    grids = training_grids(config, data)
    if config.method in WHOLE_IMAGE:
        # These methods also see patches that hold only padding.
        data = dataclasses.replace(data, slots=(None,) * len(grids), mean_slots=None)
    task = make_run_task(config, data.num_classes)
    return Setup(
        config=config,
        data=data,
        algorithm=make_algorithm(config.method, config.baseline, config.patchgd),
        problems=tuple(make_problem(config, grid, preprocess, task, mesh) for grid in grids),
        optimizer=make_run_optimizer(config, len(data.train))
        if optimizer is None
        else with_ema(optimizer, config.optimizer.ema_decay),
        key=jax.random.key(config.seed),
    )
