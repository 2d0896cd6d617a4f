"""Pooling: whole maps or windows of them, and maxima whose gradient remembers where they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


@jax.custom_vjp
def max_pool_3x3(x: jax.Array) -> jax.Array:
    """The maximum of 3x3 windows at stride 2 with padding 1, as torch.nn.MaxPool2d(3, 2, 1).

    Where several pixels of a window are the maximum, the first has all of the gradient.

    Args:
        x: `float [M, H, W, C]`.

    Returns:
        `float [M, ceil(H / 2), ceil(W / 2), C]`.
    """
    return _forward(x)[0]


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    lowest = jnp.array(-jnp.inf, x.dtype)
    height, width = x.shape[1:3]
    rows, cols = -(-height // 2), -(-width // 2)
    padded = jnp.pad(
        x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)), constant_values=lowest
    )
    best = jnp.full((x.shape[0], rows, cols, x.shape[3]), lowest)
    # One byte an output instead of both maps: all that the gradient needs.
    winner = jnp.zeros(best.shape, jnp.uint8)
    for tap in range(9):
        i, j = divmod(tap, 3)
        pixel = padded[:, i : i + 2 * rows : 2, j : j + 2 * cols : 2]
        winner = jnp.where(pixel > best, jnp.uint8(tap), winner)
        # Unlike where, this hands a NaN on.
        best = jnp.maximum(best, pixel)
    return best, (winner, jnp.zeros((0, height, width, 0), x.dtype))


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    winner, like = saved
    height, width = like.shape[1:3]
    rows, cols = dy.shape[1:3]
    margin = ((0, 0), (0, 1), (0, 1), (0, 0))
    # Left to itself, XLA:CPU computes the margins pixel by pixel in the loop below, five times
    # slower (measured).
    winner, dy = lax.optimization_barrier((jnp.pad(winner, margin), jnp.pad(dy, margin)))

    def routed(i: int, j: int) -> jax.Array:
        """What goes to tap `(i, j)`: for tap 0, of the window in the next row (column)."""
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
def global_max_pool(x: jax.Array) -> jax.Array:
    """The maximum over each map; the first of several has all of the gradient.

    The gradient of `x.max((1, 2))` looks for values equal to the maximum and divides by their
    number. A compiler that computes `x` twice, with another rounding, finds none, and divides zero
    by zero (seen on the CPU).

    Args:
        x: `float [M, H, W, C]`.

    Returns:
        `float [M, C]`.
    """
    return _global_forward(x)[0]


def _global_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    count, height, width, channels = x.shape
    pixels = x.reshape(count, height * width, channels)
    index = pixels.argmax(1)
    y = jnp.take_along_axis(pixels, index[:, None], 1)[:, 0]
    return y, (index, jnp.zeros((0, height, width, 0), x.dtype))


def _global_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    index, like = saved
    height, width = like.shape[1:3]
    chosen = jnp.arange(height * width)[:, None] == index[:, None]
    dx = jnp.where(chosen, dy[:, None], 0)
    return (dx.reshape(dy.shape[0], height, width, dy.shape[1]),)


global_max_pool.defvjp(_global_forward, _global_backward)


def mean_pool(x: jax.Array, window: int | None = None) -> jax.Array:
    """The mean over each map, or over every square window of it.

    Args:
        x: `float [M, H, W, C]`.
        window: side of the windows, which stand at every position. None: the whole map is one.

    Returns:
        `float [M, C]`, or with a window `[M, H - window + 1, W - window + 1, C]`.
    """
    return x.mean((1, 2)) if window is None else nn.avg_pool(x, (window, window))


def max_pool(x: jax.Array, window: int | None = None) -> jax.Array:
    """As `mean_pool`, the maximum."""
    return global_max_pool(x) if window is None else nn.max_pool(x, (window, window))
