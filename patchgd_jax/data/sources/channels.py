"""Finds the number of channels of a run's images, grey or colour, from their headers."""

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
    """The more frequent number; 3 if both are equally frequent."""
    others: tuple[int, ...]
    """Indices of the images with the other number, increasing."""

    @property
    def kinds(self) -> tuple[str, str]:
        """The more and the less frequent kind, in words."""
        return ("in colour", "grey") if self.most == 3 else ("grey", "in colour")


def common_channels(found: Sequence[int | None]) -> Channels:
    """Finds the channels of most images; `found` is 1, 3 or None (unreadable) for each."""
    most: Literal[1, 3] = 3 if 3 in found and found.count(3) >= found.count(1) else 1
    return Channels(most, tuple(i for i, c in enumerate(found) if c not in (most, None)))


def resolve_channels(config: TrainConfig, files: ImageFiles | None = None) -> TrainConfig:
    """Resolves `data.channels` None to the channels in the files' headers.

    Unreadable files are ignored; `make_data` reports them.

    Args:
        config: of the run.
        files: result of `read_files(config)`. None: calls it if needed.

    Raises:
        DataError: if some files are grey and others in colour, with the lines of the rarer ones;
            or for unusable labels or sets.
        ConfigError: if a tfds set does not state its channels, or for conflicting settings.
    """
    data = config.data
    channels = data.declared_channels
    if channels is None:
        files = files or read_files(config)
        if files is not None:
            channels = _file_channels(files)
        else:
            assert data.tfds is not None
            channels = stored_channels(data.tfds)
    return dataclasses.replace(config, data=dataclasses.replace(data, channels=channels))


def _file_channels(files: ImageFiles) -> Literal[1, 3]:
    table = files.table
    found = (header.channels if isinstance(header, Header) else None for header in files.headers)
    channels = common_channels(list(found))
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
