"""The layer table and the formula tier: exact against real residuals, near XLA's figure."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchgd_jax import ConfigError, ModelConfig, OptimizerConfig, PatchGDConfig, PatchGrid
from patchgd_jax.engine.compiling import compiler_options
from patchgd_jax.models.encoders import convnext_v2
from patchgd_jax.models.layers.conv import traced_for
from patchgd_jax.models.layers.cpu import conv as cpu_conv
from patchgd_jax.models.layers.remat import rematerialise
from patchgd_jax.models.registry import build_encoder, build_model
from patchgd_jax.planner import (
    Formula,
    PlanRequest,
    encoder_table,
    method_table,
    step_of,
)
from patchgd_jax.planner.formula import profile_encoder
from patchgd_jax.planner.liveness import TracedProgram
from patchgd_jax.planner.methods import encoder_shapes
from patchgd_jax.planner.request import tree_bytes

MIB = 2**20
KEY = jax.eval_shape(lambda: jax.random.key(0))


def request(encoder="small-cnn", image=256, patch=64, batch=2, **changes) -> PlanRequest:
    model = {"encoder": encoder, **changes.pop("model", {})}
    patchgd = {"patch": patch, "norm_policy": "frozen", **changes.pop("patchgd", {})}
    return PlanRequest(
        image=(image, image, 3),
        batch=batch,
        eval_batch=batch,
        model=ModelConfig(**model),
        patchgd=PatchGDConfig(**patchgd),
        **changes,
    )


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
    table = encoder_table(plan, inputs=3)
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
    table = encoder_table(plan, inputs=31)
    rest = table.total("kept_bytes") - tree_bytes(growing)
    # A kernel in another shape is an array of its own; beside such there are only statistics.
    assert 0 <= rest <= tree_bytes(params) + 2 * tree_bytes(state)


def test_flops_and_shapes_are_those_worked_out_by_hand():
    layers = {x.name: x for x in encoder_table(request(), inputs=5).layers}
    # A 3 x 3 convolution of 32 to 64 channels on a 16 x 16 map, two operations for each product.
    conv = layers["Stage_1/Conv_0"]
    assert conv.output == (5, 16, 16, 64)
    assert conv.parameters == 3 * 3 * 32 * 64
    assert conv.flops == 2 * 5 * 16 * 16 * 64 * 3 * 3 * 32
    dense = layers["Dense_0"]
    assert dense.flops == 2 * 5 * 256 * 128
    assert dense.parameters == 256 * 128 + 128


def test_resnet50_has_the_published_parameters_and_products():
    table = encoder_table(request("resnet50", patch=224, model={"latent_dim": 1000}))
    assert table.total("parameters") == 25_557_032
    # 4.09 billion products are what its paper's authors and torchvision count.
    assert table.total("flops") / 2 == pytest.approx(4.09e9, rel=0.01)


def test_a_profile_is_in_proportion_to_the_inputs():
    plan = request(patch=32)
    formula = Formula(plan, "cpu")
    model, params, state = formula._shapes(plan.model, 32, True)
    arguments = {"side": (32, 32), "channels": 3, "platform": "cpu"}
    profile = profile_encoder(model, params, state, inputs=16, **arguments)
    for count in (16, 40):
        table = encoder_table(plan, inputs=count)
        assert profile.kept(count) == table.total("kept_bytes")


def test_peak_of_a_chain_by_hand():
    x = jax.ShapeDtypeStruct((1024, 1024), np.float32)

    def chain(x, w):
        return ((x @ w) @ w) @ w

    # Two products at a time: the one that is read and the one that is written.
    assert TracedProgram(jax.make_jaxpr(chain)(x, x), platform="cpu").peak_bytes() == 8 * MIB


def test_what_is_fused_has_no_buffer_and_what_is_kept_has():
    x = jax.ShapeDtypeStruct((1024, 1024), np.float32)

    def fused(x):
        return (x * 2 + 1).sum()

    assert TracedProgram(jax.make_jaxpr(fused)(x), platform="cpu").peak_bytes() < 1024

    def kept(x, w):
        y = x @ w
        z = y @ w
        return y.T @ z

    # Both y and z, y's transpose, and the result.
    assert TracedProgram(jax.make_jaxpr(kept)(x, x), platform="cpu").peak_bytes() >= 12 * MIB


@pytest.mark.parametrize("side", [3, 7])
def test_slices_that_a_sum_reads_are_written_as_xla_does(side):
    x = jax.ShapeDtypeStruct((2, 16, 16, 32), jnp.float32)

    def gradient(x, dy):
        return cpu_conv.depthwise_weight_gradient(jnp.clip(x, 0, 6), dy, side, 1, side // 2)

    compiled = jax.jit(gradient).lower(x, x).compile().memory_analysis().temp_size_in_bytes
    traced = TracedProgram(jax.make_jaxpr(gradient)(x, x), platform="cpu")
    assert traced.peak_bytes() == pytest.approx(compiled, rel=0.05)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="newer XLA keeps two maps fewer: the formula is above it",
)
def test_an_error_function_and_its_gradient_share_their_exponential():
    x = jax.ShapeDtypeStruct((1024, 1024), np.float32)

    def gradient(x, w):
        def layers(x, w):
            return jax.nn.gelu(x @ w, approximate=False) @ w

        return jax.vjp(layers, x, w)[1](x)

    figures = jax.jit(gradient).lower(x, x).compile().memory_analysis()
    compiled = figures.temp_size_in_bytes + figures.output_size_in_bytes
    traced = TracedProgram(jax.make_jaxpr(gradient)(x, x), platform="cpu")
    assert traced.peak_bytes() == pytest.approx(compiled, rel=0.01)


def test_slices_of_what_is_computed_again_are_there_early():
    """The slices of a depthwise gradient, while the wide maps of its block are still needed."""
    x = jax.ShapeDtypeStruct((2, 32, 32, 16), jnp.float32)
    block = rematerialise(convnext_v2.Block, "dots")(jnp.float32)
    params = jax.eval_shape(lambda key, x: block.init(key, x, False, None), jax.random.key(0), x)

    def gradient(params, x):
        def loss(params, x):
            return (block.apply(params, x, True, None) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    jitted = jax.jit(gradient, compiler_options=compiler_options())
    figures = jitted.lower(params, x).compile().memory_analysis()
    compiled = figures.temp_size_in_bytes + figures.output_size_in_bytes
    with traced_for("cpu"):
        traced = TracedProgram(jax.make_jaxpr(gradient)(params, x), platform="cpu")
    assert traced.peak_bytes() == pytest.approx(compiled, rel=0.2)


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
    adam = Formula(request(), "cpu").row("accumulate")
    sgd = request(optimizer=OptimizerConfig(name="sgd"))
    plain = Formula(sgd, "cpu").row("accumulate")
    assert adam.optimizer == pytest.approx(2 * plain.optimizer, rel=1e-3)


def test_methods_that_an_encoder_does_not_support_say_why():
    vit = request("deit-tiny", image=64, patch=32)
    rows, refused = method_table(vit, "cpu", ["gd", "fully-conv"])
    assert [row.method for row in rows] == ["gd"]
    assert "not convolutional" in refused["fully-conv"]
    batch_norm = request(patchgd={"norm_policy": "inner"})
    assert "model.norm group" in method_table(batch_norm, "cpu", ["exact"])[1]["exact"]
    with pytest.raises(ConfigError, match="did you mean 'patchgd'"):
        Formula(request(), "cpu").row("patchdg")
    flat = dataclasses.replace(request("deit-tiny", patch=32), image=(64, 96, 3))
    assert "not square" in method_table(flat, "cpu", ["gd"])[1]["gd"]


def test_a_wide_image_is_planned_for_convolutional_encoders():
    wide = dataclasses.replace(request(), image=(128, 512, 3))
    rows, refused = method_table(wide, "cpu", ["gd", "accumulate"])
    assert len(rows) == 2
    assert not refused


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_planning_a_100_000_px_image_allocates_nothing():
    code = """
from pathlib import Path
from patchgd_jax import ModelConfig, PatchGDConfig
from patchgd_jax.planner import PlanRequest, method_table
request = PlanRequest(
    image=(100_000, 100_000, 3), batch=1, eval_batch=1, model=ModelConfig(norm="group"),
    patchgd=PatchGDConfig(patch=500, fraction=0.001),
)
rows, refused = method_table(request, "cpu")
assert len(rows) == 12 and not refused, refused
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) * 1024 < 2**30
