"""Area down-sampling by an integer factor."""

from __future__ import annotations

import numpy as np


def shrink(image: np.ndarray, factor: int, background: int = 0) -> np.ndarray:
    """Averages blocks of pixels.

    Args:
        image: `uint8 [H, W, C]`; continued with `background` to multiples of the factor.
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
