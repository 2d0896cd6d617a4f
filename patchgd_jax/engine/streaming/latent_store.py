"""A cache of images' latents on the host, within a budget of bytes."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from patchgd_jax.errors import ConfigError, DiskError
from patchgd_jax.io.files import disk_errors

NEVER = -(2**62)
"""The step of a latent that was never computed."""


class StoredLatents(NamedTuple):
    """The latents of one image."""

    z: np.ndarray
    """`[N, D]`."""
    when: np.ndarray
    """`int64 [N]`, the outer step in which each was computed, or `NEVER`."""


class LatentStore:
    """Stores Z of recently visited images; the least recently visited are dropped first.

    Args:
        budget: most bytes of stored latents.
        folder: where to keep them in an unnamed file. None: in memory. The file is read and
            written, not mapped: writing mapped pages to a full disk would end the process.

    Raises:
        ConfigError: if the budget is not positive.
        DiskError: if the folder cannot be written to.
    """

    def __init__(self, budget: int, folder: str | Path | None = None) -> None:
        if budget < 1:
            raise ConfigError(f"the budget of the latent store is {budget} bytes; at least 1")
        self.budget = budget
        self._file: BinaryIO | None = None
        self._folder = folder
        if folder is not None:
            with disk_errors(f"cannot write the latent store in {folder}"):
                # Without a name: nothing is left, however the process ends.
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._kept: OrderedDict[str, StoredLatents | int] = OrderedDict()
        self._free: list[int] = []
        self._form: tuple[tuple[int, ...], np.dtype] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def bytes_used(self) -> int:
        """Bytes of the stored latents, at most `budget`."""
        return len(self._kept) * self._image_bytes()

    def get(self, name: str) -> StoredLatents | None:
        """Returns a copy of an image's latents; None if none are stored."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        self._kept.move_to_end(name)
        if isinstance(kept, int):
            return self._read(kept)
        return StoredLatents(kept.z.copy(), kept.when.copy())

    def put(self, name: str, z: np.ndarray, when: np.ndarray) -> None:
        """Stores an image's latents `z [N, D]`, `when int64 [N]` in place of its earlier ones.

        Raises:
            ConfigError: if one image's latents exceed the budget, or differ in shape.
            DiskError: if the file cannot be written; the image then has no latents stored.
        """
        form = (z.shape, z.dtype)
        if self._form is None:
            self._form = form
        elif form != self._form:
            raise ConfigError(
                f"the latent store is for latents of shape {self._form[0]}, {name} has {z.shape}; "
                "use one store for each grid"
            )
        size = self._image_bytes()
        if size > self.budget:
            raise ConfigError(
                f"the latent store has {self.budget} bytes, but one image's latents take {size}; "
                "raise its budget"
            )
        slot = self._kept.pop(name, None)
        while slot is None and (len(self._kept) + 1) * size > self.budget:
            _, slot = self._kept.popitem(last=False)
        if self._file is None:
            self._kept[name] = StoredLatents(np.array(z), np.array(when, np.int64))
            return
        if not isinstance(slot, int):
            slot = self._free.pop() if self._free else len(self._kept)
        try:
            self._write(slot, z, when)
        except OSError as error:
            self._free.append(slot)
            raise DiskError(
                f"cannot write the latent store in {self._folder}: {error.strerror}; free some "
                "space or lower its budget"
            ) from error
        self._kept[name] = slot

    def close(self) -> None:
        """Drops everything."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def _image_bytes(self) -> int:
        if self._form is None:
            return 0
        (count, width), dtype = self._form
        return count * (width * dtype.itemsize + 8)

    def _write(self, slot: int, z: np.ndarray, when: np.ndarray) -> None:
        assert self._file is not None
        self._file.seek(slot * self._image_bytes())
        data = memoryview(np.ascontiguousarray(z).tobytes() + when.astype(np.int64).tobytes())
        while data:
            data = data[self._file.write(data) :]

    def _read(self, slot: int) -> StoredLatents:
        assert self._file is not None
        assert self._form is not None
        shape, dtype = self._form
        data = bytearray(self._image_bytes())
        self._file.seek(slot * len(data))
        view = memoryview(data)
        while view:
            got = self._file.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise DiskError(f"the latent store in {self._folder} was cut short")
            view = view[got:]
        split = len(data) - 8 * shape[0]
        z = np.frombuffer(memoryview(data)[:split], dtype).reshape(shape)
        return StoredLatents(z, np.frombuffer(memoryview(data)[split:], np.int64))
