"""Regions of Zarr arrays and OME-Zarr images (versions 2 and 3) with tensorstore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from patchgd_jax.data.images.pixels import DTYPES, to_uint8
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import ImageReadError
from patchgd_jax.data.images.tiff_levels import micrometres
from patchgd_jax.io.text import first_line

MARKERS = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
"""Files that identify a Zarr folder."""


class _Layout(NamedTuple):
    """Metadata of a Zarr image."""

    folders: tuple[Path, ...]
    """Of the levels."""
    axes: str | None
    """A letter each; None: guessed from the shape."""
    mpp: float | None


class ZarrRegions(RegionSource):
    """Regions of a Zarr array, or of an OME-Zarr image with its levels.

    The array has axes y and x, may have a channel axis of 1 or 3 at either end, and others of
    length 1. Chunks missing in the store have its fill value, as defined by Zarr. The arguments are
    those of `open_regions`.

    Raises:
        ImageReadError: if the folder is damaged or holds anything else.
    """

    def __init__(
        self, path: Path, channels: Literal[1, 3] | None, background: int, cache_bytes: int
    ) -> None:
        self.path = path
        try:
            layout = _layout(path)
            self._stores = _open_all(layout.folders, cache_bytes)
        except ImageReadError:
            raise
        except Exception as error:
            # tensorstore raises ValueError for nearly all; the metadata may hold anything.
            raise ImageReadError(path, first_line(error)) from error
        first = self._stores[0]
        if first.dtype.name not in DTYPES:
            raise ImageReadError(
                path, f"its pixels are {first.dtype.name}; it must be one of {', '.join(DTYPES)}"
            )
        self._axes = layout.axes or _guess_axes(first)
        _check_axes(path, self._axes, [store.shape for store in self._stores])
        rows, cols = self._axes.index("y"), self._axes.index("x")
        own = first.shape[self._axes.index("c")] if "c" in self._axes else 1
        chunk = first.chunk_layout.read_chunk.shape
        super().__init__(
            [(store.shape[rows], store.shape[cols]) for store in self._stores],
            channels or own,
            background,
            mpp=layout.mpp,
            tile=(chunk[rows], chunk[cols]) if chunk else None,
        )

    def _inside(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        if not self._stores:
            raise ValueError(f"{self.path} is closed")
        where = {"y": slice(y, y + height), "x": slice(x, x + width), "c": slice(None)}
        index = tuple(where.get(axis, 0) for axis in self._axes)
        try:
            window = self._stores[level][index].read().result()
        except Exception as error:
            place = f"{height} x {width} px at row {y}, column {x} of level {level}"
            reason = f"{place} are damaged: {first_line(error)}"
            raise ImageReadError(self.path, reason) from error
        kept = [axis for axis in self._axes if axis in where]
        window = np.asarray(window).transpose([kept.index(axis) for axis in "yxc" if axis in kept])
        window = window.reshape(height, width, -1)
        return to_uint8(window, channels=self.channels, background=self.background)

    def close(self) -> None:
        """Drops the stores; reading afterwards is an error."""
        self._stores = []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _layout(folder: Path) -> _Layout:
    modern = _read_json(folder / "zarr.json")
    attributes = modern.get("attributes", {}) if modern else _read_json(folder / ".zattrs")
    attributes = attributes.get("ome", attributes)
    if "bioformats2raw.layout" in attributes and (folder / "0").is_dir():
        return _layout(folder / "0")
    if attributes.get("multiscales"):
        return _multiscale(folder, attributes["multiscales"][0])
    if modern.get("node_type") == "array" or (folder / ".zarray").exists():
        return _Layout((folder,), None, None)
    raise ImageReadError(
        folder, "it is a Zarr group without an image; name the image's or array's folder in it"
    )


def _multiscale(folder: Path, image: dict[str, Any]) -> _Layout:
    folders = tuple(folder / dataset["path"] for dataset in image["datasets"])
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", [])]
    names = "".join(str(axis["name"])[0] for axis in axes) or None
    mpp = None
    if names and "x" in names:
        unit = micrometres(axes[names.index("x")].get("unit") or "")
        # The image's own transformations come on top of its level's.
        sources = image["datasets"][0], image
        steps = [step for of in sources for step in of.get("coordinateTransformations", [])]
        scales = [step["scale"][names.index("x")] for step in steps if step["type"] == "scale"]
        if unit and scales:
            mpp = float(np.prod(scales)) * unit
    return _Layout(folders, names, mpp if mpp and mpp > 0 else None)


def _open_all(folders: Sequence[Path], cache_bytes: int) -> list[Any]:
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    stores = []
    for folder in folders:
        spec = {
            "driver": "zarr3" if (folder / "zarr.json").exists() else "zarr",
            "kvstore": {"driver": "file", "path": str(folder.absolute()) + "/"},
            # Otherwise every read would check the file's date.
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        stores.append(tensorstore.open(spec, context=context, read=True, open=True).result())
    return stores


def _guess_axes(store: Any) -> str:
    """Axes of an array by the store's labels, or else by its shape."""
    shape, labels = store.shape, [str(label) for label in store.domain.labels]
    if all(labels):
        return "".join(label[0] for label in labels)
    if len(shape) == 3:
        return "cyx" if shape[0] in (1, 3) and shape[2] not in (1, 3) else "yxc"
    return {2: "yx", 5: "tczyx"}.get(len(shape), "?" * len(shape))


def _check_axes(path: Path, axes: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises `ImageReadError` for anything but a single grey or RGB image."""
    plain = len(set(axes)) == len(axes) and {"y", "x"} <= set(axes)
    for shape in shapes:
        fits = plain and len(shape) == len(axes)
        if not fits or any(
            size < 1 or (axis == "c" and size not in (1, 3)) or (axis not in "cyx" and size != 1)
            for axis, size in zip(axes, shape, strict=True)
        ):
            raise ImageReadError(
                path,
                f"its shape is {shape} with axes {axes!r}; an image has y and x, may have a "
                "channel axis c of 1 or 3, and any other axis must be of length 1",
            )
