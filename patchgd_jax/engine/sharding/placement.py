"""Steps on a mesh of devices; the only module that names its axes.

Along `data` each device has some of a batch's images, along `patch` a part of every image: a band
of pixel rows with the patches of `D` equal runs of patch numbers. Nothing but latents, gradients
and batch statistics moves between devices; `jax.shard_map` sees to it. Along `rows` devices share
each patch, for patches whose activations exceed one device: there the compiler divides the encoder,
and sends the rows of its maps that a neighbour needs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchgd_jax.config import PatchGDConfig
from patchgd_jax.core.gradients import Batch
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.model import Params, PatchModel, PyTree
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.step import TrainState, eval_step, train_step
from patchgd_jax.errors import ConfigError
from patchgd_jax.models.layers.conv import rows_divided
from patchgd_jax.models.layers.norm import statistics_over

DATA, PATCH, ROWS = "data", "patch", "rows"
AXES = (DATA, PATCH)
"""For layers of your own that synchronise over the encoder's patches: `axis_name=sharding.AXES`."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Regular expressions that are searched for in a parameter's path (`encoder/Conv_0/kernel`), each
with the mesh axis that every dimension is divided along, or None. The first one that is found in a
path, and has as many dimensions, counts; a parameter that none fits is whole on every device."""


def make_mesh(
    layout: str,
    *,
    batch_size: int,
    eval_batch_size: int | None = None,
    strata: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The devices as a mesh.

    Args:
        layout: `data=2,patch=4,rows=2`, of which those that are 1 may be left out; or `auto`,
            which gives `data` as many devices as the batch allows. Images share nothing but
            gradients, and whatever the split, each device holds the same share of all pixels and
            sampled patches; only Z and the head's maps are those of fewer images.
        batch_size: images of a batch.
        eval_batch_size: images of an evaluation's batch, if that is another.
        strata: `PatchGDConfig.strata`.
        devices: to be used, all of them. None: every device of every process.

    Raises:
        ConfigError: if the layout cannot be read, is not of as many devices as there are, or does
            not divide the batch and the strata.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = [batch_size, batch_size if eval_batch_size is None else eval_batch_size]
    data, patch, rows = (
        (*_choose(len(found), math.gcd(*sizes), strata), 1)
        if layout == "auto"
        else parse_layout(layout)
    )
    if data * patch * rows != len(found):
        raise ConfigError(
            f"mesh {layout} is of {data * patch * rows} devices, but there are "
            f"{len(found)}; make the product {len(found)}, or use auto"
        )
    for size in sizes:
        check_layout(data, patch, batch_size=size, strata=strata)
    # jax.make_mesh would default to another axis type, which ordinary model code does not pass.
    return jax.make_mesh(
        (data, patch, rows), (*AXES, ROWS), axis_types=(AxisType.Auto,) * 3, devices=found
    )


def parse_rules(texts: Iterable[str]) -> Rules:
    """Rules from texts such as `kernel$=-,-,-,data`, where `-` leaves a dimension whole.

    Raises:
        ConfigError: for one that cannot be read.
    """
    rules = []
    for text in texts:
        pattern, _, axes = text.rpartition("=")
        names = axes.split(",")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"param_rules: {pattern!r} is no pattern: {error}") from error
        if not pattern or not set(names) <= {DATA, PATCH, "-"}:
            raise ConfigError(
                f"param_rules: {text!r} cannot be read; write a pattern, = and for each dimension "
                f"{DATA}, {PATCH} or -, such as kernel$=-,{DATA}"
            )
        rules.append((pattern, tuple(None if name == "-" else name for name in names)))
    return rules


def parse_layout(layout: str) -> tuple[int, int, int]:
    """The sizes of the axes `data`, `patch` and `rows` in a text such as `data=2,patch=4`.

    Raises:
        ConfigError: if it cannot be read.
    """
    sizes = {DATA: 1, PATCH: 1, ROWS: 1}
    named = []
    for part in layout.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in sizes or match[1] in named:
            raise ConfigError(
                f"mesh {layout!r} cannot be read; write auto, or sizes such as {DATA}=2,{PATCH}=4 "
                f"(axes: {DATA}, {PATCH}, {ROWS})"
            )
        named.append(match[1])
        sizes[match[1]] = int(match[2])
    return sizes[DATA], sizes[PATCH], sizes[ROWS]


def check_layout(data: int, patch: int, *, batch_size: int, strata: int) -> None:
    """Checks that a mesh divides the work evenly.

    Raises:
        ConfigError: if it does not.
    """
    if batch_size % data != 0:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided among {data} devices (mesh axis {DATA}); "
            f"use a multiple of {data}"
        )
    if strata % patch != 0:
        raise ConfigError(
            f"patchgd.strata {strata} cannot be divided among {patch} devices (mesh axis {PATCH}); "
            f"use --patchgd.strata {patch}, or a multiple of it"
        )


def check_grid(mesh: Mesh, grid: PatchGrid) -> None:
    """Checks that a mesh divides a grid's patches, and the rows of one evenly.

    Raises:
        ConfigError: if it does not.
    """
    Bands(grid, mesh.shape[PATCH])
    if grid.patch % mesh.shape[ROWS] != 0:
        raise ConfigError(
            f"the {grid.patch} rows of a patch cannot be divided among {mesh.shape[ROWS]} devices "
            f"(mesh axis {ROWS}); use a divisor of {grid.patch}"
        )


def _choose(count: int, batch_size: int, strata: int) -> tuple[int, int]:
    for patch in range(1, count + 1):
        if count % patch == 0 and batch_size % (count // patch) == 0 and strata % patch == 0:
            return count // patch, patch
    patch = count // math.gcd(count, batch_size)
    raise ConfigError(
        f"{count} devices cannot share batches of {batch_size} images with patchgd.strata "
        f"{strata}; use --patchgd.strata {patch}, or a batch that is a multiple of {count}"
    )


@dataclass(frozen=True)
class Bands:
    """How an image is laid over the `patch` axis: bands of whole pixel rows.

    Device `d` of D encodes the patches from `d * N // D` up to `(d + 1) * N // D`. Its band has the
    grid rows that these are in. All bands are equally high, so some have a row or two that no patch
    of theirs is in; and where patches overlap, neighbours share pixels.

    Raises:
        ConfigError: if there are fewer patches than devices.
    """

    grid: PatchGrid
    count: int
    """D."""

    def __post_init__(self) -> None:
        if self.count > self.grid.num_patches:
            raise ConfigError(
                f"{self.count} devices cannot share a grid of {self.grid.num_patches} patches "
                f"(mesh axis {PATCH}); use fewer devices for an image, or smaller patches"
            )

    def _bounds(self) -> np.ndarray:
        return np.arange(self.count + 1) * self.grid.num_patches // self.count

    @property
    def rows(self) -> int:
        """Grid rows of a band."""
        bounds = self._bounds()
        first, last = bounds[:-1] // self.grid.cols, (bounds[1:] - 1) // self.grid.cols
        return int((last - first).max()) + 1

    @property
    def height(self) -> int:
        """Pixel rows of a band."""
        if self.count == 1:
            return self.grid.height
        return (self.rows - 1) * self.grid.stride + self.grid.patch

    @property
    def first_rows(self) -> tuple[int, ...]:
        """The first grid row of each band."""
        first = self._bounds()[:-1] // self.grid.cols
        # The last bands begin further up rather than reach beyond the grid.
        return tuple(int(row) for row in np.minimum(first, self.grid.rows - self.rows))

    def pixels(self, number: int) -> slice:
        """The pixel rows of a band; they may reach beyond the image, by its padding."""
        start = self.first_rows[number] * self.grid.stride
        return slice(start, start + self.height)

    def of_band(self) -> PatchGrid:
        """The grid of a band, whose patch 0 is the first of its first row."""
        return dataclasses.replace(self.grid, height=self.height)

    def cut(self, image: np.ndarray, number: int, top: int = 0) -> np.ndarray:
        """A band of images `[B, H, W, C]` on the host, continued with the background.

        Args:
            image: of rows from `top` on.
            number: of the band.
            top: the first row that is there.
        """
        rows = self.pixels(number)
        band = image[:, rows.start - top : rows.stop - top]
        missing = self.height - band.shape[1]
        if missing == 0:
            return band
        background: float = self.grid.background
        if np.issubdtype(image.dtype, np.floating):
            background /= 255
        pad = ((0, 0), (0, missing), (0, 0), (0, 0))
        return np.pad(band, pad, constant_values=background)


def shard_images(
    image: np.ndarray,
    grid: PatchGrid,
    mesh: Mesh,
    *,
    first: int = 0,
    total: int | None = None,
    rows: slice | None = None,
) -> jax.Array:
    """Lays images over the mesh; each device is given its band of its images, and nothing else.

    Args:
        image: `[B, H, W, C]` on the host; a memory-mapped one is read only where it is needed.
        grid: the patch grid of the images.
        mesh: from `make_mesh`.
        first: the place of the first of them in the batch, if other processes have others; see
            `own_images`.
        total: images of the whole batch. None: these.
        rows: the pixel rows that `image` has, from `own_pixels`. None: all.

    Returns:
        `[total, D * band height, W, C]`, the bands one after the other, divided along both axes.

    Raises:
        ConfigError: if they are not of the grid's size, or the mesh does not divide them.
    """
    rows = slice(0, grid.height) if rows is None else rows
    if image.shape[1:3] != (rows.stop - rows.start, grid.width):
        raise ConfigError(
            f"the images are {image.shape[1]} x {image.shape[2]} px, but the grid is for "
            f"{rows.stop - rows.start} x {grid.width} px"
        )
    bands = Bands(grid, mesh.shape[PATCH])
    total = len(image) if total is None else total
    check_layout(mesh.shape[DATA], 1, batch_size=total, strata=1)
    shape = (total, bands.count * bands.height, *image.shape[2:])

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        number = (index[1].start or 0) // bands.height
        return bands.cut(image[start - first : stop - first], number, rows.start)

    return jax.make_array_from_callback(shape, batch_shardings(["image"], mesh)["image"], part)


def shard_batch(
    batch: Mapping[str, np.ndarray],
    grid: PatchGrid,
    mesh: Mesh,
    *,
    first: int = 0,
    total: int | None = None,
    rows: slice | None = None,
) -> dict[str, jax.Array]:
    """Lays a batch over the mesh: the images as `shard_images`, the rest by image."""
    total = len(batch["image"]) if total is None else total
    shardings = batch_shardings(batch, mesh)

    def by_image(name: str) -> jax.Array:
        values = np.asarray(batch[name])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            return values[start - first : stop - first]

        return jax.make_array_from_callback((total, *values.shape[1:]), shardings[name], part)

    arrays = {name: by_image(name) for name in batch if name != "image"}
    image = shard_images(batch["image"], grid, mesh, first=first, total=total, rows=rows)
    return {"image": image, **arrays}


def batch_shardings(names: Iterable[str], mesh: Mesh) -> dict[str, NamedSharding]:
    """How `shard_batch` lays out the arrays of these names."""
    return {name: NamedSharding(mesh, P(*AXES) if name == "image" else P(DATA)) for name in names}


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def own_images(mesh: Mesh, total: int) -> range:
    """The places in a batch of `total` of the images that this process's devices have a part of."""
    rows = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((total,)).values()
    places = [index[0].indices(total) for index in rows if index is not None]
    return range(min(p[0] for p in places), max(p[1] for p in places))


def own_pixels(mesh: Mesh, grid: PatchGrid) -> slice:
    """The pixel rows that this process's devices have of images; maybe beyond them, by padding."""
    bands = Bands(grid, mesh.shape[PATCH])
    own = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    numbers = np.argwhere(np.reshape(own, mesh.devices.shape))[:, 1]
    return slice(bands.pixels(int(numbers.min())).start, bands.pixels(int(numbers.max())).stop)


def param_specs(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """How each leaf of a tree is divided: a tree of `PartitionSpec`; see `Rules`.

    Raises:
        ConfigError: for a rule that does not fit a leaf whose path it matches.
    """

    def spec(path: Any, leaf: Any) -> P:
        name = _path_text(path)
        for pattern, axes in rules:
            if leaf.ndim == len(axes) and re.search(pattern, name):
                _check_rule(name, leaf.shape, axes, mesh)
                return P(*axes)
        return P()

    return jax.tree_util.tree_map_with_path(spec, params)


def _path_text(path: Any) -> str:
    """A leaf's path from its part on, also in an optimizer's state: `encoder/Conv_0/kernel`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    found = re.search(r"(?:^|/)((?:encoder|head)/.*)", name)
    return found[1] if found else name


def check_rules(params: PyTree, rules: Rules) -> None:
    """Checks that each rule is about some parameter.

    Raises:
        ConfigError: if one is about none, with a few paths that there are.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for pattern, axes in rules:
        if not any(
            leaf.ndim == len(axes) and re.search(pattern, _path_text(path)) for path, leaf in leaves
        ):
            known = ", ".join(f"{_path_text(path)} {list(leaf.shape)}" for path, leaf in leaves[:6])
            raise ConfigError(
                f"param_rules: {pattern!r} fits no parameter of {len(axes)} dimensions; there are "
                f"{known}, ..."
            )


def _check_rule(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> None:
    used = [axis for axis in axes if axis is not None]
    if not set(used) <= set(AXES) or len(set(used)) != len(used):
        raise ConfigError(f"{name} cannot be divided along {axes}; the axes are {DATA} and {PATCH}")
    sizes = [1 if axis is None else mesh.shape[axis] for axis in axes]
    if any(n % d for n, d in zip(shape, sizes, strict=True)):
        raise ConfigError(
            f"{name} of shape {list(shape)} cannot be divided along {axes} on a mesh of "
            f"{dict(mesh.shape)}; change its rule"
        )


def param_shardings(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """`param_specs` as shardings, for `jax.device_put`, `jax.jit` and restoring a checkpoint.

    Args:
        params: parameters, or a whole `TrainState`, in whose optimizer state the parameters' paths
            occur again.
        rules: see `Rules`; none of them: all is whole on every device.
        mesh: from `make_mesh`.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, rules, mesh))


def sharded_train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    mesh: Mesh,
    model: PatchModel,
    optimizer: optax.GradientTransformation,
    grid: PatchGrid,
    patchgd: PatchGDConfig,
    rules: Rules = (),
    **options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`step.train_step` on a mesh, to be jitted.

    The result is that of one device with the same `patchgd.strata`, up to rounding; only dropout is
    drawn anew for each device. A batch's `image` is one of `shard_images`.

    Args:
        state: laid out as `param_shardings(state, rules, mesh)`.
        batch: from `shard_batch`.
        key: the run's key.
        mesh: from `make_mesh`.
        model: the model. Batch statistics are those of all devices, if its layers are `Normalize`.
        optimizer: as for one device.
        grid: the patch grid of the whole images.
        patchgd: gradient mode, sampling and policies.
        rules: how parameters are divided; they are gathered for use, and the gradients' sums
            divided again.
        options: the other arguments of `train_step`.

    Raises:
        ConfigError: as `train_step`; and if the mesh does not divide the batch, the strata or the
            grid, or layers keep batch statistics of their own device only.
    """
    data, patch = mesh.shape[DATA], mesh.shape[PATCH]
    check_layout(data, patch, batch_size=batch["label"].shape[0], strata=patchgd.strata)
    check_grid(mesh, grid)
    return train_step(
        state,
        batch,
        key,
        optimizer=optimizer,
        grid=grid,
        patchgd=patchgd,
        **_placed(model, batch, grid, mesh, rules),
        **options,
    )


def sharded_eval_step(
    params: Params,
    model_state: Params,
    batch: Batch,
    *,
    mesh: Mesh,
    model: PatchModel,
    grid: PatchGrid,
    fill_chunk: int,
    rules: Rules = (),
    **options: Any,
) -> dict[str, jax.Array]:
    """`step.eval_step` on a mesh, to be jitted; arguments as for `sharded_train_step`.

    `fill_chunk` counts the positions that all devices of an image together encode at a time.
    """
    check_layout(mesh.shape[DATA], 1, batch_size=batch["label"].shape[0], strata=1)
    return eval_step(
        params,
        model_state,
        batch,
        grid=grid,
        fill_chunk=fill_chunk,
        strata=mesh.shape[PATCH],
        **_placed(model, batch, grid, mesh, rules),
        **options,
    )


def _placed(
    model: PatchModel, batch: Batch, grid: PatchGrid, mesh: Mesh, rules: Rules
) -> dict[str, Any]:
    """The model and the placement of a step on a mesh."""
    if mesh.shape[DATA] * mesh.shape[PATCH] == 1 and mesh.shape[ROWS] > 1:
        # Nothing but rows is divided, which is the compiler's business alone; it cannot sum over
        # axes of one device beside (jax 0.10).
        return {"model": _by_rows(model, NamedSharding(mesh, P(None, ROWS))), "placement": ALONE}
    if mesh.shape[ROWS] > 1:
        model = _by_rows(model, P(None, ROWS))
    return {"model": _synchronised(model), "placement": _placement(batch, grid, mesh, rules)}


def _by_rows(model: PatchModel, sharding: Any) -> PatchModel:
    """The model with its patches divided by their rows."""

    def encode(params: Params, model_state: Params, patches: jax.Array, **options: Any) -> Any:
        patches = lax.with_sharding_constraint(patches, sharding)
        with rows_divided():
            return model.encode(params, model_state, patches, **options)

    return model._replace(encode=encode)


def _placement(batch: Batch, grid: PatchGrid, mesh: Mesh, rules: Rules) -> MeshPlacement:
    bands = Bands(grid, mesh.shape[PATCH])
    if batch["image"].shape[1:3] != (bands.count * bands.height, grid.width):
        raise ConfigError(
            f"the images are {batch['image'].shape[1]} x {batch['image'].shape[2]} px, but "
            f"{bands.count} bands of the grid are {bands.count * bands.height} x {grid.width} px; "
            "lay them out with shard_batch"
        )
    return MeshPlacement(mesh, bands, tuple(rules))


def _synchronised(model: PatchModel) -> PatchModel:
    """The model with batch statistics of all devices' patches, or images for the head."""

    def synchronise(function: Callable[..., Any], part: str, axes: tuple[str, ...]) -> Any:
        def apply(params: Params, model_state: Params, *args: Any, **kwargs: Any) -> Any:
            with statistics_over(axes):
                out, changed = function(params, model_state, *args, **kwargs)
            _check_equal(model_state[part], changed[part], part)
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
            "norm group, or with layers that synchronise (models.norm.Normalize, or BatchNorm with "
            "axis_name sharding.AXES in an encoder and sharding.DATA in a head)"
        )


@dataclass(frozen=True)
class MeshPlacement(Placement):
    """A step whose images and patches are laid over a mesh.

    The encoder's gradient is a part of the whole one on every device; the head is computed by all
    devices that share an image, alike, so its gradient has a part for each place along `data` only.
    """

    mesh: Mesh
    bands: Bands
    rules: tuple[tuple[str, tuple[str | None, ...]], ...]

    def spread(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], results: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """See `Placement`."""

        def everywhere(*args: Any) -> Any:
            (params,) = (a for a, kind in zip(args, arguments, strict=True) if kind == "params")
            specs = param_specs(params, self.rules, self.mesh)

            def in_specs(kind: Any, arg: Any) -> Any:
                if isinstance(kind, tuple):
                    return tuple(map(in_specs, kind, arg))
                if kind == "batch":
                    return {name: P(*AXES) if name == "image" else P(DATA) for name in arg}
                return specs if kind == "params" else _SPECS[kind]

            def local(*parts: Any) -> Any:
                parts = tuple(
                    self._whole(part, specs) if kind == "params" else part
                    for part, kind in zip(parts, arguments, strict=True)
                )
                out = function(*parts)
                return tuple(
                    self._total(part, specs)
                    if kind == "gradient"
                    else self.sum_images(part)
                    if kind == "sum"
                    else part
                    for part, kind in zip(out, results, strict=True)
                )

            return jax.shard_map(
                local,
                mesh=self.mesh,
                axis_names=set(AXES),
                in_specs=tuple(map(in_specs, arguments, args)),
                out_specs=tuple(specs if k == "gradient" else _SPECS[k] for k in results),
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
        """See `Placement`."""
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
        """See `Placement`."""
        first = jnp.asarray(self.bands.first_rows, ids.dtype)[lax.axis_index(PATCH)]
        return self.bands.of_band().take(images, ids - first * self.bands.grid.cols)

    def own_slots(self, ids: jax.Array) -> jax.Array:
        """See `Placement`."""
        return self._part(ids, PATCH, ids.ndim - 1)

    def all_slots(self, latents: jax.Array) -> jax.Array:
        """See `Placement`."""
        return lax.all_gather(latents, PATCH, axis=latents.ndim - 2, tiled=True, to="invarying")

    def sum_images(self, value: jax.Array) -> jax.Array:
        """See `Placement`."""
        return lax.psum(value, DATA)

    def first_image(self, count: int) -> jax.Array:
        """See `Placement`."""
        return lax.axis_index(DATA) * count

    def patches_key(self, key: jax.Array) -> jax.Array:
        """See `Placement`."""
        return self._folded(key, AXES)

    def images_key(self, key: jax.Array) -> jax.Array:
        """See `Placement`."""
        return self._folded(key, (DATA,))

    def _folded(self, key: jax.Array, axes: Iterable[str]) -> jax.Array:
        # One device draws what it would draw alone.
        for axis in axes:
            if self.mesh.shape[axis] > 1:
                key = jax.random.fold_in(key, lax.axis_index(axis))
        return key


_GRADIENT_AXES = {"encoder": AXES, "head": (DATA,)}
_SPECS = {
    "same": P(),
    "sum": P(),
    "images": P(DATA),
    "groups": P(None, DATA),
}
