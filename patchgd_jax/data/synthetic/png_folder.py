"""Generated images as PNG files: in memory, or as a folder with a CSV table of their labels."""

from __future__ import annotations

import csv
import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from patchgd_jax.config import DataConfig
from patchgd_jax.data.synthetic.digits import Split
from patchgd_jax.data.synthetic.ultramnist import Digit, UltraMnist
from patchgd_jax.errors import ConfigError
from patchgd_jax.io.files import atomic_folder, unfinished_folders

# More threads would hold more whole images at a time, 48 MB each at 4000 px in colour.
_MAX_THREADS = 16

OnExample = Callable[[int, int], object]
"""Called with the number of examples done and their total."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class EncodedExample:
    """A generated example with its encoded image."""

    index: int
    label: int
    digits: tuple[Digit, ...]
    """Boxes in pixels before `data.downscale`."""
    png: bytes
    """Grey or RGB."""


def encoded_examples(
    source: UltraMnist, on_example: OnExample = lambda *counts: None
) -> Iterator[EncodedExample]:
    """Generates and encodes all examples of a split, in order, on all cores.

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


def _in_order(make: Callable[[int], _T], count: int) -> Iterator[_T]:
    """Yields `make(0), make(1), ...`, computed by threads a little ahead."""
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


def require_generated(config: DataConfig) -> None:
    """Checks that a config describes generated images.

    Raises:
        ConfigError: if it names existing images.
    """
    for name in ("csv", "root", "tfds", "panda"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"data.{name} names images that exist already; only generated ones can be made: "
                f"leave data.{name} out"
            )


def make_folder(
    config: DataConfig,
    seed: int,
    folder: str | Path,
    *,
    on_example: OnExample = lambda *counts: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Path:
    """Writes both splits as PNG files and `labels.csv` with the columns path, label and split.

    Args:
        config: look and number of the images.
        seed: of the whole data set.
        folder: output; it must not exist, or be empty. It appears when it is complete.
        on_example: called with the number of examples done and the total, for each split.
        on_note: called with a warning about folders of unfinished runs.

    Returns:
        The folder.

    Raises:
        ConfigError: if the folder is not empty, or the config names existing images.
        DiskError: if it cannot be written.
    """
    require_generated(config)
    folder = Path(folder).absolute()
    for path in unfinished_folders(folder):
        on_note(f"{path} is unfinished work; delete it if no other process is writing it")
    with atomic_folder(folder) as work, (work / "labels.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["path", "label", "split"])
        for split in get_args(Split):
            source = UltraMnist(config, split, seed)
            (work / split).mkdir()
            digits = len(str(len(source) - 1))
            for example in encoded_examples(source, on_example):
                name = f"{split}/{example.index:0{digits}d}.png"
                (work / name).write_bytes(example.png)
                rows.writerow([name, example.label, split])
    return folder
