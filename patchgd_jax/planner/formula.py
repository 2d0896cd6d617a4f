"""Every method's memory by formula: nothing is compiled and nothing is allocated.

Three shapes are traced, and every row is made of them: a patch, the whole image, and the latent
block. The peak of a trace is found by `liveness`, and scaled to the number of patches of a method.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from patchgd_jax.baselines.ips import require_attention
from patchgd_jax.config import ModelConfig
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.layers.conv import traced_for
from patchgd_jax.models.registry import build_model, encoder_entry, head_entry
from patchgd_jax.planner.liveness import TracedProgram
from patchgd_jax.planner.methods import (
    METHODS,
    PATCHGD,
    WITH_Z,
    Method,
    downscaled_size,
    encoder_inputs,
    encoder_shapes,
    optimizer_of,
    require_supported,
    trained_as,
    z_bytes,
)
from patchgd_jax.planner.request import PlanRequest, leaf_bytes, tree_bytes, with_sampled
from patchgd_jax.planner.shared_blocks import shared_blocks

# Prime, so that what grows with the number of inputs can be told from what does not.
_LEAST_INPUTS = 31


class Profile(NamedTuple):
    """What the encoder keeps and needs for the gradient of some inputs of one size."""

    fixed: int
    """Bytes kept for the backward pass whatever the number of inputs."""
    per_input: float
    """Bytes kept for each input."""
    program: TracedProgram

    def kept(self, inputs: float) -> int:
        """Bytes kept for the backward pass of that many inputs; the parameters are not in it."""
        return self.fixed + round(inputs * self.per_input)

    def peak(self, inputs: float) -> int:
        """The most bytes at once in a forward and a backward pass, gradients included."""
        return self.program.peak_bytes(inputs)


class Row(NamedTuple):
    """A method's memory in bytes, for one training step."""

    method: Method
    parameters: int
    """With batch statistics."""
    gradients: int
    optimizer: int
    activations: int
    """What the encoder keeps for its backward pass: exactly what `jax.vjp` returns."""
    input: int
    z: int
    workspace: int
    """The rest of the total: buffers of single operations, copies of Z and sums of gradients. It is
    negative where a gradient or an activation takes the place of another."""
    total: int


def profile_encoder(
    model: PatchModel,
    params: Params,
    model_state: Params,
    *,
    side: tuple[int, int],
    channels: int,
    inputs: int,
    platform: str,
    scaled: bool = True,
) -> Profile:
    """Traces the encoder's gradient for uint8 inputs of one size.

    Args:
        model: the model.
        params: shapes of both parts.
        model_state: shapes of both parts.
        side: height and width of an input.
        channels: of an input.
        inputs: how many there are at once.
        platform: see `TracedProgram`.
        scaled: trace the next prime number of inputs, of 31 or more, so that the profile can be
            asked for any number of that order. Otherwise it is exact for `inputs`, and only that:
            which kernel a convolution takes depends on how large its map is.
    """
    batch = _prime_from(max(inputs, _LEAST_INPUTS)) if scaled else inputs
    images = jax.ShapeDtypeStruct((batch, *side, channels), jnp.uint8)
    residuals: list[Any] = []

    def gradient(params: Params, model_state: Params, images: jax.Array, key: jax.Array) -> Any:
        def encode(encoder: Any) -> jax.Array:
            parts = {**params, "encoder": encoder}
            return model.encode(parts, model_state, images, train=True, rng=key)[0]

        latents, pull_back = jax.vjp(encode, params["encoder"])
        given = {id(leaf) for leaf in jax.tree.leaves(params)}
        residuals[:] = [leaf for leaf in jax.tree.leaves(pull_back) if id(leaf) not in given]
        return pull_back(jnp.ones_like(latents))

    with traced_for(platform), shared_blocks(platform):
        traced = jax.make_jaxpr(gradient)(params, model_state, images, _key())
    sizes = [(leaf_bytes(leaf), leaf.size % batch == 0) for leaf in residuals]
    return Profile(
        fixed=sum(size for size, grows in sizes if not grows),
        per_input=sum(size for size, grows in sizes if grows) / batch,
        program=TracedProgram(traced, platform=platform, batch=batch),
    )


def _prime_from(number: int) -> int:
    while any(number % factor == 0 for factor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


@contextmanager
def _without_collections() -> Iterator[None]:
    """Stops Python from looking for garbage.

    A trace is a million objects that all stay: looking through them took a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Formula:
    """The rows of one request; what several of them need is traced once.

    Args:
        request: what is planned.
        platform: cpu, cuda, rocm or tpu; what its compiler needs beside the arrays differs.
    """

    def __init__(self, request: PlanRequest, platform: str) -> None:
        self.request = request
        self.platform = platform
        self._traced_image = request.image[:2]
        self._profile = cache(self._trace_profile)
        self._head_peak = cache(self._trace_head)
        self._fill_peak = cache(self._trace_fill)
        self._shapes = cache(self._trace_shapes)
        self._encoder_shapes = cache(encoder_shapes)
        self._optimizer = cache(self._optimizer_bytes)

    @_without_collections()
    def row(self, method: Method, side: int | None = None) -> Row:
        """The row of a method.

        Args:
            method: one of METHODS.
            side: for `downscale`, the longer side in pixels; None: the patch's.

        Raises:
            ConfigError: if the encoder does not support the method, or for settings that cannot
                be together.
        """
        request = self.request
        require_supported(request, method)
        count, size = encoder_inputs(request, method)
        if method == "downscale":
            size = downscaled_size(request.image, side or request.patchgd.patch)
        _, config, patchgd = trained_as(request, method)
        model, params, model_state = self._shapes(config, min(size), method in WITH_Z)
        if method == "ips":
            require_attention(model, request.grid, config.latent_dim)
        trained = {"head": params["head"]} if method == "mil" else params
        optimizer = self._optimizer(config, min(size), method)
        gradients, z = tree_bytes(trained), z_bytes(request, method)
        pixels = int(np.prod(size)) * request.image[2]
        given = count * pixels
        if method in (*WITH_Z, "patchwise"):
            given = request.batch * int(np.prod(request.image))
        if method == "mil":
            # No gradient reaches the encoder, which keeps nothing.
            kept = 0
            peak = max(self._fill_peak(config, count) + count * pixels, self._head_peak(config)) + z
        else:
            profile, inputs = self._profile_of(config, size, count), count * self._share(size)
            kept, peak = profile.kept(inputs), profile.peak(inputs)
        if method in ("patchwise", "ips", *PATCHGD):
            peak += count * pixels
        if method in ("ips", *PATCHGD):
            head = kept + self._head_peak(config) + count * pixels
            peak = max(peak, head) + 2 * z
        elif method != "mil":
            peak += tree_bytes(params["head"])
        if method in ("patchwise", *PATCHGD) and (method != "full" or patchgd.remat):
            # Of all groups, beside those of one.
            peak += gradients
        if method in ("mil", "ips"):
            # XLA keeps a copy of what the loop of the fill reads, since the step gives it back.
            peak += tree_bytes(params["encoder"])
        parameters = tree_bytes((params, model_state))
        total = parameters + optimizer + given + peak
        return Row(
            method=method,
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            activations=kept,
            input=given,
            z=z,
            workspace=peak - gradients - kept - z,
            total=total,
        )

    def _trace_shapes(
        self, config: ModelConfig, side: int, patches: bool
    ) -> tuple[PatchModel, Params, Params]:
        """A model, and the shapes of its parameters and its model state."""
        channels, classes = self.request.image[2], self.request.classes
        grid = self.request.grid if patches else PatchGrid(side, side, side)
        model = build_model(
            config,
            grid=grid,
            channels=channels,
            classes=classes,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
        )
        # The kernels of a convolution are the same for every size; a table of positions is not.
        if encoder_entry(config.encoder).side_multiple == 1:
            side = self.request.patchgd.patch
        encoder = self._encoder(config, side)
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        head = head_entry(config.head).build(classes=classes, **dropout)
        z = jax.ShapeDtypeStruct((1, grid.rows, grid.cols, config.latent_dim), config.dtype)
        init = partial(head.init, train=False)
        variables = {"encoder": dict(encoder), "head": dict(jax.eval_shape(init, _key(), z, None))}
        params = {part: tree.pop("params", {}) for part, tree in variables.items()}
        return model, params, variables

    def _optimizer_bytes(self, config: ModelConfig, side: int, method: Method) -> int:
        """Bytes of the optimizer's state."""
        _, params, _ = self._shapes(config, side, method in WITH_Z)
        if method == "mil":
            params = {"head": params["head"]}
        return tree_bytes(jax.eval_shape(optimizer_of(self.request).init, params))

    def _encoder(self, config: ModelConfig, side: int) -> Params:
        """Shapes of the encoder, which what is kept or read of it does not change."""
        plain = dataclasses.replace(config, remat="none", head=ModelConfig.head, dropout=None)
        return self._encoder_shapes(plain, side, self.request.image[2])

    def _trace_profile(
        self, config: ModelConfig, size: tuple[int, int], count: int, scaled: bool
    ) -> Profile:
        model, params, model_state = self._shapes(config, min(size), False)
        return profile_encoder(
            model,
            params,
            model_state,
            side=size,
            channels=self.request.image[2],
            inputs=count,
            platform=self.platform,
            scaled=scaled,
        )

    def _profile_of(self, config: ModelConfig, size: tuple[int, int], count: int) -> Profile:
        """One trace serves every method whose encoder sees inputs of this size."""
        config = dataclasses.replace(config, head="linear", dropout=None)
        if size == (self.request.patchgd.patch,) * 2:
            # For smaller numbers than that of an inner step the peak is scaled down.
            patches, inner_steps = self.request.patches, self.request.patchgd.num_inner_steps
            most = self.request.batch * -(-patches // inner_steps)
            return self._profile(config, size, most, True)
        if size == self._traced_image:
            return self._profile(config, size, count, False)
        return self._profile(config, self._traced_image, count, True)

    def _share(self, size: tuple[int, int]) -> float:
        """The pixels of an input over those of the traced one."""
        patch = self.request.patchgd.patch
        if size in ((patch, patch), self._traced_image):
            return 1.0
        return float(np.prod(size) / np.prod(self._traced_image))

    def largest_side(self, budget: float | None) -> int:
        """The longest side in pixels that `downscale` can have.

        Args:
            budget: bytes; None: the patch's side.

        Returns:
            A multiple of what the encoder takes, from the patch's side to the image's own.
        """
        patch, longest = self.request.patchgd.patch, max(self.request.image[:2])
        if budget is None:
            return patch
        unit = max(1, encoder_entry(self.request.model.encoder).side_multiple)
        low, high = patch // unit, longest // unit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.row("downscale", middle * unit).total <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * unit

    def resized(self, height: int, width: int) -> Formula:
        """The formula for another image size, by the traces of this one.

        An inner step samples as many patches as before, or all if there are fewer.

        What the encoder takes for a whole image is scaled by its pixels, which attention over
        tokens outgrows.
        """
        other = copy.copy(self)
        image = (height, width, self.request.image[2])
        resized = dataclasses.replace(self.request, image=image, slots=None)
        other.request = with_sampled(resized, self.request.sampled)
        other._shapes = cache(other._trace_shapes)
        other._optimizer = cache(other._optimizer_bytes)
        other._head_peak = cache(other._trace_head)
        return other

    def _trace_fill(self, config: ModelConfig, count: int) -> int:
        """The peak of encoding so many patches without a gradient."""
        model, params, model_state = self._shapes(config, self.request.patchgd.patch, True)
        shape = (count, *self.request.grid.patch_shape, self.request.image[2])

        def encode(params: Params, model_state: Params, patches: jax.Array, key: jax.Array) -> Any:
            return model.encode(params, model_state, patches, train=False, rng=key)[0]

        patches = jax.ShapeDtypeStruct(shape, jnp.uint8)
        with traced_for(self.platform), shared_blocks(self.platform):
            traced = jax.make_jaxpr(encode)(params, model_state, patches, _key())
        return TracedProgram(traced, platform=self.platform).peak_bytes()

    def _trace_head(self, config: ModelConfig) -> int:
        """The peak of the head's gradient, that of Z included."""
        model, params, model_state = self._shapes(config, self.request.patchgd.patch, True)
        grid = self.request.grid
        shape = (self.request.batch, grid.rows, grid.cols, config.latent_dim)

        def gradient(params: Params, model_state: Params, z: jax.Array, key: jax.Array) -> Any:
            def read(head: Any, z: jax.Array) -> jax.Array:
                parts = {**params, "head": head}
                logits, _ = model.classify(parts, model_state, z, None, train=True, rng=key)
                return logits.sum()

            return jax.grad(read, argnums=(0, 1))(params["head"], z)

        z = jax.ShapeDtypeStruct(shape, config.dtype)
        traced = jax.make_jaxpr(gradient)(params, model_state, z, _key())
        return TracedProgram(traced, platform=self.platform).peak_bytes()


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def method_table(
    request: PlanRequest, platform: str, methods: Sequence[Method] = METHODS
) -> tuple[list[Row], dict[Method, str]]:
    """The rows of several methods.

    Args:
        request: what is planned.
        platform: cpu, cuda, rocm or tpu.
        methods: which.

    Returns:
        The rows of those that the encoder supports, and the reason for each of the others.
    """
    formula = Formula(request, platform)
    rows, refused = [], {}
    for method in methods:
        try:
            rows.append(formula.row(method))
        except ConfigError as error:
            refused[method] = str(error)
    return rows, refused
