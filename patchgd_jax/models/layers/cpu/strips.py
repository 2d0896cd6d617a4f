"""Convolution of large maps in horizontal strips, which bounds Winograd's buffers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from patchgd_jax.models.layers.cpu.winograd import winograd_weight_gradient


def strip_rows(height: int, row_bytes: int, most_bytes: int) -> int:
    """The most rows of a strip that divide `height` and fit `most_bytes`; 0 if they are too few.

    Each strip is convolved with a row more on either side, so few rows are much extra work.
    """
    fitting = (r for r in range(min(height, most_bytes // row_bytes), 7, -1) if height % r == 0)
    return next(fitting, 0)


def _strip(x: Array, index: Array, rows: int) -> Array:
    """Rows `index * rows - 1` to `(index + 1) * rows` of `x [M, H, W, C]`; zero beyond the map."""
    first, height = index * rows, x.shape[1]
    above = lax.dynamic_slice_in_dim(x, jnp.maximum(first - 1, 0), 1, 1)
    below = lax.dynamic_slice_in_dim(x, jnp.minimum(first + rows, height - 1), 1, 1)
    return jnp.concatenate(
        [
            jnp.where(first > 0, above, 0),
            lax.dynamic_slice_in_dim(x, first, rows, 1),
            jnp.where(first + rows < height, below, 0),
        ],
        1,
    )


def map_strips(convolve: Callable[[Array], Array], x: Array, rows: int) -> Array:
    """`convolve(x)` of a convolution of side 3 at stride 1 and padding 1, a strip at a time.

    The buffers are then those of a strip of `rows` rows, which must divide the height.
    """
    count, height, width, _ = x.shape
    features = jax.eval_shape(convolve, x).shape[-1]
    # Every value is overwritten. A constant would be kept outside of the training loop, for good.
    start = jnp.broadcast_to(x[..., :1], (count, height, width, features))

    def convolve_strip(index: Array, y: Array) -> Array:
        strip = convolve(_strip(x, index, rows))[:, 1:-1]
        return lax.dynamic_update_slice_in_dim(y, strip, index * rows, 1)

    return lax.fori_loop(0, height // rows, convolve_strip, start)


def strips_weight_gradient(x: Array, dy: Array, rows: int) -> Array:
    """As `winograd_weight_gradient`, summed over strips of `rows` rows."""

    def add(total: Array, index: Array) -> tuple[Array, None]:
        part = lax.dynamic_slice_in_dim(dy, index * rows, rows, 1)
        part = jnp.pad(part, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return total + winograd_weight_gradient(_strip(x, index, rows), part), None

    start = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    return lax.scan(add, start, jnp.arange(x.shape[1] // rows))[0]
