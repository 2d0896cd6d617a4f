"""Finds the patches with content, by the distance of pixels from the background."""

from __future__ import annotations

import numpy as np

from patchgd_jax.config import BackgroundConfig
from patchgd_jax.data.images.fitting import read_resized
from patchgd_jax.data.images.pixels import to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.errors import ConfigError

_MIN_PATCH_SIDE = 4
_MAX_SIDE = 4096
_MIN_CONTRAST = 16
"""Grey levels; smaller differences are noise of the camera or of the compression."""


def patch_mask(
    source: RegionSource,
    *,
    rows: int,
    cols: int,
    patch: int,
    stride: int,
    config: BackgroundConfig,
    background: int,
    level: int = 0,
) -> np.ndarray:
    """Finds the patches with content.

    A pixel is content if its grey value differs enough from the background's. The lowest level in
    which a patch has at least 4 px a side is examined, shrunk to 4096 px a side at most. Beyond the
    image is background.

    Args:
        source: the image.
        rows: rows of patches.
        cols: columns of patches.
        patch: side of a patch in pixels of `level`.
        stride: pixels of `level` between neighbouring patches.
        config: threshold of content, and its least share of a patch.
        background: uint8 value of the background.
        level: pyramid level of the grid.

    Returns:
        `bool [rows, cols]`, True for patches with content. If none has enough, or the image has a
        single colour, the one with the most.

    Raises:
        ImageReadError: if the level cannot be read.
        ConfigError: for method otsu without scikit-image.
    """
    if config.method == "none":
        return np.ones((rows, cols), bool)
    distance = _distance(source, patch, background, level)
    content = distance >= _limit(distance, config, background)

    height, width = source.level_shapes[level]
    scale = distance.shape[0] / height, distance.shape[1] / width
    tops = np.arange(rows) * stride * scale[0]
    lefts = np.arange(cols) * stride * scale[1]
    sides = patch * scale[0], patch * scale[1]
    share = _window_means(content, tops, lefts, sides)
    mask = share >= config.share - 1e-9
    if not mask.any():
        best = share if share.any() else _window_means(distance, tops, lefts, sides)
        mask.flat[int(np.argmax(best))] = True
    return mask


def _distance(source: RegionSource, patch: int, background: int, base: int) -> np.ndarray:
    """Distance of grey values from the background in the shrunk image, `uint8 [h, w]`."""
    sides = [patch * source.downsamples[base] / scale for scale in source.downsamples]
    large = [k for k, side in enumerate(sides) if k >= base and side >= _MIN_PATCH_SIDE]
    level = max(large, default=base)
    height, width = source.level_shapes[level]
    # A whole factor, so that each small pixel is the average of equally many large ones.
    by = -(-max(height, width) // _MAX_SIDE)
    size = (-(-height // by), -(-width // by))
    image, (rows, cols) = read_resized(source, size, background, level)
    grey = to_uint8(image[:rows, :cols], channels=1, background=background)[..., 0]
    return np.abs(grey.astype(np.int16) - background).astype(np.uint8)


def _limit(distance: np.ndarray, config: BackgroundConfig, background: int) -> int:
    """The smallest distance of content from the background; 256: there is no content."""
    if config.method == "threshold":
        return max(1, abs(config.threshold - background))
    if int(distance.max()) - int(distance.min()) < _MIN_CONTRAST:
        return 256
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ConfigError(
            "data.empty.method otsu needs scikit-image; install it with: "
            "pip install 'patchgd-jax[wsi]', or use method threshold"
        ) from error
    return int(threshold_otsu(distance)) + 1


def _window_means(
    values: np.ndarray, tops: np.ndarray, lefts: np.ndarray, sides: tuple[float, float]
) -> np.ndarray:
    """Means over windows with fractional sides, by exact areas; 0 outside.

    Returns:
        `float64 [len(tops), len(lefts)]`.
    """
    # The integral along an axis is linear within a pixel, so interpolating it is exact.
    rows = _interpolated_cumsum(values, tops + sides[0]) - _interpolated_cumsum(values, tops)
    columns = rows.T
    total = _interpolated_cumsum(columns, lefts + sides[1]) - _interpolated_cumsum(columns, lefts)
    return total.T / (sides[0] * sides[1])


def _interpolated_cumsum(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of `values[:end]` along the first axis for fractional ends, `[len(ends), ...]`."""
    ends = np.clip(ends, 0, len(values))
    whole = ends.astype(int)
    part = values[np.minimum(whole, len(values) - 1)] * (ends - whole)[:, None]
    bounds = np.concatenate([[0], whole])
    out = np.zeros((len(ends), values.shape[1]))
    total = np.zeros(values.shape[1])
    for k, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        total = total + values[start:stop].sum(0, dtype=np.float64)
        out[k] = total
    return out + part
