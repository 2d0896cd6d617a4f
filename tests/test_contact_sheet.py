"""The contact sheet: each mark is where the patch is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.data.inspect.contact_sheet import SheetEntry, contact_sheet
from patchgd_jax.errors import DataError, DiskError

GREEN = (0, 215, 90)


def draw(tmp_path, *entries, **options):
    path = tmp_path / "sheet.png"
    contact_sheet(entries, path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def image(value, height=128, width=128, channels=3):
    return np.full((height, width, channels), value, np.uint8)


def test_images_stand_in_rows_with_their_captions(tmp_path):
    entries = [SheetEntry(image(10 * i), f"number {i}") for i in range(6)]
    sheet = draw(tmp_path, *entries, columns=4, cell=64)
    assert sheet.shape[1] == 4 * (64 + 16) + 16
    for i in range(6):
        top, left = (sheet.shape[0] - 16) // 2 * (i // 4) + 16, 16 + (64 + 16) * (i % 4)
        assert (sheet[top : top + 64, left : left + 64] == 10 * i).all()
        assert (sheet[top + 64 + 2 : top + 64 + 16, left : left + 64] < 100).any(), "a caption"
    alone = draw(tmp_path, entries[0], columns=4, cell=64)
    assert alone.shape[1] == 64 + 2 * 16


def test_patches_are_marked_where_they_are(tmp_path):
    """A 4 x 2 grid of 64 px patches on a 250 x 128 px image: each is 32 px on a sheet of 125 px."""
    grid = PatchGrid(250, 128, 64)
    entry = SheetEntry(image(200, 250, 128), "", grid, sampled=[3, 6], skipped=np.array([0]))
    sheet = draw(tmp_path, entry, cell=125)
    left = 16 + (125 - 64) // 2
    shown = sheet[16 : 16 + 125, left : left + 64]
    green = (shown == GREEN).all(-1)
    for patch, marked in enumerate([False, False, False, True, False, False, True, False]):
        y, x = patch // 2 * 32, patch % 2 * 32
        inside = green[y : y + 32, x : x + 32]
        assert inside.any() == marked, patch
        assert not inside[5:-8, 5:-5].any(), "an outline leaves the patch free"
    assert (shown[40:60, 8:24] == 200).all()
    assert (np.abs(shown[8:24, 8:24].astype(int) - 128) < 40).all(), "skipped patches are dimmed"
    lines = (shown[:, 10] != 200).any(-1)
    assert np.flatnonzero(lines[33:95]).tolist() == [31], "a line between patches"


def test_a_fine_grid_does_not_hide_the_image(tmp_path):
    entry = SheetEntry(image(90), "", PatchGrid(128, 128, 4), sampled=[0])
    shown = draw(tmp_path, entry, cell=128)[16:144, 16:144]
    assert (shown[6:, 6:] == 90).all()
    assert (shown[0, 0] == GREEN).all()


def test_sizes_and_channels_of_every_kind(tmp_path):
    entries = [
        SheetEntry(image(77, 1, 1, 1), "tiny"),
        SheetEntry(image(77, 3, 900), "wide"),
        SheetEntry(image(77, 900, 3, 1), "tall"),
        SheetEntry(image(77, 700, 700), "a" * 500),
    ]
    sheet = draw(tmp_path, *entries, cell=100)
    for column, area in enumerate([100 * 100, 100, 100, 100 * 100]):
        left = 16 + 116 * column
        assert (sheet[16:116, left : left + 100] == 77).all(-1).sum() == area
    gap = sheet[:, 16 + 116 * 3 - 14 : 16 + 116 * 3 - 2]
    assert (gap == 255).all(), "a long caption stays in its column"


def test_few_pixels_stay_squares(tmp_path):
    checks = np.indices((4, 4)).sum(0) % 2 * 255
    sheet = draw(tmp_path, SheetEntry(checks[..., None].astype(np.uint8)), cell=64)
    shown = sheet[16:80, 16:80, 0]
    np.testing.assert_array_equal(shown, np.kron(checks, np.ones((16, 16))))


def test_control_characters_are_not_drawn(tmp_path):
    plain = draw(tmp_path, SheetEntry(image(0), "a?b?"))
    np.testing.assert_array_equal(draw(tmp_path, SheetEntry(image(0), "a\nb\x1b")), plain)


def test_what_cannot_be_drawn_is_told(tmp_path):
    with pytest.raises(DataError, match="no example"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(DiskError, match="cannot write"):
        contact_sheet([SheetEntry(image(0))], tmp_path / "none" / "sheet.png")
