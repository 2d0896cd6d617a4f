"""Tables of published names against full lists of keys and shapes, which know nothing of them."""

from __future__ import annotations

import re
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from published_shapes import CONVNEXTS, PARAMETERS, convnext_v2_timm, published_shapes

from patchgd_jax import ENCODERS, ConfigError, ModelConfig
from patchgd_jax.models.registry import build_encoder
from patchgd_jax.weights.positions import interpolate_positions
from patchgd_jax.weights.published import (
    LATENT_LAYER,
    PUBLISHED,
    flax_path,
    published_name,
    to_flax_layout,
    to_published_layout,
)

# The same networks as DeiT's; a test says that their tables are, too.
DIFFERENT = sorted(name for name in PARAMETERS if not name.startswith("vit-"))


@cache
def our_shapes(encoder, side=224, **names):
    """Shapes by path, with as many latents as ImageNet has classes."""
    module = build_encoder(ModelConfig(encoder=encoder, latent_dim=1000, **names), side)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda image: module.init(jax.random.key(0), image, train=False), image
    )
    return {path: leaf.shape for path, leaf in flatten_dict(variables).items()}


def with_content(encoder, shapes):
    """Without the classifier and keys without content, as the table's expressions say."""
    names = PUBLISHED[encoder]
    skipped = f"({names.classifier})|({names.ignored})"
    return {key: shape for key, shape in shapes.items() if not re.fullmatch(skipped, key)}


def numbered(shapes):
    """Arrays of these shapes; in all but the largest no two entries are equal."""
    return {
        key: np.arange(prod(shape)).reshape(shape)
        if prod(shape) < 10**6
        else np.broadcast_to(0, shape)
        for key, shape in shapes.items()
    }


def test_each_shipped_architecture_has_a_table():
    assert set(PUBLISHED) == set(PARAMETERS) == set(ENCODERS) - {"small-cnn", "micro"}


@pytest.mark.parametrize("encoder", DIFFERENT)
def test_parameters_are_as_many_as_published(encoder):
    wanted = PARAMETERS[encoder]
    published = with_parameters(published_shapes(encoder))
    ours = {path: shape for path, shape in our_shapes(encoder).items() if path[0] == "params"}
    assert sum(map(prod, published.values())) == wanted
    assert sum(map(prod, ours.values())) == wanted
    features = [shape for path, shape in ours.items() if path[1] == LATENT_LAYER]
    assert set(features) == {(1000,), (ENCODERS[encoder].features, 1000)}


def with_parameters(shapes):
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {key: shape for key, shape in shapes.items() if not key.endswith(statistics)}


@pytest.mark.parametrize("encoder", DIFFERENT)
def test_a_table_has_the_published_keys_and_shapes_and_our_paths_and_no_others(encoder):
    names, everything = PUBLISHED[encoder], published_shapes(encoder)
    shapes = with_content(encoder, everything)
    left_out = set(everything) - set(shapes)
    classifier = {key for key in left_out if re.fullmatch(names.classifier, key)}
    assert len(classifier) == 2
    assert all(1000 in everything[key] for key in classifier)
    assert all(everything[key] == () for key in left_out - classifier)
    ours = {p: shape for p, shape in our_shapes(encoder).items() if p[1] != LATENT_LAYER}
    assert {flax_path(names, key) for key in shapes} == set(ours)
    assert len(shapes) == len(ours)
    for key, array in numbered(shapes).items():
        path = flax_path(names, key)
        assert published_name(names, path) == key
        turned = to_flax_layout(names, key, array, ours[path])
        assert turned.shape == ours[path], key
        np.testing.assert_array_equal(to_published_layout(names, key, turned), array)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_vit_is_deit_with_other_preprocessing(size):
    vit, deit = PUBLISHED[f"vit-{size}"], PUBLISHED[f"deit-{size}"]
    assert vit._replace(mean=deit.mean, std=deit.std) == deit
    assert vit.mean == vit.std == (0.5, 0.5, 0.5)
    assert ENCODERS[f"vit-{size}"].build.keywords == ENCODERS[f"deit-{size}"].build.keywords


@pytest.mark.parametrize("encoder", ["convnext-v2-atto", "convnext-v2-base"])
def test_timms_names_of_convnext_are_understood(encoder):
    names = PUBLISHED[encoder]
    shapes = with_content(encoder, convnext_v2_timm(*CONVNEXTS[encoder], 1000))
    ours = {p: shape for p, shape in our_shapes(encoder).items() if p[1] != LATENT_LAYER}
    assert {flax_path(names, key) for key in shapes} == set(ours)
    assert len(shapes) == len(ours)
    for key, array in numbered(shapes).items():
        path = flax_path(names, key)
        turned = to_flax_layout(names, key, array, ours[path])
        assert turned.shape == ours[path], key
        dense = array.reshape(array.shape[:2]).T if ".mlp.fc" in key and array.ndim > 1 else None
        if dense is not None:
            np.testing.assert_array_equal(turned, dense)


def test_a_key_of_another_architecture_is_unexpected():
    path = flax_path(PUBLISHED["resnet101"], "layer3.22.conv1.weight")
    assert path == ("params", "Bottleneck_29", "Conv_0", "kernel")
    assert flax_path(PUBLISHED["resnet50"], "layer3.22.conv1.weight") is None
    assert flax_path(PUBLISHED["resnet50"], "fc.weight") is None


def test_only_the_published_norm_has_published_names():
    paths = our_shapes("resnet18", norm="group")
    path = next(path for path in paths if "GroupNorm_0" in path)
    with pytest.raises(ConfigError, match="no published name"):
        published_name(PUBLISHED["resnet18"], path)


@pytest.mark.parametrize(("key", "shape"), [("conv1.weight", (64, 3)), ("bn1.bias", (3, 4, 5))])
def test_an_array_that_cannot_be_right_is_handed_on_for_its_shape_to_be_reported(key, shape):
    array = np.zeros(shape)
    assert to_flax_layout(PUBLISHED["resnet18"], key, array, (7, 7, 3, 64)).shape == shape


@pytest.mark.parametrize("shape", [(1, 197, 8), (1, 200, 8), (197,)])
def test_positions_are_interpolated_to_the_patchs_grid_if_they_are_a_square(shape):
    got = to_flax_layout(PUBLISHED["deit-tiny"], "pos_embed", np.zeros(shape), (1, 10, 8))
    assert got.shape == ((1, 10, 8) if shape == (1, 197, 8) else shape)


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), (3, 3), (1, 1), (24, 24), (2, 31), (13, 1)])
def test_interpolation_is_torchs_bicubic(rows, cols):
    reason = "the reference implementation is in PyTorch: pip install torch"
    torch = pytest.importorskip("torch", reason=reason)
    table = np.random.default_rng(0).normal(size=(1, 197, 5))
    got = interpolate_positions(table, rows, cols)
    square = torch.from_numpy(table[:, 1:]).unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(
        square, (rows, cols), mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(
        got[0, 1:], wanted.permute(0, 2, 3, 1).reshape(-1, 5), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_array_equal(got[0, 0], table[0, 0])
    assert interpolate_positions(table.astype(np.float32), rows, cols).dtype == np.float32
