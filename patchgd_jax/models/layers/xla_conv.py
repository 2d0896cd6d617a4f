"""XLA's own 2-D convolution, in this package's layout."""

from __future__ import annotations

from jax import Array, lax


def xla_conv2d(x: Array, w: Array, stride: int, padding: int) -> Array:
    """Convolves with zero padding on every side; grouped if kernels see fewer than C channels.

    Args:
        x: `float [M, H, W, C]`.
        w: `float [k, k, C / groups, F]` of the same dtype.
        stride: of both axes.
        padding: zeros added on every side, in pixels.
    """
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // w.shape[2],
    )
