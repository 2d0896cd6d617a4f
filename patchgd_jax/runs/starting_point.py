"""Initial values of a run other than random: a weight file, or another run's encoder."""

from __future__ import annotations

from patchgd_jax.config import TrainConfig
from patchgd_jax.core.model import Params
from patchgd_jax.errors import ConfigError
from patchgd_jax.runs.checkpoint import Checkpoints, restore_params
from patchgd_jax.runs.folder import RunFolder
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.weights.matching import StartingPoint, weights_start


def starting_point(config: TrainConfig, progress: Progress) -> StartingPoint | None:
    """Finds the starting point that a config names; None for random values.

    Raises:
        ConfigError: for unknown weights, or images of another number of channels.
        DataError: for a weight file that is missing or cannot be used.
        CheckpointError: if the other run has no usable checkpoint.
    """
    if config.init_encoder is not None:
        start = _from_run(config.init_encoder, progress)
    elif config.model.weights is not None:
        start = weights_start(config.model, config.model.weights, progress.message)
    else:
        return None
    wanted, channels = len(start.mean), config.data.num_channels
    if wanted != channels:
        raise ConfigError(
            f"{config.init_encoder or config.model.weights} is for images of {wanted} channels, "
            f"these have {channels}; set --data.channels {wanted}"
        )
    return start


def _from_run(run_dir: str, progress: Progress) -> StartingPoint:
    """Starts from the encoder of another run's best checkpoint, with its batch statistics."""
    folder = RunFolder(run_dir)
    preprocess = folder.preprocess()

    def into(params: Params, batch_stats: Params) -> tuple[Params, Params]:
        checkpoints = Checkpoints(folder.checkpoints, progress.warn)
        step = checkpoints.best()
        encoder = restore_params(checkpoints, step, folder.config(), params, "encoder")
        statistics = batch_stats["encoder"]
        statistics = checkpoints.restore_part(step, "model_state/encoder", statistics)
        progress.message(f"The encoder starts from {run_dir}, step {step}.")
        return {**params, "encoder": encoder}, {**batch_stats, "encoder": statistics}

    return StartingPoint(preprocess.mean, preprocess.std, into)
