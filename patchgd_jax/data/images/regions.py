"""Opens images of any format to read regions of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from patchgd_jax.data.images.array_regions import FlatRegions, NpyRegions
from patchgd_jax.data.images.openslide_regions import OpenSlideRegions
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import FORMATS, ImageReadError
from patchgd_jax.data.images.tiff_regions import TiffRegions
from patchgd_jax.data.images.zarr_regions import MARKERS, ZarrRegions

Kind = Literal["flat", "flat-tiff", "tiff", "zarr", "npy", "openslide"]
"""How a file is read. flat: decoded as a whole; flat-tiff: a TIFF that may be, having one page
without tiles."""

MAX_FLAT_TIFF = 2**24
"""Pixels of a plain TIFF up to which it is decoded as a whole."""

_FLAT_KINDS = ("flat", "flat-tiff")
_MAGIC: dict[bytes, Kind] = {
    b"\x89PNG": "flat",
    b"\xff\xd8\xff": "flat",
    b"BM": "flat",
    b"\x93NUMPY": "npy",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
}
_TILE_WIDTH = 322
SLIDE_SUFFIXES = (".mrxs", ".dcm", ".vms", ".vmu", ".svslide", ".bif", ".scn", ".czi")
"""Lower-case suffixes of files that OpenSlide reads; some begin like JPEG or TIFF."""


def open_regions(
    path: str | Path,
    *,
    channels: Literal[1, 3] | None,
    background: int = 0,
    cache_bytes: int = 64 * 2**20,
) -> RegionSource:
    """Opens a large image to read regions of it.

    Tiled TIFF, BigTIFF, SVS, OME-TIFF and NDPI; Zarr and OME-Zarr folders; `.npy` files; what
    OpenSlide reads, if it is installed. PNG, JPEG, WebP, BMP and small plain TIFF have no regions:
    they are decoded as a whole with the first one, and stay in memory.

    Args:
        path: the file, or a Zarr image's folder; its kind is found from its content.
        channels: 1 for grey, 3 for RGB. None: what the file has; transparency does not count.
        background: uint8 value outside the image and under transparent pixels.
        cache_bytes: bytes of decoded tiles to keep.

    Returns:
        The image; to be closed by the caller.

    Raises:
        ImageReadError: if the file is missing, truncated, damaged, or no image.
        ConfigError: if a package that its kind needs is not installed.
    """
    path = Path(path)
    kind = _opened_as(path)
    if kind in _FLAT_KINDS:
        return FlatRegions(path, channels=channels, background=background)
    if kind == "npy":
        return NpyRegions(path, channels=channels, background=background)
    opener = {"zarr": ZarrRegions, "tiff": TiffRegions}.get(kind, OpenSlideRegions)
    return opener(path, channels=channels, background=background, cache_bytes=cache_bytes)


def is_flat(path: Path) -> bool:
    """Whether `open_regions` decodes a file as a whole, by `read_image`.

    Raises:
        ImageReadError: if it is missing, or nothing that can be read.
    """
    return _opened_as(path) in _FLAT_KINDS


def _opened_as(path: Path) -> Kind:
    kind = sniff(path)
    large = kind == "flat-tiff" and _flat_tiff_pixels(path) > MAX_FLAT_TIFF
    return "tiff" if large else kind


def sniff(path: Path) -> Kind:
    """Finds how a file is to be read.

    Raises:
        ImageReadError: if it is missing, or nothing that can be read.
    """
    if not path.exists():
        raise ImageReadError(path, "there is no such file")
    if path.is_dir():
        if any((path / marker).exists() for marker in MARKERS):
            return "zarr"
        raise ImageReadError(path, "it is a folder, and not of Zarr")
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return "openslide"
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ImageReadError(path, str(error)) from error
    kind = next((k for magic, k in _MAGIC.items() if start.startswith(magic)), None)
    if kind is None and start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "flat"
    if kind is None and _openslide_knows(path):
        return "openslide"
    if kind is None:
        raise ImageReadError(
            path,
            f"it is none of {', '.join(FORMATS)}, NumPy or a slide, or damaged at its start",
        )
    return "flat-tiff" if kind == "tiff" and _flat_tiff_pixels(path) else kind


def _openslide_knows(path: Path) -> bool:
    try:
        import openslide
    except ImportError:
        return False
    return openslide.OpenSlide.detect_format(path) is not None


def _flat_tiff_pixels(path: Path) -> int:
    """Pixels of a TIFF of one page without tiles that Pillow can read; 0 for any other."""
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        # Image.open would apply a limit of pixels that is global to the process.
        with path.open("rb") as file, TiffImageFile(file) as image:
            # The number of frames is known when all of them have been looked at.
            single = _TILE_WIDTH not in image.tag_v2 and image.n_frames == 1
            return image.width * image.height if single else 0
    except Exception:
        # What Pillow cannot open, the tiled reader opens or explains.
        return 0
