"""How a run's steps are carried out: what is compiled, and how batches reach the devices.

`ResidentExecution` sends whole images to one device, `MeshExecution` lays them over several;
`StreamedExecution` leaves them where they are, and reads patches as they are needed.
"""

from patchgd_jax.distributed import several
from patchgd_jax.errors import ConfigError
from patchgd_jax.execution.base import Execution, HostBatch, Setup
from patchgd_jax.execution.mesh import MeshExecution
from patchgd_jax.execution.resident import ResidentExecution
from patchgd_jax.execution.streamed import StreamedExecution
from patchgd_jax.sharding import make_mesh, parse_rules

__all__ = [
    "Execution",
    "HostBatch",
    "MeshExecution",
    "ResidentExecution",
    "Setup",
    "make_execution",
]


def make_execution(setup: Setup) -> Execution:
    """What carries out the steps of a run, by its settings.

    Raises:
        ConfigError: for settings that cannot work together.
    """
    config = setup.config
    if config.stream.enabled:
        if several():
            raise ConfigError("stream.enabled is for one process; start one, or leave it out")
        return StreamedExecution(setup)
    if config.mesh is None and not several():
        return ResidentExecution(setup)
    mesh = make_mesh(
        config.mesh or "auto",
        batch_size=config.images_per_step,
        eval_batch_size=config.eval_batch_size,
        strata=config.patchgd.strata,
    )
    return MeshExecution(setup, mesh, parse_rules(config.param_rules))
