"""Grey or colour: how many channels a run's images have, from what their files say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from patchgd_jax.config import TrainConfig
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.run_data import read_table
from patchgd_jax.data.sources.tfds_source import stored_channels
from patchgd_jax.data.tables.image_paths import Problems
from patchgd_jax.errors import DataError
from patchgd_jax.io.text import printable

ADVICE = "set --data.channels 3 to read all of them in colour, or 1 in grey"

_THREADS = 2


class Channels(NamedTuple):
    """What the images of a table have, taken together."""

    most: Literal[1, 3]
    """Channels of most of them; 3 if there are as many of either kind."""
    others: tuple[int, ...]
    """Indices of those that have the other number, rising."""

    @property
    def kinds(self) -> tuple[str, str]:
        """What most are and what the others are, in words."""
        return ("in colour", "grey") if self.most == 3 else ("grey", "in colour")


def common_channels(found: Sequence[int | None]) -> Channels:
    """What most images have, and which are the others.

    Args:
        found: 1 or 3 for each image; None for one that cannot be read.
    """
    most: Literal[1, 3] = 3 if 3 in found and found.count(3) >= found.count(1) else 1
    return Channels(most, tuple(i for i, c in enumerate(found) if c not in (most, None)))


def with_channels(config: TrainConfig) -> TrainConfig:
    """The same run with the number of channels said.

    Where `data.channels` is None it is what the files have: their headers are looked at, and no
    pixel is decoded. Files that cannot be read are passed over; reading the data names them.

    Raises:
        DataError: if some files are grey and others in colour, with the lines of the rarer ones;
            or for labels or a set that cannot be used.
        ConfigError: if a set does not say it, or for settings that do not fit together.
    """
    data = config.data
    channels = data.declared_channels
    if channels is None:
        channels = stored_channels(data.tfds) if data.tfds is not None else _of_files(config)
    return dataclasses.replace(config, data=dataclasses.replace(data, channels=channels))


def _of_files(config: TrainConfig) -> Literal[1, 3]:
    table, _ = read_table(config)
    with ThreadPoolExecutor(_THREADS) as pool:
        channels = common_channels(list(pool.map(_of_file, table.paths)))
    if channels.others:
        most, rare = channels.kinds
        problems = Problems(
            f"{len(channels.others)} of {len(table)} images are {rare}, the others {most}; {ADVICE}"
        )
        for index in channels.others:
            path = printable(str(table.paths[index]))
            problems.add(table.rows[index] or None, f"{path} is {rare}")
        problems.report()
    return channels.most


def _of_file(path: Path) -> int | None:
    try:
        with closing(open_regions(path, channels=None)) as source:
            return source.channels
    except DataError:
        return None
