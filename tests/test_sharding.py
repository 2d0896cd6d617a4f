"""A mesh of devices does what one device does, and moves no pixels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from mesh_cases import CASES
from virtual_devices import several_devices

from patchgd_jax import (
    ConfigError,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    build_model,
    init_state,
    sample_groups,
)
from patchgd_jax.core.patch_ids import chunk_patch_ids
from patchgd_jax.core.sampling import inclusion_probability
from patchgd_jax.engine.sharding.layout import model_options, sharded_train_step
from patchgd_jax.engine.sharding.mesh import Bands, make_mesh, parse_layout, shard_batch
from patchgd_jax.engine.sharding.params import check_rules, param_specs, parse_rules

HERE = Path(__file__).parent
KEY = jax.random.key(3)


def on_eight_devices(script, *arguments):
    """The lines of JSON that a script prints, run on eight virtual devices."""
    environment = {
        **os.environ,
        **several_devices(8),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


CHOSEN = ("patchgd", "exact", "lists", "fsdp", "rows", "importance", "float64 statistics")
# Single precision: `python tests/mesh_cases.py NAME` shows how far these are from one device.
SINGLE = ("group norm", "batch norm", "batch norm in the fill")
REST = tuple(name for name in CASES if name not in CHOSEN + SINGLE)


@pytest.mark.parametrize(
    "names", [CHOSEN, pytest.param(REST, marks=pytest.mark.slow)], ids=["chosen", "rest"]
)
def test_a_mesh_trains_as_one_device(names):
    found = {
        name: case
        for line in on_eight_devices("mesh_cases.py", *names)
        for name, case in line.items()
    }
    assert found.keys() == set(names)
    for name, splits in found.items():
        for split, errors in splits.items():
            for what, error in errors.items():
                assert error < 1e-12, (name, split, what, error)


LARGE = {"height": 512, "width": 512, "side": 256, "strata": 1, "fill_chunk": 1, "batch": 1}


@pytest.fixture(scope="module")
def programs():
    """Compiled figures by (data, patch, height, batch, what)."""
    requests = {
        "one": {"data": 1, "patch": 1, "height": 2048},
        "eight": {"data": 1, "patch": 8, "height": 2048},
        "two by four": {"data": 2, "patch": 4, "height": 2048},
        "exact": {"data": 2, "patch": 4, "height": 2048, "mode": "exact"},
        "fsdp": {"data": 2, "patch": 4, "height": 2048, "fsdp": True},
        "small": {"data": 1, "patch": 1, "height": 256},
        "large patches": {"data": 1, "patch": 1, **LARGE},
        "large patches by rows": {"data": 1, "patch": 1, "rows": 4, **LARGE},
    }
    lines = on_eight_devices("mesh_programs.py", *map(json.dumps, requests.values()))
    return dict(zip(requests, lines, strict=True))


@pytest.mark.parametrize("name", ["eight", "two by four", "exact", "fsdp"])
def test_nothing_of_pixel_size_moves(programs, name):
    """The largest that may: all of Z, or one parameter; a band of an image has far more pixels."""
    program = programs[name]
    moved = program["collectives"]
    assert moved, "no collective was found in the program"
    assert not [entry for entry in moved if entry[1] in ("u8", "s8")]
    largest = max(count for _, _, count in moved)
    assert largest <= max(program["z"], program["largest parameter"]) < program["image"] / 4


def test_the_gradient_is_summed_once_per_update(programs):
    """Not once per chunk: mode exact has many chunks, and one reduction of the encoder."""
    reduced = [
        count
        for kind, _, count in programs["exact"]["collectives"]
        if kind == "all-reduce" and count > 1000
    ]
    assert sum(reduced) <= 1.1 * programs["exact"]["parameters"]


@pytest.mark.parametrize(("name", "devices"), [("eight", 8), ("two by four", 8)])
def test_an_images_memory_is_divided(programs, name, devices):
    def of_image(program):
        return program["arguments"] + program["temporary"]

    # What does not depend on the device count: parameters and the optimizer's state.
    fixed = 3 * 4 * programs["one"]["parameters"]
    alone, each = of_image(programs["one"]) - fixed, of_image(programs[name]) - fixed
    assert each / alone == pytest.approx(1 / devices, rel=0.15)
    assert programs[name]["image"] * devices == programs["one"]["image"]


def test_rows_of_a_patch_divide_its_activations(programs):
    """The maps of a patch are divided; only rows at the borders between devices are sent."""
    whole, divided = programs["large patches"], programs["large patches by rows"]
    assert divided["temporary"] < 0.4 * whole["temporary"]
    sent = [count for kind, _, count in divided["collectives"] if kind == "collective-permute"]
    assert sent
    # A band of one channel's map, at most a few rows of 64 channels.
    assert max(sent) <= 256 * 64 * 2


def test_divided_parameters_take_less_memory(programs):
    """Kernels, and Adam's two averages of them, are divided among four devices."""
    whole, divided = programs["two by four"], programs["fsdp"]
    saved = whole["arguments"] - divided["arguments"]
    assert saved > 0.6 * 3 * 4 * whole["parameters"]
    assert "reduce-scatter" in {kind for kind, _, _ in divided["collectives"]}


GRIDS = [PatchGrid(16, 16, 4), PatchGrid(11, 17, 5, 3), PatchGrid(9, 40, 4), PatchGrid(90, 8, 6, 5)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_bands_hold_the_patches_of_their_devices(grid, count):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (2, grid.height, grid.width, 1), dtype=np.uint8)
    bands = Bands(grid, count)
    seen = []
    for d in range(count):
        ids = np.arange(d * grid.num_patches // count, (d + 1) * grid.num_patches // count)
        band = bands.cut(image, d)
        assert band.shape[1] == bands.height
        local = jnp.asarray(np.tile(ids - bands.first_rows[d] * grid.cols, (2, 1)))
        whole = grid.take(image, jnp.asarray(np.tile(ids, (2, 1))))
        np.testing.assert_array_equal(bands.of_band().take(band, local), whole)
        seen += ids.tolist()
    assert seen == list(range(grid.num_patches))


@pytest.mark.parametrize("sample_per", ["batch", "image"])
@pytest.mark.parametrize(("n", "steps", "strata"), [(32, 4, 8), (21, 4, 8), (9, 7, 8), (50, 3, 5)])
def test_a_stratified_partition_is_one_with_equal_shares(n, steps, strata, sample_per):
    config = PatchGDConfig(inner_steps=steps, sample_per=sample_per, strata=strata)
    ids = np.asarray(sample_groups(KEY, config, n, 3))
    bounds = np.arange(strata + 1) * n // strata
    for b in range(3):
        sizes = [(row[b] < n).sum() for row in ids]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert sorted(ids[:, b][ids[:, b] < n].tolist()) == list(range(n))
        for row in ids[:, b]:
            assert len(set(row.tolist())) == len(row)
            # A device finds those of its strata in its own slots.
            slots = row.reshape(strata, -1)
            for s in range(strata):
                real = slots[s][slots[s] < n]
                assert ((real >= bounds[s]) & (real < bounds[s + 1])).all()
        shares = [
            [((row[b] >= first) & (row[b] < end)).sum() for row in ids]
            for first, end in zip(bounds, bounds[1:], strict=False)
        ]
        assert max(max(share) - min(share) for share in shares) <= 1
    assert (sample_per == "image") == (not np.array_equal(ids[:, 0], ids[:, 1]))


def test_strata_of_lists_deal_out_each_images_patches():
    n, patches = 40, np.full((3, 12), 40, np.int32)
    counts = [1, 5, 12]
    rng = np.random.default_rng(1)
    for row, count in zip(patches, counts, strict=True):
        row[:count] = np.sort(rng.choice(n, count, replace=False))
    for sampling in ("partition", "uniform"):
        config = PatchGDConfig(inner_steps=3, sampling=sampling, strata=4)
        ids = np.asarray(sample_groups(KEY, config, n, 3, jnp.asarray(patches)))
        for b, count in enumerate(counts):
            drawn = ids[:, b][ids[:, b] < n]
            assert set(drawn.tolist()) <= set(patches[b, :count].tolist())
            if sampling == "partition":
                assert sorted(drawn.tolist()) == patches[b, :count].tolist()
                sizes = (ids[:, b] < n).sum(1)
                assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("chunk", [1, 8, 9, 100])
def test_chunks_of_strata_hold_each_patch_once(chunk):
    batch = {"label": np.zeros(1)}
    ids = np.asarray(chunk_patch_ids(batch, PatchGrid(3, 7, 1), chunk, strata=8).ids)
    assert sorted(ids[ids < 21].tolist()) == list(range(21))
    assert ids.shape[2] % 8 == 0
    assert all(len(set(row[0].tolist())) == row.size for row in ids)


def test_one_stratum_is_as_it_always_was():
    order = jax.random.permutation(KEY, 13)
    wanted = np.concatenate([order, [13, 14, 15]]).reshape(4, 4).T
    got = sample_groups(KEY, PatchGDConfig(inner_steps=4), 13, 2)
    np.testing.assert_array_equal(got, np.stack([wanted, wanted], 1))


def test_uniform_draws_of_unequal_strata_have_no_unbiased_factor():
    config = PatchGDConfig(inner_steps=4, strata=8)
    uniform = dataclasses.replace(config, sampling="uniform")
    assert inclusion_probability(uniform, 32) == 1 - (1 - 1 / 4) ** 1
    assert inclusion_probability(config, 21) == 1 / 4
    with pytest.raises(ConfigError, match="strata 8 does not divide the 21 patches"):
        inclusion_probability(uniform, 21)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [("data=2,patch=4", (2, 4, 1)), ("patch=3,rows=2", (1, 3, 2)), (" data = 5 ", (5, 1, 1))],
)
def test_layouts_are_read(layout, sizes):
    assert parse_layout(layout) == sizes


@pytest.mark.parametrize("layout", ["", "8", "data=0", "data=2;patch=4", "cols=2", "data=2,data=2"])
def test_a_bad_layout_is_named(layout):
    with pytest.raises(ConfigError, match="cannot be read; write auto"):
        parse_layout(layout)


@pytest.mark.parametrize(
    ("layout", "batch", "strata", "message"),
    [
        ("data=2,patch=1", 2, 1, "is of 2 devices, but there are 1; make the product 1"),
        ("data=1,patch=8", 2, 8, "is of 8 devices"),
    ],
)
def test_a_mesh_that_does_not_match_is_named(layout, batch, strata, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(layout, batch_size=batch, strata=strata, devices=jax.devices()[:1])


class _Device:
    """As many as asked for, where the layout is chosen before a mesh is made."""


@pytest.mark.parametrize(
    ("layout", "batch", "strata", "message"),
    [
        ("data=4,patch=2", 6, 2, "a batch of 6 cannot be divided among 4 devices"),
        ("data=1,patch=8", 6, 12, "use --patchgd.strata 8"),
        ("auto", 3, 1, "8 devices cannot share batches of 3 images .* use --patchgd.strata 8"),
        ("auto", 6, 1, "use --patchgd.strata 4"),
    ],
)
def test_work_that_cannot_be_divided_is_named(layout, batch, strata, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(layout, batch_size=batch, strata=strata, devices=[_Device()] * 8)


def test_more_strata_or_devices_than_patches_are_named():
    with pytest.raises(ConfigError, match="9 devices cannot share a grid of 4 patches"):
        Bands(PatchGrid(8, 8, 4), 9)
    with pytest.raises(ConfigError, match="strata is 8, but the grid has only 4 patches"):
        sample_groups(KEY, PatchGDConfig(inner_steps=2, strata=8), 4, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        PatchGDConfig(strata=0)


def test_rules_are_read():
    assert parse_rules(["kernel$=-,data", "a=b=patch"]) == [
        ("kernel$", (None, "data")),
        ("a=b", ("patch",)),
    ]
    for text in ("kernel", "kernel=model", "=data", "(=data"):
        with pytest.raises(ConfigError, match="param_rules"):
            parse_rules([text])
    with pytest.raises(
        ConfigError, match="fits no parameter of 1 dimensions; there are encoder/kernel"
    ):
        check_rules({"encoder": {"kernel": np.zeros((3, 4))}}, parse_rules(["kernel=data"]))


def test_rules_that_do_not_fit_are_named():
    mesh = make_mesh("auto", batch_size=1, devices=jax.devices()[:1])
    params = {"encoder": {"kernel": np.zeros((3, 4))}, "head": {}}
    # Rules are for parameters of as many dimensions as they have axes.
    assert param_specs(params, [("kernel", (None, None, "data"))], mesh)["encoder"]["kernel"] == P()
    divided = {"opt_state": {"mu": params}}
    spec = param_specs(divided, [("^encoder/kernel$", (None, "data"))], mesh)
    assert spec["opt_state"]["mu"]["encoder"]["kernel"] == P(None, "data")
    with pytest.raises(ConfigError, match="the axes are data and patch"):
        param_specs(params, [("kernel", (None, "model"))], mesh)


def test_images_of_another_size_are_named():
    mesh = make_mesh("auto", batch_size=1, devices=jax.devices()[:1])
    batch = {"image": np.zeros((1, 8, 8, 1), np.uint8), "label": np.zeros(1, np.int32)}
    with pytest.raises(ConfigError, match="8 x 8 px, but the grid is for 8 x 12 px"):
        shard_batch(batch, PatchGrid(8, 12, 4), mesh)


def test_batch_statistics_of_one_device_alone_are_an_error():
    mesh = make_mesh("auto", batch_size=2, devices=jax.devices()[:1])
    grid, config = PatchGrid(8, 12, 4), PatchGDConfig(patch=4, fraction=0.5)
    names = ModelConfig(norm="batch", head="linear", latent_dim=4)
    build = partial(build_model, names, grid=grid, channels=1, classes=3, mean=0.0, std=1.0)
    batch = {"image": np.zeros((2, 8, 12, 1), np.uint8), "label": np.zeros(2, np.int32)}
    optimizer = optax.sgd(0.1)

    def trace(model):
        problem = Problem(model, grid, config)
        state = jax.eval_shape(partial(init_state, problem, optimizer), KEY)
        step = partial(sharded_train_step, problem, optimizer, mesh=mesh)
        return jax.eval_shape(step, state, shard_batch(batch, grid, mesh), KEY)

    with pytest.raises(ConfigError, match=r"the encoder keeps batch statistics .* axis_name="):
        trace(build())
    trace(build(**model_options(mesh)))
