"""The switch between XLA's own convolution and the CPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array, lax

Convolution = Callable[[Array, Array, int, int], Array]
"""`(x, w, stride, padding) -> y`."""
Gradients = Callable[[Array, Array, Array, int, int], tuple[Array, Array]]
"""`(x, w, dy, stride, padding) -> (dx, dw)`."""


def with_cpu_kernels(plain: Convolution, forward: Convolution, gradients: Gradients) -> Convolution:
    """Gives a convolution another implementation on the CPU, in both directions.

    Args:
        plain: used with its automatic gradient on GPU and TPU.
        forward: used on the CPU.
        gradients: of `forward`.
    """
    # A network has many convolutions of the same shapes: each form is traced once, and inlined.
    traced_once = partial(jax.jit, static_argnums=(0, 1), inline=True)

    @traced_once
    def value(stride: int, padding: int, x: Array, w: Array) -> Array:
        return lax.platform_dependent(
            x,
            w,
            cpu=lambda x, w: forward(x, w, stride, padding),
            default=lambda x, w: plain(x, w, stride, padding),
        )

    @traced_once
    def backward(stride: int, padding: int, saved: tuple[Array, Array], dy: Array) -> Any:
        def automatic(x: Array, w: Array, dy: Array) -> Any:
            return jax.vjp(lambda x, w: plain(x, w, stride, padding), x, w)[1](dy)

        return lax.platform_dependent(
            *saved, dy, cpu=lambda x, w, dy: gradients(x, w, dy, stride, padding), default=automatic
        )

    @partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def convolve(x: Array, w: Array, stride: int, padding: int) -> Array:
        return value(stride, padding, x, w)

    convolve.defvjp(lambda x, w, stride, padding: (value(stride, padding, x, w), (x, w)), backward)
    return convolve
