"""Convolution, batch norm and max pooling against XLA's, PyTorch's rules and plain loops."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toy import max_relative

from patchgd_jax.models.layers.batch_norm import batch_norm
from patchgd_jax.models.layers.conv import Patchify, conv2d, depthwise_conv2d
from patchgd_jax.models.layers.cpu.strips import strip_rows
from patchgd_jax.models.layers.cpu.taps import rows_weight_gradient, taps, taps_weight_gradient
from patchgd_jax.models.layers.cpu.winograd import (
    winograd,
    winograd_input_gradient,
    winograd_weight_gradient,
)
from patchgd_jax.models.layers.norm import Normalize
from patchgd_jax.models.layers.pool import global_max_pool, max_pool_3x3


def xla_conv(x, w, stride, padding):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=layout
    )


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# The channels decide among XLA's convolution and products; the tiles between Winograd's and taps.
@pytest.mark.parametrize(
    ("count", "channels", "height", "width", "side", "stride", "padding"),
    [
        (3, 4, 9, 7, 3, 1, 1), (2, 8, 9, 7, 3, 1, 1), (20, 9, 9, 7, 3, 1, 1),
        (3, 4, 8, 8, 3, 2, 1), (20, 9, 8, 8, 3, 2, 1), (2, 8, 20, 24, 3, 1, 0),
        (2, 8, 3, 2, 3, 1, 1), (20, 9, 1, 1, 3, 1, 1), (3, 4, 21, 17, 7, 2, 3),
        (2, 8, 21, 17, 7, 2, 3), (2, 8, 10, 6, 1, 1, 0), (20, 9, 10, 7, 1, 2, 0),
        (2, 8, 17, 17, 5, 3, 2), (2, 8, 18, 18, 3, 1, 3), (20, 9, 4, 4, 3, 1, 1),
        (2, 8, 2, 2, 3, 2, 1), (2, 8, 1, 1, 3, 2, 1), (2, 8, 5, 4, 1, 1, 1),
    ],
)  # fmt: skip
def test_conv2d_and_both_gradients_equal_xlas(
    float64, count, channels, height, width, side, stride, padding
):
    x, w = normal(0, count, height, width, channels), normal(1, side, side, channels, 5)
    assert_equals_xlas(x, w, stride, padding, 1e-12)


def assert_equals_xlas(x, w, stride, padding, tolerance):
    dy = normal(2, *jax.eval_shape(lambda: xla_conv(x, w, stride, padding)).shape)

    def both(conv, x, w, dy):
        y, pull = jax.vjp(lambda x, w: conv(x, w, stride, padding), x, w)
        return y, pull(dy)

    got, wanted = (jax.jit(partial(both, conv))(x, w, dy) for conv in (conv2d, xla_conv))
    assert max_relative(got, wanted) < tolerance


# A prime height cannot be cut into strips, and a large map at stride 2 is not.
@pytest.mark.parametrize(("height", "stride"), [(512, 1), (521, 1), (512, 2)])
def test_maps_too_large_for_winograds_buffers_are_convolved_as_well(float64, height, stride):
    x, w = normal(0, 2, height, 256, 8), normal(1, 3, 3, 8, 8)
    assert x.nbytes >= 2**24
    assert_equals_xlas(x, w, stride, 1, 1e-11)


def test_large_maps_are_convolved_in_little_memory():
    """Winograd's buffers are eight times the map, in strips a fraction of it."""
    x = jax.ShapeDtypeStruct((1, 256, 256, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)

    def gradients(x, w, dy):
        return jax.vjp(lambda x, w: conv2d(x, w, 1, 1), x, w)[1](dy)

    compiled = jax.jit(gradients).lower(x, w, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**24


@pytest.mark.parametrize(
    ("height", "row_bytes", "most", "rows"),
    [(128, 4, 128, 32), (100, 4, 128, 25), (97, 4, 128, 0), (16, 1, 7, 0), (24, 1, 1000, 24)],
)
def test_strips_divide_the_height(height, row_bytes, most, rows):
    assert strip_rows(height, row_bytes, most) == rows


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 8), (7, 7), (2, 2), (1, 3)])
def test_winograd_and_its_gradients_equal_xlas(float64, height, width):
    x, w = normal(0, 2, height, width, 3), normal(1, 3, 3, 3, 5)
    wanted, pull = jax.vjp(lambda x, w: xla_conv(x, w, 1, 1), x, w)
    dy = normal(2, *wanted.shape)
    dx, dw = pull(dy)
    assert max_relative(winograd(x, w), wanted) < 1e-12
    assert max_relative(winograd_input_gradient(dy, w), dx) < 1e-12
    assert max_relative(winograd_weight_gradient(x, dy), dw) < 1e-12


@pytest.mark.parametrize(
    ("height", "width", "side", "stride", "padding"),
    [
        (9, 7, 3, 1, 1), (8, 8, 3, 2, 1), (7, 10, 5, 2, 2), (1, 1, 7, 1, 3), (2, 3, 7, 1, 3),
        (9, 9, 7, 1, 3), (1, 2, 3, 2, 1), (8, 9, 3, 3, 0), (6, 6, 3, 1, 3), (5, 5, 1, 2, 0),
    ],
)  # fmt: skip
def test_depthwise_convolution_and_both_gradients_equal_xlas(
    float64, height, width, side, stride, padding
):
    def xla(x, w):
        layout, around = ("NHWC", "HWIO", "NHWC"), [(padding, padding)] * 2
        return lax.conv_general_dilated(
            x, w, (stride, stride), around, dimension_numbers=layout, feature_group_count=4
        )

    def ours(x, w):
        return depthwise_conv2d(x, w, stride, padding)

    def run(conv):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(2, height, width, 4)), rng.normal(size=(side, side, 1, 4))
        dy = rng.normal(size=jax.eval_shape(conv, x, w).shape)

        def both_ways(x, w, dy):
            y, pull = jax.vjp(conv, x, w)
            return y, pull(dy)

        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(both_ways, compiler_options=quick)(x, w, dy)

    assert max_relative(run(ours), run(xla)) < 1e-12


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 15)])
def test_patchify_is_a_convolution_without_overlap(float64, height, width):
    x = normal(0, 2, height, width, 3)
    layer = Patchify(5, 4, jnp.float64)
    params = {"kernel": normal(1, 4, 4, 3, 5), "bias": normal(2, 5)}
    wanted = xla_conv(x, params["kernel"], 4, 0) + params["bias"]
    assert max_relative(layer.apply({"params": params}, x), wanted) < 1e-12


def test_winograds_rounding_error_is_that_of_float32():
    x, w = normal(0, 4, 16, 16, 64, dtype=jnp.float32), normal(1, 3, 3, 64, 64, dtype=jnp.float32)
    with jax.enable_x64(True):
        truth = np.asarray(xla_conv(x.astype(jnp.float64), w.astype(jnp.float64), 1, 1))
    got = np.asarray(winograd(x, w), np.float64)
    assert np.linalg.norm(got - truth) < 2e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width", "side", "padding"), [(6, 5, 3, 1), (7, 9, 5, 0)])
def test_weight_gradients_by_tap_and_by_row_equal_xlas(
    float64, height, width, side, padding, stride
):
    x, w = normal(0, 2, height, width, 3), normal(1, side, side, 3, 5)
    y, pull = jax.vjp(lambda w: xla_conv(x, w, stride, padding), w)
    dy = normal(2, *y.shape)
    assert max_relative(taps(x, w, stride, padding), y) < 1e-12
    for gradient in (taps_weight_gradient, rows_weight_gradient):
        assert max_relative(gradient(x, dy, side, stride, padding), pull(dy)[0]) < 1e-12


def plain_batch_norm(x, scale, bias, counts):
    share = np.ones(len(x)) if counts is None else np.asarray(counts, np.float64)
    share = share[:, None, None, None]
    number = share.sum() * x.shape[1] * x.shape[2]
    mean = (x * share).sum((0, 1, 2)) / number
    variance = (jnp.square(x - mean) * share).sum((0, 1, 2)) / number
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    return y, mean, variance * number / (number - 1)


@pytest.mark.parametrize("counts", [None, [True, False, True, True]])
def test_batch_norm_and_its_gradient(float64, counts):
    x = 3 + 2 * normal(0, 4, 3, 5, 6)
    scale, bias = normal(1, 6), normal(2, 6)
    counts = None if counts is None else jnp.array(counts)
    got = batch_norm(x, scale, bias, counts)
    wanted = plain_batch_norm(x, scale, bias, counts)
    assert max_relative(got, wanted) < 1e-12
    dy = normal(3, *x.shape)

    def gradient(norm):
        return jax.grad(lambda *a: (norm(*a, counts)[0] * dy).sum(), argnums=(0, 1, 2))(
            x, scale, bias
        )

    assert max_relative(gradient(batch_norm), gradient(plain_batch_norm)) < 1e-11


def test_batch_norm_keeps_statistics_wide():
    x = (5 + normal(0, 8, 4, 4, 3, dtype=jnp.float32)).astype(jnp.bfloat16)
    layer = Normalize("batch", jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, train=True)
    y, changed = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    truth = np.asarray(x, np.float64)
    count = truth.size // 3
    for name, value in (
        ("mean", 0.1 * truth.mean((0, 1, 2))),
        ("var", 0.9 + 0.1 * truth.var((0, 1, 2)) * count / (count - 1)),
    ):
        statistic = changed["batch_stats"][name]
        assert statistic.dtype == jnp.float32
        np.testing.assert_allclose(statistic, value, rtol=1e-5)


def loop_max_pool(x, dy):
    """The pooled map, and the gradient given to the first maximum of each window."""
    height, width = x.shape[1:3]
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    for m, i, j, c in np.ndindex(dy.shape):
        window = [
            (x[m, a, b, c], -a, -b)
            for a in range(max(0, 2 * i - 1), min(height, 2 * i + 2))
            for b in range(max(0, 2 * j - 1), min(width, 2 * j + 2))
        ]
        # Of equal values, the one first by row, then by column.
        value, a, b = max(window)
        y[m, i, j, c] = value
        dx[m, -a, -b, c] += dy[m, i, j, c]
    return y, dx


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 6), (5, 9), (1, 1), (2, 3)])
@pytest.mark.parametrize("values", [1000, 3, 1])
def test_max_pooling_is_torchs(float64, height, width, values):
    """With few different values, windows have ties, and with one value nothing else."""
    rng = np.random.default_rng(0)
    x = rng.integers(values, size=(2, height, width, 3)) - 1.0
    y, pull = jax.vjp(max_pool_3x3, jnp.asarray(x))
    dy = rng.normal(size=y.shape)
    wanted, dx = loop_max_pool(x, dy)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dx, rtol=1e-12, atol=1e-12)


def test_max_pooling_hands_nan_on():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1] = np.nan
    assert np.isnan(max_pool_3x3(jnp.asarray(x))).sum() == 4


def test_the_global_maximum_and_its_gradient(float64):
    x = normal(0, 3, 4, 5, 6)
    y, pull = jax.vjp(global_max_pool, x)
    wanted, pull_max = jax.vjp(lambda x: x.max((1, 2)), x)
    dy = normal(1, *y.shape)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(pull(dy)[0], pull_max(dy)[0])
    flat = jax.vjp(global_max_pool, jnp.zeros((1, 2, 2, 1)))[1](jnp.ones((1, 1)))[0]
    np.testing.assert_array_equal(flat.ravel(), [1, 0, 0, 0])
