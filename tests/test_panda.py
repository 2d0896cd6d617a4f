"""PANDA's table, its pyramid levels and the squares made of them, on a stand-in."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_panda import GRADES, SIZES, make_tiny_panda, slide_id, tissue, write_rows

from patchgd_jax.config import DataConfig, PandaConfig, SplitConfig
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.data.run_data import file_background
from patchgd_jax.data.sources.panda import choose_level, panda_image, read_panda
from patchgd_jax.data.tables.splits import split_table
from patchgd_jax.errors import DataError

ALL = PandaConfig()


@pytest.fixture(scope="module")
def panda(tmp_path_factory):
    """A sound folder of seven slides, not to be changed."""
    return make_tiny_panda(tmp_path_factory.mktemp("panda"), n=7)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Two sound slides and every fault, not to be changed."""
    return make_tiny_panda(tmp_path_factory.mktemp("faulty"), n=2, faults=True)


def test_table(panda):
    table = read_panda(panda, ALL)
    assert table.labels.tolist() == list(GRADES)
    assert table.labels.dtype == np.int64
    assert table.class_names == tuple("012345")
    assert table.rows == tuple(range(2, 9))
    assert [p.stem for p in table.paths] == [slide_id(i) for i in range(7)]
    assert all(p.is_file() for p in table.paths)
    assert (table.groups, table.splits, table.weights) == (None, None, None)
    assert file_background(DataConfig(panda=str(panda)), table) == 255


def test_folds_are_stratified_by_grade_and_centre(panda, tmp_path):
    table = read_panda(panda, ALL)
    assert table.strata.dtype == np.int64
    centres = ("karolinska", "radboud") * 3 + ("karolinska",)
    keys = list(zip(table.labels, centres, strict=True))
    same = np.array([[a == b for b in keys] for a in keys])
    np.testing.assert_array_equal(table.strata[:, None] == table.strata, same)
    (tmp_path / "train_images").mkdir()
    rows = [[f"{i:032x}", centres[i % 2], i // 8 % 6, "0+0"] for i in range(480)]
    for row in rows:
        (tmp_path / "train_images" / f"{row[0]}.tiff").touch()
    write_rows(tmp_path, rows)
    table = read_panda(tmp_path, ALL)
    for fold in range(5):
        chosen = split_table(table, SplitConfig(fold=fold))["validation"]
        assert (np.bincount(table.strata[chosen], minlength=12) == 8).all()
    # The folds that recorded runs had.
    assert chosen[:12].tolist() == [7, 14, 16, 21, 22, 26, 35, 40, 55, 57, 58, 69]


def test_a_grade_counts_whatever_its_gleason_score(tmp_path):
    make_tiny_panda(tmp_path, n=2)
    write_rows(tmp_path, [[slide_id(0), "karolinska", 2, "4+4"], [slide_id(1), "radboud", 5, "7"]])
    assert read_panda(tmp_path, ALL).labels.tolist() == [2, 5]


def test_faults_are_told_with_their_lines(faulty):
    with pytest.raises(DataError) as caught:
        read_panda(faulty, ALL)
    assert str(caught.value).splitlines() == [
        f"cannot use the labels in {faulty}/train.csv:",
        f"  line 7: there is no file 'train_images/{slide_id('missing')}.tiff'",
        "  line 8: the label '6' is none of the 6 classes; they are 0, 1, 2, 3, 4, 5",
        f"  line 9: 'train_images/{slide_id(0)}.tiff' is the image of line 2 again, with the same "
        "label; keep one",
    ]


def test_only_ten_faults_are_listed(tmp_path):
    make_tiny_panda(tmp_path, n=1)
    good = [slide_id(0), "karolinska", 0, "0+0"]
    write_rows(tmp_path, [good, *([f"{i:032x}", "harvard\x1b", 1, "3+3"] for i in range(12))])
    with pytest.raises(DataError) as caught:
        read_panda(tmp_path, ALL)
    text = str(caught.value)
    assert text.count("\n") == 11
    assert text.endswith("and 2 more")
    assert "line 3: the provider 'harvard?' is none of karolinska, radboud" in text
    write_rows(tmp_path, [["elsewhere", "radboud", 1, "3+3"], ["a\x1bb", "radboud", 1, "3+3"]])
    with pytest.raises(DataError, match=r"there is no file 'train_images/elsewhere") as caught:
        read_panda(tmp_path, ALL)
    assert "\x1b" not in str(caught.value)
    write_rows(tmp_path, [])
    with pytest.raises(DataError, match="no rows below its header"):
        read_panda(tmp_path, ALL)


def test_a_folder_of_another_layout(tmp_path):
    with pytest.raises(DataError, match=r"no .*/train\.csv; data\.panda names the folder"):
        read_panda(tmp_path, ALL)
    (tmp_path / "train.csv").write_text("image_id,label\na,1\n")
    with pytest.raises(DataError, match=r"no .*/train_images; data\.panda names the folder"):
        read_panda(tmp_path, ALL)
    (tmp_path / "train_images").mkdir()
    with pytest.raises(DataError, match=r"no column 'isup_grade'; it has .* unchanged"):
        read_panda(tmp_path, ALL)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"train\.csv is not UTF-8 text"):
        read_panda(tmp_path, ALL)


@pytest.mark.parametrize("header", ["", "image_id,noise\n"])
def test_a_cleaned_list_leaves_rows_out(tmp_path, faulty, header):
    listed = tmp_path / "list.csv"
    kept = [slide_id(1), slide_id("corrupt"), slide_id("white")]
    listed.write_text(header + "".join(f"{i},0\n" for i in reversed(kept)) + "\n")
    table = read_panda(faulty, PandaConfig(cleaned_list=str(listed)))
    assert [p.stem for p in table.paths] == kept
    assert table.rows == (3, 5, 6)
    listed.write_text(f"{kept[0]}\nunknown\n{slide_id(9)}\n")
    with pytest.raises(DataError) as caught:
        read_panda(faulty, PandaConfig(cleaned_list=str(listed)))
    assert str(caught.value).splitlines() == [
        f"cannot use the cleaned list {listed}:",
        "  line 2: 'unknown' is not in train.csv",
        f"  line 3: '{slide_id(9)}' is not in train.csv",
    ]
    listed.write_text("\n")
    with pytest.raises(DataError, match="names no slide"):
        read_panda(faulty, PandaConfig(cleaned_list=str(listed)))


def test_fingerprint(tmp_path, panda):
    whole = read_panda(panda, ALL).fingerprint
    assert read_panda(panda, ALL).fingerprint == whole
    assert read_panda(panda, PandaConfig(reference_level=True)).fingerprint != whole
    listed = tmp_path / "list.txt"
    listed.write_text(f"{slide_id(0)}\n{slide_id(1)}\n")
    assert read_panda(panda, PandaConfig(cleaned_list=str(listed))).fingerprint != whole


def shapes(height, width):
    return [(height // by, width // by) for by in (1, 4, 16)]


# Sizes of real slides: Radboud's are multiples of 256, Karolinska's are not.
USUAL = [shapes(31744, 37632), shapes(10752, 36352), shapes(9728, 20224), shapes(19919, 26327)]


def test_the_level_is_the_smallest_that_is_large_enough():
    for levels in USUAL:
        for target in (256, 512, 1024, 2048, 4096, 8192, 30_000, 100_000):
            level = choose_level(levels, target)
            enough = [i for i, s in enumerate(levels) if max(s) >= target]
            assert level == (max(enough) if enough else 0)
    assert choose_level(USUAL[0], 2352) == 2
    assert choose_level(USUAL[0], 2353) == 1
    assert choose_level([(100, 80)], 512) == 0


def test_the_papers_level_is_nearly_always_the_last():
    for levels in USUAL:
        for target in (512, 1024, 2048, 4096):
            assert choose_level(levels, target, reference=True) == 2
    # The shorter side counts, and a level above one that is too small is never reached.
    assert choose_level(shapes(4096 * 16, 4096 * 20), 512, reference=True) == 0
    assert choose_level(shapes(4096 * 16 - 1, 4096 * 20), 512, reference=True) == 2
    assert choose_level([(5000, 5000), (4096, 4500)], 4096, reference=True) == 0
    assert choose_level([(5000, 5000), (4096, 4500)], 4500, reference=True) == 1
    assert choose_level([(100, 80)], 512, reference=True) == 0


def test_slides_open_as_pyramids(panda):
    for i, path in enumerate(read_panda(panda, ALL).paths):
        source = open_regions(path, channels=3, background=255)
        height, width = SIZES[("karolinska", "radboud")[i % 2]][i // 2 % 2]
        assert list(source.level_shapes) == shapes(height, width)
        assert source.mpp == pytest.approx(0.45 + i / 100, rel=1e-3)
        source.close()


@pytest.mark.parametrize("index", [0, 1])
def test_squares_are_area_averages_on_white(panda, index):
    source = open_regions(read_panda(panda, ALL).paths[index], channels=3, background=255)
    rows, cols = SIZES[("karolinska", "radboud")[index]][0]
    for target in (89, 96, 200, 700):
        image, (height, width) = panda_image(source, (target, target))
        assert image.shape == (target, target, 3)
        assert image.dtype == np.uint8
        assert width == min(target, cols)
        assert abs(height - rows * width / cols) <= 1
        assert (image[height:] == 255).all()
        assert (image[:, width:] == 255).all()
        full = tissue(rows, cols, GRADES[index], index).astype(float)
        # Means of a coarse grid agree with those of the pixels that were written.
        for y in range(3):
            for x in range(4):
                a, b = (
                    slice(k * n // parts, (k + 1) * n // parts)
                    for k, n, parts in ((y, height, 3), (x, width, 4))
                )
                c, d = (
                    slice(k * n // parts, (k + 1) * n // parts)
                    for k, n, parts in ((y, rows, 3), (x, cols, 4))
                )
                np.testing.assert_allclose(
                    image[a, b].mean((0, 1)), full[c, d].mean((0, 1)), atol=4
                )
    image, (height, width) = panda_image(source, (2000, 2000))
    assert (height, width) == (rows, cols), "no pixel is made up"
    np.testing.assert_array_equal(image[:rows, :cols], source.read(0, 0, rows, cols))
    source.close()


def linear(pixels, axis, size):
    """Pixels along an axis enlarged by linear interpolation between their centres."""
    count = pixels.shape[axis]
    at = ((np.arange(size) + 0.5) * count / size - 0.5).clip(0, count - 1)
    low = np.minimum(at.astype(int), count - 2)
    share = np.expand_dims(at - low, [i for i in range(3) if i != axis])
    return pixels.take(low, axis) * (1 - share) + pixels.take(low + 1, axis) * share


def test_the_papers_square_is_enlarged_from_the_last_level(panda):
    source = open_regions(read_panda(panda, ALL).paths[0], channels=3, background=255)
    rows, cols = source.level_shapes[2]
    image, (height, width) = panda_image(source, (356, 356), reference=True)
    assert (height, width) == (round(rows * 356 / cols), 356)
    assert (image[height:] == 255).all()
    want = source.read(0, 0, rows, cols, 2).astype(float)
    for axis, size in ((0, height), (1, width)):
        want = linear(want, axis, size)
    np.testing.assert_allclose(image[:height], want, atol=1.01)
    fine, _ = panda_image(source, (356, 356))
    assert np.abs(fine.astype(int) - image).mean() > 0.5
    shrunk, size = panda_image(source, (50, 50), reference=True)
    assert max(size) == 50
    assert shrunk.shape == (50, 50, 3)
    source.close()


def test_red_stays_red():
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 200
    for reference in (False, True):
        for target in (30, 60, 90):
            image, (height, width) = panda_image(
                ArrayRegions(red), (target, target), reference=reference
            )
            assert (image[:height, :width] == [200, 0, 0]).all()


def test_damaged_slides_are_told_and_empty_ones_are_white(faulty):
    def path(name):
        return faulty / "train_images" / f"{slide_id(name)}.tiff"

    with pytest.raises(ImageReadError, match=slide_id("truncated")):
        open_regions(path("truncated"), channels=3, background=255)
    corrupt = open_regions(path("corrupt"), channels=3, background=255)
    with pytest.raises(ImageReadError, match="row 0, column 0 of level 0 is damaged"):
        panda_image(corrupt, (1000, 1000))
    panda_image(corrupt, (60, 60))
    white = open_regions(path("white"), channels=3, background=255)
    assert (panda_image(white, (64, 64))[0] == 255).all()
    corrupt.close()
    white.close()


def test_the_stand_in_can_be_learnt(panda):
    table = read_panda(panda, ALL)
    dark = []
    for path in table.paths:
        source = open_regions(path, channels=3, background=255)
        image, _ = panda_image(source, (256, 256))
        tissue_pixels = (image[..., 1] < 230).sum()
        dark.append((image[..., 1] < 110).sum() / tissue_pixels)
        source.close()
    order = np.argsort(table.labels, kind="stable")
    assert (np.diff(np.array(dark)[order][1:]) > 0).all()
