"""Convolution and pooling kernels for XLA on the CPU; accelerators use XLA's own."""
