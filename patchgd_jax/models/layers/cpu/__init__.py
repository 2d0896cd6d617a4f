"""Convolutions that are fast in XLA:CPU as well; on GPU and TPU they are XLA's own.

XLA:CPU's convolution is 2 to 5 times slower than a matrix product of its size on few channels or
small maps, and its weight gradient inside a loop body 30 to 200 times (measured). `conv` chooses by
shape between it and sums of products: one per kernel tap (`taps`), or Winograd's (`winograd`, in
`strips` for large maps). It has no fast grouped convolution at all, which `depthwise` replaces.
"""

from patchgd_jax.models.layers.cpu import conv, depthwise
from patchgd_jax.models.layers.cpu.dispatch import with_cpu_kernels
from patchgd_jax.models.layers.xla_conv import xla_conv2d

conv2d = with_cpu_kernels(xla_conv2d, conv.forward, conv.gradients)
depthwise_conv2d = with_cpu_kernels(xla_conv2d, depthwise.forward, depthwise.gradients)
