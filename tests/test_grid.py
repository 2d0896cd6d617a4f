"""PatchGrid against slices of a padded image, for grids of any shape."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import quick

from patchgd_jax import ConfigError, PatchGrid


@st.composite
def grids(draw):
    """Grids with and without overlap, some with padding at the right and the lower border."""
    patch = draw(st.integers(1, 7))
    height, width = (draw(st.integers(patch, 20)) for _ in range(2))
    return PatchGrid(height, width, patch, draw(st.integers(0, patch)), background=7)


def pixels(height, width, dtype):
    return np.arange(2 * height * width * 3).reshape(2, height, width, 3).astype(dtype)


def corners(grid):
    """The first pixel of each patch, by its number."""
    return [(r * grid.stride, c * grid.stride) for r in range(grid.rows) for c in range(grid.cols)]


@given(grids(), st.sampled_from([np.uint8, np.float32]))
def test_take_equals_slicing_a_padded_image(grid, dtype):
    images = pixels(grid.height, grid.width, dtype)
    value = 7 if dtype == np.uint8 else 7 / 255
    padded = np.full((2, grid.padded_height, grid.padded_width, 3), value, dtype)
    padded[:, : grid.height, : grid.width] = images
    ids = np.stack([np.arange(grid.num_patches), np.arange(grid.num_patches)[::-1]])
    got = np.asarray(quick(grid.take)(images, ids))
    patch = grid.patch
    windows = np.stack([padded[:, y : y + patch, x : x + patch] for y, x in corners(grid)], 1)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[0], windows[0])
    np.testing.assert_array_equal(got[1], windows[1, ::-1])


@given(grids())
def test_every_pixel_is_in_a_patch_and_no_patch_is_padding_only(grid):
    seen = np.zeros((grid.padded_height, grid.padded_width), int)
    for y, x in corners(grid):
        seen[y : y + grid.patch, x : x + grid.patch] += 1
        assert y < grid.height
        assert x < grid.width
    assert seen.min() >= 1
    assert seen.shape >= (grid.height, grid.width)
    assert np.asarray(grid.mask(jnp.array([[grid.height, grid.width]]))).all()
    if grid.stride == grid.patch:
        assert seen.max() == 1


@given(grids(), st.data())
def test_the_mask_of_a_smaller_image_is_the_grid_that_it_has_alone(grid, data):
    height, width = (data.draw(st.integers(1, side)) for side in (grid.height, grid.width))
    # One smaller than a patch has one patch.
    sides = max(height, grid.patch), max(width, grid.patch)
    alone = PatchGrid(*sides, grid.patch, grid.stride)
    wanted = np.zeros((2, grid.rows, grid.cols), bool)
    wanted[0] = True
    wanted[1, : alone.rows, : alone.cols] = True
    mask = grid.mask(jnp.array([[grid.height, grid.width], [height, width]]))
    np.testing.assert_array_equal(mask, wanted)


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
