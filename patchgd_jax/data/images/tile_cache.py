"""Decoded tiles, kept within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np


class TileCache:
    """The tiles used last; safe to use from several threads.

    Args:
        max_bytes: bytes of pixels kept at most; a tile larger than that is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of pixels kept now."""
        return self._bytes

    def get(self, key: Hashable, load: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile under a key, loaded if it is not here.

        The lock is not held while loading, so two threads may load the same tile at once.

        Args:
            key: names the tile.
            load: makes it; its errors pass through.

        Returns:
            The tile, shared with later callers: not to be written to.
        """
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        tile = load()
        with self._lock:
            if key not in self._tiles and tile.nbytes <= self.max_bytes:
                self._tiles[key] = tile
                self._bytes += tile.nbytes
                while self._bytes > self.max_bytes:
                    self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def clear(self) -> None:
        """Drops all tiles."""
        with self._lock:
            self._tiles.clear()
            self._bytes = 0
