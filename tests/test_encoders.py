"""The encoders beside PyTorch modules with the same weights, and what is known before they run."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from published_shapes import PARAMETERS, published_shapes
from toy import max_relative

from patchgd_jax import (
    ENCODERS,
    HEADS,
    ConfigError,
    ModelConfig,
    PatchGrid,
    build_model,
    register_encoder,
    register_head,
)
from patchgd_jax.models.encoders.convnext_v2 import GRN
from patchgd_jax.models.registry import build_encoder, encoder_norm
from patchgd_jax.weights.published import PUBLISHED, flax_path, to_flax_layout

TORCH = "the reference implementation is in PyTorch: pip install torch"
KEY = jax.random.key(2)
CLASSES = 7
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
# Compiling is nearly all of the time here, and this shortens it without changing what is computed.
QUICK = {"xla_backend_optimization_level": 0}
# One of each family.
SMALLEST = ["convnext-v2-atto", "deit-tiny", "efficientnet-b0", "mobilenet-v2", "resnet18"]


def other_side(encoder):
    """A patch side that is not the native one, and odd where it can be."""
    if encoder.startswith("convnext"):
        return 75
    return 45 if ENCODERS[encoder].side_multiple == 1 else 48


def cases():
    """Every encoder at its native and another patch side in both formats; most of them slow.

    ViT is DeiT under another name, as a test of the tables says.
    """
    chosen = []
    native_ones = ("deit-tiny", "mobilenet-v2")
    for encoder in sorted(name for name in PARAMETERS if not name.startswith("vit-")):
        for dtype in TOLERANCE:
            for native in (True, False):
                quick = (
                    encoder in native_ones and dtype == "float32"
                    if native
                    else encoder in SMALLEST and dtype == "float64"
                )
                side = 224 if native else other_side(encoder)
                marks = [] if quick else [pytest.mark.slow]
                name = f"{encoder}-{dtype}-{side}"
                chosen.append(pytest.param(encoder, dtype, side, marks=marks, id=name))
    return chosen


def random_weights(encoder, dtype):
    """Weights of a trained network's size under their published names, the classifier's too."""
    rng = np.random.default_rng(0)
    weights = {}
    for key, shape in published_shapes(encoder, CLASSES).items():
        kind = key.rpartition(".")[2]
        normal = rng.normal(size=shape)
        if kind == "num_batches_tracked":
            values = np.zeros((), np.int64)
        elif kind == "weight" and len(shape) > 1:
            values = (normal * np.sqrt(1.5 / np.prod(shape[1:]))).astype(dtype)
        elif kind in ("weight", "running_var"):
            values = rng.uniform(0.5, 1.5, shape).astype(dtype)
        else:
            values = (0.2 * normal).astype(dtype)
        weights[key] = values
    return weights


def load(encoder, module, side, weights):
    """Our variables, with the published classifier as the latent layer."""
    names = PUBLISHED[encoder]
    image = jax.ShapeDtypeStruct((1, side, side, 3), module.dtype)
    shapes = flatten_dict(jax.eval_shape(lambda image: module.init(KEY, image, train=False), image))
    variables = {}
    for key, array in weights.items():
        path = flax_path(names, key)
        if path is not None:
            variables[path] = to_flax_layout(names, key, array, shapes[path].shape)
        elif re.fullmatch(names.classifier, key):
            leaf = "bias" if key.endswith("bias") else "kernel"
            variables["params", "Dense_0", leaf] = array.T
    assert {p: a.shape for p, a in variables.items()} == {p: a.shape for p, a in shapes.items()}
    return unflatten_dict(variables)


def both(encoder, dtype, side, count):
    """Our module with its variables, PyTorch's, and patches, which are normalised already."""
    torch = pytest.importorskip("torch", reason=TORCH)
    from torch_models import torch_model

    torch.set_num_threads(1)
    weights = random_weights(encoder, dtype)
    config = ModelConfig(encoder=encoder, latent_dim=CLASSES)
    module = build_encoder(config, side).clone(dtype=jnp.dtype(dtype))
    theirs = torch_model(encoder, CLASSES).to(getattr(torch, dtype))
    theirs.load_state_dict({key: torch.from_numpy(array) for key, array in weights.items()})
    patches = np.random.default_rng(1).normal(size=(count, side, side, 3)).astype(dtype)
    return module, load(encoder, module, side, weights), theirs, patches


def run_torch(module, patches):
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(patches).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize(("encoder", "dtype", "side"), cases())
def test_features_and_logits_are_pytorchs(encoder, dtype, side):
    with jax.enable_x64(dtype == "float64"):
        module, variables, theirs, patches = both(encoder, dtype, side, 1 if side > 100 else 2)
        run = jax.jit(lambda v, x: module.apply(v, x, train=False), compiler_options=QUICK)
        got = np.asarray(run(variables, patches))
    assert got.dtype == dtype
    assert max_relative(got, run_torch(theirs.eval(), patches)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        "mobilenet-v2",
        pytest.param("resnet50", marks=pytest.mark.slow),
        pytest.param("efficientnet-b0", marks=pytest.mark.slow),
    ],
)
def test_batch_statistics_and_running_averages_are_pytorchs(encoder, float64):
    module, variables, theirs, patches = both(encoder, "float64", 45, 3)
    run = jax.jit(
        lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]),
        compiler_options=QUICK,
    )
    got, changed = run(variables, patches)
    assert max_relative(got, run_torch(theirs.train(), patches)) < 1e-9
    state, checked = theirs.state_dict(), 0
    changed = flatten_dict(changed)
    for key, array in state.items():
        path = flax_path(PUBLISHED[encoder], key)
        if path is not None and path[0] == "batch_stats":
            assert max_relative(changed[path], array.numpy()) < 1e-9, key
            checked += 1
    assert checked == len(changed) > 0


def shapes_of(encoder, side, **names):
    module = build_encoder(ModelConfig(encoder=encoder, latent_dim=5, **names), side)
    image = jnp.zeros((2, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda: module.init_with_output(KEY, image, train=False))


@pytest.mark.parametrize("encoder", [*SMALLEST, "small-cnn"])
def test_half_precision_and_any_norm_at_the_smallest_side(encoder):
    """Computed in bfloat16, with parameters in float32."""
    entry = ENCODERS[encoder]
    side, norm = entry.smallest_side, entry.norms[-1]
    latents, variables = shapes_of(encoder, side, dtype="bfloat16", norm=norm)
    assert (latents.shape, latents.dtype) == ((2, 5), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert set(variables) == {"params"}
    assert any("GroupNorm_0" in path for path in flatten_dict(variables)) == (norm == "group")
    with pytest.raises(ConfigError, match=f"side {side - 1} is too small for {encoder}; .* {side}"):
        build_encoder(ModelConfig(encoder=encoder), side - 1)


def test_a_side_that_is_no_multiple_is_refused():
    with pytest.raises(ConfigError, match=r"side 40 is not possible in vit-base; .* 32 or 48"):
        build_encoder(ModelConfig(encoder="vit-base"), 40)


@pytest.mark.parametrize(
    ("encoder", "norm", "message"),
    [
        ("convnext-v2-tiny", "batch", "not possible in convnext-v2-tiny; it can have layer"),
        ("deit-tiny", "group", "model.norm group is not possible in deit-tiny"),
        ("resnet18", "layer", "it can have batch or group"),
    ],
)
def test_a_norm_that_an_architecture_has_not_is_refused(encoder, norm, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder(ModelConfig(encoder=encoder, norm=norm), 64)


def test_norms_are_the_architectures_own_unless_set():
    for encoder, norm in (("small-cnn", "batch"), ("resnet50", "batch"), ("vit-tiny", "layer")):
        assert encoder_norm(ModelConfig(encoder=encoder)) == norm
    assert encoder_norm(ModelConfig(encoder="efficientnet-b0", norm="group")) == "group"


@pytest.mark.parametrize(
    ("encoder", "fields"),
    [
        ("convnext-v2-atto", {"blocks": (1, 1, 1, 1)}),
        ("deit-tiny", {"depth": 2}),
        pytest.param("mobilenet-v2", {}, marks=pytest.mark.slow),
        pytest.param("efficientnet-b0", {}, marks=pytest.mark.slow),
    ],
)
def test_each_policy_keeps_less_than_the_one_before(encoder, fields):
    kept = [residual_bytes(encoder, remat, fields) for remat in ("none", "dots", "blocks")]
    assert kept[0] > kept[1] > kept[2]


def residual_bytes(encoder, remat, fields):
    """Bytes that `jax.vjp` keeps, parameters and input left out."""
    module = build_encoder(ModelConfig(encoder=encoder, latent_dim=5, remat=remat), 64)
    module = module.clone(**fields)
    patches = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(KEY, x, train=False), patches)

    def pull_back(variables, patches):
        def encode(params):
            return module.apply(
                {**variables, "params": params}, patches, train=True, mutable=["batch_stats"]
            )[0]

        return jax.vjp(encode, variables["params"])[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, variables, patches))
    given = {leaf.shape for leaf in jax.tree.leaves(variables)} | {patches.shape}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in given)


def test_stochastic_depth_drops_branches_of_single_patches_in_training_only():
    """Of two blocks, the first has no rate and the last has all of it."""
    config = ModelConfig(encoder="deit-tiny", latent_dim=5, drop_path=0.9)
    module = build_encoder(config, 16).clone(depth=2, width=32, heads=2)

    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: module.init(KEY, one, train=False))
    variables = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), shapes)

    def run(depth, count, train):
        patches = jnp.broadcast_to(one, (count, *one.shape[1:]))
        net = module.clone(depth=depth)
        return net.apply(variables, patches, train=train, rngs={"dropout": KEY})

    run = jax.jit(run, static_argnums=(0, 1, 2), compiler_options=QUICK)
    whole, shallow, noisy = run(2, 1, False), run(1, 1, False), run(2, 400, True)
    assert max_relative(whole, shallow) > 0.01
    # Neither of the last block's two branches, which are there in a tenth of the patches each.
    dropped = np.isclose(noisy, shallow, rtol=1e-4, atol=1e-4).all(1).mean()
    assert 0.76 < dropped < 0.86
    # What is there is enlarged to keep the mean: both branches, one, the other, or none.
    assert len(np.unique(np.asarray(noisy).round(2), axis=0)) <= 4


def test_stochastic_depth_where_there_is_none_is_refused():
    with pytest.raises(ConfigError, match="mobilenet-v2 has no stochastic depth"):
        build_encoder(ModelConfig(encoder="mobilenet-v2", drop_path=0.1), 64)


def test_a_silent_channel_has_a_finite_gradient():
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    variables = {"params": {"gamma": jnp.ones(3), "beta": jnp.ones(3)}}
    slope = jax.grad(lambda x: GRN().apply(variables, x).sum())(x)
    assert np.isfinite(np.asarray(slope)).all()


class Mine(nn.Module):
    """A user's encoder, which takes a norm but neither a format nor a policy."""

    latent_dim: int
    norm: str = "layer"

    @nn.compact
    def __call__(self, x, *, train):
        assert self.norm == "group"
        return nn.Dense(self.latent_dim)(x.mean((1, 2)))


class MyHead(nn.Module):
    """A user's head."""

    classes: int

    @nn.compact
    def __call__(self, z, mask, *, train):
        return nn.Dense(self.classes)(z.mean((1, 2)))


@pytest.fixture
def own_names(monkeypatch):
    """What a test adds is gone after it."""
    monkeypatch.setattr("patchgd_jax.models.registry._ENCODERS", dict(ENCODERS))
    monkeypatch.setattr("patchgd_jax.models.registry._HEADS", dict(HEADS))


@pytest.mark.usefixtures("own_names")
def test_a_user_adds_an_encoder_and_a_head_by_name():
    register_encoder("mine", Mine, norms=("group",), smallest_side=8)
    register_head("mine", MyHead)
    grid = PatchGrid(32, 48, 16)
    config = ModelConfig(encoder="mine", head="mine", latent_dim=6)
    model = build_model(config, grid=grid, channels=1, classes=4, mean=0.0, std=1.0)
    params, _ = jax.eval_shape(model.init, KEY)
    assert params["encoder"]["Dense_0"]["kernel"].shape == (1, 6)
    assert params["head"]["Dense_0"]["kernel"].shape == (6, 4)
    with pytest.raises(ConfigError, match="there is an encoder 'mine' already"):
        register_encoder("mine", Mine)
    with pytest.raises(ConfigError, match="there is a head 'linear' already"):
        register_head("linear", MyHead)
    with pytest.raises(ConfigError, match="side 7 is too small for mine"):
        build_encoder(config, 7)


@pytest.mark.usefixtures("own_names")
def test_installed_packages_add_encoders_and_heads_by_entry_points(tmp_path, monkeypatch):
    (tmp_path / "their_model.py").write_text(
        "from patchgd_jax.models.registry import EncoderEntry\n"
        "from patchgd_jax.models.encoders.small_cnn import SmallCNN\n"
        "from patchgd_jax.models.heads.simple import LinearHead\n"
        'tiles = EncoderEntry(SmallCNN, norms=("group",), smallest_side=8)\n'
    )
    package = tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[patchgd_jax.encoders]\ntiles = their_model:tiles\nlost = their_model:lost\n"
        "[patchgd_jax.heads]\nmine = their_model:LinearHead\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(encoder="tiles", head="mine", latent_dim=6)
    grid = PatchGrid(32, 48, 16)
    model = build_model(config, grid=grid, channels=1, classes=4, mean=0.0, std=1.0)
    params, _ = jax.eval_shape(model.init, KEY)
    assert params["head"]["Dense_0"]["kernel"].shape == (6, 4)
    assert encoder_norm(config) == "group"
    with pytest.raises(ConfigError, match="side 7 is too small for tiles"):
        build_encoder(config, 7)
    with pytest.raises(ConfigError, match="did you mean 'tiles'"):
        build_encoder(ModelConfig(encoder="tile"), 16)
    with pytest.raises(ConfigError, match="'lost' cannot be loaded from their_model:lost"):
        build_encoder(ModelConfig(encoder="lost"), 16)


def test_the_names_are_added_by_the_functions_only():
    for names in (ENCODERS, HEADS):
        with pytest.raises(TypeError):
            names["mine"] = None
