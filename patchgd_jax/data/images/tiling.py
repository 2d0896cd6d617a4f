"""Converts an image to a tiled pyramid, to be read by regions."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from patchgd_jax.data.images.array_regions import FlatRegions
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.regions import open_regions, sniff
from patchgd_jax.data.images.safe_image import MAX_PIXELS
from patchgd_jax.data.images.tiff_levels import MAX_TILE_PIXELS, require_tifffile
from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.io.files import atomic_file

SMALLEST_LEVEL = 1024
"""Levels are added until the longer side has at most this many pixels."""


def tile_image(
    path: str | Path,
    output: str | Path,
    *,
    channels: Literal[1, 3] = 3,
    background: int = 0,
    tile: int = 512,
    quality: int | Literal["lossless"] = 90,
    levels: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[tuple[int, int], ...]:
    """Converts an image to a tiled pyramidal BigTIFF.

    Each level has half the side of the one before, rounded up, and averages of two by two pixels.
    An image in regions is converted by rows of tiles, with the smaller levels in temporary files
    beside the output (a third of the image's pixels, uncompressed). A flat file (PNG, JPEG, ...) is
    decoded as a whole.

    Args:
        path: an image for `open_regions`, or a flat file of at most `max_pixels`.
        output: the TIFF; it appears under its name when it is complete.
        channels: 1 for grey, 3 for RGB.
        background: uint8 value under transparent pixels and in missing tiles.
        tile: side of a tile in pixels, a multiple of 16.
        quality: of JPEG, 1 to 100; or lossless, with Deflate.
        levels: number of levels. None: until the longer side is at most `SMALLEST_LEVEL`.
        max_pixels: largest height times width of a flat file. Its decoding takes about 10 bytes a
            pixel for RGB. For WebP, Pillow's own limit holds as well.

    Returns:
        Height and width of each level.

    Raises:
        ConfigError: if a setting is out of range, or tifffile or imagecodecs is not installed.
        ImageReadError: if the image cannot be read.
        DiskError: if the output exists or cannot be written.
    """
    if tile < 16 or tile % 16 or tile * tile > MAX_TILE_PIXELS:
        raise ConfigError(f"tile is {tile}; it must be a multiple of 16 between 16 and 4096")
    if quality != "lossless" and not 1 <= quality <= 100:
        raise ConfigError(f"quality is {quality}; it must be in 1..100, or lossless")
    if levels is not None and levels < 1:
        raise ConfigError(f"levels is {levels}; at least 1")
    require_tifffile()
    path, output = Path(path), Path(output)
    _refuse_existing(output)
    source: RegionSource
    if sniff(path) in ("flat", "flat-tiff"):
        source = FlatRegions(path, channels, background, max_pixels)
    else:
        source = open_regions(path, channels=channels, background=background)
    with contextlib.closing(source), atomic_file(output) as partial:
        shapes = _shapes(source.level_shapes[0], levels)
        _write(partial, source, shapes, tile, quality)
        _refuse_existing(output)
    return shapes


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise DiskError(f"{output} exists; name another file, or delete it first")


def _shapes(full: tuple[int, int], levels: int | None) -> tuple[tuple[int, int], ...]:
    """Height and width of each level."""
    shapes = [full]
    while len(shapes) < levels if levels is not None else max(shapes[-1]) > SMALLEST_LEVEL:
        height, width = shapes[-1]
        if (height, width) == (1, 1):
            break
        shapes.append(((height + 1) // 2, (width + 1) // 2))
    return tuple(shapes)


def _write(
    path: Path,
    source: RegionSource,
    shapes: tuple[tuple[int, int], ...],
    tile: int,
    quality: int | Literal["lossless"],
) -> None:
    tifffile = require_tifffile()
    options: dict[str, Any] = {
        "tile": (tile, tile),
        "dtype": np.uint8,
        "photometric": "rgb" if source.channels == 3 else "minisblack",
        "metadata": None,
    }
    if quality == "lossless":
        options |= {"compression": "deflate", "predictor": True}
    else:
        options |= {"compression": "jpeg", "compressionargs": {"level": quality}}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(tifffile.TiffWriter(path, bigtiff=True))
        bands = _source_bands(source, tile)
        for level, shape in enumerate(shapes):
            smaller = None
            if level + 1 < len(shapes):
                smaller = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            if source.mpp is not None:
                across = 1e4 / source.mpp * shape[1] / shapes[0][1]
                options |= {"resolution": (across, across), "resolutionunit": "CENTIMETER"}
            writer.write(
                _tiles(bands, tile, smaller),
                shape=shape if source.channels == 1 else (*shape, 3),
                subfiletype=int(level > 0),
                **options,
            )
            if smaller is not None:
                bands = _file_bands(smaller, shapes[level + 1], source.channels, tile)


def _source_bands(source: RegionSource, tile: int) -> Iterator[np.ndarray]:
    """Yields the image in bands as high as a tile: `uint8 [<= tile, W, C]`."""
    height, width = source.level_shapes[0]
    for top in range(0, height, tile):
        yield source.read(top, 0, min(tile, height - top), width)


def _file_bands(
    file: IO[bytes], shape: tuple[int, int], channels: int, tile: int
) -> Iterator[np.ndarray]:
    """Yields a level from its temporary file, in bands as high as a tile."""
    height, width = shape
    file.seek(0)
    for top in range(0, height, tile):
        rows = min(tile, height - top)
        data = file.read(rows * width * channels)
        yield np.frombuffer(data, np.uint8).reshape(rows, width, channels)


def _tiles(
    bands: Iterator[np.ndarray], tile: int, smaller: IO[bytes] | None
) -> Iterator[np.ndarray]:
    """Cuts bands into tiles, and writes each band at half its size to `smaller`.

    Yields:
        `uint8 [tile, tile]` or `[tile, tile, 3]`, padded with the image's last pixels to avoid JPEG
        artefacts.
    """
    for band in bands:
        if smaller is not None:
            smaller.write(_halved(band).tobytes())
        pad = ((0, -band.shape[0] % tile), (0, -band.shape[1] % tile), (0, 0))
        padded = np.pad(band, pad, mode="edge")
        for left in range(0, padded.shape[1], tile):
            piece = padded[:, left : left + tile]
            yield np.ascontiguousarray(piece[..., 0] if piece.shape[-1] == 1 else piece)


def _halved(band: np.ndarray) -> np.ndarray:
    """Averages two by two pixels: `uint8 [ceil(h / 2), ceil(w / 2), C]`; at odd edges fewer."""
    from PIL import Image

    image = Image.fromarray(band[..., 0] if band.shape[-1] == 1 else band)
    half = np.asarray(image.reduce(2))
    return half.reshape(*half.shape[:2], band.shape[-1])
