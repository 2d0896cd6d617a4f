"""The rehearsal of a run: what it tries, what it compares, and that it leaves nothing."""

from __future__ import annotations

import dataclasses

import pytest
from micro import MICRO, config_for, write_csv, write_images

from patchgd_jax import CheckpointError
from patchgd_jax.engine.build import ResidentExecutor
from patchgd_jax.runs.dry_run import dry_run


def test_the_command_leaves_no_run_folder(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = command("train", *MICRO, "--device", "cpu", "--dry-run")
    assert result.returncode == 0, result.stderr
    for words in (
        "Compiled 2 programs",
        "2 training steps and an evaluation of 8 images ran",
        "equal bit for bit",
        "estimated",
        "measured",
    ):
        assert words in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_padded_size_is_compiled_and_the_memory_compared(tmp_path, monkeypatch):
    sizes = [(40, 56)] * 12 + [(20, 20)] * 12
    labels = write_csv(tmp_path / "labels.csv", write_images(tmp_path, sizes))
    config = config_for(labels, fit="native")
    said, trained, scored = [], [], []

    def watch(name, log):
        original = getattr(ResidentExecutor, name)

        def watched(self, *arguments):
            log.append(original(self, *arguments))
            return log[-1]

        monkeypatch.setattr(ResidentExecutor, name, watched)

    watch("compile", said)
    watch("train", trained)
    watch("evaluate", scored)
    figures = dry_run(dataclasses.replace(config, device="cpu"))
    assert said[0].startswith("Compiled 4 programs")
    assert (len(trained), len(scored)) == (2, 1)
    assert figures["expected"] > figures["compiled"] > 0
    assert figures["estimated"] > 0
    assert figures["measured"] is None or figures["measured"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"labels.csv", "images"}


def test_what_is_restored_otherwise_than_saved_is_told(monkeypatch, tmp_path):
    from patchgd_jax.runs.checkpoint import Checkpoints

    restore = Checkpoints.restore

    def with_one_bit_changed(self, step, like):
        state = restore(self, step, like)
        return state._replace(step=state.step ^ 1)

    monkeypatch.setattr(Checkpoints, "restore", with_one_bit_changed)
    labels = write_csv(tmp_path / "labels.csv", write_images(tmp_path, [(32, 32)] * 24))
    with pytest.raises(CheckpointError, match="not restored as it was saved"):
        dry_run(dataclasses.replace(config_for(labels, size=(32, 32)), device="cpu"))
