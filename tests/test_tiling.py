"""Images converted to tiled pyramids, against their pixels and against OpenSlide."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from pyramids import levels_of, tissue, write_pages, write_svs, write_zarr
from test_regions import damage

from patchgd_jax.data.images import tiling
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.data.images.tiling import tile_image
from patchgd_jax.errors import ConfigError, DiskError

IMAGE = tissue(331, 517)


def png(path, image=IMAGE):
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(path)
    return path


def averaged(image):
    """Half the size, rounded up; pixels at an odd edge are averages of fewer."""
    height, width = image.shape[:2]
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    total, count = (
        np.pad(a, pad).reshape(-(-height // 2), 2, -(-width // 2), 2, -1).sum((1, 3))
        for a in (image.astype(np.int64), np.ones_like(image, np.int64))
    )
    return (2 * total + count) // (2 * count)


def levels_in(path, channels=3):
    with contextlib.closing(open_regions(path, channels=channels, background=255)) as source:
        return [source.read(0, 0, *s, k) for k, s in enumerate(source.level_shapes)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tile", [64, 112])
def test_lossless_levels_are_averages_of_two_by_two(channels, tile, tmp_path):
    image = IMAGE[..., :channels]
    shapes = tile_image(
        png(tmp_path / "a.png", image), tmp_path / "a.tif", channels=channels, tile=tile,
        quality="lossless", levels=4,
    )  # fmt: skip
    assert shapes == ((331, 517), (166, 259), (83, 130), (42, 65))
    got = levels_in(tmp_path / "a.tif", channels)
    assert tuple(level.shape[:2] for level in got) == shapes
    for level in got:
        np.testing.assert_array_equal(level, image)
        image = averaged(image)


@pytest.mark.parametrize(("quality", "error"), [(95, 3), (60, 6)])
def test_jpeg_levels_are_near(quality, error, tmp_path):
    tile_image(png(tmp_path / "a.png"), tmp_path / "a.tif", tile=64, quality=quality, levels=2)
    first, second = levels_in(tmp_path / "a.tif")
    assert np.abs(first.astype(int) - IMAGE).mean() < error
    assert np.abs(second - averaged(IMAGE)).mean() < error


@pytest.mark.parametrize("quality", [90, "lossless"])
@pytest.mark.parametrize("channels", [1, 3])
def test_openslide_reads_the_same_levels(quality, channels, tmp_path):
    openslide = pytest.importorskip("openslide")
    path = png(tmp_path / "a.png", tissue(701, 1103)[..., :channels])
    shapes = tile_image(
        path, tmp_path / "a.tif", channels=channels, tile=128, quality=quality, levels=4
    )
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert tuple((h, w) for w, h in slide.level_dimensions) == shapes
        for level, ours in enumerate(levels_in(tmp_path / "a.tif")):
            theirs = slide.read_region((0, 0), level, slide.level_dimensions[level])
            np.testing.assert_array_equal(ours, np.asarray(theirs.convert("RGB")))


def test_levels_end_at_1024_pixels(tmp_path):
    path = png(tmp_path / "a.png", np.zeros((40, 4097, 1), np.uint8))
    shapes = tile_image(path, tmp_path / "a.tif", channels=1)
    assert shapes == ((40, 4097), (20, 2049), (10, 1025), (5, 513))
    assert tile_image(png(tmp_path / "b.png"), tmp_path / "b.tif") == ((331, 517),)


@pytest.mark.parametrize("kind", ["svs", "strips", "zarr", "npy"])
def test_large_formats_pass_through(kind, tmp_path):
    levels = levels_of(IMAGE, (1, 4))
    path = {
        "svs": lambda: write_svs(tmp_path / "a.svs", levels),
        "strips": lambda: png(tmp_path / "a.tif"),
        "zarr": lambda: write_zarr(tmp_path / "a.zarr", levels),
        "npy": lambda: np.save(tmp_path / "a.npy", IMAGE) or tmp_path / "a.npy",
    }[kind]()
    out = tmp_path / "out.tif"
    tile_image(path, out, tile=64, quality="lossless", levels=3)
    with (
        contextlib.closing(open_regions(path, channels=3)) as source,
        contextlib.closing(open_regions(out, channels=3)) as tiled,
    ):
        np.testing.assert_array_equal(tiled.read(0, 0, 331, 517), source.read(0, 0, 331, 517))
        assert tiled.tile == (64, 64)
        assert len(tiled.level_shapes) == 3
        assert tiled.mpp == (source.mpp and pytest.approx(source.mpp, rel=1e-4))


def test_a_tile_row_at_a_time_is_in_memory(tmp_path):
    large = np.lib.format.open_memmap(
        tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(6000, 2000, 3)
    )
    large[:, :300] = 90
    large.flush()
    tracemalloc.start()
    try:
        tile_image(tmp_path / "a.npy", tmp_path / "a.tif", tile=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < large.nbytes / 2
    with contextlib.closing(open_regions(tmp_path / "a.tif", channels=3)) as tiled:
        assert tiled.level_shapes[-1] == (750, 250)
        assert abs(int(tiled.read(700, 20, 1, 1, 3)[0, 0, 0]) - 90) < 4


def test_what_exists_is_kept(tmp_path):
    path, out = png(tmp_path / "a.png"), tmp_path / "a.tif"
    out.write_bytes(b"precious")
    with pytest.raises(DiskError, match="exists") as caught:
        tile_image(path, out)
    assert str(out) in str(caught.value)
    assert out.read_bytes() == b"precious"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_pages(tmp_path / "a.tif", [IMAGE], compression="deflate", tile=64)
    damage(source, 0, 40)
    with pytest.raises(ImageReadError, match="row 4, column 4"):
        tile_image(source, tmp_path / "out.tif", tile=64, levels=3)
    with pytest.raises(DiskError, match="cannot write"):
        tile_image(png(tmp_path / "b.png"), tmp_path / "missing" / "out.tif")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiling, "_halved", full)
    with pytest.raises(DiskError, match="No space left"):
        tile_image(tmp_path / "b.png", tmp_path / "out.tif", tile=64, levels=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.png"]


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_flat_files_are_limited_in_size_until_the_limit_is_raised(suffix, tmp_path, monkeypatch):
    path = png(tmp_path / f"a.{suffix}")
    with pytest.raises(ImageReadError, match=r"331 x 517 px.*data tile"):
        tile_image(path, tmp_path / "out.tif", max_pixels=331 * 517 - 1)
    # Pillow itself refuses what has more than twice this.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    with pytest.raises(Image.DecompressionBombError), Image.open(path) as image:
        image.load()
    seen = []
    write = tiling._write

    def watched(*arguments):
        seen.append(Image.MAX_IMAGE_PIXELS)
        write(*arguments)

    monkeypatch.setattr(tiling, "_write", watched)
    tile_image(path, tmp_path / "out.tif", max_pixels=331 * 517, quality="lossless")
    np.testing.assert_array_equal(levels_in(tmp_path / "out.tif")[0], IMAGE)
    assert [*seen, Image.MAX_IMAGE_PIXELS] == [80_000] * 2


def test_settings_out_of_range_are_refused(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png")
    for setting in ({"tile": 100}, {"tile": 8192}, {"quality": 0}, {"quality": 101}, {"levels": 0}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            tile_image(path, tmp_path / "a.tif", **setting)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ConfigError, match="wsi"):
        tile_image(path, tmp_path / "a.tif")
    assert not (tmp_path / "a.tif").exists()
