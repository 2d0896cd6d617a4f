"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_bytes(content)
    fsync_path(partial)
    partial.replace(path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
