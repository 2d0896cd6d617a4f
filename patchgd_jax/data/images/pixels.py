"""Conversion of pixels to uint8 grey or RGB, by the rules of `safe_image`, and down-sampling."""

from __future__ import annotations

from typing import Literal

import numpy as np

Alpha = Literal["none", "straight", "premultiplied"]
"""Kind of a pixel's last sample: none: a colour; otherwise opacity, premultiplied with colours."""

DTYPES = ("bool", "uint8", "uint16")


def to_uint8(
    pixels: np.ndarray, *, channels: int, background: int, alpha: Alpha = "none"
) -> np.ndarray:
    """Converts pixels to uint8 grey or RGB.

    16 bits are scaled to 8 over their whole range; alpha is composited over the background; RGB
    becomes grey by the weights of ITU-R BT.601; grey is repeated for RGB.

    Args:
        pixels: `bool`, `uint8` or `uint16`, `[H, W, S]`; S is 1 or 3, and 1 more with alpha.
        channels: 1 or 3.
        background: uint8 value under transparent pixels.
        alpha: kind of the last sample.

    Returns:
        `uint8 [H, W, channels]`; `pixels` itself if they need no conversion.
    """
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if alpha != "none":
        colour, opacity = pixels[..., :-1].astype(np.uint32), pixels[..., -1:].astype(np.uint32)
        over = colour * (255 if alpha == "premultiplied" else opacity)
        mixed = (over + background * (255 - opacity) + 127) // 255
        pixels = np.minimum(mixed, 255).astype(np.uint8)
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    from PIL import Image

    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return np.asarray(grey)[..., None]


def shrink(image: np.ndarray, factor: int, background: int = 0) -> np.ndarray:
    """Averages square blocks of pixels.

    Args:
        image: `uint8 [H, W, C]`; padded with `background` to multiples of the factor.
        factor: side of a block in pixels.
        background: uint8 value beyond the image.

    Returns:
        `uint8 [ceil(H / factor), ceil(W / factor), C]`.
    """
    if factor == 1:
        return image
    height, width, channels = image.shape
    pad = ((0, -height % factor), (0, -width % factor), (0, 0))
    image = np.pad(image, pad, constant_values=background)
    blocks = image.reshape(-(-height // factor), factor, -(-width // factor), factor, channels)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)
