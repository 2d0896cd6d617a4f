"""Large images brought to a size, against Pillow's own resize of the whole."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from pyramids import levels_of, tissue, write_pages

from patchgd_jax.config import DataConfig
from patchgd_jax.data.images import fitting
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.fitting import best_level, fitted_shape, read_resized
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.images.tiff_regions import TiffRegions
from patchgd_jax.data.synthetic.ultramnist import DigitRegions, UltraMnist

IMAGE = tissue(480, 720)


class Recorded(ArrayRegions):
    """Levels from arrays, remembering which were read."""

    def __init__(self, levels, tile=None):
        super().__init__(levels[0], 0)
        self.level_shapes = tuple(level.shape[:2] for level in levels)
        self.levels, self.tile, self.reads = levels, tile, []

    def _inside(self, level, y, x, height, width):
        self.reads.append((level, y, height))
        return self.levels[level][y : y + height, x : x + width].copy()


def test_the_best_level_is_the_smallest_that_is_large_enough():
    source = Recorded(levels_of(IMAGE, (1, 2, 4, 16)))
    cases = {
        (480, 720): 0,
        (241, 300): 0,
        (240, 360): 1,
        (100, 181): 1,
        (120, 180): 2,
        (31, 45): 2,
        (30, 45): 3,
        (1, 1): 3,
        (4096, 4096): 0,
    }
    for (height, width), level in cases.items():
        assert best_level(source, height, width) == level


def test_an_image_fits_and_keeps_its_proportions():
    rng = np.random.default_rng(0)
    for _ in range(500):
        shape, size = (tuple(int(n) for n in rng.integers(1, 5000, 2)) for _ in range(2))
        got = fitted_shape(shape, size)
        assert 1 <= got[0] <= size[0]
        assert 1 <= got[1] <= size[1]
        if shape[0] <= size[0] and shape[1] <= size[1]:
            assert got == shape
            continue
        scale = min(size[0] / shape[0], size[1] / shape[1])
        assert got[0] == size[0] or got[1] == size[1]
        assert abs(got[0] - shape[0] * scale) <= 0.5 or got[0] == 1
        assert abs(got[1] - shape[1] * scale) <= 0.5 or got[1] == 1


@pytest.mark.parametrize("size", [(240, 360), (96, 200), (200, 96), (97, 101), (479, 719)])
@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strip", [1, 9 * 720 * 4, 2**20])
def test_bands_give_what_the_whole_image_gives(size, tile, channels, strip, monkeypatch):
    image = IMAGE[..., :channels]
    monkeypatch.setattr(fitting, "_BAND_BYTES", 5 * 720 * channels)
    monkeypatch.setattr(fitting, "_STRIP_BYTES", strip)
    source = Recorded([image], tile)
    got, (height, width) = read_resized(source, size, 9)
    assert len(source.reads) > 6
    assert (height, width) == fitted_shape((480, 720), size)
    plain = Image.fromarray(image if channels == 3 else image[..., 0])
    expected = np.asarray(plain.resize((width, height), Image.Resampling.BOX))
    expected = expected.reshape(height, width, channels)
    np.testing.assert_array_equal(got[:height, :width], expected)
    assert (got[height:] == 9).all()
    assert (got[:, width:] == 9).all()
    assert got.shape == (*size, channels)


def test_whole_factors_average_the_area():
    got, shape = read_resized(ArrayRegions(IMAGE), (120, 180), 0)
    blocks = IMAGE.reshape(120, 4, 180, 4, 3).mean((1, 3))
    assert shape == (120, 180)
    assert np.abs(got - blocks).max() <= 1


def test_an_image_is_never_enlarged():
    got, shape = read_resized(ArrayRegions(IMAGE), (600, 721), 200)
    assert shape == (480, 720)
    np.testing.assert_array_equal(got[:480, :720], IMAGE)
    assert (got[480:] == 200).all()
    assert (got[:, 720:] == 200).all()
    small = Recorded(levels_of(IMAGE, (1, 4)))
    got, shape = read_resized(small, (300, 300), 200, level=1)
    assert shape == (120, 180)
    np.testing.assert_array_equal(got[:120, :180], small.levels[1])


def test_only_the_level_that_suffices_is_read():
    source = Recorded(levels_of(IMAGE, (1, 2, 4)))
    read_resized(source, (200, 300), 0)
    assert {level for level, _, _ in source.reads} == {1}
    source.reads.clear()
    read_resized(source, (200, 300), 0, level=2)
    assert {level for level, _, _ in source.reads} == {2}


def test_each_tile_is_decoded_once(tmp_path, monkeypatch):
    path = write_pages(tmp_path / "a.tif", [IMAGE], tile=64)
    monkeypatch.setattr(fitting, "_BAND_BYTES", 1)
    loads = []
    load = TiffRegions._load
    monkeypatch.setattr(TiffRegions, "_load", lambda self, *a: loads.append(a) or load(self, *a))
    with contextlib.closing(open_regions(path, channels=3, cache_bytes=0)) as source:
        read_resized(source, (100, 100), 0)
    assert len(loads) == len(set(loads)) == 8 * 12


def test_memory_does_not_grow_with_the_level():
    config = DataConfig(task="digit-sum", size=(16_000, 16_000))
    source = DigitRegions(UltraMnist(config, "train", 0), 0)
    read_resized(source, (64, 64), 0)
    tracemalloc.start()
    try:
        got, _ = read_resized(source, (512, 512), 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.any()
    assert peak < 16_000**2 / 2
