"""Decodes untrusted image files to uint8 grey or RGB."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from patchgd_jax.errors import DataError
from patchgd_jax.io.text import printable

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = {"PNG": "Png", "JPEG": "Jpeg", "TIFF": "Tiff", "WEBP": "WebP", "BMP": "Bmp"}
"""Supported formats, with the prefix of Pillow's reader of each."""
MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image: Pillow's own limit."""

_GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
"""Pillow's transposition for each EXIF orientation."""
# TIFF tags.
_BITS, _COMPRESSION, _PHOTOMETRIC, _TILE_SIDES = 258, 259, 262, (322, 323)
_PARTS = ((273, 279), (324, 325))
"""Offsets and byte counts of strips and of tiles."""


class ImageReadError(DataError):
    """An image file that cannot be used.

    Args:
        path: the file.
        reason: why, in a few words.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"cannot read image {printable(str(path))}: {reason}")
        self.path = path
        self.reason = reason


class ImageHeader(NamedTuple):
    """An image file's header."""

    width: int
    """Pixels, after the orientation of EXIF is applied."""
    height: int
    channels: Literal[1, 3]
    """1 for grey, 3 for colour; transparency does not count."""
    format: str
    """One of `FORMATS`."""


@dataclass(frozen=True)
class _Opened:
    """A file that has passed all checks before decoding."""

    image: ImageFile.ImageFile
    header: ImageHeader
    turn: int
    """EXIF orientation to apply after decoding; 1: none."""
    bits: int
    """Bits of a channel in the file."""
    inverted: bool
    """Whether 0 means white (16-bit TIFFs; Pillow inverts the others)."""


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads an image file's header; decodes no pixel.

    Args:
        path: as for `read_image`.
        max_pixels: as for `read_image`.

    Returns:
        Size, channels and format of the decoded image.

    Raises:
        ImageReadError: as `read_image`, except for damaged pixel data.
    """
    with _opened(Path(path), max_pixels) as opened:
        return opened.header


def read_image(
    path: str | Path,
    *,
    channels: Literal[1, 3],
    background: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Reads an image file.

    The EXIF orientation is applied if it precedes the pixels, as in browsers. Alpha and transparent
    colours are composited over the background, 12- and 16-bit grey is scaled to 8 bits (16-bit
    colour keeps its high bytes), palettes and CMYK are converted. The first picture of an MPO file
    is read. Colour profiles are ignored.

    Args:
        path: the file; its format is found from its content.
        channels: 1 for grey, 3 for RGB.
        background: uint8 value under transparent pixels.
        max_pixels: largest accepted height times width, checked before any pixel is decoded. For
            WebP, Pillow's own limit holds as well.

    Returns:
        `uint8 [H, W, channels]`, C-contiguous.

    Raises:
        ImageReadError: if the file is missing, truncated, too large, animated or no image.
    """
    with _opened(Path(path), max_pixels) as opened:
        return _decoded(opened, channels, background)


def decode_image(
    data: bytes,
    name: str,
    *,
    channels: Literal[1, 3],
    background: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes an image file in memory, by the rules of `read_image`.

    Args:
        data: the file's content.
        name: for errors.
        channels: as for `read_image`.
        background: as for `read_image`.
        max_pixels: as for `read_image`.

    Returns:
        `uint8 [H, W, channels]`, C-contiguous.

    Raises:
        ImageReadError: if the data is truncated, too large, animated or no image.
    """
    with _opened(name, max_pixels, io.BytesIO(data)) as opened:
        return _decoded(opened, channels, background)


def _decoded(opened: _Opened, channels: int, background: int) -> np.ndarray:
    if opened.header.format == "TIFF":
        from PIL import Image

        image = cast(Any, opened.image)
        # Otherwise Pillow allocates the TIFF's pixels with its global limit.
        image.im = cast(Any, Image).core.new(image.mode, getattr(image, "_tile_size", image.size))
    opened.image.load()
    pixels = _to_uint8(opened, channels, background)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))


@contextmanager
def _opened(path: str | Path, max_pixels: int, data: BinaryIO | None = None) -> Iterator[_Opened]:
    """Opens and checks a file; converts errors of the body to `ImageReadError`, too."""
    try:
        if data is None and not Path(path).exists():
            raise ImageReadError(path, "there is no such file")
        if data is None and not Path(path).is_file():
            raise ImageReadError(path, "it is not a file")
        with data or Path(path).open("rb") as file:
            start = file.read(26)
            kind = sniff_format(start)
            if kind is None:
                raise ImageReadError(path, f"it is none of {', '.join(FORMATS)}")
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            try:
                image = _reader(kind)(file)
            except SyntaxError as error:
                reason = f"it is an unsupported {kind} file, or damaged at its start"
                raise ImageReadError(path, f"{reason} ({error})") from error
            with image:
                yield _checked(path, image, kind, start, size, max_pixels)
    except ImageReadError:
        raise
    except MemoryError as error:
        raise ImageReadError(path, "there is not enough memory for it") from error
    except Exception as error:
        # Pillow's decoders raise a dozen classes for damaged files, struct.error among them.
        raise ImageReadError(path, printable(str(error)) or type(error).__name__) from error


def sniff_format(start: bytes) -> str | None:
    """Finds a file's format, one of `FORMATS`, from its first 12 bytes or more."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    return "BMP" if start.startswith(b"BM") else None


def _reader(kind: str) -> type[ImageFile.ImageFile]:
    # Not Image.open: it applies a process-wide limit of pixels by a warning with a process-wide
    # filter, and it maps files into memory, where one that shrinks kills the process.
    name = FORMATS[kind]
    return getattr(importlib.import_module(f"PIL.{name}ImagePlugin"), f"{name}ImageFile")


def _checked(
    path: str | Path,
    image: ImageFile.ImageFile,
    kind: str,
    start: bytes,
    size: int,
    max_pixels: int,
) -> _Opened:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageReadError(
            path, f"it claims {width} x {height} px, more than the {max_pixels} px allowed"
        )
    if width == 0 or height == 0:
        raise ImageReadError(path, "it has no pixels")
    if getattr(image, "is_animated", False):
        raise ImageReadError(path, "it has several frames; save one of them")
    if image.mode in ("F", "I"):
        raise ImageReadError(path, f"its pixels are 32-bit ({image.mode}); save it with 8 or 16")
    if image.mode not in _GREY + _COLOUR:
        raise ImageReadError(path, f"its colours are {image.mode}; save it as RGB")
    turn = _orientation(image)
    swapped = turn in (5, 6, 7, 8)
    bits = start[24] if kind == "PNG" else 8
    inverted = False
    if kind == "TIFF":
        tags = cast(Any, image).tag_v2
        _check_parts(path, tags, size, max_pixels)
        bits = max(tags.get(_BITS, (1,)))
        inverted = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC, 0) == 0
        # Pillow turns TIFFs itself: the size of those with the tag when it opens them, and the
        # pixels when it decodes them.
        swapped = swapped and _ORIENTATION not in tags
        turn = 1
    if swapped:
        width, height = height, width
    grey = image.mode in _GREY or _has_grey_palette(image)
    header = ImageHeader(width, height, 1 if grey else 3, kind)
    return _Opened(image, header, turn, bits, inverted)


def _has_grey_palette(image: ImageFile.ImageFile) -> bool:
    """Whether all colours of an image's palette are grey, including unused ones."""
    if image.mode not in ("P", "PA") or image.palette is None:
        return False
    from PIL import Image

    # Not image.getpalette, which decodes the pixels.
    rawmode, entries = image.palette.getdata()
    pixel = Image.new("P", (1, 1))
    pixel.putpalette(entries, rawmode)
    colours = np.array(pixel.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _check_parts(path: str | Path, tags: Any, size: int, max_pixels: int) -> None:
    """Refuses a TIFF with tiles too large for memory, or with parts beyond its end."""
    width, height = (tags.get(tag, 1) for tag in _TILE_SIDES)
    if width * height > max_pixels:
        raise ImageReadError(
            path, f"its tiles claim {width} x {height} px, more than the {max_pixels} px allowed"
        )
    for offset_tag, count_tag in _PARTS:
        offsets = np.array(tags.get(offset_tag, ()), np.int64)
        counts = np.array(tags.get(count_tag, ()), np.int64)[: len(offsets)]
        if tags.get(_COMPRESSION, 1) == 1:
            # Some programs write a wrong count here; decoding does not need it.
            counts = counts.clip(0, 1)
        end = (offsets[: len(counts)] + counts).max(initial=0, where=counts > 0)
        if end > size:
            raise ImageReadError(path, f"it is truncated: {size} of at least {end} bytes are there")


def _orientation(image: ImageFile.ImageFile) -> int:
    from PIL import Image

    try:
        # Not the PNG reader's getexif, which decodes the pixels.
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:
        # A damaged EXIF block does not concern the pixels.
        return 1


def _to_uint8(opened: _Opened, channels: int, background: int) -> np.ndarray:
    """`uint8 [H, W]` or `[H, W, 3]` of a decoded image."""
    from PIL import Image

    image: Image.Image = opened.image
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        image = _from_16_bits(opened, transparent)
    elif transparent is not None and image.mode in ("L", "RGB"):
        # Pillow has scaled the pixels to 8 bits, but not the transparent colour.
        image.info["transparency"] = _to_8_bits(transparent, opened.bits)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode == "RGBa" or "A" in image.getbands() or "transparency" in image.info:
        over = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        over.alpha_composite(image.convert("RGBA"))
        image = over
    image = image.convert("L" if channels == 1 else "RGB")
    if opened.turn in _TURNS:
        image = image.transpose(Image.Transpose[_TURNS[opened.turn]])
    return np.asarray(image, np.uint8)


def _from_16_bits(opened: _Opened, transparent: int | None) -> Image.Image:
    """An image of mode L or LA; convert("L") would clip at 255."""
    from PIL import Image

    values = np.asarray(opened.image)
    scaled = np.round(np.arange(65_536) * (255 / (2**opened.bits - 1)))
    scaled = scaled.clip(0, 255).astype(np.uint8)
    grey = (255 - scaled if opened.inverted else scaled)[values]
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == transparent, 0, 255)]).astype("u1"))


def _to_8_bits(value: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(v >> (bits - 8) for v in value)
    return (value & (2**bits - 1)) * 255 // (2**bits - 1)
