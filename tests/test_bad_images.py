"""The list of unreadable images: exact, whole, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import os

import pytest

from patchgd_jax import CheckpointError, DiskError
from patchgd_jax.data.loading.bad_images import BadImages, BadRecord

ROWS = [
    (7, "images/7.png", "OSError: image file is truncated"),
    (0, 'a, "b".png', "two\nlines\r\nand a carriage\rreturn"),
    (2, "=HYPERLINK(1).png", "@sum"),
    (3, "-1.png", "+1"),
    (4, "'quoted.png", "''="),
    (5, "größe.png", ""),
    (6, os.fsdecode(b"latin-\xe9.png"), "not UTF-8"),
]


def rows(bad):
    return [(r.index, r.description, r.reason) for r in bad.records]


def test_what_is_written_is_read_back(tmp_path):
    bad = BadImages(tmp_path)
    assert bad.records == ()
    assert not bad.path.exists()
    for number, row in enumerate(ROWS, start=1):
        bad.add(*row)
        # On disk at once, and whole.
        assert rows(BadImages(tmp_path)) == ROWS[:number]
    assert [p.name for p in tmp_path.iterdir()] == ["bad_images.csv"]
    assert bad.records[0] == BadRecord(*ROWS[0])


def test_a_resumed_run_goes_on_with_the_list(tmp_path):
    BadImages(tmp_path).add(*ROWS[0])
    resumed = BadImages(tmp_path)
    resumed.add(*ROWS[0])
    resumed.add(*ROWS[1])
    assert rows(BadImages(tmp_path)) == ROWS[:2]
    # The same index of another split is another image.
    resumed.add(7, "validation/7.png", "it has no pixels")
    assert len(BadImages(tmp_path).records) == 3


def test_no_cell_is_a_formula(tmp_path):
    bad = BadImages(tmp_path)
    for row in ROWS:
        bad.add(*row)
    text = bad.path.read_text(encoding="utf-8", errors="surrogateescape")
    assert text.splitlines()[:2] == [
        "index,path,reason",
        "7,images/7.png,OSError: image file is truncated",
    ]
    for cells in csv.reader(text.splitlines(keepends=True)):
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_a_failed_write_leaves_the_old_list(tmp_path, monkeypatch):
    bad = BadImages(tmp_path)
    bad.add(*ROWS[0])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchgd_jax.io.files.fsync_path", fail)
    with pytest.raises(DiskError, match=r"bad_images.csv: No space left on device"):
        bad.add(*ROWS[1])
    assert rows(BadImages(tmp_path)) == ROWS[:1]


@pytest.mark.parametrize(
    "content",
    [b"", b"path,reason\n", b"index,path,reason\nx,y,z\n", b'index,path,reason\n1,"a', b"\x00\xff"],
)
def test_a_damaged_list_is_an_error(tmp_path, content):
    (tmp_path / "bad_images.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad_images.csv: .*delete it"):
        BadImages(tmp_path)
