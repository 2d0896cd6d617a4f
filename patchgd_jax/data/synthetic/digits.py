"""Disjoint pools of digits for training and validation: `uint8 [n, 28, 28]`, white on black."""

from __future__ import annotations

import gzip
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from patchgd_jax.errors import DataError

SIDE = 28
"""Side of a digit in pixels; its ink is within the middle 20, as in MNIST."""

Split = Literal["train", "validation"]


class DigitPool(NamedTuple):
    """Digits of one split."""

    glyphs: np.ndarray
    """`uint8 [n, 28, 28]`."""
    labels: np.ndarray
    """`int64 [n]`, 0..9."""


def load_digits(source: str, split: Split, folder: str | None = None) -> DigitPool:
    """Loads one split's pool; the two splits of a source share no digit.

    Args:
        source: `sklearn` (the 1,797 handwritten digits of scikit-learn, four fifths of them for
            training), `mnist` (idx files or a prepared tensorflow-datasets folder; its own test
            set validates) or `font` (drawn with Pillow's embedded font).
        split: `train` or `validation`.
        folder: of the MNIST files.

    Raises:
        DataError: if files are missing or are not MNIST files.
    """
    if source == "mnist":
        return _mnist(str(folder), split)
    glyphs, labels = _sklearn() if source == "sklearn" else _font()
    # Every fifth digit of each class validates, so both pools hold all classes evenly.
    rank = np.zeros(len(labels), np.int64)
    for digit in range(10):
        of_class = labels == digit
        rank[of_class] = np.arange(of_class.sum())
    keep = (rank % 5 == 4) == (split == "validation")
    return DigitPool(glyphs[keep], labels[keep])


@lru_cache(maxsize=1)
def _sklearn() -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    glyphs = np.zeros((len(data.images), SIDE, SIDE), np.uint8)
    for glyph, image in zip(glyphs, data.images, strict=True):
        padded = np.pad(image / 16, 1).astype(np.float32)
        smooth = np.asarray(Image.fromarray(padded).resize((20, 20), Image.Resampling.BICUBIC))
        glyph[4:24, 4:24] = np.round(logistic(smooth.clip(0, 1), 10.0) * 255)
    return glyphs, np.asarray(data.target, np.int64)


def logistic(x: np.ndarray, slope: float) -> np.ndarray:
    """Maps values in [0, 1] by a logistic curve, scaled to run through (0, 0) and (1, 1)."""
    low, high = 1 / (1 + np.exp(slope / 2)), 1 / (1 + np.exp(-slope / 2))
    return (1 / (1 + np.exp(-slope * (x - 0.5))) - low) / (high - low)


@lru_cache(maxsize=1)
def _font() -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image, ImageDraw, ImageFont

    side, bicubic = 80, Image.Resampling.BICUBIC
    rng = np.random.default_rng([28, 1])
    labels = np.arange(600) % 10
    glyphs = np.zeros((len(labels), SIDE, SIDE), np.uint8)
    for glyph, label in zip(glyphs, labels, strict=True):
        size, stroke = 44 + 12 * rng.random(), int(rng.integers(0, 3))
        canvas, middle = Image.new("L", (side, side)), (side / 2, side / 2)
        font = ImageFont.load_default(size)
        ImageDraw.Draw(canvas).text(middle, str(label), 255, font, anchor="mm", stroke_width=stroke)
        shear, angle = 0.4 * (rng.random() - 0.5), 24 * (rng.random() - 0.5)
        matrix = (1.0, shear, -shear * side / 2, 0.0, 1.0, 0.0)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, bicubic)
        canvas = canvas.rotate(angle, bicubic)
        box = canvas.getbbox()
        assert box is not None
        canvas = canvas.crop(box)
        scale = 20 / max(canvas.size)
        width, height = (max(1, round(n * scale)) for n in canvas.size)
        small = np.asarray(canvas.resize((width, height), Image.Resampling.BOX))
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        glyph[top : top + height, left : left + width] = small
    return glyphs, labels.astype(np.int64)


def _mnist(folder: str, split: Split) -> DigitPool:
    root = Path(folder)
    if (root / "dataset_info.json").exists():
        return _prepared_mnist(root, split)
    stem = "train" if split == "train" else "t10k"
    glyphs = _read_idx(root, f"{stem}-images-idx3-ubyte", 2051)
    labels = _read_idx(root, f"{stem}-labels-idx1-ubyte", 2049)
    if glyphs.shape[1:] != (SIDE, SIDE) or len(glyphs) != len(labels):
        raise DataError(
            f"{folder}: {len(glyphs)} images of {glyphs.shape[1:]} px and {len(labels)} labels; "
            "expected as many labels as images of 28 x 28 px"
        )
    return DigitPool(glyphs, labels.astype(np.int64))


def _read_idx(root: Path, name: str, magic: int) -> np.ndarray:
    path = next((p for p in (root / name, root / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise DataError(f"no MNIST file {root / name}[.gz]; put the four idx files there")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (found,) = struct.unpack(">I", data[:4])
        if found != magic:
            raise DataError(f"{path} is no MNIST file: it starts with {found}, not {magic}")
        ndim = magic % 256
        shape = struct.unpack(f">{ndim}I", data[4 : 4 + 4 * ndim])
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read as an MNIST file: {error}") from error


def _prepared_mnist(root: Path, split: Split) -> DigitPool:
    """Reads a folder that tensorflow-datasets prepared; needs no TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(root))
        records = builder.as_data_source("train" if split == "train" else "test")
        glyphs = np.stack([record["image"][..., 0] for record in records])
        labels = np.array([record["label"] for record in records], np.int64)
    except Exception as error:
        # tfds raises undocumented classes of errors for damaged folders.
        raise DataError(f"{root} cannot be read as a prepared MNIST: {error}") from error
    return DigitPool(glyphs, labels)
