"""Generated images as a folder of PNG files with a CSV table of their labels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from patchgd_jax.config import DataConfig
from patchgd_jax.data.synthetic.digits import Split
from patchgd_jax.data.synthetic.encoded import (
    OnExample,
    encoded_examples,
    ignore_note,
    ignore_progress,
    require_generated,
)
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.io.files import atomic_folder, unfinished_folders

TABLE = "labels.csv"


def make_folder(
    config: DataConfig,
    seed: int,
    folder: str | Path,
    *,
    on_example: OnExample = ignore_progress,
    on_note: Callable[[str], None] = ignore_note,
) -> Path:
    """Writes both splits as PNG files and `labels.csv` with the columns path, label and split.

    Args:
        config: what the images look like and how many there are.
        seed: of the whole data set.
        folder: where to; it must not exist, or be empty. It appears when it is complete.
        on_example: called with the number of examples done and the total, for each split.
        on_note: called with a warning about folders of unfinished runs.

    Returns:
        The folder.

    Raises:
        ConfigError: if the folder is not empty, or the config names other images.
        DiskError: if it cannot be written.
    """
    require_generated(config)
    folder = Path(folder).absolute()
    for path in unfinished_folders(folder):
        on_note(f"{path} is unfinished work; delete it if no other process is writing it")
    with atomic_folder(folder) as work, (work / TABLE).open("w", newline="") as table:
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
