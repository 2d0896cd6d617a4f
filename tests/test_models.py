"""Encoders and heads."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from toy import init_weights, max_relative, outer_steps

from patchgd_jax import (
    ENCODERS,
    HEADS,
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    build_model,
    eval_step,
    from_linen,
    from_nnx,
)
from patchgd_jax.models.heads.simple import LinearHead

KEY = jax.random.key(5)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def init_shapes(encoder="resnet18", head="attention", grid=None, **names):
    grid = grid or PatchGrid(64, 64, 32)
    config = ModelConfig(encoder=encoder, head=head, **names)
    model = build_model(config, grid=grid, channels=3, classes=10, mean=0.0, std=1.0)
    return jax.eval_shape(model.init, KEY)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # torchvision's counts with the 1000-class layer taken off.
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
    ],
)
def test_resnets_have_the_published_number_of_parameters(name, parameters):
    params, state = init_shapes(name, norm="batch", latent_dim=256)
    features = ENCODERS[name].features
    assert count(params["encoder"]) == parameters + features * 256 + 256
    assert state["encoder"], "BatchNorm has running statistics"
    params, state = init_shapes(name, norm="group", latent_dim=256)
    assert count(params["encoder"]) == parameters + features * 256 + 256
    assert not state["encoder"]


@pytest.mark.parametrize(
    ("name", "blocks", "features"),
    [
        ("cnn-original", (1, 3), 256),
        ("cnn-smaller", (0, 3), 256),
        ("cnn-larger", (1, 4), 256),
        ("cnn-smaller-feat", (1, 3), 128),
        ("cnn-larger-feat", (1, 3), 512),
    ],
)
def test_the_papers_heads(name, blocks, features):
    """Blocks of a 3x3 convolution with bias and BatchNorm, then one dense layer."""
    grid = PatchGrid(512, 512, 32)
    params, _ = init_shapes(head=name, grid=grid, latent_dim=256)
    same, halving = blocks
    width, side, wanted = 256, 16, 0
    for stride in [1] * same + [2] * halving:
        wanted += 9 * width * features + features + 2 * features
        width, side = features, -(-side // stride)
    wanted += side * side * features * 10 + 10
    assert count(params["head"]) == wanted


@pytest.mark.parametrize("patch", [32, 45])
@pytest.mark.parametrize(
    "encoder", ["small-cnn", "resnet18", "mobilenet-v2", "efficientnet-b0", "convnext-v2-atto"]
)
def test_convolutional_encoders_take_any_patch_side(encoder, patch):
    grid = PatchGrid(90, 90, patch)
    config = ModelConfig(encoder=encoder, latent_dim=24)
    model = build_model(config, grid=grid, channels=3, classes=4, mean=0.0, std=1.0)

    def run(key):
        params, state = model.init(key)
        patches = jnp.zeros((2, patch, patch, 3), jnp.uint8)
        return model.encode(params, state, patches, train=True, rng=key)[0]

    assert jax.eval_shape(run, KEY).shape == (2, 24)


def test_the_last_pixels_of_a_patch_are_seen():
    """Also where the patch side is not a multiple of the stem's four pixels."""
    grid = PatchGrid(45, 45, 45)
    model = build_model(ModelConfig(latent_dim=8), grid=grid, channels=1, classes=3, mean=0, std=1)
    params, state = jax.jit(model.init)(KEY)
    encode = jax.jit(partial(model.encode, train=False, rng=KEY))
    dark = np.zeros((1, 45, 45, 1), np.uint8)
    for y, x in [(44, 44), (44, 0), (0, 44)]:
        bright = dark.copy()
        bright[0, y, x] = 255
        latents = [encode(params, state, patch)[0] for patch in (dark, bright)]
        assert (np.asarray(latents[0]) != np.asarray(latents[1])).any()


@pytest.mark.parametrize("head", sorted(HEADS))
def test_heads_ignore_masked_patches(head):
    grid = PatchGrid(64, 64, 16)
    config = ModelConfig(head=head, latent_dim=8)
    model = build_model(config, grid=grid, channels=1, classes=3, mean=0.0, std=1.0)
    params, state = jax.jit(model.init)(KEY)
    # The attention head's scores start at zero; a mask must hold for any scores.
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)
    mask = jnp.arange(16).reshape(1, 4, 4) < 11
    z = jax.random.normal(KEY, (1, 4, 4, 8))
    other = jnp.where(mask[..., None], z, 100.0)

    @jax.jit
    def logits(z):
        return model.classify(params, state, z, mask, train=False, rng=KEY)[0]

    np.testing.assert_array_equal(logits(z), logits(other))
    assert np.isfinite(np.asarray(logits(z))).all()


def test_a_grid_free_head_does_not_care_for_the_order_of_patches():
    grid = PatchGrid(64, 64, 16)
    model = build_model(ModelConfig(latent_dim=8), grid=grid, channels=1, classes=3, mean=0, std=1)
    params, state = jax.jit(model.init)(KEY)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)
    z = jax.random.normal(KEY, (1, 4, 4, 8))
    turned = jnp.rot90(z, axes=(1, 2))

    def logits(z):
        return model.classify(params, state, z, None, train=False, rng=KEY)[0]

    np.testing.assert_allclose(logits(z), logits(turned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"encoder": "resnet81"}, "unknown encoder 'resnet81'; did you mean 'resnet18'"),
        ({"head": "attn"}, "unknown head 'attn'"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(names, message):
    with pytest.raises(ConfigError, match=message):
        init_shapes(**names)


class _NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 6, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


class _NnxHead(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(5, 10, rngs=rngs)

    def __call__(self, z, mask):
        return self.out(z.mean((1, 2)))


def test_from_nnx_trains_and_switches_modes():
    grid = PatchGrid(32, 32, 16)
    model = from_nnx(_NnxEncoder, _NnxHead, mean=0.1, std=0.3)
    params, state = jax.jit(model.init)(KEY)
    patches = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8)
    quiet = [
        model.encode(params, state, patches, train=False, rng=jax.random.key(i)) for i in (0, 1)
    ]
    np.testing.assert_array_equal(quiet[0][0], quiet[1][0])
    assert max_relative(quiet[0][1], state) == 0
    noisy = [
        model.encode(params, state, patches, train=True, rng=jax.random.key(i)) for i in (0, 1)
    ]
    assert (np.asarray(noisy[0][0]) != np.asarray(noisy[1][0])).any(), "dropout is on in training"
    assert max_relative(noisy[0][1]["encoder"], state["encoder"]) > 0, "statistics move"

    image = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 1), dtype=np.uint8)
    batch = {"image": image, "label": np.arange(6, dtype=np.int32)}
    problem = Problem(model, grid, PatchGDConfig(fraction=0.5))
    (first, *_, last), metrics = outer_steps(problem, optax.adam(1e-2), KEY, *[batch] * 3)
    assert np.isfinite(metrics[-1]["loss"])
    assert jax.tree.structure(last) == jax.tree.structure(first)
    assert max_relative(last.params["encoder"], first.params["encoder"]) > 0
    assert max_relative(last.params["head"], first.params["head"]) > 0


class _LinenStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        keep = None if mask is None else mask[:, None, None, None]
        norm = nn.BatchNorm(not train, momentum=0.0)
        return norm(x, mask=keep).mean((1, 2))


class _LinenUnmasked(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.BatchNorm(not train, momentum=0.0)(x).mean((1, 2))


class _NnxStatistics(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, momentum=0.0, rngs=rngs)

    def __call__(self, x, mask=None):
        keep = None if mask is None else mask[:, None, None, None]
        return self.norm(x, mask=keep).mean((1, 2))


class _NnxUnmasked(_NnxStatistics):
    def __call__(self, x):
        return super().__call__(x)


MASKING = {"linen": _LinenStatistics, "nnx": _NnxStatistics}
UNMASKED = {"linen": _LinenUnmasked, "nnx": _NnxUnmasked}
# A group of three slots for two patches: the last patch stands in the padding slot as well.
PADDED = np.broadcast_to(np.array([0.5, 1.0, 1.0], np.float32)[:, None, None, None], (3, 4, 4, 1))


def _encoded(library, encoder, **options):
    """The batch statistics after `PADDED` is encoded, by name."""
    if library == "nnx":
        model = from_nnx(encoder, _NnxHead)
    else:
        model = from_linen(encoder(), LinearHead(3), grid=PatchGrid(4, 8, 4), channels=1)
    params, state = model.init(KEY)
    _, state = model.encode(params, state, PADDED, rng=KEY, **options)
    leaves = jax.tree_util.tree_leaves_with_path(state["encoder"])
    return {path[-1].key: float(leaf[0]) for path, leaf in leaves}


@pytest.mark.parametrize("library", MASKING)
def test_padding_does_not_enter_batch_statistics(library):
    mask = np.array([True, True, False])
    wanted = {"mean": 0.75, "var": 0.0625}
    assert _encoded(library, MASKING[library], mask=mask, train=True) == wanted
    assert _encoded(library, MASKING[library], mask=mask, train=False) == {"mean": 0, "var": 1}
    unmasked = _encoded(library, UNMASKED[library], train=True)
    assert unmasked == pytest.approx({"mean": 0.8333, "var": 0.0556}, abs=1e-4)


@pytest.mark.parametrize("library", UNMASKED)
def test_batch_statistics_without_a_mask_cannot_see_padding(library):
    mask = np.array([True, True, False])
    message = f"{UNMASKED[library].__name__} keeps batch statistics and takes no mask.*norm"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: _encoded(library, UNMASKED[library], mask=mask, train=True))
    # In eval mode nothing is counted.
    assert _encoded(library, UNMASKED[library], mask=mask, train=False) == {"mean": 0, "var": 1}


def test_from_linen_reports_what_a_module_returns():
    """A user's own two modules, without mask or batch statistics."""

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(7)(x.mean((1, 2)))

    class Head(nn.Module):
        @nn.compact
        def __call__(self, z, mask, *, train):
            return nn.Dense(4)(z.reshape(z.shape[0], -1))

    grid = PatchGrid(32, 48, 16)
    model = from_linen(Encoder(), Head(), grid=grid, channels=3)
    weights = init_weights(model, KEY)
    assert set(weights.params) == set(weights.batch_stats) == {"encoder", "head"}
    batch = {"image": np.zeros((2, 32, 48, 3), np.uint8), "label": np.zeros(2, np.int32)}
    out = eval_step(Problem(model, grid, PatchGDConfig()), weights, batch)
    assert out["logits"].shape == (2, 4)
