"""Grey or colour: how many channels a run's images have, found from their headers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from patchgd_jax.config import TrainConfig
from patchgd_jax.data.run_data import ImageFiles, read_files
from patchgd_jax.data.sources.file_reader import Header
from patchgd_jax.data.sources.tfds_source import stored_channels
from patchgd_jax.data.tables.image_paths import Problems
from patchgd_jax.io.text import printable

ADVICE = "set --data.channels 3 to read all of them in colour, or 1 in grey"


class Channels(NamedTuple):
    """The channels of a table's images."""

    most: Literal[1, 3]
    """Channels of most of them; 3 if there are as many of either kind."""
    others: tuple[int, ...]
    """Indices of those that have the other number, rising."""

    @property
    def kinds(self) -> tuple[str, str]:
        """What most are and what the others are, in words."""
        return ("in colour", "grey") if self.most == 3 else ("grey", "in colour")


def common_channels(found: Sequence[int | None]) -> Channels:
    """Finds the channels of most images, and which images have others.

    Args:
        found: 1 or 3 for each image; None for one that cannot be read.
    """
    most: Literal[1, 3] = 3 if 3 in found and found.count(3) >= found.count(1) else 1
    return Channels(most, tuple(i for i, c in enumerate(found) if c not in (most, None)))


def resolve_channels(config: TrainConfig, files: ImageFiles | None = None) -> TrainConfig:
    """Resolves `data.channels` None to the channels in the files' headers.

    Files that cannot be read are passed over; reading the data names them.

    Args:
        config: of the run.
        files: what `read_files(config)` gave. None: read them, if they are needed.

    Raises:
        DataError: if some files are grey and others in colour, with the lines of the rarer ones;
            or for labels or a set that cannot be used.
        ConfigError: if a set does not state it, or for settings that do not fit together.
    """
    data = config.data
    channels = data.declared_channels
    if channels is None:
        files = files or read_files(config)
        if files is not None:
            channels = _of_files(files)
        else:
            assert data.tfds is not None
            channels = stored_channels(data.tfds)
    return dataclasses.replace(config, data=dataclasses.replace(data, channels=channels))


def _of_files(files: ImageFiles) -> Literal[1, 3]:
    table = files.table
    channels = common_channels(
        [header.channels if isinstance(header, Header) else None for header in files.headers]
    )
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
