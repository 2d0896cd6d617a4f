"""Synthetic images of digits, of any size, each a pure function of (seed, split, index).

Two tasks: UltraMNIST's (the label is the sum of three to five digits of very different sizes; rules
in arXiv 2206.12681 and the PatchGD papers) and a simpler one (the label is the most frequent
digit). All boxes are known, and any region of an image can be rendered alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from patchgd_jax.config import DataConfig
from patchgd_jax.data.images.pixels import shrink
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.synthetic.digits import SIDE, DigitPool, Split, load_digits, logistic
from patchgd_jax.errors import ConfigError, DataError

GENERATOR_VERSION = 1
"""Increased whenever the pixels of a (seed, split, index) change."""

_OBJECT_RATIO = (0.15625, 0.25)
"""Default range of digit sides for task most-frequent, as a fraction of the shorter side."""

_TRIES_PER_DIGIT = 200
_LAYOUTS = 50


class Digit(NamedTuple):
    """A digit of an image; its box is `side` pixels square with the top-left pixel at (y, x)."""

    value: int
    glyph: int
    """Index into the split's pool."""
    y: int
    x: int
    side: int


class Plan(NamedTuple):
    """Contents of an image before rendering."""

    label: int
    digits: tuple[Digit, ...]
    noise_seed: int


@cache
def multisets(total: int) -> tuple[tuple[int, ...], ...]:
    """Lists all multisets of three, four or five digits with a sum, in a fixed order."""
    return tuple(
        combination
        for count in (3, 4, 5)
        for combination in itertools.combinations_with_replacement(range(10), count)
        if sum(combination) == total
    )


def _size_law(classes: int) -> np.ndarray:
    """Cumulative probabilities of the size factors 1, 2, ... (V-shaped; the official weights)."""
    highest = 5 if classes == 10 else 38
    weights = [*range(highest, 0, -1), *range(1, highest)]
    return np.cumsum(weights) / sum(weights)


class UltraMnist:
    """A random-access source of examples; stateless.

    Args:
        config: look of the images.
        split: `train` or `validation`; they share no digit and no random number.
        seed: of the whole data set.

    Raises:
        ConfigError: if the label's digits cannot be the most frequent.
    """

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        self.config = config
        self.split: Split = split
        self.seed = seed
        self.class_names = tuple(map(str, range(config.classes)))
        self.buckets = (np.arange(len(self)),)
        if config.task == "most-frequent":
            self._label_count = round(config.label_share * config.digit_count)
            others = config.digit_count - self._label_count
            if self._label_count < 1 or others > 9 * (self._label_count - 1):
                raise ConfigError(
                    f"with data.digit_count {config.digit_count} and data.label_share "
                    f"{config.label_share} the label has {self._label_count} digits, too few to be "
                    "the most frequent; raise data.label_share"
                )

    def __len__(self) -> int:
        return self.config.train_size if self.split == "train" else self.config.val_size

    @property
    def fingerprint(self) -> str:
        """Changes whenever any example does."""
        look = dataclasses.replace(self.config, digits="font", digits_dir=None)
        pool = hashlib.sha256(self.pool.glyphs.tobytes() + self.pool.labels.tobytes())
        return (
            f"ultramnist-v{GENERATOR_VERSION} {self.split} seed={self.seed} "
            f"digits={pool.hexdigest()[:16]} {look}"
        )

    @cached_property
    def pool(self) -> DigitPool:
        """The digits of this split; loaded on first use."""
        return load_digits(self.config.digits, self.split, self.config.digits_dir)

    def describe(self, index: int) -> str:
        """Names an example in messages."""
        return f"generated image {index}"

    def plan(self, index: int) -> Plan:
        """Plans the label and the boxes of an example, without overlap.

        Raises:
            DataError: if the digits do not fit after a bounded number of tries.
        """
        rng = np.random.default_rng([self.seed, 0 if self.split == "train" else 1, index])
        label = index % self.config.classes
        values = self._values(rng, label)
        for _ in range(_LAYOUTS):
            boxes = self._place(rng, len(values))
            if boxes is not None:
                break
        else:
            raise DataError(
                f"{len(values)} digits find no room in {self.config.size[0]} x "
                f"{self.config.size[1]} px; use larger images, or smaller or fewer digits"
            )
        glyphs = [int(rng.choice(np.flatnonzero(self.pool.labels == value))) for value in values]
        digits = (Digit(v, g, *box) for v, g, box in zip(values, glyphs, boxes, strict=True))
        return Plan(label, tuple(digits), int(rng.integers(2**31)))

    def _values(self, rng: np.random.Generator, label: int) -> list[int]:
        config = self.config
        if config.task == "digit-sum":
            options = multisets(label)
            return list(options[int(rng.integers(len(options)))])
        counts = np.zeros(10, np.int64)
        counts[label] = self._label_count
        for _ in range(config.digit_count - self._label_count):
            allowed = np.flatnonzero(counts < self._label_count - 1)
            allowed = allowed[allowed != label]
            counts[int(rng.choice(allowed))] += 1
        return [int(v) for v in rng.permutation(np.repeat(np.arange(10), counts))]

    def _side(self, rng: np.random.Generator) -> int:
        config, shorter = self.config, min(self.config.size)
        if config.task == "most-frequent" or config.object_ratio is not None:
            low, high = config.object_ratio or _OBJECT_RATIO
            reference = shorter if config.scale == "relative" else 256
            return round(reference * (low + (high - low) * rng.random()))
        factor = 1 + int(np.searchsorted(_size_law(config.classes), rng.random(), side="right"))
        side = SIDE * factor
        if factor == 1 and rng.random() < 0.5:
            side = SIDE // 2
        if config.scale == "absolute":
            return side
        return max(1, round(side * shorter / (512 if config.classes == 10 else 4000)))

    def _place(self, rng: np.random.Generator, count: int) -> list[tuple[int, int, int]] | None:
        height, width = self.config.size
        boxes: list[tuple[int, int, int]] = []
        for _ in range(count):
            for _ in range(_TRIES_PER_DIGIT):
                side = self._side(rng)
                if side > min(height, width):
                    continue
                y = int(rng.integers(height - side + 1))
                x = int(rng.integers(width - side + 1))
                if all(
                    y + side <= v or v + s <= y or x + side <= u or u + s <= x for v, u, s in boxes
                ):
                    boxes.append((y, x, side))
                    break
            else:
                return None
        return boxes

    def read(self, index: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Renders a region of an example before `downscale`; the cost is that of the region.

        Returns:
            `uint8 [height, width]`, 0 outside the image.
        """
        return self.render(self.plan(index), y, x, height, width)

    def render(self, plan: Plan, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Renders a region of a planned image, as `read`."""
        out = np.zeros((height, width), np.uint8)
        smooth = self.config.task == "most-frequent"
        for digit in plan.digits:
            top, bottom = max(y, digit.y), min(y + height, digit.y + digit.side)
            left, right = max(x, digit.x), min(x + width, digit.x + digit.side)
            if top >= bottom or left >= right:
                continue
            out[top - y : bottom - y, left - x : right - x] = _enlarge(
                self.pool.glyphs[digit.glyph],
                digit.side,
                np.arange(top - digit.y, bottom - digit.y),
                np.arange(left - digit.x, right - digit.x),
                smooth=smooth,
            )
        if self.config.noise:
            rows, cols = np.arange(y, y + height), np.arange(x, x + width)
            noise = _noise(plan.noise_seed, self.config.size, rows, cols)
            inside = ((rows >= 0) & (rows < self.config.size[0]))[:, None] & (
                (cols >= 0) & (cols < self.config.size[1])
            )
            out = np.where(inside & (noise ^ (out > 127)), 255, 0).astype(np.uint8)
        return out

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Renders an example: `image` `uint8 [H, W, C]`, `label` and `id` (the index), int64."""
        height, width = self.config.size
        plan = self.plan(index)
        image = self.render(plan, 0, 0, height, width)[..., None]
        image = np.repeat(shrink(image, self.config.downscale), self.config.num_channels, axis=-1)
        return {"image": image, "label": np.int64(plan.label), "id": np.int64(index)}

    def entry(self, index: int) -> dict[str, Any]:
        """Returns the label and id of an example."""
        return {"label": np.int64(index % self.config.classes), "id": np.int64(index)}

    def padded_size(self, index: int) -> int:
        """Returns 0, as all images have one size."""
        return 0

    def open(self, index: int) -> DigitRegions:
        """Opens an example's image, to be rendered by regions."""
        return DigitRegions(self, index)


class DigitRegions(RegionSource):
    """Regions of one example, with the pixels of `source[index]["image"]`.

    Args:
        source: the data set.
        index: number of the example.
    """

    def __init__(self, source: UltraMnist, index: int) -> None:
        self._source, self._plan = source, source.plan(index)
        height, width, channels = source.config.image_shape
        super().__init__([(height, width)], channels, background=0)

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        by = self._source.config.downscale
        window = self._source.render(self._plan, y * by, x * by, height * by, width * by)
        return np.repeat(shrink(window[..., None], by), self.channels, axis=-1)

    def close(self) -> None:
        """Does nothing: there is no file."""


def _enlarge(
    glyph: np.ndarray, side: int, rows: np.ndarray, cols: np.ndarray, *, smooth: bool
) -> np.ndarray:
    """Draws the pixels `rows x cols` of a glyph `side` pixels wide.

    Each pixel is computed on its own, in integers, so regions equal parts of the whole exactly.
    """
    if side < SIDE:
        from PIL import Image

        small = Image.fromarray(glyph).resize((side, side), Image.Resampling.BOX)
        return np.asarray(small)[np.ix_(rows, cols)]
    if not smooth:
        return glyph[np.ix_(rows * SIDE // side, cols * SIDE // side)]

    def taps(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Pixel centres, in 1/256 of a glyph pixel.
        at = ((2 * positions + 1) * SIDE * 128) // side - 128
        low = at >> 8
        return low.clip(0, SIDE - 1), (low + 1).clip(0, SIDE - 1), at & 255

    top, bottom, wy = taps(rows)
    left, right, wx = taps(cols)
    pixels = glyph.astype(np.int32)
    tall = pixels[top] * (256 - wy)[:, None] + pixels[bottom] * wy[:, None]
    wide = tall[:, left] * (256 - wx) + tall[:, right] * wx
    return _SHARPEN[wide >> 16]


# Bilinear enlargement blurs the edges of strokes.
_SHARPEN = np.round(255 * logistic(np.arange(256) / 255, 12.75)).astype(np.uint8)


def _noise(seed: int, size: tuple[int, int], rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The benchmark's background: checkers under an affine map XOR discs XOR triangles.

    Returns:
        `bool [len(rows), len(cols)]`.
    """
    rng = np.random.default_rng(seed)
    longer = max(size)
    y, x = (rows / longer)[:, None], (cols / longer)[None, :]
    cells = int(rng.integers(12, 24))
    board = rng.random((cells, cells)) < 0.5
    matrix = np.eye(2) + 0.8 * (rng.random((2, 2)) - 0.5)
    shift = rng.random(2)
    v = np.floor((matrix[0, 0] * y + matrix[0, 1] * x + shift[0]) * cells).astype(np.int64) % cells
    u = np.floor((matrix[1, 0] * y + matrix[1, 1] * x + shift[1]) * cells).astype(np.int64) % cells
    out = board[v, u]
    for _ in range(int(rng.integers(5))):
        centre, radius = rng.random(2), 0.05 + 0.2 * rng.random()
        out = out ^ ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2)
    for _ in range(int(rng.integers(5))):
        corners = rng.random((3, 2))
        sides = []
        for (ay, ax), (by, bx) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            sides.append((bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0)
        out = out ^ ((sides[0] == sides[1]) & (sides[1] == sides[2]))
    return out
