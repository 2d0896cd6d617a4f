"""How a run's steps are carried out: what is compiled, and how batches reach the devices.

`ResidentExecution` sends whole images to one device, `MeshExecution` lays them over several;
`StreamedExecution` leaves them where they are, and reads patches as they are needed.
`FeatureExecution` encodes each image once.
"""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from patchgd_jax.config import TrainConfig
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.engine.base import Execution, HostBatch, Setup
from patchgd_jax.engine.distributed import several
from patchgd_jax.engine.features import FeatureExecution
from patchgd_jax.engine.mesh import MeshExecution
from patchgd_jax.engine.resident import ResidentExecution
from patchgd_jax.engine.sharding.placement import check_grid, make_mesh, own_images, parse_rules
from patchgd_jax.engine.streamed import StreamedExecution
from patchgd_jax.errors import ConfigError

__all__ = [
    "Execution",
    "FeatureExecution",
    "HostBatch",
    "MeshExecution",
    "ResidentExecution",
    "Setup",
    "check_execution",
    "make_execution",
]


def check_execution(config: TrainConfig, grids: Sequence[Grid]) -> None:
    """Checks that there is a way to carry out a run's steps, before anything is read.

    Args:
        config: of the run.
        grids: the patch grid of each padded size.

    Raises:
        ConfigError: for settings that cannot work together, or on these devices.
    """
    if config.stream.enabled and several():
        raise ConfigError("stream.enabled is for one process; start one, or leave it out")
    rules = parse_rules(config.param_rules)
    mesh = _mesh(config)
    if mesh is not None:
        if config.method != "patchgd":
            raise ConfigError(
                f"method {config.method} trains on one device; only patchgd does on several"
            )
        for grid in grids:
            assert isinstance(grid, PatchGrid)
            check_grid(mesh, grid)
        own = len(own_images(mesh, config.images_per_step))
        if own * jax.process_count() > config.images_per_step:
            _check_shared_images(config)
    elif rules:
        raise ConfigError("param_rules divide parameters among the devices of a mesh; add --mesh")


def _check_shared_images(config: TrainConfig) -> None:
    if config.data.bad_images == "substitute":
        raise ConfigError(
            "data.bad_images substitute: processes that share images could each put another in "
            "the place of one; use raise, or a mesh whose axis data has a multiple of the processes"
        )


def _mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of the run's devices; None if one of them does all."""
    if config.mesh is None and not several():
        return None
    return make_mesh(
        config.mesh or "auto",
        batch_size=config.images_per_step,
        eval_batch_size=config.eval_batch_size,
        strata=config.patchgd.strata,
    )


def make_execution(setup: Setup) -> Execution:
    """What carries out the steps of a run, by its settings, which `check_execution` has passed.

    Raises:
        ConfigError: for settings that do not fit the model.
    """
    config = setup.config
    if config.stream.enabled:
        return StreamedExecution(setup)
    if config.method == "mil":
        return FeatureExecution(setup)
    mesh = _mesh(config)
    if mesh is None:
        return ResidentExecution(setup)
    return MeshExecution(setup, mesh, parse_rules(config.param_rules))
