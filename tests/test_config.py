"""Settings: what is refused, and that a config survives JSON."""

from __future__ import annotations

import json

import pytest

from patchgd_jax import (
    PRESETS,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    TrainConfig,
    get_preset,
)
from patchgd_jax.config import from_dict, migrate, nest, serialization, to_dict
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import RunData
from patchgd_jax.engine.setup import make_model, training_grids


def grids_of(config):
    """The grids for images of the settings' size."""
    shape = config.data.image_shape[:2]
    data = RunData(None, None, None, background=0, shapes=(shape,), slots=(None,))
    return training_grids(config, data)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_json(name):
    config = get_preset(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    channels = config.data.num_channels
    (grid,) = grids_of(config)
    names, shapes = ("a",) * config.data.classes, ((grid.height, grid.width),)
    make_model(config, grid, Preprocess((0.0,) * channels, (1.0,) * channels, 0, names, shapes))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'ultramnits'; did you mean 'ultramnist'"):
        get_preset("ultramnits")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchGDConfig(fraction=0), r"patchgd.fraction is 0; it must be in \(0, 1\]"),
        (lambda: PatchGDConfig(fraction=1.2), r"patchgd.fraction is 1.2"),
        (
            lambda: PatchGDConfig(mode="patchgd", fraction=0.25, epsilon=3),
            "epsilon 3 does not divide the 4 inner steps",
        ),
        (lambda: PatchGDConfig(patch=16, stride=17), "patchgd.stride is 17"),
        (lambda: PatchGDConfig(inner_steps=0), "patchgd.inner_steps is 0"),
        (lambda: PatchGDConfig(fill_chunk=0), "patchgd.fill_chunk is 0"),
        (
            lambda: PatchGDConfig(importance="loss"),
            "importance loss draws with replacement.*add --patchgd.sampling uniform",
        ),
        (
            lambda: PatchGDConfig(importance="loss", sampling="uniform", mode="exact"),
            "importance loss .*mode exact takes the gradient of all; use mode patchgd",
        ),
        (
            lambda: PatchGDConfig(importance="staleness", sampling="uniform", strata=2),
            "importance staleness .*strata 2 .*use strata 1",
        ),
        (lambda: PatchGDConfig(importance_mix=0), r"importance_mix is 0; it must be in \(0, 1\]"),
        (lambda: DataConfig(classes=28), "data.classes is 28"),
        (lambda: DataConfig(size=(0, 5)), r"data.size is \(0, 5\)"),
        (lambda: DataConfig(downscale=3), "data.downscale 3 does not divide"),
        (lambda: DataConfig(object_ratio=(0.5, 0.2)), "data.object_ratio"),
        (lambda: DataConfig(digits="mnist"), "data.digits_dir"),
        (lambda: DataConfig(label_share=0), "data.label_share is 0"),
        (lambda: ModelConfig(latent_dim=0), "model.latent_dim is 0"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout is 1.0"),
        (lambda: ModelConfig(drop_path=1.0), "model.drop_path is 1.0"),
        (lambda: ModelConfig(remat="some"), "model.remat is .some.; it must be one of none, dots"),
        (lambda: OptimizerConfig(learning_rate=0), "optimizer.learning_rate is 0"),
        (lambda: OptimizerConfig(weight_decay=0.1), "needs optimizer.name adamw"),
        (lambda: OptimizerConfig(clip_norm=-1), "optimizer.clip_norm is -1"),
        (lambda: TrainConfig(batch_size=0), "batch_size is 0"),
        (lambda: TrainConfig(epochs=0), "epochs is 0"),
        (lambda: TrainConfig(seed=-1), "seed is -1"),
    ],
)
def test_values_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 3}, "unknown setting 'config.batchsize'; did you mean 'config.batch_size'"),
        ({"batch_size": "3"}, "config.batch_size is '3'; expected int or 'auto'"),
        ({"batch_size": True}, "config.batch_size is True; expected int or 'auto'"),
        ({"patchgd": {"mode": "fast"}}, "config.patchgd.mode is 'fast'"),
        ({"data": {"size": [256]}}, r"config.data.size is \[256\]"),
        ({"data": 3}, "config.data must be an object"),
    ],
)
def test_damaged_json_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, {**to_dict(TrainConfig()), **change})


def test_stored_settings_of_schema_0_are_migrated(monkeypatch):
    stored = {**to_dict(TrainConfig(batch_size=7)), "reader_workers": 2}
    assert from_dict(TrainConfig, nest(migrate(stored))) == TrainConfig(batch_size=7)
    monkeypatch.setattr(serialization, "RENAMED", {"patchgd.side": "patchgd.patch"})
    monkeypatch.setattr(serialization, "REMOVED", {"fast": None, "data.mode": (None, "new")})
    old = {"patchgd": {"side": 32}, "fast": 3, "data": {"mode": "new", "size": [64, 64]}}
    assert migrate(old) == {"patchgd.patch": 32, "data.size": [64, 64]}
    # Flat, as a checkpoint stores them; and of this schema, which has no such names.
    assert migrate({"patchgd.side": 32}) == {"patchgd.patch": 32}
    assert migrate({"schema": 1, "fast": 3}) == {"fast": 3}
    with pytest.raises(ConfigError, match=r"data\.mode is 'old', a setting that"):
        migrate({"data": {"mode": "old"}})
    for schema in (2, "1", None):
        with pytest.raises(ConfigError, match=f"run.json has schema {schema!r}.*update"):
            migrate({"schema": schema}, "run.json")


def test_a_patch_larger_than_the_image_is_refused():
    config = TrainConfig(data=DataConfig(size=(128, 48)))
    with pytest.raises(ConfigError, match=r"patch side 64 is larger than the image .128 x 48"):
        grids_of(config)


def test_more_inner_steps_than_patches_are_refused_with_both_numbers():
    config = TrainConfig(patchgd=PatchGDConfig(fraction=0.05))
    with pytest.raises(ConfigError, match="20 inner steps for a grid of 16 patches"):
        grids_of(config)


def test_a_fraction_of_one_over_n_gives_n_inner_steps():
    for n in range(1, 400):
        assert PatchGDConfig(fraction=1 / n).num_inner_steps == n
