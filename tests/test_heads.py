"""Heads for any grid: position codes, padding, pooling, and what they look at."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import init_weights, quick

from patchgd_jax import (
    HEADS,
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    Weights,
    attention_map,
    build_model,
)
from patchgd_jax.models.heads.adaptive import adaptive_average_pool
from patchgd_jax.models.heads.transformer import TransformerHead, position_codes

KEY = jax.random.key(3)
ANY_GRID = sorted(name for name, entry in HEADS.items() if not entry.fixed_grid)


@quick
def shaken(params):
    """Parameters without the zeros that a start may have."""
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)


def start(head, z):
    return shaken(quick(partial(head.init, train=False))(KEY, z, None)["params"])


def test_position_codes_equal_the_formula():
    got = np.asarray(position_codes(3, 5, 12))
    assert got.shape == (3, 5, 12)
    for row in range(3):
        for col in range(5):
            wanted = []
            for place in (row, col):
                angles = [place / 10_000 ** (i / 3) for i in range(3)]
                wanted += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            np.testing.assert_allclose(got[row, col], wanted, rtol=1e-5, atol=1e-6)


def test_position_codes_are_different_everywhere_and_alike_on_every_grid():
    codes = np.asarray(position_codes(40, 30, 64))
    np.testing.assert_array_equal(codes[:7, :9], position_codes(7, 9, 64))
    flat = codes.reshape(-1, 64)
    square = (flat**2).sum(1)
    distance = square[:, None] + square - 2 * flat @ flat.T + 99 * np.eye(len(flat))
    assert distance.min() > 1e-2


def test_position_codes_need_a_multiple_of_four():
    with pytest.raises(ConfigError, match="multiple of 4 features, not 10"):
        position_codes(2, 2, 10)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ANY_GRID)
def test_padding_changes_neither_logits_nor_attention(name, train):
    """A Z inside a larger one that is full of noise gives what it gives alone."""
    head = HEADS[name].build(classes=3)
    rng = np.random.default_rng(0)
    small = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    large = 100 * rng.normal(size=(2, 6, 7, 8)).astype(np.float32)
    large[:, :3, :5] = small
    mask = np.zeros((2, 6, 7), bool)
    mask[:, :3, :5] = True
    params = start(head, small)

    @quick
    def both(small, large):
        out = partial(head.apply, {"params": params}, train=train, mutable=["intermediates"])
        return out(small, None), out(large, mask)

    (alone, seen_alone), (inside, seen_inside) = both(small, large)
    np.testing.assert_allclose(inside, alone, rtol=2e-5, atol=2e-5)
    assert bool(seen_alone) == (name in ("attention", "transformer"))
    if seen_alone:
        (alone,) = seen_alone["intermediates"]["attention"]
        (inside,) = seen_inside["intermediates"]["attention"]
        np.testing.assert_allclose(inside[:, :3, :5], alone, rtol=1e-4, atol=1e-6)
        assert (np.asarray(inside)[~mask] == 0).all()
        np.testing.assert_allclose(alone.sum((1, 2)), 1, rtol=1e-5)


def test_masks_need_not_be_rectangles():
    """Of tissue, say: a patch that is masked anywhere changes nothing."""
    rng = np.random.default_rng(1)
    mask = rng.random((2, 5, 6)) < 0.6
    z = rng.normal(size=(2, 5, 6, 8)).astype(np.float32)
    other = np.where(mask[..., None], z, 50)
    for name in ANY_GRID:
        head = HEADS[name].build(classes=3)
        params = start(head, z)
        apply = quick(partial(head.apply, {"params": params}, train=False))
        out = [apply(x, mask) for x in (z, other)]
        np.testing.assert_array_equal(*out)


def test_the_transformer_knows_where_a_patch_is():
    """Unlike the other heads for any grid, which are alike for turned images."""
    z = np.random.default_rng(2).normal(size=(1, 4, 4, 8)).astype(np.float32)
    head = TransformerHead(classes=3)
    params = start(head, z)
    apply = quick(partial(head.apply, {"params": params}, mask=None, train=False))
    out = [apply(z), apply(np.rot90(z, 1, (1, 2)).copy())]
    assert np.abs(out[0] - out[1]).max() > 1e-2


def test_the_transformer_equals_pytorchs():
    """Two of PyTorch's pre-norm encoder layers with the same weights, with a padding mask."""
    torch = pytest.importorskip("torch", reason="compares with torch.nn.TransformerEncoderLayer")
    rng = np.random.default_rng(3)
    z = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    mask = rng.random((2, 3, 4)) < 0.7
    head = TransformerHead(classes=5, features=16, heads=4)
    params = start(head, z)
    apply = partial(head.apply, {"params": params}, train=False, mutable=["intermediates"])
    got, sown = quick(apply)(z, mask)

    def tensor(x):
        return torch.tensor(np.asarray(x))

    def dense(index):
        part = params[f"Dense_{index}"]
        return tensor(part["kernel"]).T, tensor(part["bias"])

    def norm(index):
        part = params[f"LayerNorm_{index}"]
        return tensor(part["scale"]), tensor(part["bias"])

    weight, bias = dense(0)
    x = tensor(z) @ weight.T + bias + tensor(position_codes(3, 4, 16))
    x = torch.cat([tensor(params["token"]).expand(2, 1, 16), x.reshape(2, 12, 16)], 1)
    hidden = torch.tensor(np.pad(~mask.reshape(2, -1), ((0, 0), (1, 0))))
    seen = None
    with torch.no_grad():
        for layer in range(2):
            module = torch.nn.TransformerEncoderLayer(
                16, 4, 32, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
            )
            attention = module.self_attn
            pairs = [
                ((module.norm1.weight, module.norm1.bias), norm(2 * layer)),
                ((module.norm2.weight, module.norm2.bias), norm(2 * layer + 1)),
                ((attention.in_proj_weight, attention.in_proj_bias), dense(1 + 4 * layer)),
                ((attention.out_proj.weight, attention.out_proj.bias), dense(2 + 4 * layer)),
                ((module.linear1.weight, module.linear1.bias), dense(3 + 4 * layer)),
                ((module.linear2.weight, module.linear2.bias), dense(4 + 4 * layer)),
            ]
            for theirs, ours in pairs:
                for to, value in zip(theirs, ours, strict=True):
                    to.copy_(value)
            y = module.norm1(x)
            seen = attention(y, y, y, key_padding_mask=hidden)[1][:, 0, 1:]
            x = module.train()(x, src_key_padding_mask=hidden)
        token = torch.nn.functional.layer_norm(x[:, 0], (16,), *norm(4), 1e-6)
        weight, bias = dense(9)
        wanted = token @ weight.T + bias
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)
    seen = (seen / seen.sum(1, keepdim=True)).numpy().reshape(2, 3, 4)
    np.testing.assert_allclose(sown["intermediates"]["attention"][0], seen, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "cols", "bins"), [(4, 6, 2), (5, 7, 3), (1, 2, 2), (7, 3, 4)])
def test_adaptive_pooling_equals_pytorchs(rows, cols, bins):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.AdaptiveAvgPool2d")
    x = np.random.default_rng(4).normal(size=(2, rows, cols, 3)).astype(np.float32)
    got = adaptive_average_pool(jnp.asarray(x), jnp.ones((2, rows, cols), bool), bins)
    wanted = torch.nn.AdaptiveAvgPool2d(bins)(torch.tensor(x).permute(0, 3, 1, 2))
    np.testing.assert_allclose(got, wanted.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6)


def test_the_attention_map_is_where_the_patches_are():
    """Sizes are respected, and a head that has seen a patch shows it at its place."""
    grid = PatchGrid(32, 48, 16)
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (2, 32, 48, 1), dtype=np.uint8)
    batch = {"image": image, "size": np.array([[32, 48], [16, 32]], np.int32)}
    for head in ("attention", "transformer"):
        config = ModelConfig(head=head, latent_dim=8, norm="group")
        model = build_model(config, grid=grid, channels=1, classes=3, mean=0.5, std=0.3)
        params, batch_stats = init_weights(model, KEY)
        weights = Weights({**params, "head": shaken(params["head"])}, batch_stats)
        look = quick(partial(attention_map, Problem(model, grid, PatchGDConfig())))
        seen = np.asarray(look(weights, batch))
        assert seen.shape == (2, 2, 3)
        np.testing.assert_allclose(seen.sum((1, 2)), 1, rtol=1e-5)
        assert (seen > 0).tolist() == np.asarray(grid.mask(batch["size"])).tolist()
        # The patches of the first image, in another order, are looked at in that order.
        if head == "attention":
            turned = {**batch, "image": np.roll(image, (16, 16), (1, 2)), "size": [[32, 48]] * 2}
            turned["size"] = np.array(turned["size"], np.int32)
            again = np.asarray(look(weights, turned))
            np.testing.assert_allclose(again[0], np.roll(seen[0], (1, 1), (0, 1)), rtol=1e-3)


def test_a_head_without_attention_says_so():
    grid = PatchGrid(16, 16, 16)
    config = ModelConfig(head="linear", latent_dim=4)
    model = build_model(config, grid=grid, channels=1, classes=3, mean=0, std=1)
    weights = init_weights(model, KEY)
    batch = {"image": np.zeros((1, 16, 16, 1), np.uint8)}
    with pytest.raises(ConfigError, match="LinearHead has no attention to show"):
        attention_map(Problem(model, grid, PatchGDConfig()), weights, batch)
    bare = model._replace(attend=None)
    with pytest.raises(ConfigError, match="no attention to show"):
        attention_map(Problem(bare, grid, PatchGDConfig()), weights, batch)
