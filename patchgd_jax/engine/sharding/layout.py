"""Train and eval steps on a mesh; devices exchange latents, gradients and batch statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchgd_jax.contrib.rows import divide_rows
from patchgd_jax.core.forward import eval_step
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.model import Params, PatchModel, PyTree
from patchgd_jax.core.optimizer import Optimizer
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

_GRADIENT_AXES = {"encoder": AXES, "head": (DATA,)}
_SPECS = {Spec.SAME: P(), Spec.SUM: P(), Spec.IMAGES: P(DATA), Spec.GROUPS: P(None, DATA)}


def sharded_train_step(
    problem: Problem,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    mesh: Mesh,
    rules: Rules = (),
) -> tuple[TrainState, dict[str, Array]]:
    """Runs `core.step.train_step` on a mesh; to be jitted.

    The result is that of one device with the same `config.strata`, up to rounding; only dropout is
    drawn for each device.

    Args:
        problem: of one device, with the patch grid of the whole images. Batch statistics are those
            of all devices if its model is built with `model_options(mesh)`.
        optimizer: any optax transformation.
        state: laid out as `param_shardings(state, rules, mesh)`.
        batch: from `shard_batch`.
        key: the run's key.
        mesh: from `make_mesh`.
        rules: sharding of the parameters; they are gathered for use, and the gradients' sums
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
) -> dict[str, Array]:
    """Runs `core.forward.eval_step` on a mesh, to be jitted; arguments as `sharded_train_step`'s.

    `config.fill_chunk` counts the patches that all devices of an image together encode at a time.
    """
    check_layout(mesh.shape[DATA], 1, batch_size=batch["label"].shape[0], strata=1)
    problem = shard_problem(problem, batch["image"].shape, mesh, rules)
    return eval_step(problem, weights, batch)


def model_options(mesh: Mesh) -> dict[str, Any]:
    """Returns arguments of `build_model` for a model that trains on a mesh."""
    rows = mesh.shape[ROWS] > 1
    return {"axis_name": {} if _divides_rows_only(mesh) else _GRADIENT_AXES, "rows_sharded": rows}


def _divides_rows_only(mesh: Mesh) -> bool:
    # Left to the compiler, which cannot sum over axes of one device beside it (jax 0.10).
    return mesh.shape[DATA] * mesh.shape[PATCH] == 1 and mesh.shape[ROWS] > 1


def shard_problem(
    problem: Problem, images: tuple[int, ...], mesh: Mesh, rules: Rules = ()
) -> Problem:
    """Lays a problem of one device over a mesh.

    `images` is the shape of a batch's images as `shard_batch` lays them out. Raises `ConfigError`
    if they are not of the grid's size, or the mesh does not divide the grid.
    """
    grid, model = problem.grid, problem.model
    assert isinstance(grid, PatchGrid)
    check_grid(mesh, grid)
    if _divides_rows_only(mesh):
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
    return dataclasses.replace(problem, model=_checked(model), layout=layout)


def _checked(model: PatchModel) -> PatchModel:
    """Wraps the model to raise while it is traced if batch statistics differ between devices."""

    def check(function: Callable[..., Any], part: str) -> Any:
        def apply(params: Params, batch_stats: Params, *args: Any, **kwargs: Any) -> Any:
            out, changed = function(params, batch_stats, *args, **kwargs)
            if _types(changed[part]) != _types(batch_stats[part]):
                raise ConfigError(
                    f"the {part} keeps batch statistics that differ from device to device; build "
                    f"it with axis_name={_GRADIENT_AXES[part]}, as build_model(..., "
                    "**model_options(mesh)) does, or with norm group"
                )
            return out, changed

        return apply

    encode, classify = check(model.encode, "encoder"), check(model.classify, "head")
    return model._replace(encode=encode, classify=classify)


def _types(tree: PyTree) -> list[str]:
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


@dataclass(frozen=True)
class MeshLayout(Layout):
    """A layout of images and patches over a mesh.

    Each device has its own part of the encoder's gradient. All devices that share an image compute
    the head redundantly, so its gradient has a part for each place along `data` only.
    """

    mesh: Mesh
    bands: Bands
    rules: tuple[tuple[str, tuple[str | None, ...]], ...]

    @property
    def patch_devices(self) -> int:  # type: ignore[override]
        return self.mesh.shape[PATCH]

    def spread(self, function: Callable[..., Any], arguments: Any, results: Any) -> Any:
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
        """Gathers all of the parameters from this device's parts."""

        def gather(x: Array, spec: P) -> Array:
            for dimension, axis in enumerate(spec):
                if axis is not None:
                    x = lax.all_gather(x, axis, axis=dimension, tiled=True, to="invarying")
            return x

        return self.vary(jax.tree.map(gather, params, specs))

    def _total(self, grads: Params, specs: Params) -> Params:
        """Sums this device's part of the gradient over all devices."""

        def total(g: Array, spec: P, axes: tuple[str, ...]) -> Array:
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
        # Else automatic differentiation would sum over devices wherever a parameter is used.
        return {
            part: jax.tree.map(lambda x, a=axes: lax.pcast(x, a, to="varying"), params[part])
            for part, axes in _GRADIENT_AXES.items()
        }

    def _part(self, x: Array, axis: str, dimension: int) -> Array:
        size = x.shape[dimension] // self.mesh.shape[axis]
        start = lax.axis_index(axis) * size
        return lax.dynamic_slice_in_dim(x, start, size, axis=dimension)

    def take(self, grid: Grid, images: Array, ids: Array) -> Array:
        first = jnp.asarray(self.bands.first_rows, ids.dtype)[lax.axis_index(PATCH)]
        return self.bands.of_band().take(images, ids - first * self.bands.grid.cols)

    def own_slots(self, groups: Any) -> Any:
        return jax.tree.map(lambda x: self._part(x, PATCH, x.ndim - 1), groups)

    def all_slots(self, latents: Array) -> Array:
        return lax.all_gather(latents, PATCH, axis=latents.ndim - 2, tiled=True, to="invarying")

    def sum_images(self, value: Array) -> Array:
        return lax.psum(value, DATA)

    def first_image(self, count: int) -> Array:
        return lax.axis_index(DATA) * count

    def patches_key(self, key: Array) -> Array:
        return self._folded(key, AXES)

    def images_key(self, key: Array) -> Array:
        return self._folded(key, (DATA,))

    def _folded(self, key: Array, axes: Iterable[str]) -> Array:
        # An axis of one device leaves the key as it is, so its draws are those without a mesh.
        for axis in axes:
            if self.mesh.shape[axis] > 1:
                key = jax.random.fold_in(key, lax.axis_index(axis))
        return key
