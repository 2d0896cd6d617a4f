"""The check of a data set's files: what it counts and what it finds."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pyramids import halved, tissue
from test_safe_image import bomb, tiff

from patchgd_jax.data.images import regions
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.images.safe_image import ImageReadError, read_header
from patchgd_jax.data.inspect.check import Problem, check_images, write_bad_list
from patchgd_jax.data.tables.table import make_table
from patchgd_jax.errors import DiskError


class FakeRegions:
    """A slide of two levels whose file is text; `damaged` in it damages level 1."""

    channels = 3
    mpp = None
    tile = (256, 256)
    level_shapes = ((5000, 3000), (1250, 750))
    downsamples = (1.0, 4.0)

    def __init__(self, path, *, channels):
        self.text = Path(path).read_text()
        self.read_pixels = 0
        self.closed = False
        if "slide" not in self.text:
            raise ImageReadError(path, "it is no slide")
        opened.append(self)

    def read(self, y, x, height, width, level=0):
        assert y + height <= self.level_shapes[level][0]
        assert x + width <= self.level_shapes[level][1]
        self.read_pixels += height * width
        if "damaged" in self.text and level == 1:
            raise ImageReadError("slide", "level 1 tile 3 is damaged")
        return np.zeros((height, width, 3), np.uint8)

    def close(self):
        self.closed = True


opened: list[FakeRegions] = []


def never(path, *, channels):
    raise AssertionError(f"{path} opened by regions")


def picture(path, seed, shape=(20, 30, 3), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def table(paths, labels, **options):
    names = options.pop("class_names", ("a", "b"))
    root = paths[0].parent
    present = [path if path.exists() else root for path in paths]
    made = make_table(present, root, np.asarray(labels), names, **options)
    object.__setattr__(made, "paths", tuple(paths))
    return made


def check(made, train, validation, open_image=never, channels=3, **options):
    given = {"train": train, "validation": validation, "test": []}
    splits = {name: np.array(indices, np.int64) for name, indices in given.items()}
    return check_images(made, splits, channels=channels, open_image=open_image, **options)


def test_a_sound_data_set(tmp_path):
    shapes = [(20, 30, 3), (500, 600, 3), (511, 512, 3), (1, 1, 3), (64, 40, 3), (64, 40, 3)]
    suffixes = ["png", "jpg", "tiff", "bmp", "webp", "png"]
    paths = [
        picture(tmp_path / f"{i}.{suffix}", i, shape)
        for i, (shape, suffix) in enumerate(zip(shapes, suffixes, strict=True))
    ]
    done = []
    made = table(paths, [0, 0, 0, 1, 1, 0])
    report = check(made, [0, 1, 3, 5], [2, 4], on_image=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert report.problems == ()
    assert report.notes == ()
    assert report.images == {"train": 4, "validation": 2, "test": 0}
    assert report.labels["train"] == {"a": 3, "b": 1}
    assert report.labels["validation"] == {"a": 1, "b": 1}
    assert report.sizes == {"height": (1, 64, 511), "width": (1, 40, 600)}
    assert report.longer_sides == {
        "1-1 px": 1,
        "16-31 px": 1,
        "64-127 px": 2,
        "512-1023 px": 2,
    }
    assert report.formats == {"PNG": 2, "JPEG": 1, "TIFF": 1, "BMP": 1, "WEBP": 1}
    assert json.loads(json.dumps(report.to_dict()))["labels"]["train"] == {"a": 3, "b": 1}
    assert check(made, [0, 1, 3, 5], [2, 4], decode=True, threads=1).text() == (
        "6 images: 4 train, 2 validation, 0 test\n"
        "   train  validation  test\n"
        "a      3           1     0\n"
        "b      1           1     0\n"
        "height: 1 to 511 px, median 64\n"
        "width: 1 to 600 px, median 40\n"
        "longer side: 1 of 1-1 px, 1 of 16-31 px, 2 of 64-127 px, 2 of 512-1023 px\n"
        "format: 2 of PNG, 1 of JPEG, 1 of TIFF, 1 of BMP, 1 of WEBP\n"
        "decoded 6 images: none with a problem"
    )


def test_every_unreadable_file_is_listed_with_its_line(tmp_path):
    good = [picture(tmp_path / f"good{i}.png", i) for i in range(3)]
    cut = picture(tmp_path / "cut.png", 5, (90, 90, 3))
    cut.write_bytes(cut.read_bytes()[:-3000])
    short = picture(tmp_path / "short.tiff", 6, compression="tiff_lzw")
    short.write_bytes(short.read_bytes()[:-200])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    strip = tiff(tmp_path / "strip.tiff", 9, 9, (8,), bytes(81), {273: 9000})
    bad = {
        tmp_path / "gone.png": "there is no such file",
        text: "it is none of PNG",
        bomb(tmp_path / "bomb.png"): "it claims 60000 x 60000 px",
        tmp_path: "it is a folder, and not of Zarr",
        strip: "it is truncated: 204 of at least 9001 bytes are there",
    }
    hidden = {cut: "truncated", short: "it is no slide"}
    paths = [*good, *bad, *hidden]
    made = table(paths, np.arange(len(paths)) % 2, rows=range(2, 2 + len(paths)))

    def no_slide(path, *, channels):
        raise ImageReadError(path, "it is no slide")

    for decode, wanted in ((False, bad), (True, {**bad, **hidden})):
        report = check(made, [0, 1], range(2, len(paths)), no_slide, decode=decode)
        got = {path: (row, reason) for row, path, reason in report.problems}
        # Whether a header can be read of the two cut files is up to where they are cut.
        assert set(map(str, wanted)) <= set(got)
        assert not set(got) & set(map(str, good))
        for path, reason in wanted.items():
            assert reason in got[str(path)][1]
            assert got[str(path)][0] == paths.index(path) + 2
        assert report.images["validation"] == len(paths) - 2
    assert sum(report.formats.values()) == 3
    lines = [line for line in report.text().splitlines() if line.startswith("problem: ")]
    assert lines[0] == f"problem: line 5, {tmp_path}/gone.png: there is no such file"
    assert report.text().endswith("decoded 10 images: 7 with a problem")


def test_slides_go_through_regions(tmp_path):
    opened.clear()
    paths = [tmp_path / name for name in ("a.mrxs", "b.scn", "c.mrxs")]
    for path, text in zip(paths, ("slide 1", "slide 2", "slide 3 damaged"), strict=True):
        path.write_text(text)
    # A TIFF of several pages may be a slide.
    frames = tmp_path / "frames.tiff"
    pictures = [Image.fromarray(np.full((9, 9), v, np.uint8)) for v in (1, 2)]
    pictures[0].save(frames, save_all=True, append_images=pictures[1:])
    made = table([*paths, frames], [0, 1, 0, 1])

    def open_slide(path, *, channels):
        if path == frames:
            path = paths[0]
        return FakeRegions(path, channels=channels)

    report = check(made, [0, 1], [2, 3], open_slide)
    assert report.problems == ()
    assert report.formats == {"regions": 4}
    assert report.sizes["height"] == (5000, 5000, 5000)
    assert all(source.closed and not source.read_pixels for source in opened)
    opened.clear()
    report = check(made, [0, 1], [2, 3], open_slide, decode=True)
    assert report.problems == ((0, str(paths[2]), "level 1 tile 3 is damaged"),)
    assert all(source.closed for source in opened)
    whole = 5000 * 3000 + 1250 * 750
    assert sorted(source.read_pixels for source in opened) == [whole] * 4


def test_tiffs_are_judged_by_the_reader_of_training(tmp_path):
    image = tissue(300, 400)
    layout = {"tile": (64, 64), "metadata": None}
    good, cut = tmp_path / "good.tif", tmp_path / "cut.tif"
    with tifffile.TiffWriter(good) as writer:
        writer.write(image, subifds=1, photometric="rgb", **layout)
        writer.write(halved(image), subfiletype=1, photometric="rgb", **layout)
    cut.write_bytes(good.read_bytes()[:-1])
    turned, inks = tmp_path / "turned.tif", tmp_path / "inks.tif"
    tifffile.imwrite(turned, image, photometric="rgb", extratags=[(274, 3, 1, 6, True)], **layout)
    four = np.dstack([image, image[..., 0]])
    tifffile.imwrite(inks, four, photometric="separated", **layout)
    upright = picture(tmp_path / "plain.tif", 3, tiffinfo={274: 6})
    paths = [good, cut, turned, inks, upright]
    for path in (cut, turned, inks):
        # Pillow is content with the header of its first page.
        assert read_header(path).format == "TIFF"
    made = table(paths, [0, 1, 0, 1, 0], rows=range(2, 7))
    for decode in (False, True):
        report = check(made, [0, 1], [2, 3, 4], open_regions, decode=decode)
        assert [(p.row, p.path) for p in report.problems] == [
            (3, str(cut)),
            (4, str(turned)),
            (5, str(inks)),
        ]
        for problem, reason in zip(
            report.problems, ("truncated", "orientation 6", "its colours are"), strict=True
        ):
            assert reason in problem.reason
        assert report.formats == {"regions": 1, "TIFF": 1}
        assert report.sizes == {"height": (30, 165, 300), "width": (20, 210, 400)}


def test_a_plain_tiff_above_the_limit_is_read_by_regions(tmp_path, monkeypatch):
    path = picture(tmp_path / "plain.tif", 3)
    monkeypatch.setattr(regions, "MAX_FLAT_TIFF", 599)
    assert check(table([path], [0]), [0], [], open_regions).formats == {"regions": 1}
    monkeypatch.setattr(regions, "MAX_FLAT_TIFF", 600)
    assert check(table([path], [0]), [0], [], open_regions).formats == {"TIFF": 1}


def test_copies_and_leaks(tmp_path):
    twice = [picture(tmp_path / f"{name}.png", 1) for name in "abcd"]
    # Of the same size on disk, but not the same content.
    near = [picture(tmp_path / f"{name}.bmp", seed) for seed, name in enumerate("ef")]
    assert near[0].stat().st_size == near[1].stat().st_size
    made = table([*twice, *near], [0, 0, 1, 0, 0, 1], rows=range(2, 8))
    report = check(made, [0, 1, 2, 4], [3, 5])
    assert report.problems == (
        (4, str(twice[2]), "the content of a.png (line 2) under another label: b here and a there"),
        (
            5,
            str(twice[3]),
            "the content of a.png (line 2), which is in the split train, is in validation",
        ),
    )
    assert report.notes == ("1 images are copies of others: b.png = a.png",)
    groups = ["p1", "p1", "p2", "p1", "p3", "p2"]
    paths = [picture(tmp_path / f"{i}.png", 10 + i) for i in range(6)]
    made = table(paths, [0, 1, 0, 1, 0, 1], groups=groups)
    assert check(made, [0, 1, 2], [3, 4, 5]).problems == (
        (0, str(paths[3]), "group 'p1' is in the splits train and validation"),
        (0, str(paths[5]), "group 'p2' is in the splits train and validation"),
    )
    assert check(made, [0, 1, 3], [2, 4, 5]).problems == ()


def test_notes_of_channels(tmp_path):
    grey = picture(tmp_path / "grey.png", 0, (9, 9))
    colour = picture(tmp_path / "colour.png", 1)
    mixed, dull = table([grey, colour], [0, 1]), table([grey], [0])
    assert check(mixed, [0], [1]).notes == ("1 of 2 images are grey, the others coloured",)
    (note,) = check(mixed, [0], [1], channels=1).notes
    assert note.startswith("1 of 2 images are coloured; data.channels 1 makes them grey")
    assert "needs a third" in check(dull, [0], []).notes[0]
    assert check(dull, [0], [], channels=1).notes == ()


def test_other_tasks_are_counted(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i // 2) for i in range(4)]
    several = table(paths, np.array([[1, 1], [1, 0], [0, 0], [0, 0]], np.float32))
    report = check(several, [0, 1], [2, 3])
    assert report.labels["train"] == {"a": 2, "b": 1}
    assert [p.reason for p in report.problems] == [
        "the content of 0.png under another label: a here and a;b there"
    ]
    values = table(paths, np.array([1.5, 2.5, 3, 3], np.float32), class_names=())
    report = check(values, [0, 1], [2, 3])
    assert report.labels == {
        "train": {"min": 1.5, "mean": 2, "max": 2.5},
        "validation": {"min": 3, "mean": 3, "max": 3},
        "test": {},
    }
    assert "2.5 here and 1.5 there" in report.problems[0].reason
    assert "mean      2           3" in report.text()


def test_names_cannot_reach_the_terminal_or_a_formula(tmp_path):
    path = tmp_path / "\x1b[2J=cmd.png"
    path.write_bytes(b"")
    report = check(table([path], [0], class_names=("\x1b[31mred", "b")), [0], [])
    assert "\x1b" not in report.text()
    assert "?[2J=cmd.png" in report.text()
    problems = [
        Problem(3, "=1+1.png", "-bad"),
        Problem(0, "+a,b.png", 'it says "no"'),
        Problem(4, "@SUM(A1).png", "two\nlines"),
        Problem(5, "a=b.png", "\tplain"),
        Problem(6, "\udcff.png", "no UTF-8"),
    ]
    target = tmp_path / "bad_images.csv"
    write_bad_list(target, problems)
    with target.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["row", "path", "reason"],
            ["3", "'=1+1.png", "'-bad"],
            ["", "'+a,b.png", 'it says "no"'],
            ["4", "'@SUM(A1).png", "two?lines"],
            ["5", "a=b.png", "?plain"],
            ["6", "?.png", "no UTF-8"],
        ]
    assert [p.name for p in tmp_path.glob(".bad*")] == []
    with pytest.raises(DiskError, match="cannot write"):
        write_bad_list(tmp_path / "none" / "bad.csv", problems)


def test_long_lists_are_cut_in_text_but_not_in_json(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(30)]
    for path in paths:
        path.write_text(path.name)
    names = tuple(f"class{i}" for i in range(30))
    report = check(table(paths, np.arange(30), class_names=names), range(20), range(20, 30))
    assert "and 10 more classes" in report.text()
    assert "and 10 more problems" in report.text()
    assert len(report.to_dict()["problems"]) == 30
    assert report.to_dict()["problems"][0]["reason"].startswith("it is none of")


def test_files_are_looked_at_by_several_threads_in_the_tables_order(tmp_path):
    paths = [tmp_path / f"{i}.mrxs" for i in range(4)]
    for index, path in enumerate(paths):
        path.write_text(f"slide {index}")
    together = threading.Barrier(4, timeout=30)

    def open_slide(path, *, channels):
        together.wait()
        raise ImageReadError(path, path.name)

    report = check(table(paths, [0, 1, 0, 1]), [0, 1], [2, 3], open_slide, threads=4)
    assert [problem.reason for problem in report.problems] == [path.name for path in paths]


def test_what_is_no_fault_of_an_image_ends_the_check(tmp_path):
    path = tmp_path / "a.mrxs"
    path.write_text("slide")

    def broken(path, *, channels):
        raise RuntimeError("no reader")

    with pytest.raises(RuntimeError, match="no reader"):
        check(table([path], [0]), [0], [], broken)
