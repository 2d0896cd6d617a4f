"""Patch Gradient Descent in JAX: end-to-end training with activations of a few patches only.

Everything public is re-exported here by hand; nothing else is. Importing it loads jax, flax and
optax, but no command line, data pipeline or plotting.
"""

from patchgd_jax._version import __version__ as __version__
from patchgd_jax.config import AugmentConfig as AugmentConfig
from patchgd_jax.config import BaselineConfig as BaselineConfig
from patchgd_jax.config import DataConfig as DataConfig
from patchgd_jax.config import ModelConfig as ModelConfig
from patchgd_jax.config import OptimizerConfig as OptimizerConfig
from patchgd_jax.config import PatchGDConfig as PatchGDConfig
from patchgd_jax.config import TaskConfig as TaskConfig
from patchgd_jax.config import TrainConfig as TrainConfig
from patchgd_jax.config.presets import PRESETS as PRESETS
from patchgd_jax.config.presets import get_preset as get_preset
from patchgd_jax.core.grid import Grid as Grid
from patchgd_jax.core.grid import PatchGrid as PatchGrid
from patchgd_jax.core.grid import SeriesGrid as SeriesGrid
from patchgd_jax.core.grid import WholeImage as WholeImage
from patchgd_jax.core.latents import fill as fill
from patchgd_jax.core.model import PatchModel as PatchModel
from patchgd_jax.core.optimizer import make_optimizer as make_optimizer
from patchgd_jax.core.optimizer import make_schedule as make_schedule
from patchgd_jax.core.optimizer import with_average as with_average
from patchgd_jax.core.sampling import sample_groups as sample_groups
from patchgd_jax.core.step import TrainState as TrainState
from patchgd_jax.core.step import attention_map as attention_map
from patchgd_jax.core.step import eval_step as eval_step
from patchgd_jax.core.step import evaluated_params as evaluated_params
from patchgd_jax.core.step import init_state as init_state
from patchgd_jax.core.step import train_step as train_step
from patchgd_jax.core.tasks import TASKS as TASKS
from patchgd_jax.core.tasks import Task as Task
from patchgd_jax.core.tasks import make_task as make_task
from patchgd_jax.engine.compiling import compiler_options as compiler_options
from patchgd_jax.errors import CheckpointError as CheckpointError
from patchgd_jax.errors import ConfigError as ConfigError
from patchgd_jax.errors import DataError as DataError
from patchgd_jax.errors import DeviceError as DeviceError
from patchgd_jax.errors import DiskError as DiskError
from patchgd_jax.errors import DivergedError as DivergedError
from patchgd_jax.errors import Interrupted as Interrupted
from patchgd_jax.errors import PatchGDError as PatchGDError
from patchgd_jax.models.adapters import from_linen as from_linen
from patchgd_jax.models.adapters import from_nnx as from_nnx
from patchgd_jax.models.depth import encoder_layers as encoder_layers
from patchgd_jax.models.registry import ENCODERS as ENCODERS
from patchgd_jax.models.registry import HEADS as HEADS
from patchgd_jax.models.registry import build_encoder as build_encoder
from patchgd_jax.models.registry import build_model as build_model
from patchgd_jax.models.registry import register_encoder as register_encoder
from patchgd_jax.models.registry import register_head as register_head
