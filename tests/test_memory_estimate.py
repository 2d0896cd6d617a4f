"""The layer table and the estimate: exact against real residuals and textbook numbers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchgd_jax import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    PatchGrid,
    TrainConfig,
)
from patchgd_jax.config import METHODS
from patchgd_jax.models.registry import build_encoder, build_model
from patchgd_jax.planner import (
    Estimator,
    PlanRequest,
    compile_program,
    encoder_table,
    step_of,
)
from patchgd_jax.planner.layers import residuals
from patchgd_jax.planner.methods import encoder_shapes
from patchgd_jax.planner.request import tree_bytes

KEY = jax.eval_shape(lambda: jax.random.key(0))


def request(encoder="small-cnn", image=256, patch=64, batch=2, **changes) -> PlanRequest:
    model = {"encoder": encoder, **changes.pop("model", {})}
    patchgd = {"patch": patch, "norm_policy": "frozen", **changes.pop("patchgd", {})}
    config = TrainConfig(
        data=DataConfig(channels=3),
        batch_size=batch,
        eval_batch_size=batch,
        model=ModelConfig(**model),
        patchgd=PatchGDConfig(**patchgd),
        **changes,
    )
    return PlanRequest(config, (image, image))


def encoder_of(encoder, remat, patch):
    """The encoder as a function, with its parameters' shapes."""
    model = build_model(
        ModelConfig(encoder=encoder, remat=remat),
        grid=PatchGrid(patch, patch, patch),
        channels=3,
        classes=10,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    params, state = jax.eval_shape(model.init, jax.random.key(0))

    def encode(encoder, state, images):
        parts = {**params, "encoder": encoder}
        return model.encode(parts, state, images, train=True, rng=jax.random.key(1))[0]

    return encode, params["encoder"], state


@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_sums_are_those_of_the_real_tree_and_the_real_residuals(remat):
    plan = request(model={"remat": remat}, patch=32)
    table = encoder_table(plan.model, 3, (32, 32), inputs=3)
    params = step_of(plan, "accumulate").state.params["encoder"]
    assert table.total("parameter_bytes") == tree_bytes(params)
    assert table.total("parameters") == sum(x.size for x in jax.tree.leaves(params))

    # Real arrays, no two parameters alike, so that those among the residuals can be told.
    encode, params, state = encoder_of("small-cnn", remat, 32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 8, x.dtype), params)
    state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)
    images = jnp.asarray(rng.integers(0, 255, (3, 32, 32, 3)), "u1")
    pull_back = jax.jit(lambda p: jax.vjp(lambda p: encode(p, state, images), p)[1])(params)
    given = {(x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(params)}
    kept = [
        x for x in jax.tree.leaves(pull_back) if (x.shape, np.asarray(x).tobytes()) not in given
    ]
    assert table.total("kept_bytes") == sum(x.nbytes for x in kept)


@pytest.mark.parametrize("encoder", ["resnet18", "deit-tiny", "convnext-v2-atto"])
def test_kept_bytes_of_other_architectures_are_the_residuals_without_parameters(encoder):
    plan = request(encoder, patch=32, model={"remat": "none"})
    encode, params, state = encoder_of(encoder, "none", 32)
    images = jax.ShapeDtypeStruct((31, 32, 32, 3), np.uint8)
    residuals = jax.eval_shape(
        lambda p, s, x: jax.vjp(lambda p: encode(p, s, x), p)[1], params, state, images
    )
    # No parameter has a number of elements that 31 divides; everything of the inputs has.
    growing = [x for x in jax.tree.leaves(residuals) if x.size % 31 == 0]
    table = encoder_table(plan.model, 3, (32, 32), inputs=31)
    rest = table.total("kept_bytes") - tree_bytes(growing)
    # A kernel in another shape is an array of its own; beside such there are only statistics.
    assert 0 <= rest <= tree_bytes(params) + 2 * tree_bytes(state)


def test_flops_and_shapes_are_those_worked_out_by_hand():
    layers = {x.name: x for x in encoder_table(request().model, 3, (64, 64), inputs=5).layers}
    # A 3 x 3 convolution of 32 to 64 channels on a 16 x 16 map, two operations for each product.
    conv = layers["Stage_1/Conv_0"]
    assert conv.output == (5, 16, 16, 64)
    assert conv.parameters == 3 * 3 * 32 * 64
    assert conv.flops == 2 * 5 * 16 * 16 * 64 * 3 * 3 * 32
    dense = layers["Dense_0"]
    assert dense.flops == 2 * 5 * 256 * 128
    assert dense.parameters == 256 * 128 + 128


def test_resnet50_has_the_published_parameters_and_products():
    table = encoder_table(ModelConfig(encoder="resnet50", latent_dim=1000), 3, (224, 224))
    assert table.total("parameters") == 25_557_032
    # 4.09 billion products are what its paper's authors and torchvision count.
    assert table.total("flops") / 2 == pytest.approx(4.09e9, rel=0.01)


def test_residuals_are_in_proportion_to_the_inputs():
    plan = request(patch=32)
    estimator = Estimator(plan)
    for count in (16, 40):
        table = encoder_table(plan.model, 3, (32, 32), inputs=count)
        assert estimator.encoder_bytes(plan.model, (32, 32), count)[0] == table.total("kept_bytes")


@pytest.mark.parametrize("method", ["gd", "patchwise", "mil", "accumulate", "exact"])
def test_parameters_and_optimizer_state_are_those_of_the_step(method):
    plan = request(patch=32, image=64)
    row, state = Estimator(plan).row(method), step_of(plan, method).state
    assert row.parameters == tree_bytes(state.weights)
    assert row.optimizer == tree_bytes(state.opt_state)


def test_residuals_by_hand():
    """Two products with a tanh between: the input of each product, and the tanh's result."""

    def network(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    x = jax.ShapeDtypeStruct((8, 32), np.float32)
    params = {
        "a": jax.ShapeDtypeStruct((32, 16), np.float32),
        "b": jax.ShapeDtypeStruct((16, 4), np.float32),
    }
    kept = jax.eval_shape(lambda p, x: residuals(network, p, x), params, x)
    sizes = sorted(leaf.size for leaf in kept)
    # The tanh's derivative is an array of its own.
    assert sizes in ([8 * 16, 8 * 32], [8 * 16, 8 * 16, 8 * 32])


@pytest.mark.parametrize("encoder", ["small-cnn", "resnet18", "deit-tiny"])
def test_shapes_of_an_encoder_are_those_of_its_initialisation(encoder):
    config = ModelConfig(encoder=encoder)
    built = build_encoder(config, 32)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = jax.eval_shape(lambda key, x: built.init(key, x, train=False), KEY, images)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), encoder_shapes(config, 32, 3)) == (
        jax.tree.map(lambda a: (a.shape, a.dtype), dict(init))
    )


def test_the_optimizer_and_frozen_statistics_are_counted():
    adam = Estimator(request()).row("accumulate")
    sgd = request(optimizer=OptimizerConfig(name="sgd"))
    plain = Estimator(sgd).row("accumulate")
    assert adam.optimizer == pytest.approx(2 * plain.optimizer, rel=1e-3)


def test_methods_that_an_encoder_does_not_support_say_why():
    vit = Estimator(request("deit-tiny", image=64, patch=32))
    assert vit.row("gd").method == "gd"
    flat = dataclasses.replace(request("deit-tiny", patch=32), size=(64, 96))
    batch_norm = request(patchgd={"norm_policy": "inner"})
    for estimator, method, why in (
        (vit, "fully-conv", "not convolutional"),
        (Estimator(flat), "gd", "not square"),
        (Estimator(batch_norm), "exact", "model.norm group"),
        (vit, "patchdg", "did you mean 'patchgd'"),
    ):
        with pytest.raises(ConfigError, match=why):
            estimator.row(method)


def test_a_wide_image_is_planned_for_convolutional_encoders():
    wide = Estimator(dataclasses.replace(request(), size=(128, 512)))
    square = Estimator(dataclasses.replace(request(), size=(256, 256)))
    for method in ("gd", "accumulate"):
        assert wide.row(method).total == pytest.approx(square.row(method).total, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_planning_a_100_000_px_image_allocates_nothing():
    code = """
from pathlib import Path
from patchgd_jax import DataConfig, ModelConfig, PatchGDConfig, TrainConfig
from patchgd_jax.planner import METHODS, Estimator, PlanRequest
config = TrainConfig(
    data=DataConfig(channels=3), batch_size=1, eval_batch_size=1, model=ModelConfig(norm="group"),
    patchgd=PatchGDConfig(patch=500, fraction=0.001),
)
request = PlanRequest(config, (100_000, 100_000))
estimator = Estimator(request)
rows = [estimator.row(method) for method in METHODS]
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) * 1024 < 2**30


@pytest.mark.parametrize("method", [name for name in METHODS if name != "patchgd"])
def test_the_planner_has_a_row_for_each(method):
    """By estimate near the compiled figure of the step that trains, even for a small one."""
    config = TrainConfig(
        data=DataConfig(channels=3),
        batch_size=4,
        eval_batch_size=4,
        model=ModelConfig(latent_dim=16, norm="group"),
        patchgd=PatchGDConfig(patch=32),
    )
    request = PlanRequest(config, (128, 128))
    compiled = compile_program(step_of(request, method).train)[0].total
    assert Estimator(request).row(method).total == pytest.approx(compiled, rel=0.25)
