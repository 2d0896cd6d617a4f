"""Checks a run's settings, and builds its executor from config and data."""

import jax
from jax.sharding import Mesh

from patchgd_jax.baselines.registry import method_model
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.sampling import group_size
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import RunData
from patchgd_jax.engine.base import Executor
from patchgd_jax.engine.distributed import is_multiprocess
from patchgd_jax.engine.features import FeatureExecutor
from patchgd_jax.engine.mesh import MeshExecutor
from patchgd_jax.engine.resident import ResidentExecutor
from patchgd_jax.engine.setup import (
    make_run_task,
    make_setup,
    method_grid,
    samples_patches,
    training_grids,
)
from patchgd_jax.engine.sharding.mesh import check_grid, make_mesh, own_images, parse_layout
from patchgd_jax.engine.sharding.params import parse_rules
from patchgd_jax.engine.streamed import StreamedExecutor
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.registry import build_encoder, encoder_norm, head_entry


def check_settings(config: TrainConfig) -> None:
    """Checks a run's settings, with its method resolved, without reading its data.

    Raises `ConfigError` for an unknown name, a patch larger than the images, more inner steps than
    patches, or conflicting settings.
    """
    model = method_model(config.method, config.model)
    head_entry(model.head)
    build_encoder(model, config.patchgd.patch, window=1 if config.method == "fully-conv" else None)
    moves = encoder_norm(config.model) == "batch" and config.patchgd.norm_policy != "frozen"
    if config.patchgd.mode == "exact" and moves:
        raise ConfigError(
            "patchgd.mode exact needs model.norm group, or patchgd.norm_policy frozen: batch "
            "statistics taken chunk by chunk are not those of the whole image"
        )
    parse_rules(config.param_rules)
    if config.mesh not in (None, "auto"):
        parse_layout(config.mesh)
    if config.data.generated or config.data.fit == "resize":
        height, width = config.data.size
        shrink = config.data.downscale
        grid = method_grid(config, height // shrink, width // shrink)
        if samples_patches(config) and config.patchgd.fraction != "auto":
            group_size(grid.num_patches, config.patchgd.num_inner_steps)


def check_run(config: TrainConfig, data: RunData) -> None:
    """Checks a run's settings against its data and these devices, before any image is read."""
    grids = training_grids(config, data)
    make_run_task(config, data.num_classes)
    if config.stream.enabled and is_multiprocess():
        raise ConfigError("stream.enabled is for one process; start one, or leave it out")
    mesh = _mesh(config)
    if mesh is None:
        if config.param_rules:
            raise ConfigError(
                "param_rules divide parameters among the devices of a mesh; add --mesh"
            )
        return
    if config.method != "patchgd":
        raise ConfigError(
            f"method {config.method} trains on one device; only patchgd does on several"
        )
    for grid in grids:
        assert isinstance(grid, PatchGrid)
        check_grid(mesh, grid)
    own = len(own_images(mesh, config.images_per_step))
    shared = own * jax.process_count() > config.images_per_step
    if shared and config.data.bad_images == "substitute":
        raise ConfigError(
            "data.bad_images substitute: processes that share images could each substitute another "
            "one; use raise, or a mesh whose axis data has a multiple of the processes"
        )


def build(
    config: TrainConfig, data: RunData, preprocess: Preprocess, optimizer: Optimizer | None = None
) -> Executor:
    """Builds a run that `check_run` has passed: problems, optimizer and executor, each once.

    `optimizer` replaces the config's, of which freezing and the EMA stay.
    """
    mesh = _mesh(config)
    setup = make_setup(config, data, preprocess, optimizer, mesh)
    if config.stream.enabled:
        return StreamedExecutor(setup)
    if config.method == "mil":
        return FeatureExecutor(setup)
    if mesh is None:
        return ResidentExecutor(setup)
    return MeshExecutor(setup, mesh, parse_rules(config.param_rules))


def _mesh(config: TrainConfig) -> Mesh | None:
    """Returns the mesh of the run's devices; None for one device."""
    if config.mesh is None and not is_multiprocess():
        return None
    return make_mesh(
        config.mesh or "auto",
        batch_size=config.images_per_step,
        eval_batch_size=config.eval_batch_size,
        strata=config.patchgd.strata,
    )
