"""Train and eval steps on a mesh of devices.

Nothing but latents, gradients and batch statistics moves between devices: `jax.shard_map` sees to
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchgd_jax.contrib.rows import divide_rows
from patchgd_jax.core.forward import eval_step
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.model import Params, PatchModel, PyTree
from patchgd_jax.core.problem import Batch, Layout, Problem, Spec, Weights
from patchgd_jax.core.step import train_step
from patchgd_jax.core.update import TrainState
from patchgd_jax.engine.sharding.mesh import (
    AXES,
    DATA,
    PATCH,
    ROWS,
    Bands,
    check_grid,
    check_layout,
)
from patchgd_jax.engine.sharding.params import Rules, param_specs
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.layers.norm import statistics_over

_GRADIENT_AXES = {"encoder": AXES, "head": (DATA,)}
_SPECS = {
    Spec.SAME: P(),
    Spec.SUM: P(),
    Spec.IMAGES: P(DATA),
    Spec.GROUPS: P(None, DATA),
}


def sharded_train_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    mesh: Mesh,
    rules: Rules = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs `core.step.train_step` on a mesh; to be jitted.

    The result is that of one device with the same `config.strata`, up to rounding; only dropout is
    drawn anew for each device.

    Args:
        problem: of one device, with the patch grid of the whole images. Batch statistics are those
            of all devices if its layers are `Normalize`.
        optimizer: any optax transformation.
        state: laid out as `param_shardings(state, rules, mesh)`.
        batch: from `shard_batch`.
        key: the run's key.
        mesh: from `make_mesh`.
        rules: how parameters are divided; they are gathered for use, and the gradients' sums
            divided again.

    Raises:
        ConfigError: as `train_step`; and if the mesh does not divide the batch, the strata or the
            grid, or layers keep batch statistics of their own device only.
    """
    data, patch = mesh.shape[DATA], mesh.shape[PATCH]
    size = batch["label"].shape[0]
    check_layout(data, patch, batch_size=size, strata=problem.config.strata)
    problem = shard_problem(problem, batch["image"].shape, mesh, rules)
    return train_step(problem, optimizer, state, batch, key)


def sharded_eval_step(
    problem: Problem, weights: Weights, batch: Batch, *, mesh: Mesh, rules: Rules = ()
) -> dict[str, jax.Array]:
    """Runs `core.forward.eval_step` on a mesh, to be jitted; arguments as `sharded_train_step`'s.

    `config.fill_chunk` counts the patches that all devices of an image together encode at a time.
    """
    check_layout(mesh.shape[DATA], 1, batch_size=batch["label"].shape[0], strata=1)
    problem = shard_problem(problem, batch["image"].shape, mesh, rules)
    return eval_step(problem, weights, batch)


def shard_problem(
    problem: Problem, images: tuple[int, ...], mesh: Mesh, rules: Rules = ()
) -> Problem:
    """Lays a problem over a mesh.

    Args:
        problem: of one device.
        images: shape of a batch's images as `shard_images` lays them out.
        mesh: from `make_mesh`.
        rules: how parameters are divided.

    Raises:
        ConfigError: if the mesh does not divide the grid, or the images are not of its size.
    """
    grid, model = problem.grid, problem.model
    assert isinstance(grid, PatchGrid)
    check_grid(mesh, grid)
    if mesh.shape[DATA] * mesh.shape[PATCH] == 1 and mesh.shape[ROWS] > 1:
        # Nothing but rows is divided, which is the compiler's business alone; it cannot sum over
        # axes of one device beside (jax 0.10).
        model = divide_rows(model, NamedSharding(mesh, P(None, ROWS)))
        return dataclasses.replace(problem, model=model)
    bands = Bands(grid, mesh.shape[PATCH])
    if images[1:3] != (bands.count * bands.height, grid.width):
        raise ConfigError(
            f"the images are {images[1]} x {images[2]} px, but {bands.count} bands of the grid are "
            f"{bands.count * bands.height} x {grid.width} px; lay them out with shard_batch"
        )
    if mesh.shape[ROWS] > 1:
        model = divide_rows(model, P(None, ROWS))
    layout = MeshLayout(mesh, bands, tuple(rules))
    return dataclasses.replace(problem, model=_synchronised(model), layout=layout)


def _synchronised(model: PatchModel) -> PatchModel:
    """The model with batch statistics of all devices' patches, or images for the head."""

    def synchronise(function: Callable[..., Any], part: str, axes: tuple[str, ...]) -> Any:
        def apply(params: Params, batch_stats: Params, *args: Any, **kwargs: Any) -> Any:
            with statistics_over(axes):
                out, changed = function(params, batch_stats, *args, **kwargs)
            _check_equal(batch_stats[part], changed[part], part)
            return out, changed

        return apply

    return model._replace(
        encode=synchronise(model.encode, "encoder", AXES),
        classify=synchronise(model.classify, "head", (DATA,)),
    )


def _check_equal(before: PyTree, after: PyTree, part: str) -> None:
    kinds = [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(after)]
    if kinds != [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(before)]:
        raise ConfigError(
            f"the {part} keeps batch statistics that differ from device to device; build it with "
            "norm group, or with layers that synchronise (models.layers.norm.Normalize, or "
            "BatchNorm with axis_name AXES in an encoder and DATA in a head)"
        )


@dataclass(frozen=True)
class MeshLayout(Layout):
    """A layout of images and patches over a mesh.

    The encoder's gradient is a part of the whole one on every device; the head is computed by all
    devices that share an image, alike, so its gradient has a part for each place along `data` only.
    """

    mesh: Mesh
    bands: Bands
    rules: tuple[tuple[str, tuple[str | None, ...]], ...]

    @property
    def patch_devices(self) -> int:  # type: ignore[override]
        """See `Layout`."""
        return self.mesh.shape[PATCH]

    def spread(self, function: Callable[..., Any], arguments: Any, results: Any) -> Any:
        """See `Layout`."""

        def everywhere(*args: Any) -> Any:
            weights = args[arguments.index(Spec.WEIGHTS)]
            specs = param_specs(weights.params, self.rules, self.mesh)

            def in_spec(kind: Spec, arg: Any) -> Any:
                if kind is Spec.BATCH:
                    return {name: P(*AXES) if name == "image" else P(DATA) for name in arg}
                return Weights(specs, P()) if kind is Spec.WEIGHTS else _SPECS[kind]  # type: ignore[arg-type]

            def whole(kind: Spec, part: Any) -> Any:
                if kind is Spec.WEIGHTS:
                    return part._replace(params=self._whole(part.params, specs))
                return part

            def total(kind: Spec, part: Any) -> Any:
                if kind is Spec.GRADIENT:
                    return self._total(part, specs)
                return self.sum_images(part) if kind is Spec.SUM else part

            def local(*parts: Any) -> Any:
                return jax.tree.map(
                    total, results, function(*jax.tree.map(whole, arguments, parts))
                )

            return jax.shard_map(
                local,
                mesh=self.mesh,
                axis_names=set(AXES),
                in_specs=jax.tree.map(in_spec, arguments, args),
                out_specs=jax.tree.map(
                    lambda kind: specs if kind is Spec.GRADIENT else _SPECS[kind], results
                ),
            )(*args)

        return everywhere

    def _whole(self, params: Params, specs: Params) -> Params:
        """All of the parameters, from this device's parts."""

        def gather(x: jax.Array, spec: P) -> jax.Array:
            for dimension, axis in enumerate(spec):
                if axis is not None:
                    x = lax.all_gather(x, axis, axis=dimension, tiled=True, to="invarying")
            return x

        return self.vary(jax.tree.map(gather, params, specs))

    def _total(self, grads: Params, specs: Params) -> Params:
        """This device's part of the gradient, summed over all devices."""

        def total(g: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
            divided = {axis: dimension for dimension, axis in enumerate(spec) if axis is not None}
            whole = tuple(axis for axis in axes if axis not in divided)
            if whole:
                g = lax.psum(g, whole)
            for axis, dimension in divided.items():
                if axis in axes:
                    g = lax.psum_scatter(g, axis, scatter_dimension=dimension, tiled=True)
                else:
                    g = self._part(g, axis, dimension)
            return g

        return {
            part: jax.tree.map(lambda g, s, a=axes: total(g, s, a), grads[part], specs[part])
            for part, axes in _GRADIENT_AXES.items()
        }

    def vary(self, params: Params) -> Params:
        """See `Layout`."""
        # Else automatic differentiation would sum over devices wherever a parameter is used.
        return {
            part: jax.tree.map(lambda x, a=axes: lax.pcast(x, a, to="varying"), params[part])
            for part, axes in _GRADIENT_AXES.items()
        }

    def _part(self, x: jax.Array, axis: str, dimension: int) -> jax.Array:
        size = x.shape[dimension] // self.mesh.shape[axis]
        start = lax.axis_index(axis) * size
        return lax.dynamic_slice_in_dim(x, start, size, axis=dimension)

    def take(self, grid: Grid, images: jax.Array, ids: jax.Array) -> jax.Array:
        """See `Layout`."""
        first = jnp.asarray(self.bands.first_rows, ids.dtype)[lax.axis_index(PATCH)]
        return self.bands.of_band().take(images, ids - first * self.bands.grid.cols)

    def own_slots(self, groups: Any) -> Any:
        """See `Layout`."""
        return jax.tree.map(lambda x: self._part(x, PATCH, x.ndim - 1), groups)

    def all_slots(self, latents: jax.Array) -> jax.Array:
        """See `Layout`."""
        return lax.all_gather(latents, PATCH, axis=latents.ndim - 2, tiled=True, to="invarying")

    def sum_images(self, value: jax.Array) -> jax.Array:
        """See `Layout`."""
        return lax.psum(value, DATA)

    def first_image(self, count: int) -> jax.Array:
        """See `Layout`."""
        return lax.axis_index(DATA) * count

    def patches_key(self, key: jax.Array) -> jax.Array:
        """See `Layout`."""
        return self._folded(key, AXES)

    def images_key(self, key: jax.Array) -> jax.Array:
        """See `Layout`."""
        return self._folded(key, (DATA,))

    def _folded(self, key: jax.Array, axes: Iterable[str]) -> jax.Array:
        # One device draws what it would draw alone.
        for axis in axes:
            if self.mesh.shape[axis] > 1:
                key = jax.random.fold_in(key, lax.axis_index(axis))
        return key
