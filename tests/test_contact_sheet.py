"""The contact sheet: each mark is where the patch is, and what is marked is what a step samples."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from toy import toy_batch, toy_problem

from patchgd_jax import DataConfig, PatchGDConfig, TrainConfig, init_state, train_step
from patchgd_jax.cli.main import main
from patchgd_jax.core import step
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.data.inspect.contact_sheet import SheetEntry, contact_sheet
from patchgd_jax.errors import DataError, DiskError
from patchgd_jax.runs.preview import preview

GREEN = (0, 215, 90)
GAP, BELOW = 16, 24


def sheet_of(tmp_path, *entries, **options):
    path = tmp_path / "sheet.png"
    contact_sheet(entries, path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def image(value, height=128, width=128, channels=3):
    return np.full((height, width, channels), value, np.uint8)


def test_images_stand_in_rows_with_their_captions(tmp_path):
    entries = [SheetEntry(image(10 * i), f"number {i}") for i in range(6)]
    sheet = sheet_of(tmp_path, *entries, columns=4, cell=64)
    assert sheet.shape[1] == 4 * (64 + GAP) + GAP
    for i in range(6):
        top, left = GAP + (64 + BELOW + GAP) * (i // 4), GAP + (64 + GAP) * (i % 4)
        # But for a frame of a pixel.
        assert (sheet[top + 1 : top + 63, left + 1 : left + 63] == 10 * i).all()
        assert (sheet[top + 64 : top + 64 + BELOW, left : left + 64] < 100).any(), "a caption"
    alone = sheet_of(tmp_path, entries[0], columns=4, cell=64)
    assert alone.shape[1] == 64 + 2 * GAP


def test_patches_are_marked_where_they_are(tmp_path):
    """A 4 x 2 grid of 64 px patches on a 250 x 128 px image: each is 32 px on a sheet of 125 px."""
    grid = PatchGrid(250, 128, 64)
    entry = SheetEntry(image(200, 250, 128), "", grid, sampled=[3, 6], skipped=np.array([0]))
    # Scaled to the grid, whose image may be larger than the one that is shown.
    for shown in (entry, dataclasses.replace(entry, image=image(200, 125, 64))):
        sheet = sheet_of(tmp_path, shown, cell=125)
        left = GAP + (125 - 64) // 2
        shown = sheet[GAP : GAP + 125, left : left + 64]
        green = (np.abs(shown.astype(int) - GREEN) < 8).all(-1)
        for patch, marked in enumerate([False, False, False, True, False, False, True, False]):
            y, x = patch // 2 * 32, patch % 2 * 32
            assert green[y : y + 32, x : x + 32].sum() > 40 or not marked, patch
            assert green[y + 4 : y + 27, x + 4 : x + 27].any() == 0, "an outline leaves it free"
            assert marked or not green[y + 4 : y + 27, x + 2 : x + 30].any(), patch
        assert (shown[40:60, 8:24] == 200).all()
        assert (np.abs(shown[8:24, 8:24].astype(int) - 153) < 3).all(), "skipped ones are dimmed"
        lines = (shown[:, 10] != 200).any(-1)
        assert np.flatnonzero(lines[34:92]).tolist() == [30], "a line between patches"


def test_a_fine_grid_does_not_hide_the_image(tmp_path):
    entry = SheetEntry(image(90), "", PatchGrid(128, 128, 4), sampled=[0])
    shown = sheet_of(tmp_path, entry, cell=128)[GAP : GAP + 128, GAP : GAP + 128]
    assert (shown[6:-1, 6:-1] == 90).all()
    assert shown[4, 2, 1] > 150 > shown[4, 2, 0], "green"


def test_sizes_and_channels_of_every_kind(tmp_path):
    entries = [
        SheetEntry(image(77, 1, 1, 1), "tiny"),
        SheetEntry(image(77, 30, 900), "wide"),
        SheetEntry(image(77, 900, 30, 1), "tall"),
        SheetEntry(image(77, 700, 700), "a" * 500),
    ]
    sheet = sheet_of(tmp_path, *entries, cell=100)
    for column, (least, most) in enumerate([(98, 100), (1, 4), (1, 4), (98, 100)]):
        left = GAP + 116 * column
        inside = (sheet[GAP : GAP + 100, left : left + 100] == 77).all(-1).sum()
        # But for the frame; 3.3 px are left of the shorter side.
        assert 98 * least <= inside <= 100 * most
    gap = sheet[:, GAP + 116 * 3 - 14 : GAP + 116 * 3 - 2]
    assert (gap == 255).all(), "a long caption stays in its column"


def test_few_pixels_stay_squares(tmp_path):
    checks = np.indices((4, 4)).sum(0) % 2 * 255
    sheet = sheet_of(tmp_path, SheetEntry(checks[..., None].astype(np.uint8)), cell=64)
    shown = sheet[GAP : GAP + 64, GAP : GAP + 64, 0]
    wanted = np.kron(checks, np.ones((16, 16)))
    np.testing.assert_array_equal(shown[1:-1, 1:-1], wanted[1:-1, 1:-1])


def test_captions_are_plain_text_without_control_characters(tmp_path):
    plain = sheet_of(tmp_path, SheetEntry(image(0), "a?b?"))
    np.testing.assert_array_equal(sheet_of(tmp_path, SheetEntry(image(0), "a\nb\x1b")), plain)
    sheet_of(tmp_path, SheetEntry(image(0), "$\\nonsense{$"))


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no example"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(DiskError, match="cannot write"):
        contact_sheet([SheetEntry(image(0))], tmp_path / "none" / "sheet.png")


SMALL = DataConfig(size=(64, 64), digits="font", train_size=8, val_size=4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"sample_per": "image"}, {"strata": 4}, {"sampling": "uniform", "sample_per": "image"}],
    ids=str,
)
def test_marked_patches_are_those_that_the_first_step_samples(settings, monkeypatch):
    patchgd = PatchGDConfig(patch=16, fraction=0.25, **settings)
    config = TrainConfig(data=SMALL, patchgd=patchgd, batch_size=3, seed=5)
    drawn = []

    def spy(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    draw = step.draw
    monkeypatch.setattr(step, "draw", spy)
    grid, optimizer = PatchGrid(64, 64, 16), optax.sgd(0.1)
    problem = toy_problem(grid, patchgd)
    state = init_state(problem, optimizer, jax.random.key(0))
    train_step(problem, optimizer, state, toy_batch(0, grid, batch=3), jax.random.key(5))
    ((_, groups),) = drawn
    first = [set(row.tolist()) & set(range(16)) for row in np.asarray(groups.ids[0])]
    # A second batch of the same step is drawn like the first.
    shown = preview(config, 5, "train")
    assert [set(entry.sampled) for entry in shown] == [*first, *first[:2]]


def test_importance_sampling_is_said_to_draw_differently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data.size", "64", "64", "--data.digits", "font", "--data.train-size", "64",
             "--data.val-size", "4", "--patchgd.patch", "16", "--count", "2"]  # fmt: skip
    assert main(["data", "show", *small, "--output", "plain.png"]) == 0
    more = ["--patchgd.importance", "loss", "--patchgd.sampling", "uniform"]
    assert main(["data", "show", *small, *more, "--output", "importance.png"]) == 0
    plain, said = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "importance"))
    assert plain.size == said.size
    below = [np.asarray(sheet.convert("L"))[-40:] < 128 for sheet in (plain, said)]
    assert below[1].sum() > below[0].sum() + 200, "a line of text"
