"""PatchGrid against a NumPy loop."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from patchgd_jax import ConfigError, PatchGrid

SHAPES = [
    (8, 8, 4, 0), (12, 20, 4, 4), (13, 9, 4, 4), (11, 14, 5, 3), (6, 6, 6, 6),
    (7, 30, 7, 2), (9, 10, 4, 1), (100, 5, 5, 4),
]  # fmt: skip


def pixels(height, width, dtype):
    return np.arange(2 * height * width * 3).reshape(2, height, width, 3).astype(dtype)


@pytest.mark.parametrize(("height", "width", "patch", "stride"), SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_take_equals_slicing_a_padded_image(height, width, patch, stride, dtype):
    grid = PatchGrid(height, width, patch, stride, background=7)
    step = stride or patch
    images = pixels(height, width, dtype)
    value = 7 if dtype == np.uint8 else 7 / 255
    padded = np.full((2, grid.padded_height, grid.padded_width, 3), value, dtype)
    padded[:, :height, :width] = images
    ids = np.stack([np.arange(grid.num_patches), np.arange(grid.num_patches)[::-1]])
    got = np.asarray(grid.take(jnp.asarray(images), jnp.asarray(ids)))
    assert got.dtype == dtype
    for b, row in enumerate(ids):
        for k, n in enumerate(row):
            y, x = n // grid.cols * step, n % grid.cols * step
            np.testing.assert_array_equal(got[b, k], padded[b, y : y + patch, x : x + patch])


@pytest.mark.parametrize(("height", "width", "patch", "stride"), SHAPES)
def test_every_pixel_is_in_a_patch_and_no_patch_is_padding_only(height, width, patch, stride):
    grid = PatchGrid(height, width, patch, stride)
    step = stride or patch
    seen = np.zeros((grid.padded_height, grid.padded_width), int)
    for r in range(grid.rows):
        for c in range(grid.cols):
            seen[r * step : r * step + patch, c * step : c * step + patch] += 1
            assert r * step < height
            assert c * step < width
    assert seen.min() >= 1
    assert seen.shape >= (height, width)
    assert np.asarray(grid.mask(jnp.array([[height, width]]))).all()
    if step == patch:
        assert seen.max() == 1


def test_mask_of_smaller_images():
    grid = PatchGrid(40, 60, 20, 10)
    mask = np.asarray(grid.mask(jnp.array([[40, 60], [11, 30], [20, 1]])))
    assert mask.shape == (3, grid.rows, grid.cols)
    for b, (height, width) in enumerate([(40, 60), (11, 30), (20, 1)]):
        # The grid an image of that size has alone; one smaller than a patch has one patch.
        alone = PatchGrid(max(height, 20), max(width, 20), 20, 10)
        wanted = np.zeros((grid.rows, grid.cols), bool)
        wanted[: alone.rows, : alone.cols] = True
        np.testing.assert_array_equal(mask[b], wanted)


def test_ids_out_of_range_are_clipped():
    grid = PatchGrid(8, 8, 4)
    images = pixels(8, 8, np.uint8)[:1]
    got = grid.take(images, jnp.array([[99, -5]]))
    np.testing.assert_array_equal(got, grid.take(images, jnp.array([[3, 0]])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 8, 9), "patch side 9 is larger than the image .16 x 8 px"),
        ((16, 16, 4, 5), "stride 5"),
        ((16, 16, 0), "patch side 0"),
    ],
)
def test_impossible_grids_are_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PatchGrid(*arguments)


def test_grids_are_hashable_and_equal_by_value():
    assert hash(PatchGrid(8, 8, 4)) == hash(PatchGrid(8, 8, 4, 4))
    assert PatchGrid(8, 8, 4) == PatchGrid(8, 8, 4, 4)
