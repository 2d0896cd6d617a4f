"""Patch Gradient Descent in JAX: end-to-end training with activations of a few patches only.

Importing it loads jax, flax and optax. Names that need more (data pipelines, checkpoints, whole
runs) are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchgd_jax._version import __version__
from patchgd_jax.config import (
    AugmentConfig,
    BaselineConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    StreamConfig,
    TaskConfig,
    TrainConfig,
)
from patchgd_jax.config.presets import PRESETS, get_preset
from patchgd_jax.core.forward import attention_map, eval_step, fill
from patchgd_jax.core.grid import Grid, PatchGrid, WholeImage
from patchgd_jax.core.model import PatchModel
from patchgd_jax.core.optimizer import make_optimizer, make_schedule, with_ema
from patchgd_jax.core.patch_ids import PatchIds
from patchgd_jax.core.problem import Problem, Weights
from patchgd_jax.core.sampling import sample_groups
from patchgd_jax.core.step import train_step
from patchgd_jax.core.tasks import TASKS, Task, make_task
from patchgd_jax.core.update import TrainState, ema_params, init_state
from patchgd_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    DiskError,
    DivergedError,
    Interrupted,
    PatchGDError,
)
from patchgd_jax.models.adapters import from_linen, from_nnx
from patchgd_jax.models.depth import encoder_layers
from patchgd_jax.models.registry import (
    ENCODERS,
    HEADS,
    build_encoder,
    build_model,
    register_encoder,
    register_head,
)

if TYPE_CHECKING:
    from patchgd_jax.engine.compiling import compiler_options
    from patchgd_jax.engine.distributed import initialize
    from patchgd_jax.engine.sharding.layout import sharded_train_step
    from patchgd_jax.engine.streaming.step import StreamedStep
    from patchgd_jax.runs.cross_validation import cross_validate
    from patchgd_jax.runs.predict import evaluate, load_run
    from patchgd_jax.runs.train import resume, train

_LAZY = {
    "StreamedStep": "engine.streaming.step",
    "compiler_options": "engine.compiling",
    "cross_validate": "runs.cross_validation",
    "evaluate": "runs.predict",
    "initialize": "engine.distributed",
    "load_run": "runs.predict",
    "resume": "runs.train",
    "sharded_train_step": "engine.sharding.layout",
    "train": "runs.train",
}

__all__ = [
    "ENCODERS",
    "HEADS",
    "PRESETS",
    "TASKS",
    "AugmentConfig",
    "BaselineConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DeviceError",
    "DiskError",
    "DivergedError",
    "Grid",
    "Interrupted",
    "ModelConfig",
    "OptimizerConfig",
    "PatchGDConfig",
    "PatchGDError",
    "PatchGrid",
    "PatchIds",
    "PatchModel",
    "Problem",
    "StreamConfig",
    "StreamedStep",
    "Task",
    "TaskConfig",
    "TrainConfig",
    "TrainState",
    "Weights",
    "WholeImage",
    "__version__",
    "attention_map",
    "build_encoder",
    "build_model",
    "compiler_options",
    "cross_validate",
    "ema_params",
    "encoder_layers",
    "eval_step",
    "evaluate",
    "fill",
    "from_linen",
    "from_nnx",
    "get_preset",
    "init_state",
    "initialize",
    "load_run",
    "make_optimizer",
    "make_schedule",
    "make_task",
    "register_encoder",
    "register_head",
    "resume",
    "sample_groups",
    "sharded_train_step",
    "train",
    "train_step",
    "with_ema",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
