"""Meshes of devices: their axes, and the layout of images and batches over them.

Along `data` each device has some of a batch's images, along `patch` a part of every image: a band
of pixel rows with a range of patch ids. Along `rows` devices share each patch (`contrib.rows`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.errors import ConfigError

DATA, PATCH, ROWS = "data", "patch", "rows"
AXES = (DATA, PATCH)
"""For layers of your own that synchronise over the encoder's patches: `axis_name=AXES`."""


def make_mesh(
    layout: str,
    *,
    batch_size: int,
    eval_batch_size: int | None = None,
    strata: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh of the devices.

    Args:
        layout: sizes of the axes, such as `data=2,patch=4,rows=2` (1 if left out); or `auto`, which
            gives `data` as many devices as the batch allows: images share only gradients, and each
            device's share of the pixels and patches is the same anyway.
        batch_size: images of a batch.
        eval_batch_size: images of an evaluation batch. None: `batch_size`.
        strata: `PatchGDConfig.strata`.
        devices: all of them are used. None: every device of every process.

    Raises:
        ConfigError: if the layout cannot be read, has another number of devices, or does not divide
            the batch and the strata.
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


def parse_layout(layout: str) -> tuple[int, int, int]:
    """Parses sizes of the axes `data`, `patch` and `rows` from a text such as `data=2,patch=4`."""
    sizes: dict[str, int] = {}
    for part in layout.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in (*AXES, ROWS) or match[1] in sizes:
            raise ConfigError(
                f"mesh {layout!r} cannot be read; write auto, or sizes such as {DATA}=2,{PATCH}=4 "
                f"(axes: {DATA}, {PATCH}, {ROWS})"
            )
        sizes[match[1]] = int(match[2])
    return sizes.get(DATA, 1), sizes.get(PATCH, 1), sizes.get(ROWS, 1)


def check_layout(data: int, patch: int, *, batch_size: int, strata: int) -> None:
    """Raises `ConfigError` unless a mesh divides the work evenly."""
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
    """Raises `ConfigError` unless a mesh divides a grid's patches, and the rows of one evenly."""
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
    """The layout of an image over the `patch` axis: bands of whole pixel rows.

    Device `d` of D encodes the patches from `d * N // D` up to `(d + 1) * N // D`, so D is at most
    N. Its band has their grid rows. All bands have one height, so some have a row or two without a
    patch of their own; where patches overlap, neighbours share pixels.
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
        """First grid row of each band."""
        first = self._bounds()[:-1] // self.grid.cols
        # The last bands begin further up rather than reach beyond the grid.
        return tuple(int(row) for row in np.minimum(first, self.grid.rows - self.rows))

    def pixels(self, number: int) -> slice:
        """Returns the pixel rows of a band; they may reach into the image's padding."""
        start = self.first_rows[number] * self.grid.stride
        return slice(start, start + self.height)

    def of_band(self) -> PatchGrid:
        """Returns the grid of a band; its patch 0 is the first of its first row."""
        return dataclasses.replace(self.grid, height=self.height)

    def cut(self, image: np.ndarray, number: int, top: int = 0) -> np.ndarray:
        """Cuts a band out of images `[B, H, W, C]` (from row `top` on); pads with background."""
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


def shard_batch(
    batch: Mapping[str, np.ndarray],
    grid: PatchGrid,
    mesh: Mesh,
    *,
    first: int = 0,
    total: int | None = None,
    rows: slice | None = None,
) -> dict[str, Array]:
    """Lays a batch over the mesh: each device gets its images, and of them its band only.

    Args:
        batch: arrays `[B, ...]` on the host, with `image [B, H, W, C]`; of an image in a memory
            map, only own bands are read.
        grid: the patch grid of the images.
        mesh: from `make_mesh`.
        first: place in the batch of the first example, if other processes have others; see
            `own_images`.
        total: images of the whole batch. None: these.
        rows: pixel rows of `image`, from `own_pixels`. None: all.

    Returns:
        Arrays `[total, ...]` divided by image; `image [total, D * band height, W, C]` has the bands
        one after the other, divided along both axes.

    Raises:
        ConfigError: if images are not of the grid's size, or the mesh does not divide them.
    """
    image = batch["image"]
    rows = slice(0, grid.height) if rows is None else rows
    if image.shape[1:3] != (rows.stop - rows.start, grid.width):
        raise ConfigError(
            f"the images are {image.shape[1]} x {image.shape[2]} px, but the grid is for "
            f"{rows.stop - rows.start} x {grid.width} px"
        )
    bands = Bands(grid, mesh.shape[PATCH])
    count = len(image) if total is None else total
    check_layout(mesh.shape[DATA], 1, batch_size=count, strata=1)

    def part(name: str, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(count)
        values = np.asarray(batch[name][start - first : stop - first])
        if name != "image":
            return values
        return bands.cut(values, (index[1].start or 0) // bands.height, rows.start)

    shapes = {name: (count, *values.shape[1:]) for name, values in batch.items()}
    shapes["image"] = (count, bands.count * bands.height, *image.shape[2:])
    return {
        name: jax.make_array_from_callback(shapes[name], sharding, partial(part, name))
        for name, sharding in batch_shardings(batch, mesh).items()
    }


def batch_shardings(names: Iterable[str], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of a batch's arrays by name, as `shard_batch` lays them out."""
    return {name: NamedSharding(mesh, P(*AXES) if name == "image" else P(DATA)) for name in names}


def own_images(mesh: Mesh, total: int) -> range:
    """Returns the places in a batch of `total` images that this process's devices share."""
    rows = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((total,)).values()
    places = [index[0].indices(total) for index in rows if index is not None]
    return range(min(p[0] for p in places), max(p[1] for p in places))


def own_pixels(mesh: Mesh, grid: PatchGrid) -> slice:
    """Returns the pixel rows of images on this process's devices; they may reach into padding."""
    bands = Bands(grid, mesh.shape[PATCH])
    own = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    numbers = np.argwhere(np.reshape(own, mesh.devices.shape))[:, 1]
    return slice(bands.pixels(int(numbers.min())).start, bands.pixels(int(numbers.max())).stop)
