"""Generated examples as PNG files in memory, made on all cores and handed over in order."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from patchgd_jax.config import DataConfig
from patchgd_jax.data.synthetic.ultramnist import Digit, UltraMnist
from patchgd_jax.errors import ConfigError

# More threads would hold more whole images at a time, 48 MB each at 4000 px in colour.
_MAX_THREADS = 16

OnExample = Callable[[int, int], None]
"""Called with the number of examples done and their total."""

_T = TypeVar("_T")


def ignore_progress(done: int, total: int) -> None:
    """Reports nothing."""


def ignore_note(text: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class EncodedExample:
    """An example as it is stored."""

    index: int
    label: int
    digits: tuple[Digit, ...]
    """Boxes in pixels before `data.downscale`."""
    png: bytes
    """A lossless image file, grey or RGB."""


def encoded_examples(
    source: UltraMnist, on_example: OnExample = ignore_progress
) -> Iterator[EncodedExample]:
    """Generates and encodes all examples of a split, in order.

    Args:
        source: the generator.
        on_example: called after each example with the number done and the split's total.
    """
    from PIL import Image

    def encode(index: int) -> EncodedExample:
        pixels = source[index]["image"]
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
        plan = source.plan(index)
        return EncodedExample(index, plan.label, plan.digits, file.getvalue())

    for example in _in_order(encode, len(source)):
        on_example(example.index + 1, len(source))
        yield example


def require_generated(config: DataConfig) -> None:
    """Checks that a config describes generated images.

    Raises:
        ConfigError: if it names files of the user's.
    """
    for name in ("csv", "root", "tfds", "panda"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"data.{name} names images that exist already; only generated ones can be made: "
                f"leave data.{name} out"
            )


def _in_order(make: Callable[[int], _T], count: int) -> Iterator[_T]:
    """`make(0), make(1), ...`, computed by threads a little ahead."""
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index in range(count):
                waiting.append(pool.submit(make, index))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
