"""Opens images of any format, to read regions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from patchgd_jax.data.images.array_regions import FlatRegions, NpyRegions
from patchgd_jax.data.images.openslide_regions import OpenSlideRegions
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import FORMATS, ImageReadError, sniff_format
from patchgd_jax.data.images.tiff_regions import TiffRegions
from patchgd_jax.data.images.zarr_regions import MARKERS, ZarrRegions

Kind = Literal["flat", "flat-tiff", "tiff", "zarr", "npy", "openslide"]
"""Kind of reader. flat: decoded as a whole; flat-tiff: a TIFF of one page without tiles, which can
be decoded as a whole."""

MAX_FLAT_TIFF = 2**24
"""Plain TIFFs of up to this many pixels are decoded as a whole."""

_FLAT_KINDS = ("flat", "flat-tiff")
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

    Reads tiled TIFF, BigTIFF, SVS, OME-TIFF and NDPI; Zarr and OME-Zarr folders; `.npy` files; the
    formats of OpenSlide, if it is installed. PNG, JPEG, WebP, BMP and small plain TIFF are decoded
    as a whole with the first region, and stay in memory.

    Args:
        path: the file, or a Zarr image's folder; its format is found from its content.
        channels: 1 for grey, 3 for RGB. None: the file's own; transparency does not count.
        background: uint8 value outside the image and under transparent pixels.
        cache_bytes: bytes of decoded tiles to keep.

    Returns:
        The image; to be closed by the caller.

    Raises:
        ImageReadError: if the file is missing, truncated, damaged, or no image.
        ConfigError: if a package for its format is not installed.
    """
    path = Path(path)
    kind = _opened_as(path)
    if kind in _FLAT_KINDS:
        return FlatRegions(path, channels, background)
    if kind == "npy":
        return NpyRegions(path, channels, background)
    opener = {"zarr": ZarrRegions, "tiff": TiffRegions}.get(kind, OpenSlideRegions)
    return opener(path, channels, background, cache_bytes)


def is_flat(path: Path) -> bool:
    """Whether `open_regions` decodes a file as a whole, by `read_image`.

    Raises:
        ImageReadError: if the file is missing or unsupported.
    """
    return _opened_as(path) in _FLAT_KINDS


def _opened_as(path: Path) -> Kind:
    kind = sniff(path)
    large = kind == "flat-tiff" and _flat_tiff_pixels(path) > MAX_FLAT_TIFF
    return "tiff" if large else kind


def sniff(path: Path) -> Kind:
    """Finds the kind of reader of a file.

    Raises:
        ImageReadError: if the file is missing or unsupported.
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
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    found = sniff_format(start)
    if found == "TIFF":
        return "flat-tiff" if _flat_tiff_pixels(path) else "tiff"
    if found is not None:
        return "flat"
    if _openslide_knows(path):
        return "openslide"
    raise ImageReadError(
        path, f"it is none of {', '.join(FORMATS)}, NumPy or a slide, or damaged at its start"
    )


def _openslide_knows(path: Path) -> bool:
    try:
        import openslide
    except ImportError:
        return False
    return openslide.OpenSlide.detect_format(path) is not None


def _flat_tiff_pixels(path: Path) -> int:
    """Number of pixels of a TIFF of one page without tiles that Pillow reads; 0 for others."""
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        # Image.open would apply a limit of pixels that is global to the process.
        with path.open("rb") as file, TiffImageFile(file) as image:
            # `n_frames` reads all pages.
            single = _TILE_WIDTH not in image.tag_v2 and image.n_frames == 1
            return image.width * image.height if single else 0
    except Exception:
        # The tiled reader opens it or explains the error.
        return 0
