"""Exports a trained model as a weight file: published names for the encoder, ours for the rest."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np

from patchgd_jax._version import __version__
from patchgd_jax.baselines.registry import method_model
from patchgd_jax.config import TrainConfig
from patchgd_jax.core.model import Params
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.io.files import atomic_folder, write_json
from patchgd_jax.runs.folder import PREPROCESS
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.weights.files import write_safetensors
from patchgd_jax.weights.matching import METADATA_KEY, OWN_PREFIX, tensor_names, tensor_paths
from patchgd_jax.weights.published import PUBLISHED, to_published_layout

WEIGHTS = "model.safetensors"


def export_run(
    run_dir: str | Path, output: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Writes a run's best model as `model.safetensors` and `preprocess.json`.

    `--model.weights` reads the file back to the same parameters and batch statistics, bit for bit.
    A PyTorch model loads the encoder from it with `strict=False`: published names and layouts, but
    for encoders that have none or were trained with another norm.

    Args:
        run_dir: the run folder.
        output: the folder to make; None: `export` in the run folder.
        progress: gets a warning for each damaged checkpoint that is skipped.

    Returns:
        The weight file. The folder is made whole or not at all.

    Raises:
        ConfigError: if the folder holds anything already.
        CheckpointError: if the run has no usable checkpoint.
        DiskError: if it cannot be written.
    """
    model = TrainedModel(run_dir, "best", progress)
    folder = Path(os.path.abspath(output if output is not None else model.folder.path / "export"))
    with atomic_folder(folder) as partial:
        encoder = model.config.model.encoder
        tensors = export_tensors(encoder, *model.weights)
        write_safetensors(partial / WEIGHTS, tensors, export_header(model.config, model.preprocess))
        write_json(partial / PREPROCESS, dataclasses.asdict(model.preprocess))
    return folder / WEIGHTS


def export_header(config: TrainConfig, preprocess: Preprocess) -> dict[str, str]:
    """Makes the metadata of an export: its version, settings and input scaling."""
    origin = {
        "version": __version__,
        "settings": {
            "model.encoder": config.model.encoder,
            "model.norm": config.model.norm,
            "model.latent_dim": config.model.latent_dim,
            "model.head": method_model(config.method, config.model).head,
            "model.stem_stride": config.model.stem_stride,
            "data.classes": len(preprocess.class_names),
        },
        "preprocess": dataclasses.asdict(preprocess),
    }
    # Other libraries read the tensor layout from `format`.
    return {"format": "pt", METADATA_KEY: json.dumps(origin)}


def export_tensors(encoder: str, params: Params, batch_stats: Params) -> dict[str, np.ndarray]:
    """Converts a model's tensors to the names and layouts of an export."""
    leaves = tensor_paths(params, batch_stats)
    tensors = {}
    for path, name in tensor_names(encoder, leaves).items():
        array = np.asarray(jax.device_get(leaves[path]))
        if not name.startswith(OWN_PREFIX):
            array = to_published_layout(PUBLISHED[encoder], name, array)
        tensors[name] = array
    return tensors
