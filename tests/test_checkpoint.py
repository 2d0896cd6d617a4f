"""Checkpoints: whole or absent, damage found, the newest intact step used."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchgd_jax import CheckpointError, DiskError, TrainState
from patchgd_jax.runs.checkpoint import Checkpoints


def make_state(seed=0, width=8):
    params = {
        "encoder": {"w": jax.random.normal(jax.random.key(seed), (width, 3))},
        "head": {"w": jnp.arange(3.0)},
    }
    opt_state = optax.adam(1e-3).init(params)
    return TrainState(jnp.int32(seed), params, {"encoder": {}, "head": {}}, opt_state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.fixture
def saved(tmp_path):
    """Three steps, and the warnings that come later."""
    warnings = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", warnings.append)
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step), {"data": "d"})
    return checkpoints, warnings


def test_what_is_saved_comes_back(saved):
    checkpoints, _ = saved
    assert checkpoints.steps() == [10, 20, 30]
    assert checkpoints.newest_intact() == 30
    assert_same(checkpoints.restore(20, make_state()), make_state(20))
    assert checkpoints.meta(20)["data"] == "d"
    assert json.loads((checkpoints.folder / "latest.json").read_text()) == {"step": 30}


def files_of(checkpoints, step):
    root = checkpoints.folder / f"{step:08d}"
    return sorted(p for p in root.rglob("*") if p.is_file())


def test_every_flipped_bit_is_found(saved, tmp_path):
    checkpoints, _ = saved
    rng = np.random.default_rng(0)
    sizes = np.array([p.stat().st_size for p in files_of(checkpoints, 30)])
    for _ in range(300):
        at = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        path = files_of(checkpoints, 30)[at]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        assert checkpoints.damage(30) is not None, path
        path.write_bytes(good)
    assert checkpoints.damage(30) is None


def test_missing_truncated_and_added_files_are_found(saved):
    checkpoints, _ = saved
    for path in files_of(checkpoints, 30):
        good = path.read_bytes()
        for broken in (None, b"", good[:-1]):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            if broken != good:
                assert checkpoints.damage(30) is not None, path
            path.write_bytes(good)
    assert checkpoints.damage(30) is None
    stranger = files_of(checkpoints, 30)[0].with_name("stranger")
    stranger.write_text("x")
    assert "was not there when it was written" in checkpoints.damage(30)


def test_the_newest_intact_step_is_used_and_the_damage_named(saved):
    checkpoints, warnings = saved
    for step in (30, 20):
        path = max(files_of(checkpoints, step), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.newest_intact() == 10
    assert len(warnings) == 2
    assert "00000030 is damaged" in warnings[0]
    shutil.rmtree(checkpoints.folder / "00000010")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoints.newest_intact()


def test_the_best_step_and_the_last_two_are_kept(saved):
    checkpoints, warnings = saved
    checkpoints.mark_best(10)
    checkpoints.save(40, make_state(40), {})
    checkpoints.prune()
    assert checkpoints.steps() == [10, 30, 40]
    assert checkpoints.best() == 10
    path = files_of(checkpoints, 10)[0]
    path.unlink()
    assert checkpoints.best() == 40
    assert "best checkpoint" in warnings[0]


def test_another_models_checkpoint_is_refused_with_the_differences(saved):
    checkpoints, _ = saved
    with pytest.raises(CheckpointError, match="another model") as caught:
        checkpoints.restore(30, make_state(width=9))
    text = str(caught.value)
    assert "params/encoder/w: checkpoint has float32[8, 3], this model needs float32[9, 3]" in text


def test_a_part_is_read_without_knowing_the_rest(saved):
    checkpoints, _ = saved
    state = make_state(20)
    encoder = checkpoints.restore_part(20, "params/encoder", state.params["encoder"])
    assert_same(encoder, state.params["encoder"])
    assert checkpoints.restore_part(20, "model_state", state.batch_stats) == state.batch_stats
    with pytest.raises(CheckpointError, match="params/head of checkpoint"):
        checkpoints.restore_part(20, "params/head", state.params["encoder"])


def test_steps_that_did_not_verify_are_set_aside_not_deleted(saved):
    checkpoints, _ = saved
    checkpoints.discard_after(10)
    assert checkpoints.steps() == [10]
    assert (checkpoints.folder / "00000030.damaged" / "meta.json").exists()


def test_what_a_kill_leaves_behind_is_ignored_and_cleared(saved):
    checkpoints, _ = saved
    leftover = checkpoints.folder / ".00000040.partial"
    shutil.copytree(checkpoints.folder / "00000030", leftover)
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(40, make_state(40), {})
    assert not leftover.exists()
    assert_same(checkpoints.restore(40, make_state()), make_state(40))


def test_a_failed_save_leaves_the_older_steps_and_nothing_half(saved, monkeypatch):
    checkpoints, _ = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write_manifest", full)
    with pytest.raises(DiskError, match="No space left on device"):
        checkpoints.save(40, make_state(40), {})
    assert checkpoints.steps() == [10, 20, 30]
    assert not list(checkpoints.folder.glob(".*"))
    assert checkpoints.newest_intact() == 30


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot write checkpoint"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, make_state(), {})
