"""Reads image files that may be hostile, damaged or unusual, into one plain form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from patchgd_jax.errors import DataError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
MAX_PIXELS = 178_956_970
"""Pixels an image may have: the limit above which Pillow itself refuses to decode."""


class ImageReadError(DataError):
    """An image file that cannot be used.

    Args:
        path: the file.
        reason: why, in words.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"cannot read image {path}: {reason}")


def read_image(
    path: str | Path,
    *,
    channels: Literal[1, 3],
    background: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Reads an image file.

    Orientation from EXIF is applied, alpha is composited over the background, 16-bit grey is
    scaled to 8 bits, palettes and CMYK are converted. Colour profiles are ignored.

    Args:
        path: the file; its kind is found from its content.
        channels: 1 for grey, 3 for RGB.
        background: uint8 value under transparent pixels.
        max_pixels: largest accepted height times width, checked before any pixel is decoded.

    Returns:
        `uint8 [H, W, channels]`, C-contiguous.

    Raises:
        ImageReadError: if the file is missing, truncated, too large, animated or no image.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    try:
        if not path.exists():
            raise ImageReadError(path, "there is no such file")
        if not path.is_file():
            raise ImageReadError(path, "it is not a file")
        with warnings.catch_warnings():
            # The size is checked here, by our own limit, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageReadError(
                        path,
                        f"it claims {width} x {height} px, more than the {max_pixels} px allowed",
                    )
                if width == 0 or height == 0:
                    raise ImageReadError(path, "it has no pixels")
                # MPO is a JPEG with more pictures behind it, as phones write them.
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    raise ImageReadError(path, "it has several frames; save one of them")
                image.load()
                upright = ImageOps.exif_transpose(image)
                return _to_array(path, upright, channels, background)
    except ImageReadError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageReadError(path, f"it claims too many pixels ({error})") from error
    except Exception as error:
        # Pillow's decoders let a dozen kinds out for damaged files, struct.error among them.
        reason = str(error) or type(error).__name__
        if "cannot identify" in reason:
            reason = f"it is none of {', '.join(FORMATS)}, or damaged at its start"
        raise ImageReadError(path, reason) from error


def _to_array(path: Path, image, channels: int, background: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    from PIL import Image

    if image.mode in ("F", "I"):
        raise ImageReadError(path, f"its pixels are 32-bit ({image.mode}); save it with 8 or 16")
    if image.mode.startswith("I;16"):
        # convert("L") would cut everything above 255 off.
        grey = np.round(np.asarray(image, np.float64) / 257).astype(np.uint8)
        image = Image.fromarray(grey)
    if "A" in image.getbands() or "transparency" in image.info:
        over = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        image = Image.alpha_composite(over, image.convert("RGBA"))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))
