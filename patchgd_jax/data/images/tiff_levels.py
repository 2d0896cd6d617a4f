"""Finds the resolution levels of a TIFF, and refuses files that could only be read wrongly."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from patchgd_jax.data.images.pixels import DTYPES, Alpha
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.errors import ConfigError

MAX_TILE_PIXELS = 2**24
MAX_STRIP_PIXELS = 2**22
"""With larger strips each small region would decode a great part of the image."""

_JPEG = (6, 7)
_APERIO_YCBCR = 33003
_NDPI_MAGNIFICATION, _NDPI_Z_OFFSET = 65421, 65424


@dataclass(frozen=True)
class Level:
    """Places of a level's tiles in the file; a strip is a tile as wide as the image."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray
    """int64, bytes from the file's start, by plane, row and column."""
    counts: np.ndarray
    """int64, bytes of each tile; 0: the tile is not in the file."""
    decode: Callable[..., Any]
    """tifffile's decoder of this page; it holds no file and may be called from any thread."""
    tables: dict[str, bytes | None]
    """Further arguments of `decode`."""
    planes: int
    """1, or the number of samples if each has tiles of its own."""

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.shape[0] // self.tile[0])

    @property
    def cols(self) -> int:
        """Columns of tiles."""
        return -(-self.shape[1] // self.tile[1])


@dataclass(frozen=True)
class Pyramid:
    """Metadata of a TIFF."""

    levels: tuple[Level, ...]
    alpha: Alpha
    colours: int
    """Used samples per pixel: colours and alpha."""
    inverted: bool
    """Whether 0 is white."""
    ycbcr: bool
    """Whether the decoder leaves YCbCr to the caller."""
    mpp: float | None

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour; alpha does not count."""
        return self.colours - (self.alpha != "none")


def require_tifffile() -> ModuleType:
    """Imports the tifffile package.

    Raises:
        ConfigError: if it or imagecodecs is not installed.
    """
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError as error:
        raise ConfigError(
            "tiled TIFF files need the packages tifffile and imagecodecs; install them with: "
            "pip install 'patchgd-jax[wsi]'"
        ) from error
    return tifffile


def read_pyramid(path: Path) -> Pyramid:
    """Reads all directories of a TIFF.

    Pages of the base page's aspect ratio, samples and layout (tiled or not) are its levels, but not
    labels, macro pictures and thumbnails.

    Raises:
        ImageReadError: if the file is truncated, damaged or unsupported.
        ConfigError: if tifffile or imagecodecs is not installed.
    """
    tifffile = require_tifffile()
    try:
        with tifffile.TiffFile(path) as tif:
            if tif.is_bif or tif.is_scn:
                raise _TiffError(
                    "it is a Ventana or Leica slide, whose parts OpenSlide puts together; give it "
                    "its suffix back (.bif or .scn) and: pip install 'patchgd-jax[openslide]'"
                )
            pages = list(_pages(tif))
            for page in pages:
                _require_whole(page, tif.filehandle.size)
            base = _base(pages, tif.is_ndpi)
            used = _level_pages(base, pages, tif.is_ndpi)
            alpha, colours = _samples(base)
            return Pyramid(
                tuple(_level(page, number) for number, page in enumerate(used)),
                alpha=alpha,
                colours=colours,
                inverted=base.photometric == 0,
                ycbcr=base.compression == _APERIO_YCBCR,
                mpp=_mpp(base, tif.pages[0].description),
            )
    except _TiffError as error:
        raise ImageReadError(path, str(error)) from error
    except Exception as error:
        # Damaged directories make tifffile raise many kinds, struct.error and KeyError among them.
        reason = str(error) or type(error).__name__
        raise ImageReadError(path, f"it is no TIFF, or damaged or truncated: {reason}") from error


class _TiffError(Exception):
    """The reason why a TIFF is refused."""


def _pages(tif: Any) -> Iterator[Any]:
    """Yields all pages and their sub-pages.

    tifffile stops silently at a directory beyond the file's end; the last must have no successor.
    """
    size, layout = tif.filehandle.size, tif.tiff
    pages = list(tif.pages)
    last = pages[-1].offset
    tif.filehandle.seek(last)
    (tags,) = struct.unpack(layout.tagnoformat, tif.filehandle.read(layout.tagnosize))
    tif.filehandle.seek(last + layout.tagnosize + tags * layout.tagsize)
    (following,) = struct.unpack(layout.offsetformat, tif.filehandle.read(layout.offsetsize))
    if following != 0:
        raise _TiffError(
            f"it is truncated: after {len(pages)} pages the next is said to be at byte "
            f"{following} of {size}"
        )
    for page in pages:
        yield page
        if page.subifds:
            if max(page.subifds) >= size:
                raise _TiffError("it is truncated: a level lies beyond the file's end")
            children = list(page.pages)
            if len(children) < len(page.subifds):
                raise _TiffError("it is truncated: some levels cannot be read")
            yield from children


def _is_slide_page(page: Any, ndpi: bool) -> bool:
    """Whether a page shows the specimen.

    In NDPI, macro and map have no positive magnification, and of several focal planes the one at
    0 is used.
    """
    if not ndpi:
        return True
    magnification = page.tags.valueof(_NDPI_MAGNIFICATION)
    return (magnification is None or magnification > 0) and not page.tags.valueof(_NDPI_Z_OFFSET)


def _side_lengths(page: Any) -> tuple[int, int]:
    return page.imagelength, page.imagewidth


def _area(page: Any) -> int:
    return page.imagelength * page.imagewidth


def _base(pages: list[Any], ndpi: bool) -> Any:
    """The page of full resolution: the largest tiled one, or the largest if none is tiled."""
    candidates = [p for p in pages if _is_slide_page(p, ndpi) and _area(p) > 0]
    candidates = [p for p in candidates if p.is_tiled] or candidates
    if not candidates:
        raise _TiffError("it has no pixels")
    return max(candidates, key=_area)


def _level_pages(base: Any, pages: list[Any], ndpi: bool) -> list[Any]:
    used = [base]
    for page in sorted(pages, key=_area, reverse=True):
        if page is base or not _is_slide_page(page, ndpi) or not _like(page, base):
            continue
        # NDPI stores its small levels untiled.
        if page.is_tiled != base.is_tiled and not (ndpi and _area(page) <= MAX_STRIP_PIXELS):
            continue
        if _side_lengths(page) == _side_lengths(base):
            raise _TiffError(
                f"it has several pages of {page.imagelength} x {page.imagewidth} px, a stack or "
                "several colour channels; save one grey or RGB image"
            )
        # A thumbnail may have a level's size.
        if _side_lengths(page) != _side_lengths(used[-1]):
            used.append(page)
    return used


def _like(page: Any, base: Any) -> bool:
    """Whether a page is the base at a lower resolution; both sides may be rounded in any way."""
    if (page.samplesperpixel, page.dtype) != (base.samplesperpixel, base.dtype) or not _area(page):
        return False
    full, small = _side_lengths(base), _side_lengths(page)
    longer = int(full[1] > full[0])
    expected = full[1 - longer] * small[longer] / full[longer]
    return abs(small[1 - longer] - expected) <= 2


def _samples(page: Any) -> tuple[Alpha, int]:
    """Kind of the alpha sample, and number of used samples per pixel."""
    if page.dtype is None or page.dtype.name not in DTYPES or page.bitspersample not in (1, 8, 16):
        kind = page.dtype or f"sample format {page.sampleformat}"
        raise _TiffError(f"its pixels are {kind}, {page.bitspersample} bits; save it with 8 or 16")
    if page.imagedepth > 1:
        raise _TiffError("it is a volume; save one plane of it")
    colours = {0: 1, 1: 1, 2: 3, 6: 3}.get(int(page.photometric))
    ycbcr = int(page.photometric) == 6 and page.compression not in (*_JPEG, _APERIO_YCBCR, 33005)
    if colours is None or ycbcr or page.samplesperpixel < colours:
        raise _TiffError(
            f"its colours are {page.photometric!r} with {page.samplesperpixel} samples a pixel; "
            "save it as grey or RGB"
        )
    orientation = page.tags.valueof(274)
    if orientation not in (None, 0, 1):
        raise _TiffError(f"it is turned (orientation {orientation}); save it upright")
    extra = page.samplesperpixel - colours
    if extra > 1:
        raise _TiffError(f"it has {page.samplesperpixel} samples a pixel; save it as grey or RGB")
    if extra == 0:
        return "none", colours
    kinds = [int(kind) for kind in page.extrasamples] or [0]
    if kinds[0] == 1:
        return "premultiplied", colours + 1
    return ("straight", colours + 1) if kinds[0] == 2 else ("none", colours)


def _require_whole(page: Any, file_size: int) -> None:
    """Refuses a page, used or not, with data beyond the file's end."""
    offsets, counts = (np.asarray(p, np.int64) for p in (page.dataoffsets, page.databytecounts))
    if len(offsets) != len(counts) or (offsets < 0).any() or (counts < 0).any():
        raise _TiffError(f"the places of the tiles of page {page.index} are damaged")
    beyond = np.count_nonzero((counts > 0) & (offsets + counts > file_size))
    if beyond:
        raise _TiffError(
            f"it is truncated: {beyond} of {len(counts)} tiles of page {page.index} lie beyond "
            f"its end at byte {file_size}"
        )


def _level(page: Any, number: int) -> Level:
    height, width = _side_lengths(page)
    if page.is_tiled:
        tile, limit = (page.tilelength, page.tilewidth), MAX_TILE_PIXELS
    else:
        tile, limit = (min(page.rowsperstrip, height), width), MAX_STRIP_PIXELS
    if tile[0] * tile[1] > limit:
        raise _TiffError(
            f"level {number} of {height} x {width} px is stored in pieces of {tile[0]} x "
            f"{tile[1]} px, too large to read regions from; convert it once with "
            "`patchgd-jax data tile`"
        )
    level = Level(
        shape=(height, width),
        tile=tile,
        offsets=np.asarray(page.dataoffsets, np.int64),
        counts=np.asarray(page.databytecounts, np.int64),
        decode=page.decode,
        tables={"jpegtables": page.jpegtables, "jpegheader": page.jpegheader},
        planes=page.samplesperpixel if page.planarconfig == 2 else 1,
    )
    expected = level.rows * level.cols * level.planes
    if len(level.offsets) != expected:
        raise _TiffError(f"level {number} needs {expected} tiles but lists {len(level.offsets)}")
    return level


def _mpp(base: Any, description: str) -> float | None:
    """Micrometres per pixel from an SVS or OME description, else from the resolution tags."""
    svs = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if svs:
        return _positive(float(svs[1]))
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    if pixels:
        size = re.search(r'\bPhysicalSizeX="([^"]+)"', pixels[0])
        unit = re.search(r'\bPhysicalSizeXUnit="([^"]+)"', pixels[0])
        scale = micrometres(unit[1] if unit else "µm")
        return _positive(float(size[1]) * scale) if size and scale else None
    resolution = base.tags.valueof(282)
    unit_size = {2: 25_400.0, 3: 10_000.0}.get(int(base.tags.valueof(296, 2)))
    if resolution is None or unit_size is None or not all(resolution):
        return None
    return _positive(unit_size * resolution[1] / resolution[0])


def micrometres(unit: str) -> float | None:
    """Converts a unit of length in OME's notation to micrometres; None for other units."""
    names = {
        "nm": 1e-3, "nanometer": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micrometer": 1.0,
        "micron": 1.0, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "m": 1e6,
        "meter": 1e6,
    }  # fmt: skip
    return names.get(unit)


def _positive(value: float) -> float | None:
    return value if 0 < value < float("inf") else None
