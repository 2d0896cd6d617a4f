"""Reads patches ahead of the device, a bounded number of chunks at a time.

A chunk is alive from the start of its read to the end of the computation on it. The number of
chunks alive is limited, so host memory does not grow with the image.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Self

import jax
import numpy as np
from jax import Array

from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.errors import DataError, PatchGDError

if TYPE_CHECKING:
    from patchgd_jax.data.images.region_base import RegionSource


class ChunkIds(NamedTuple):
    """The patches of one chunk."""

    first: int
    """Place in the batch of the chunk's first image."""
    ids: np.ndarray
    """`int [b, k]`, patch numbers of the images `first`, `first + 1` ...; slots of at least N hold
    no patch."""


class PatchReader:
    """Reads single patches of a batch of images; pixels outside an image are background.

    Args:
        names: of the images, for errors.
        grid: the patch grid, which may be larger than an image.
        level: resolution to read, an index into `RegionSource.level_shapes`.

    Raises:
        DataError: if an image is larger than the grid, has no such level, or another number of
            channels than the first.
    """

    def __init__(
        self, images: Sequence[RegionSource], names: Sequence[str], grid: PatchGrid, level: int = 0
    ) -> None:
        self.images, self.names, self.grid, self.level = images, names, grid, level
        self.channels = images[0].channels
        self.sizes = []
        for image, name in zip(images, names, strict=True):
            if level >= len(image.level_shapes):
                raise DataError(
                    f"{name} has {len(image.level_shapes)} resolutions, no level {level}; read a "
                    "smaller level"
                )
            height, width = image.level_shapes[level]
            if height > grid.height or width > grid.width:
                raise DataError(
                    f"{name} is {height} x {width} px at level {level}, but the grid is for "
                    f"{grid.height} x {grid.width} px; use a grid of at least its size"
                )
            if image.channels != self.channels:
                raise DataError(
                    f"{name} has {image.channels} channels, but {names[0]} has {self.channels}; "
                    "open all with the same number"
                )
            self.sizes.append((height, width))

    def read(self, place: int, number: int, out: np.ndarray) -> None:
        """Reads patch `number` of the image at `place` in the batch into `out uint8 [p, p, C]`.

        Raises `DataError`, naming the image, if the source fails or returns other pixels than asked
        for. The package's own errors keep their kind.
        """
        grid = self.grid
        y, x = (number // grid.cols) * grid.stride, (number % grid.cols) * grid.stride
        rows = min(grid.patch, self.sizes[place][0] - y)
        cols = min(grid.patch, self.sizes[place][1] - x)
        if rows < grid.patch or cols < grid.patch:
            out[:] = grid.background
        if rows <= 0 or cols <= 0:
            return
        name = self.names[place]
        where = f"{name}, patch {number} ({rows} x {cols} px at row {y}, column {x})"
        try:
            pixels = self.images[place].read(y, x, rows, cols, self.level)
        except PatchGDError as error:
            if name not in str(error):
                # The kind of error stays: it decides what the run does next.
                error.args = (f"{name}: {error}",)
            raise
        except Exception as error:
            raise DataError(f"cannot read {where}: {error or type(error).__name__}") from error
        if pixels.dtype != np.uint8 or pixels.shape != (rows, cols, self.channels):
            raise DataError(
                f"cannot read {where}: its source gave {pixels.dtype} {list(pixels.shape)} instead "
                f"of uint8 {[rows, cols, self.channels]}"
            )
        out[:rows, :cols] = pixels


class _Chunk(NamedTuple):
    pixels: np.ndarray
    reads: list[Future[None]]


class PatchFeed:
    """Returns the chunks of a plan in order, and reads the next ones meanwhile.

    Use it in a `with` statement: leaving it stops and joins its threads. For each chunk call
    `take`, start the computation on it, and call `used` with a result of that computation.

    Args:
        plan: the chunks, in order; consumed no sooner than they are read.
        buffers: chunks alive at once, at least 2.
        readers: threads that read.
    """

    def __init__(
        self, reader: PatchReader, plan: Iterable[ChunkIds], *, buffers: int, readers: int
    ) -> None:
        self._reader, self._plan, self._buffers = reader, iter(plan), buffers
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="patch-reader")
        self._reading: deque[_Chunk] = deque()
        self._running: deque[Array] = deque()
        self.waited = 0.0
        """Seconds so far that `take` has waited for reads."""

    def __enter__(self) -> Self:
        self._read_ahead()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> Array:
        """Sends the next chunk to the device: `uint8 [b, k, p, p, C]`; raises as its reads."""
        chunk = self._reading.popleft()
        begun = time.monotonic()
        for read in chunk.reads:
            read.result()
        self.waited += time.monotonic() - begun
        # The buffer is never written again: on the CPU the device's array may be the same memory.
        return jax.device_put(chunk.pixels)

    def used(self, result: Array) -> None:
        """Registers the computation on the last chunk by a result, which must not be donated.

        Waits for the previous computation, so that at most two are queued on the device: a queued
        call keeps its chunk alive.
        """
        self._running.append(result)
        if len(self._running) > 1:
            self._running.popleft().block_until_ready()
        self._read_ahead()

    def _read_ahead(self) -> None:
        while len(self._reading) + len(self._running) < self._buffers:
            chunk = next(self._plan, None)
            if chunk is None:
                return
            self._reading.append(self._start(chunk))

    def _start(self, chunk: ChunkIds) -> _Chunk:
        grid = self._reader.grid
        side = (grid.patch, grid.patch, self._reader.channels)
        pixels = np.empty((*chunk.ids.shape, *side), np.uint8)
        reads = []
        for (b, slot), number in np.ndenumerate(chunk.ids):
            out = pixels[b, slot]
            if number >= grid.num_patches:
                out[:] = grid.background
            else:
                place = chunk.first + b
                reads.append(self._pool.submit(self._reader.read, place, int(number), out))
        return _Chunk(pixels, reads)
