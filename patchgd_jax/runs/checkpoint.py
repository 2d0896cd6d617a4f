"""Checkpoints that are committed atomically and verified when read.

Orbax writes the arrays. Our commit protocol adds a SHA-256 manifest over every file, fsync and one
rename, because no common checkpoint format detects a flipped bit. Restoring scans the folder,
verifies newest first and falls back to the newest step that is intact.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from patchgd_jax.config import TrainConfig
from patchgd_jax.core.freezing import partition_frozen
from patchgd_jax.core.model import Params, PyTree
from patchgd_jax.core.update import TrainState
from patchgd_jax.engine.distributed import is_first, raise_together, watchdog
from patchgd_jax.engine.setup import run_frozen
from patchgd_jax.errors import CheckpointError, DiskError
from patchgd_jax.io.files import disk_errors, fsync_path, sha256, write_json
from patchgd_jax.io.text import first_line

_MANIFEST = "manifest.json"
_META = "meta.json"
_KEEP_LAST = 2


def tree_spec(tree: PyTree) -> dict[str, str]:
    """Lists shape and dtype of every leaf by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def describe_difference(stored: dict[str, str], wanted: dict[str, str]) -> str:
    """Lists the differences of two tree specs, at most ten; empty if they are equal."""
    lines = [
        f"{path}: checkpoint has {stored.get(path, 'nothing')}, "
        f"this model needs {wanted.get(path, 'nothing')}"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
    more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "\n  ".join(lines[:10] + more)


class Checkpoints:
    """The checkpoints of one run, in a folder that all of its processes share.

    Layout: `<folder>/<step>/` with `state/` (Orbax), `meta.json` and `manifest.json`;
    `latest.json` and `best.json` name steps.

    Args:
        folder: folder of the checkpoints; made when first written to.
        warn: called with one line for each step that is skipped as damaged.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = warnings.warn) -> None:
        self.folder = folder
        self._warn = warn

    def steps(self) -> list[int]:
        """Lists the committed steps, oldest first, without verifying them."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Writes the state after `step` outer steps to disk, and its number to `latest.json`.

        With several processes each holds its shards of `state`; `meta` are JSON values stored
        beside it. Raises `DiskError` if it cannot be written; then nothing of it is left, and older
        steps are intact.
        """
        state, final = _stored(state), self._path(step)
        partial = self.folder / f".{final.name}.partial"
        with raise_together(), self._all_or_nothing(final, partial):
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".*.partial"):
                    shutil.rmtree(leftover)
                partial.mkdir()
        # All processes write their shards; if one fails, the watchdog ends those that wait for it.
        with self._all_or_nothing(final, partial), watchdog(), _checkpointer() as checkpointer:
            checkpointer.save(partial.absolute() / "state", state)
            checkpointer.wait_until_finished()
        with raise_together(), self._all_or_nothing(final, partial):
            if is_first():
                content = {**meta, "step": step, "tree": tree_spec(state)}
                (partial / _META).write_text(json.dumps(content, indent=2), encoding="utf-8")
                self._write_manifest(partial)
                if final.exists():
                    shutil.rmtree(final)
                partial.rename(final)
                fsync_path(self.folder)
                write_json(self.folder / "latest.json", {"step": step})

    @contextmanager
    def _all_or_nothing(self, final: Path, partial: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax and TensorStore report a full disk as ValueError or RuntimeError.
            if is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise DiskError(
                f"cannot write checkpoint {final}: {first_line(error)} "
                f"({_free_space(self.folder)} free); make room and resume the run"
            ) from error

    def _write_manifest(self, partial: Path) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(partial)): sha256(p) for p in files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*files, partial / _MANIFEST, *(p for p in partial.rglob("*") if p.is_dir())):
            fsync_path(path)
        fsync_path(partial)

    def mark_best(self, step: int) -> None:
        """Names the best step in `best.json`."""
        if self._named_best() != step:
            write_json(self.folder / "best.json", {"step": step})

    def _named_best(self) -> int | None:
        try:
            text = (self.folder / "best.json").read_text(encoding="utf-8")
            return int(json.loads(text)["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def discard_after(self, step: int) -> None:
        """Renames checkpoints newer than the restored step to `*.damaged`."""
        for later in self.steps():
            if later > step:
                path = self._path(later)
                aside = path.with_name(f"{path.name}.damaged")
                with disk_errors(f"cannot rename {path} to {aside.name}"):
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)

    def prune(self) -> None:
        """Removes all steps but the last two and the best."""
        best = self._named_best()
        for step in self.steps()[:-_KEEP_LAST]:
            if step != best:
                with disk_errors(f"cannot remove {self._path(step)}"):
                    shutil.rmtree(self._path(step))

    def damage(self, step: int) -> str | None:
        """Describes the first damaged file of a step; None if every byte is as written."""
        path = self._path(step)
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
            for name in sorted(manifest.keys() | (found - {_MANIFEST})):
                if name not in manifest:
                    return f"{name} was not there when it was written"
                if name not in found:
                    return f"{name} is missing"
                if sha256(path / name) != manifest[name]:
                    return f"{name} has changed since it was written"
        except (OSError, ValueError, AttributeError) as error:
            return f"its manifest cannot be read ({first_line(error)})"
        return None

    def newest_intact(self) -> int:
        """Finds the newest step whose files verify; warns of each damaged one.

        Raises `CheckpointError` if there is none.
        """
        for step in reversed(self.steps()):
            problem = self.damage(step)
            if problem is None:
                return step
            self._warn(f"checkpoint {self._path(step)} is damaged: {problem}; trying an older one")
        raise CheckpointError(
            f"no usable checkpoint in {self.folder}; train again in another folder"
        )

    def best(self) -> int:
        """Finds the step that `best.json` names; if damaged, warns and takes the newest intact."""
        step = self._named_best()
        if step is not None:
            problem = self.damage(step)
            if problem is None:
                return step
            path = self._path(step)
            self._warn(f"the best checkpoint {path} is damaged: {problem}; using the last")
        return self.newest_intact()

    def meta(self, step: int) -> dict[str, Any]:
        """Reads the JSON values stored beside a step's arrays; `tree` is its `tree_spec`."""
        return dict(json.loads((self._path(step) / _META).read_text(encoding="utf-8")))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Reads a step that was verified by `newest_intact` or `best`.

        `like` is a tree of the same shapes and dtypes (arrays or ShapeDtypeStructs). Leaves are
        placed by their `sharding`, or on the first device. Raises `CheckpointError` if the stored
        tree is another model's.
        """
        stored = _stored(like)
        difference = describe_difference(self.meta(step)["tree"], tree_spec(stored))
        if difference:
            raise CheckpointError(
                f"checkpoint {self._path(step)} is of another model:\n  {difference}"
            )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
            ),
            stored,
        )
        with watchdog(), _checkpointer() as checkpointer:
            state = checkpointer.restore(self._path(step).absolute() / "state", target)
        return TrainState(*state) if isinstance(like, TrainState) else state

    def restore_part(self, step: int, name: str, like: PyTree) -> PyTree:
        """Reads a part of a verified step by its path in the state, such as `params/encoder`.

        It may be written on any devices. `like` are nested dicts of the same shapes and dtypes.
        Raises `CheckpointError` if the stored part is another model's.
        """
        part: Any = self.restore_arrays(step)
        for field in name.split("/"):
            part = (part.get(field) if part else None) or {}
        difference = describe_difference(tree_spec(part), tree_spec(like))
        if difference:
            raise CheckpointError(
                f"{name} of checkpoint {self._path(step)} is of another model:\n  {difference}"
            )
        # Orbax omits empty dicts, so the structure is that of `like`.
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(jax.device_put(part)))

    def restore_arrays(self, step: int) -> PyTree:
        """Reads a step of any model, written on any devices, as nested dicts of NumPy arrays."""
        import orbax.checkpoint as ocp

        path = self._path(step).absolute() / "state"
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata.tree
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            return checkpointer.restore(path, restore_args=how)


class _StoredState(NamedTuple):
    """A train state under its names on disk, those of the first version."""

    step: Any
    params: Any
    model_state: Any
    opt_state: Any


def _stored(state: PyTree) -> PyTree:
    return _StoredState(*state) if isinstance(state, TrainState) else state


def restore_params(
    checkpoints: Checkpoints, step: int, config: TrainConfig, like: Params, part: str
) -> PyTree:
    """Restores the evaluated parameters of `encoder` or `head`: their EMA if the run keeps one.

    `like` has the encoder and head parameters of the model, by shape and dtype. Raises
    `CheckpointError` if the stored part is another model's.
    """
    params = checkpoints.restore_part(step, f"params/{part}", like[part])
    if config.optimizer.ema_decay is None:
        return params
    trained, _ = partition_frozen(like, run_frozen(config))
    # Frozen entries have no EMA.
    return {**params, **checkpoints.restore_part(step, f"opt_state/average/{part}", trained[part])}


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Orbax logs every save at a level that would break into the progress display.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.StandardCheckpointer()


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown space"
