"""Regions of every kind of large image, against the whole image and against OpenSlide."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from pyramids import (
    levels_of,
    tissue,
    write_array,
    write_ndpi,
    write_ome,
    write_pages,
    write_svs,
    write_zarr,
)

from patchgd_jax.config import DataConfig
from patchgd_jax.data.images import regions, tiff_levels
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.openslide_regions import OpenSlideRegions
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.images.safe_image import ImageReadError, read_image
from patchgd_jax.data.images.tiff_regions import TiffRegions, TileCache
from patchgd_jax.data.synthetic.ultramnist import DigitRegions, UltraMnist
from patchgd_jax.errors import ConfigError, DataError

IMAGE = tissue(352, 512)
LEVELS = levels_of(IMAGE, (1, 2, 8))
GREY = np.asarray(Image.fromarray(IMAGE).convert("L"))[..., None]
DIGITS = DataConfig(size=(352, 512), downscale=2, channels=3, noise=True)


def image_file(path, **options):
    Image.fromarray(IMAGE).save(path, **options)
    return path


def npy(path):
    np.save(path, IMAGE)
    return path


def striped(path, **options):
    tifffile.imwrite(path, IMAGE, rowsperstrip=24, photometric="rgb", **options)
    return path


FILES = {
    "jpeg pages": lambda d: write_pages(d / "a.tif", LEVELS),
    "deflate pages": lambda d: write_pages(d / "a.tif", LEVELS, compression="deflate", tile=112),
    "lzw with predictor": lambda d: write_pages(
        d / "a.tif", LEVELS, compression="lzw", predictor=True
    ),
    "ome": lambda d: write_ome(d / "a.ome.tif", LEVELS),
    "svs": lambda d: write_svs(d / "a.svs", LEVELS),
    "ndpi": lambda d: write_ndpi(d / "a.ndpi", LEVELS),
    "strips": lambda d: striped(d / "a.tif", compression="deflate"),
    "plain tiff": lambda d: image_file(d / "a.tif"),
    "zarr 3": lambda d: write_zarr(d / "a.zarr", LEVELS, axes="cyx"),
    "zarr 2": lambda d: write_zarr(d / "a.zarr", LEVELS, version=2, axes="tczyx"),
    "zarr array": lambda d: write_array(d / "a", IMAGE, version=3, chunks=(100, 100, 3)),
    "npy": lambda d: npy(d / "a.npy"),
    "png": lambda d: image_file(d / "a.png"),
    "jpeg": lambda d: image_file(d / "a.jpg", quality=90),
    "webp": lambda d: image_file(d / "a.webp", lossless=True),
    "bmp": lambda d: image_file(d / "a.bmp"),
}
LOSSY = ("jpeg pages", "svs", "ndpi", "jpeg")
OTHERS = {
    "array": lambda d: ArrayRegions(IMAGE, 200),
    "digits": lambda d: DigitRegions(UltraMnist(DIGITS, "train", 3), 5),
    "openslide": lambda d: OpenSlideRegions(write_svs(d / "a.svs", LEVELS), 3, 200, 2**26),
}


@pytest.fixture(params=[*FILES, *OTHERS])
def source(request, tmp_path, monkeypatch):
    """Each kind of source in turn, with a cache too small for it."""
    if request.param == "strips":
        # So that it is read by strips and not as a whole.
        monkeypatch.setattr(regions, "MAX_FLAT_TIFF", 1000)
    if request.param == "openslide":
        pytest.importorskip("openslide")
    if request.param in OTHERS:
        opened = OTHERS[request.param](tmp_path)
    else:
        path = FILES[request.param](tmp_path)
        opened = open_regions(path, channels=3, background=200, cache_bytes=300_000)
    with contextlib.closing(opened):
        yield opened


def some_regions(shape, count=12):
    """Regions inside, across the edges, and outside."""
    rng = np.random.default_rng(7)
    height, width = shape
    for _ in range(count):
        h, w = (int(n) for n in rng.integers(1, 130, 2))
        yield int(rng.integers(-60, height + 20)), int(rng.integers(-60, width + 20)), h, w
    yield -500, -500, 20, 30
    yield height + 10, 0, 5, 5
    yield -10, -20, height + 30, width + 40


def crop(image, y, x, height, width, background):
    pad = 600
    canvas = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=background)
    return canvas[y + pad : y + pad + height, x + pad : x + pad + width]


def test_a_region_is_a_crop_of_the_whole(source):
    for level, shape in enumerate(source.level_shapes):
        whole = source.read(0, 0, *shape, level=level)
        assert whole.shape == (*shape, 3)
        for region in some_regions(shape):
            got = source.read(*region, level=level)
            np.testing.assert_array_equal(got, crop(whole, *region, source.background))
            assert got.dtype == np.uint8
            assert got.flags.c_contiguous


def test_eight_threads_read_what_one_does(source):
    jobs = [
        (*region, level)
        for level, shape in enumerate(source.level_shapes)
        for region in some_regions(shape, 20)
    ]
    alone = [source.read(*job) for job in jobs]
    order = np.random.default_rng(0).permutation(len(jobs) * 4) % len(jobs)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda k: source.read(*jobs[k]), order))
    for k, got in zip(order, together, strict=True):
        np.testing.assert_array_equal(got, alone[k])


def test_what_was_read_is_the_callers_own(source):
    width = source.level_shapes[0][1]
    before = source.read(0, 0, 128, width)
    before[:] = 7
    assert (source.read(0, 0, 128, width) != 7).any()


def test_reading_a_closed_source_fails(source):
    source.read(0, 0, 4, 4)
    source.close()
    if not isinstance(source, DigitRegions):
        with pytest.raises(ValueError, match="closed"):
            source.read(0, 0, 4, 4)
    source.close()


@pytest.mark.parametrize("kind", [k for k in FILES if k not in LOSSY])
def test_lossless_files_give_the_pixels_that_were_written(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "MAX_FLAT_TIFF", 1000 if kind == "strips" else 2**24)
    path = FILES[kind](tmp_path)
    for channels, images in ((3, LEVELS), (1, [GREY])):
        with contextlib.closing(open_regions(path, channels=channels)) as source:
            assert source.level_shapes[0] == (352, 512)
            for level, image in enumerate(images[: len(source.level_shapes)]):
                got = source.read(0, 0, *source.level_shapes[level], level)
                np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize("kind", [k for k in FILES if k in LOSSY])
def test_lossy_files_give_nearly_the_pixels_that_were_written(kind, tmp_path):
    path = FILES[kind](tmp_path)
    with contextlib.closing(open_regions(path, channels=3)) as source:
        got = source.read(0, 0, 352, 512).astype(int)
        assert np.abs(got - IMAGE).mean() < 4


@pytest.mark.parametrize("kind", ["jpeg pages", "deflate pages", "svs", "ndpi"])
@pytest.mark.parametrize("channels", [1, 3])
def test_openslide_gives_the_same_pixels_on_every_level(kind, channels, tmp_path):
    openslide = pytest.importorskip("openslide")
    path = FILES[kind](tmp_path)
    mode = "L" if channels == 1 else "RGB"
    with (
        openslide.OpenSlide(path) as slide,
        contextlib.closing(open_regions(path, channels=channels, background=77)) as source,
    ):
        sizes = [(height, width) for width, height in slide.level_dimensions]
        assert set(source.level_shapes) <= set(sizes)
        assert kind == "ndpi" or source.level_shapes == tuple(sizes)
        for level, shape in enumerate(source.level_shapes):
            theirs = sizes.index(shape)
            scale = round(slide.level_downsamples[theirs])
            for y, x, height, width in some_regions(shape):
                rgba = slide.read_region((x * scale, y * scale), theirs, (width, height))
                behind = Image.new("RGBA", rgba.size, (77, 77, 77, 255))
                expected = np.asarray(Image.alpha_composite(behind, rgba).convert(mode))
                got = source.read(y, x, height, width, level)
                np.testing.assert_array_equal(got, expected.reshape(height, width, channels))


def test_aperio_jpeg2000_in_ycbcr_has_the_colours_openslide_gives(tmp_path):
    openslide = pytest.importorskip("openslide")
    ycbcr = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
    path = tmp_path / "a.svs"
    tiles = [
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(ycbcr[y : y + 176, x : x + 256]),
            level=0,
            mct=False,
            codecformat="j2k",
        )
        for y in (0, 176)
        for x in (0, 256)
    ]
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=IMAGE.shape,
        dtype=np.uint8,
        tile=(176, 256),
        compression=33003,
        photometric="rgb",
        description="Aperio Image Library v11\r\n512x352 |MPP = 0.5",
        metadata=None,
    )
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, (512, 352)).convert("RGB")).astype(int)
    with contextlib.closing(open_regions(path, channels=3)) as source:
        got = source.read(0, 0, 352, 512)
    assert np.abs(got - expected).max() <= 1
    assert np.abs(got - IMAGE.astype(int)).max() <= 3


def test_labels_and_thumbnails_are_no_levels(tmp_path):
    for write, name in ((write_svs, "a.svs"), (write_ndpi, "a.ndpi")):
        path = write(tmp_path / name, LEVELS)
        with contextlib.closing(open_regions(path, channels=3)) as source:
            assert source.level_shapes == ((352, 512), (176, 256), (44, 64))
            np.testing.assert_allclose(source.downsamples, [1, 2, 8])


def test_a_tiled_thumbnail_of_a_levels_size_is_no_further_level(tmp_path):
    thumbnail = np.zeros_like(LEVELS[1])
    path = write_pages(tmp_path / "a.tif", [*LEVELS, thumbnail], compression="deflate")
    with contextlib.closing(open_regions(path, channels=3)) as source:
        assert len(source.level_shapes) == 3
        np.testing.assert_array_equal(source.read(0, 0, 176, 256, 1), LEVELS[1])


def test_levels_with_rounded_sides_belong_together(tmp_path):
    full = tissue(331, 517)
    levels = [full, full[:83, :130], full[:20, :33]]
    path = write_pages(tmp_path / "a.tif", levels, compression="deflate")
    with contextlib.closing(open_regions(path, channels=3)) as source:
        assert source.level_shapes == ((331, 517), (83, 130), (20, 33))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("svs", 0.2498), ("ome", 0.5), ("ndpi", 0.23), ("zarr 3", 0.5), ("zarr 2", 0.5)],
)
def test_micrometres_per_pixel(kind, expected, tmp_path):
    with contextlib.closing(open_regions(FILES[kind](tmp_path), channels=3)) as source:
        assert source.mpp == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("unit", "resolution", "expected"),
    [
        ("CENTIMETER", (20_000, 20_000), 0.5),
        ("INCH", (50_800, 50_800), 0.5),
        ("NONE", (1, 1), None),
        ("INCH", None, None),
    ],
)
def test_micrometres_per_pixel_from_resolution_tags(unit, resolution, expected, tmp_path):
    options = {"resolution": resolution, "resolutionunit": unit} if resolution else {}
    path = write_pages(tmp_path / "a.tif", LEVELS, **options)
    with contextlib.closing(open_regions(path, channels=3)) as source:
        assert source.mpp == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("kind", ["jpeg pages", "deflate pages", "svs", "ome", "ndpi"])
@pytest.mark.parametrize("share", [0.95, 0.6, 0.2])
def test_a_truncated_file_is_refused_when_opened(kind, share, tmp_path):
    path = FILES[kind](tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageReadError, match="truncated") as caught:
        open_regions(path, channels=3)
    assert str(path) in str(caught.value)


def damage(path, level, index):
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[level]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\x55" * count
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_a_corrupt_tile_is_named_and_the_others_are_read(compression, tmp_path):
    path = write_pages(tmp_path / "a.tif", LEVELS, compression=compression)
    with contextlib.closing(open_regions(path, channels=3)) as source:
        healthy = source.read(0, 0, 128, 512)
    damage(path, 0, 6)
    with contextlib.closing(open_regions(path, channels=3)) as source:
        np.testing.assert_array_equal(source.read(0, 0, 128, 512), healthy)
        for _ in range(2):
            with pytest.raises(ImageReadError, match="row 1, column 2 of level 0 is damaged") as e:
                source.read(200, 200, 200, 200)
            assert str(path) in str(e.value)
        source.read(0, 0, 10, 10, 1)


def test_a_corrupt_chunk_is_named(tmp_path):
    folder = write_zarr(tmp_path / "a.zarr", LEVELS)
    chunk = next(p for p in (folder / "0").rglob("*") if p.is_file() and "zarr.json" not in p.name)
    chunk.write_bytes(chunk.read_bytes()[:10])
    with (
        contextlib.closing(open_regions(folder, channels=3)) as source,
        pytest.raises(ImageReadError, match="of level 0 are damaged"),
    ):
        source.read(0, 0, 352, 512)


def test_tiles_that_the_file_leaves_out_are_background(tmp_path):
    path = tmp_path / "a.tif"
    tiles = [IMAGE[:128, :128], None, None, IMAGE[128:256, 128:256]]
    tifffile.imwrite(
        path, iter(tiles), shape=(256, 256, 3), dtype=np.uint8, tile=(128, 128),
        photometric="rgb", compression="deflate", metadata=None,
    )  # fmt: skip
    expected = np.full((256, 256, 3), 201, np.uint8)
    expected[:128, :128], expected[128:, 128:] = tiles[0], tiles[3]
    with contextlib.closing(open_regions(path, channels=3, background=201)) as source:
        np.testing.assert_array_equal(source.read(0, 0, 256, 256), expected)
        np.testing.assert_array_equal(source.read(100, 100, 60, 60), expected[100:160, 100:160])


def write_tiled(path, array, **options):
    tifffile.imwrite(path, array, tile=(64, 64), metadata=None, **options)
    return path


def read_all(path, channels=3, background=0):
    with contextlib.closing(open_regions(path, channels=channels, background=background)) as source:
        return source.read(0, 0, *source.level_shapes[0])


def test_kinds_of_pixels_are_converted_as_in_whole_images(tmp_path):
    path = tmp_path / "a.tif"
    wide = IMAGE.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_all(write_tiled(path, wide, photometric="rgb")), IMAGE)
    np.testing.assert_array_equal(
        read_all(write_tiled(path, GREY[..., 0], photometric="minisblack")), GREY.repeat(3, -1)
    )
    np.testing.assert_array_equal(
        read_all(write_tiled(path, GREY[..., 0], photometric="miniswhite"), 1), 255 - GREY
    )
    swapped = write_tiled(path, wide, photometric="rgb", byteorder=">", compression="deflate")
    np.testing.assert_array_equal(read_all(swapped), IMAGE)
    bits = GREY[..., 0] > 100
    np.testing.assert_array_equal(
        read_all(write_tiled(path, bits, photometric="minisblack"), 1)[..., 0], bits * 255
    )
    planes = IMAGE.transpose(2, 0, 1)
    np.testing.assert_array_equal(
        read_all(write_tiled(path, planes, photometric="rgb", planarconfig="separate")), IMAGE
    )
    grey_jpeg = read_all(write_tiled(path, GREY[..., 0], compression="jpeg"), 1)
    assert np.abs(grey_jpeg.astype(int) - GREY).mean() < 4


def test_transparent_pixels_show_the_background(tmp_path):
    alpha = np.random.default_rng(0).integers(0, 256, (352, 512, 1), dtype=np.uint8)
    rgba = np.dstack([IMAGE, alpha])
    png = tmp_path / "a.png"
    Image.fromarray(rgba).save(png)
    expected = read_image(png, channels=3, background=200).astype(int)
    tiff = write_tiled(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert np.abs(read_all(tiff, background=200) - expected).max() <= 1
    rgba[..., :3] = np.round(IMAGE * (alpha / 255.0))
    tiff = write_tiled(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(read_all(tiff, background=200) - expected).max() <= 1


def test_what_could_only_be_read_wrongly_is_refused(tmp_path, monkeypatch):
    def tiled(name, array, **options):
        return write_tiled(tmp_path / f"{name}.tif", array, **options)

    stack = np.stack([GREY[..., 0]] * 3)
    cases = {
        tiled("float", GREY[..., 0].astype(np.float32)): "float32",
        tiled("cmyk", np.dstack([IMAGE, GREY]), photometric="separated"): "its colours are",
        tiled(
            "palette", GREY[..., 0], photometric="palette",
            colormap=np.zeros((3, 256), np.uint16),
        ): "its colours are",
        tiled("stack", stack, photometric="minisblack"): "several pages of 352 x 512 px",
        tiled("five", np.dstack([IMAGE, GREY, GREY]), photometric="rgb"): "5 samples",
        tiled("turned", IMAGE, photometric="rgb", extratags=[(274, 3, 1, 6, True)]): "orientation",
    }  # fmt: skip
    for path, reason in cases.items():
        with pytest.raises(ImageReadError, match=reason) as caught:
            open_regions(path, channels=3)
        assert str(path) in str(caught.value)
    monkeypatch.setattr(regions, "MAX_FLAT_TIFF", 1000)
    monkeypatch.setattr(tiff_levels, "MAX_STRIP_PIXELS", 10_000)
    with pytest.raises(ImageReadError, match="data tile"):
        open_regions(striped(tmp_path / "strips.tif"), channels=3)


def test_zarr_of_other_shapes_is_explained(tmp_path):
    volume = np.zeros((4, 30, 30, 3), np.uint8)
    cases = {
        write_array(tmp_path / "v", volume, version=3, chunks=(1, 30, 30, 3)): "an image has y and",
        write_array(tmp_path / "f", volume[0] * 1.0, version=2, chunks=(30, 30, 3)): "float64",
        write_array(tmp_path / "c", volume[:, :, :, 0], version=2, chunks=(1, 9, 9)): "an image ha",
    }
    empty = tmp_path / "group"
    empty.mkdir()
    (empty / ".zgroup").write_text('{"zarr_format": 2}')
    cases[empty] = "Zarr group without an image"
    for path, reason in cases.items():
        with pytest.raises(ImageReadError, match=reason):
            open_regions(path, channels=3)


def test_the_first_image_of_a_converted_file_is_found(tmp_path):
    folder = tmp_path / "a.zarr"
    write_zarr(folder / "0", LEVELS, version=2)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    np.testing.assert_array_equal(read_all(folder), IMAGE)


def test_files_that_are_no_images_are_refused(tmp_path):
    text = tmp_path / "a.png"
    text.write_text("not an image")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(40))
    cut = npy(tmp_path / "cut.npy")
    cut.write_bytes(cut.read_bytes()[:5000])
    np.save(tmp_path / "many.npy", np.zeros((2, 3, 4, 5), np.uint8))
    cases = {
        tmp_path / "missing.svs": "no such file",
        text: "none of PNG",
        tmp_path / "folder": "folder",
        tmp_path / "a.tif": "no TIFF, or damaged",
        cut: "cut.npy",
        tmp_path / "many.npy": "shape",
    }
    for path, reason in cases.items():
        with pytest.raises(ImageReadError, match=reason) as caught:
            open_regions(path, channels=3)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="float64"):
        ArrayRegions(np.zeros((4, 4)))


def test_flat_files_that_are_too_large_are_refused_before_they_are_decoded(tmp_path):
    from test_safe_image import bomb

    for side in (13_500, 60_000):
        with pytest.raises(ImageReadError, match="data tile"):
            open_regions(bomb(tmp_path / "a.png", side), channels=1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_plain_tiff_is_upright(orientation, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(IMAGE).save(path, tiffinfo={0x0112: orientation})
    transposed = IMAGE.transpose(1, 0, 2)
    # Where the first row and the first column of the file are to be seen.
    expected = {
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }[orientation]
    with contextlib.closing(open_regions(path, channels=3)) as source:
        assert source.level_shapes == ((512, 352),)
        np.testing.assert_array_equal(source.read(0, 0, 512, 352), expected)
        np.testing.assert_array_equal(source.read(400, 20, 90, 60), expected[400:490, 20:80])


def test_a_turned_photograph_is_upright(tmp_path):
    photo = Image.fromarray(IMAGE)
    exif = photo.getexif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        photo.save(path, exif=exif)
        with contextlib.closing(open_regions(path, channels=3)) as source:
            assert source.level_shapes == ((512, 352),)
            got = source.read(0, 0, 512, 352)
            np.testing.assert_array_equal(got, read_image(path, channels=3))


@pytest.mark.parametrize("package", ["tifffile", "imagecodecs"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    path = write_svs(tmp_path / "a.svs", LEVELS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'patchgd-jax\[wsi\]'"):
        open_regions(path, channels=3)
    plain = image_file(tmp_path / "plain.tif")
    np.testing.assert_array_equal(read_all(plain), IMAGE)


def test_a_slide_that_openslide_cannot_read_is_named(tmp_path):
    pytest.importorskip("openslide")
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageReadError, match=r"a\.mrxs"):
        open_regions(path, channels=3)


def test_a_slide_without_openslide_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"\xff\xd8\xff")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ConfigError, match=r"pip install 'patchgd-jax\[openslide\]'"):
        open_regions(path, channels=3)


def test_a_virtual_image_of_100000_pixels_a_side_costs_only_its_region():
    config = DataConfig(task="digit-sum", size=(100_000, 100_000), channels=1)
    source = UltraMnist(config, "train", 0)
    image = DigitRegions(source, 4)
    assert image.level_shapes == ((100_000, 100_000),)
    digit = source.plan(4).digits[0]
    tracemalloc.start()
    try:
        # Around the middle of a side of the first digit's box.
        y, x = digit.y - 300, digit.x + digit.side // 2 - 300
        got = image.read(y, x, 900, 900)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()
    quarters = [image.read(y + a, x + b, 450, 450) for a in (0, 450) for b in (0, 450)]
    joined = np.vstack([np.hstack(quarters[:2]), np.hstack(quarters[2:])])
    np.testing.assert_array_equal(got, joined)
    box = image.read(digit.y, digit.x, digit.side, digit.side)
    glyph = source.pool.glyphs[digit.glyph]
    step = digit.side // 28
    np.testing.assert_array_equal(box[step // 2 :: step, step // 2 :: step][:28, :28, 0], glyph)


def test_digit_regions_are_those_of_the_example():
    source = UltraMnist(DIGITS, "train", 3)
    whole = source[5]["image"]
    image = DigitRegions(source, 5)
    assert image.level_shapes == (whole.shape[:2],)
    np.testing.assert_array_equal(image.read(0, 0, *whole.shape[:2]), whole)
    np.testing.assert_array_equal(image.read(30, 41, 64, 70), whole[30:94, 41:111])


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest():
    cache, loads = TileCache(1000), []

    def get(key, size=300):
        def load():
            loads.append(key)
            return np.full(size, key, np.uint8)

        assert (cache.get(key, load) == key).all()

    for key in (1, 2, 3, 1, 4):
        get(key)
    assert cache.nbytes == 900
    assert loads == [1, 2, 3, 4]
    get(1)
    get(2)
    assert loads == [1, 2, 3, 4, 2]
    get(9, 5000)
    get(9, 5000)
    assert loads[-2:] == [9, 9]
    assert cache.nbytes == 900
    cache.clear()
    assert cache.nbytes == 0


def test_decoded_tiles_stay_within_their_budget(tmp_path):
    large = np.tile(IMAGE, (6, 4, 1))
    path = write_pages(tmp_path / "a.tif", [large], compression="deflate", tile=256)
    budget = 2 * 2**20
    with contextlib.closing(
        open_regions(path, channels=3, background=0, cache_bytes=budget)
    ) as source:
        assert isinstance(source, TiffRegions)
        tracemalloc.start()
        try:
            for y in range(0, large.shape[0], 100):
                for x in range(0, large.shape[1], 300):
                    source.read(y, x, 200, 200)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert large.nbytes > 5 * budget
    assert budget / 2 < kept < budget + 2**20
    assert peak < budget + 4 * 2**20


def test_nothing_but_our_error_escapes_damaged_files(tmp_path, caplog):
    caplog.set_level("CRITICAL", logger="tifffile")
    rng = np.random.default_rng(5)
    small = [level[:96, :160] for level in LEVELS[:1]] + [LEVELS[0][:48, :80]]
    writers = {
        "a.tif": lambda p: write_pages(p, small, tile=64),
        "b.tif": lambda p: write_pages(p, small, tile=64, compression="deflate"),
        "c.svs": lambda p: write_svs(p, small, tile=64),
        "d.ome.tif": lambda p: write_ome(p, small, tile=64),
        "e.ndpi": lambda p: write_ndpi(p, [LEVELS[0], LEVELS[1]]),
    }
    for name, write in writers.items():
        path = write(tmp_path / name)
        good = path.read_bytes()
        for trial in range(40):
            data = bytearray(good)
            reach = min(1000, len(data)) if trial % 2 else len(data)
            for _ in range(int(rng.integers(1, 8))):
                data[int(rng.integers(reach))] = int(rng.integers(256))
            path.write_bytes(
                bytes(data[: int(rng.integers(1, len(data)))] if trial % 3 == 0 else data)
            )
            with contextlib.suppress(ImageReadError), warnings.catch_warnings():
                warnings.simplefilter("error")
                with contextlib.closing(open_regions(path, channels=3)) as source:
                    assert source.read(-5, -5, 200, 200).dtype == np.uint8
