"""Pooling of whole maps or windows, with gradients of maxima by position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax


@jax.custom_vjp
def max_pool_3x3(x: Array) -> Array:
    """The maximum of 3x3 windows at stride 2 with padding 1, as torch.nn.MaxPool2d(3, 2, 1).

    Of several equal maxima in a window, the first gets all of the gradient.

    Args:
        x: `float [M, H, W, C]`.

    Returns:
        `float [M, ceil(H / 2), ceil(W / 2), C]`.
    """
    return _forward(x)[0]


def _forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    lowest = jnp.array(-jnp.inf, x.dtype)
    height, width = x.shape[1:3]
    rows, cols = -(-height // 2), -(-width // 2)
    padded = jnp.pad(
        x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)), constant_values=lowest
    )
    best = jnp.full((x.shape[0], rows, cols, x.shape[3]), lowest)
    # For the gradient, one byte per output replaces both maps.
    winner = jnp.zeros(best.shape, jnp.uint8)
    for tap in range(9):
        i, j = divmod(tap, 3)
        pixel = padded[:, i : i + 2 * rows : 2, j : j + 2 * cols : 2]
        winner = jnp.where(pixel > best, jnp.uint8(tap), winner)
        # Unlike where, this propagates NaN.
        best = jnp.maximum(best, pixel)
    return best, (winner, jnp.zeros((0, height, width, 0), x.dtype))


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    winner, like = saved
    height, width = like.shape[1:3]
    rows, cols = dy.shape[1:3]
    margin = ((0, 0), (0, 1), (0, 1), (0, 0))
    # Left to itself, XLA:CPU computes the margins pixel by pixel in the loop below, five times
    # slower (measured).
    winner, dy = lax.optimization_barrier((jnp.pad(winner, margin), jnp.pad(dy, margin)))

    def routed(i: int, j: int) -> Array:
        """The gradient of tap `(i, j)`; tap 0 is that of the window in the next row (column)."""
        window = (
            slice(None),
            slice(int(i == 0), rows + int(i == 0)),
            slice(int(j == 0), cols + int(j == 0)),
        )
        return jnp.where(winner[window] == 3 * i + j, dy[window], 0)

    # An even pixel is the middle of one window, an odd one the last of one and the first of the
    # next; so each of the four phases of dx is a plain sum.
    reached = ((1,), (2, 0))
    phases = [
        jnp.stack([sum(routed(i, j) for i in reached[a] for j in reached[b]) for b in (0, 1)], 3)
        for a in (0, 1)
    ]
    dx = jnp.stack(phases, 2)
    dx = dx.reshape(dx.shape[0], 2 * rows, 2 * cols, dx.shape[5])
    return (dx[:, :height, :width],)


max_pool_3x3.defvjp(_forward, _backward)


@jax.custom_vjp
def global_max_pool(x: Array) -> Array:
    """The maximum over each map; of several, the first gets all of the gradient.

    The gradient of `x.max((1, 2))` compares with the maximum and divides by the number of equal
    values. If the compiler computes `x` twice with different rounding, there is none: 0 / 0 (seen
    on the CPU).

    Args:
        x: `float [M, H, W, C]`.

    Returns:
        `float [M, C]`.
    """
    return _global_forward(x)[0]


def _global_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    count, height, width, channels = x.shape
    pixels = x.reshape(count, height * width, channels)
    index = pixels.argmax(1)
    y = jnp.take_along_axis(pixels, index[:, None], 1)[:, 0]
    return y, (index, jnp.zeros((0, height, width, 0), x.dtype))


def _global_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    index, like = saved
    height, width = like.shape[1:3]
    chosen = jnp.arange(height * width)[:, None] == index[:, None]
    dx = jnp.where(chosen, dy[:, None], 0)
    return (dx.reshape(dy.shape[0], height, width, dy.shape[1]),)


global_max_pool.defvjp(_global_forward, _global_backward)


def mean_pool(x: Array, window: int | None = None) -> Array:
    """The mean over each map, or over its square windows at every position.

    Args:
        x: `float [M, H, W, C]`.
        window: side of the windows; None for the whole map.

    Returns:
        `float [M, C]`, or with a window `[M, H - window + 1, W - window + 1, C]`.
    """
    return x.mean((1, 2)) if window is None else nn.avg_pool(x, (window, window))


def max_pool(x: Array, window: int | None = None) -> Array:
    """The maximum, as `mean_pool`."""
    return global_max_pool(x) if window is None else nn.max_pool(x, (window, window))
