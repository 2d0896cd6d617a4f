"""Which patches hold something, against a count of the pixels of each patch."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
from pyramids import halved, tissue, write_pages
from skimage.filters import threshold_otsu
from test_fitting import Recorded

from patchgd_jax.config import BackgroundConfig
from patchgd_jax.data.images.array_regions import ArrayRegions
from patchgd_jax.data.images.background import _window_means, patch_mask
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.errors import ConfigError

OTSU = BackgroundConfig(method="otsu")


def slide(height=512, width=768):
    """White with noise, and dark blobs: `uint8 [H, W, 1]`."""
    rng = np.random.default_rng(3)
    image = rng.integers(235, 256, (height, width), dtype=np.uint8)
    for _ in range(9):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        h, w = (int(n) for n in rng.integers(5, 130, 2))
        part = image[y : y + h, x : x + w]
        part[:] = rng.integers(60, 160, part.shape)
    image[90:310, 390:610] = 100
    return image[..., None]


def mask_of(image, config, background, patch=64, stride=64, rows=None, cols=None):
    source = image if not isinstance(image, np.ndarray) else ArrayRegions(image, background)
    height, width = source.level_shapes[0]
    return patch_mask(
        source,
        rows=rows or -(-(height - patch) // stride) + 1,
        cols=cols or -(-(width - patch) // stride) + 1,
        patch=patch,
        stride=stride,
        config=config,
        background=background,
    )


def counted(content, patch, stride, rows, cols, share):
    """The same by cutting every patch out of the padded image."""
    height, width = (rows - 1) * stride + patch, (cols - 1) * stride + patch
    padded = np.zeros((height, width), bool)
    padded[: content.shape[0], : content.shape[1]] = content[:height, :width]
    return np.array(
        [
            [
                padded[r * stride : r * stride + patch, c * stride : c * stride + patch].mean()
                >= share - 1e-9
                for c in range(cols)
            ]
            for r in range(rows)
        ]
    )


@pytest.mark.parametrize(("patch", "stride"), [(64, 64), (64, 40), (100, 100), (37, 23)])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("background", [255, 0])
def test_patches_count_by_their_share_of_content(patch, stride, share, background):
    image = slide() if background == 255 else 255 - slide()
    distance = np.abs(image[..., 0].astype(int) - background)
    cases = {
        BackgroundConfig(method="otsu", share=share): distance > threshold_otsu(distance),
        BackgroundConfig(
            method="threshold", threshold=220 if background else 35, share=share
        ): distance >= 35,
    }
    for config, content in cases.items():
        got = mask_of(image, config, background, patch, stride)
        expected = counted(content, patch, stride, *got.shape, share)
        assert 0 < expected.sum() < expected.size
        np.testing.assert_array_equal(got, expected)


def test_colour_counts_by_its_grey_value():
    image = np.full((128, 128, 3), 250, np.uint8)
    image[64:, 64:] = (200, 60, 180)
    expected = np.array([[False, False], [False, True]])
    np.testing.assert_array_equal(mask_of(image, OTSU, 255), expected)


def test_only_the_lowest_level_that_shows_patches_is_read():
    full = np.repeat(slide(), 3, -1)
    source = Recorded([full, halved(full, 4), halved(full, 16), halved(full, 64)])
    source.downsamples = (1.0, 4.0, 16.0, 64.0)
    got = mask_of(source, OTSU, 255)
    assert {level for level, _, _ in source.reads} == {2}
    assert (got != mask_of(full, OTSU, 255)).sum() <= 4


def test_a_pyramid_in_a_file_gives_the_mask_of_its_image(tmp_path):
    image = np.full((1024, 1536, 3), 255, np.uint8)
    image[256:640, 512:1024] = tissue(384, 512) // 2
    path = write_pages(tmp_path / "a.tif", [image, halved(image, 4), halved(image, 16)])
    expected = np.zeros((8, 12), bool)
    expected[2:5, 4:8] = True
    with contextlib.closing(open_regions(path, channels=3, background=255)) as source:
        np.testing.assert_array_equal(mask_of(source, OTSU, 255, 128, 128), expected)


def test_a_large_image_of_one_level_is_read_small(monkeypatch):
    from patchgd_jax.data.images import background

    monkeypatch.setattr(background, "_MAX_SIDE", 100)
    image = np.full((512, 768, 1), 255, np.uint8)
    image[128:256, 256:320] = 40
    expected = np.zeros((8, 12), bool)
    expected[2:4, 4] = True
    config = BackgroundConfig(method="otsu", share=0.5)
    np.testing.assert_array_equal(mask_of(image, config, 255), expected)


@pytest.mark.parametrize("method", ["otsu", "threshold"])
@pytest.mark.parametrize("background", [0, 255])
def test_an_image_without_content_keeps_one_patch(method, background):
    config = BackgroundConfig(method=method, threshold=128)
    for value in (background, abs(background - 3)):
        image = np.full((256, 256, 1), value, np.uint8)
        assert mask_of(image, config, background).sum() == 1
    image = np.full((256, 256, 1), background, np.uint8)
    image[130:140, 70:75] = abs(background - 10)
    got = mask_of(image, config, background)
    assert got.sum() == 1
    assert got[2, 1]


def test_one_colour_is_background_whatever_the_colour():
    assert mask_of(np.full((256, 256, 1), 100, np.uint8), OTSU, 255).sum() == 1


def test_noise_is_no_content():
    noise = np.random.default_rng(0).integers(244, 256, (256, 256, 1), dtype=np.uint8)
    assert mask_of(noise, OTSU, 255).sum() == 1


def test_too_little_content_everywhere_keeps_the_fullest_patch():
    image = np.full((256, 256, 1), 255, np.uint8)
    image[10:14, 10:14] = 0
    # Fainter, but more of it.
    image[140:148, 200:208] = 210
    got = mask_of(image, BackgroundConfig(method="threshold", share=0.9), 255)
    assert got.sum() == 1
    assert got[2, 3]


def test_method_none_keeps_all():
    got = mask_of(np.zeros((256, 256, 1), np.uint8), BackgroundConfig(), 0)
    assert got.all()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.filters", None)
    with pytest.raises(ConfigError, match=r"pip install 'patchgd-jax\[wsi\]'"):
        mask_of(slide(), OTSU, 255)


def test_windows_between_pixels_are_exact():
    rng = np.random.default_rng(0)
    values = rng.random((12, 17))
    fine = np.kron(values, np.ones((10, 10)))
    tops, lefts, sides = np.array([0.0, 2.3, 9.9]), np.array([0.4, 5.0, 15.1]), (2.5, 3.2)
    padded = np.pad(fine, ((0, 100), (0, 100)))
    expected = [
        [
            padded[round(10 * t) : round(10 * t) + 25, round(10 * s) : round(10 * s) + 32].mean()
            for s in lefts
        ]
        for t in tops
    ]
    np.testing.assert_allclose(_window_means(values, tops, lefts, sides), expected, rtol=1e-12)
