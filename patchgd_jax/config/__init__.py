"""Every setting of a run: frozen dataclasses, one field one default, checked when made.

Nothing here imports a command-line library; `cli.py` turns the classes into flags and the text
under each field into its help.
"""

from patchgd_jax.config.baseline import METHODS, BaselineConfig, MethodName
from patchgd_jax.config.data import (
    BackgroundConfig,
    ColumnsConfig,
    DataConfig,
    PandaConfig,
    SplitConfig,
)
from patchgd_jax.config.model import AugmentConfig, ModelConfig, TaskConfig
from patchgd_jax.config.optimizer import OptimizerConfig
from patchgd_jax.config.patchgd import PatchGDConfig
from patchgd_jax.config.run import StreamConfig, TrainConfig
from patchgd_jax.config.serialization import SCHEMA, flatten, from_dict, migrate, nest, to_dict

__all__ = [
    "METHODS",
    "SCHEMA",
    "AugmentConfig",
    "BackgroundConfig",
    "BaselineConfig",
    "ColumnsConfig",
    "DataConfig",
    "MethodName",
    "ModelConfig",
    "OptimizerConfig",
    "PandaConfig",
    "PatchGDConfig",
    "SplitConfig",
    "StreamConfig",
    "TaskConfig",
    "TrainConfig",
    "flatten",
    "from_dict",
    "migrate",
    "nest",
    "to_dict",
]
