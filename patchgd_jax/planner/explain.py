"""Textbook memory sums for the user's own numbers, beside what training really takes."""

from __future__ import annotations

from patchgd_jax.config import OptimizerConfig
from patchgd_jax.planner.estimate import Row
from patchgd_jax.planner.layers import LayerTable
from patchgd_jax.planner.request import PlanRequest
from patchgd_jax.planner.size import show_size

FLOAT = 4
"""Bytes of a float32."""


def conv_weights(side: int, inputs: int, outputs: int) -> int:
    """Counts weights of a convolution: a kernel for each input channel of each output channel."""
    return side * side * inputs * outputs


def dense_weights(inputs: int, outputs: int) -> int:
    """Counts weights and biases of a dense layer."""
    return inputs * outputs + outputs


def image_bytes(height: int, width: int, channels: int) -> int:
    """Bytes of an image's pixels as float32."""
    return height * width * channels * FLOAT


def parameter_copies(optimizer: OptimizerConfig) -> int:
    """Counts arrays of the parameters' size in training: weights, gradients, moments, EMA."""
    moments = 2 if optimizer.name != "sgd" else int(optimizer.momentum != 0)
    return 2 + moments + (optimizer.ema_decay is not None)


def hand_parameter_bytes(parameters: int, copies: int = 3) -> int:
    """Bytes of float32 weights with their gradients and, for three copies, a momentum."""
    return parameters * FLOAT * copies


def hand_activation_bytes(activations: int) -> int:
    """Bytes of all layers' float32 outputs for one image, and of their gradients."""
    return 2 * activations * FLOAT


def hand_total(parameters: int, activations: int, batch: int, data_bytes: int) -> int:
    """Adds up three copies of the parameters, twice the outputs times the batch, and data."""
    activation_bytes = batch * hand_activation_bytes(activations)
    return hand_parameter_bytes(parameters) + activation_bytes + data_bytes


def explain(
    request: PlanRequest, table: LayerTable, row: Row, *, compiled: int | None = None
) -> list[str]:
    """Works out the textbook sums for one request, line by line.

    `table` has the layers of the encoder for one of the method's inputs, `row` the method's
    estimate, and `compiled` the bytes of the compiled programs, if known.
    """
    height, width, channels = request.image
    parameters = table.total("parameters")
    activations = table.total("output_bytes") // FLOAT
    copies, optimizer = parameter_copies(request.config.optimizer), request.config.optimizer.name
    data = request.batch * image_bytes(height, width, channels)
    largest = max(table.layers, key=lambda layer: layer.output_bytes)
    # The first few layers with weights and the last: the rest follow the same sum.
    kernels = [layer for layer in table.layers if layer.flops]
    shown = kernels if len(kernels) <= 6 else [*kernels[:5], kernels[-1]]
    model = parameters * FLOAT
    lines = [
        f"By hand, {row.method}:",
        *(f"  {x.name} ({x.kind}): {x.parameters:,} parameters, output {x.output}" for x in shown),
        f"  encoder: {parameters:,} parameters x 4 bytes = {show_size(model)}",
        f"  with gradients and {optimizer}: x {copies} = "
        f"{show_size(hand_parameter_bytes(parameters, copies))}",
        f"  one input's layer outputs: {activations:,} values; x 2 for their gradients x 4 bytes = "
        f"{show_size(hand_activation_bytes(activations))}",
        f"  a batch of {request.batch} x {height} x {width} x {channels}: "
        f"{show_size(data)} as float32, {show_size(data // FLOAT)} as uint8 (what is kept here)",
        f"  the largest output, {largest.name} {largest.output}: {show_size(largest.output_bytes)}"
        "; pooling makes maps smaller only after they were there at full size",
        "  im2col: a convolution of side k as one product copies its input k x k times (x 9 for "
        f"3 x 3: up to {show_size(9 * largest.output_bytes)} for that map); each thread that works "
        "on an image of its own needs such a buffer",
        f"  in half precision: activations {show_size(row.activations // 2)} instead of "
        f"{show_size(row.activations)} if they are float32 now; weights and moments stay float32",
        "What training keeps and needs:",
        f"  residuals for the backward pass, by jax.vjp: {show_size(row.activations)} "
        f"(model.remat {request.model.remat})",
        f"  parameters {show_size(row.parameters)}, gradients {show_size(row.gradients)}, "
        f"{optimizer} {show_size(row.optimizer)}, input {show_size(row.input)}, "
        f"Z {show_size(row.z)}, the rest {show_size(row.workspace)}",
        f"  in all, by estimate: {show_size(row.total)}"
        + (f"; as XLA compiles it: {show_size(compiled)}" if compiled else ""),
    ]
    if row.total > model:
        lines.append(
            f"  so {show_size(model)} of weights become {show_size(row.total)}, "
            f"{row.total / model:.0f} times as much: the maps of every layer, for every input of "
            "the batch at once, outweigh the weights"
        )
    lines.append(
        "  nvidia-smi shows about 75 % of a GPU as soon as JAX starts: it reserves memory ahead "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION); only its allocator knows what is in use"
    )
    return lines
