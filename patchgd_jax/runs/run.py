"""A run: its data, executor and state, and the identity that a resume checks."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import optax

from patchgd_jax._version import __version__
from patchgd_jax.config import TrainConfig, flatten, migrate, to_dict
from patchgd_jax.core.sampling import group_size
from patchgd_jax.core.update import TrainState, init_state
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.data.run_data import ImageFiles, make_data
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.engine.build import build, check_run
from patchgd_jax.engine.compiling import use_compilation_cache
from patchgd_jax.engine.devices import select_device
from patchgd_jax.engine.distributed import watchdog
from patchgd_jax.engine.setup import samples_patches
from patchgd_jax.errors import CheckpointError
from patchgd_jax.io.files import disk_errors
from patchgd_jax.runs.folder import EXAMPLES, RunFolder
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.starting_point import starting_point

_MAY_CHANGE = (
    "run_dir",
    "device",
    "data.bad_images",
    "data.bad_limit",
    "reader_threads",
    "reader_mib",
    "mesh",
    "param_rules",
    "stream.enabled",
    "stream.buffers",
    "stream.readers",
    "stream.store_mib",
    "stream.store_dir",
)
"""Settings that may change on resume."""

_OWN = ("run_dir", "reader_threads", "reader_mib", "stream.store_dir")
"""Settings that may differ between processes."""

_EXAMPLE_PIXELS = 2**24
"""Most pixels of a generated image for writing a few to the run folder."""


class Run:
    """The constant objects of a run: data, preprocessing, executor and identity.

    Args:
        config: the run, resolved.
        preprocess: that of a resumed run. None: measured.
        progress: shows notes about the data and the device.
        optimizer: replaces the config's, of which freezing and the EMA stay.
        files: the config's image files, if they are read already.

    Raises:
        PatchGDError: of the subclass that fits.
    """

    def __init__(
        self,
        config: TrainConfig,
        preprocess: Preprocess | None,
        progress: Progress,
        optimizer: optax.GradientTransformation | None,
        files: ImageFiles | None = None,
    ) -> None:
        self.config = config
        self.progress = progress
        # First, because processes wait for each other's devices.
        self.device = select_device(config.device, shared=config.mesh is not None)
        self.data = make_data(config, files)
        for note in self.data.notes:
            progress.message(note)
        check_run(config, self.data)
        self.total_steps = config.total_steps(len(self.data.train))
        cache = use_compilation_cache()
        progress.message(
            f"Device: {self.device.device_kind} ({self.device.platform}). "
            f"Compiled programs are {cache}."
        )
        self.start = None if preprocess else starting_point(config, progress)
        if preprocess is None:
            substitute = config.data.bad_images == "substitute"
            preprocess = Preprocess.measure(self.data, leave_out_bad=substitute)
        if start := self.start:
            # The encoder's input must be scaled as it was when the encoder was trained.
            preprocess = dataclasses.replace(preprocess, mean=start.mean, std=start.std)
        self.preprocess = preprocess
        self.executor = build(config, self.data, preprocess, optimizer)
        self.setup = self.executor.setup
        if samples_patches(config):
            steps, count = config.patchgd.num_inner_steps, self.setup.problems[0].grid.num_patches
            progress.message(
                f"Patches: {count} of an image, {group_size(count, steps)} in each of {steps} "
                "inner steps."
            )
        self.init = jax.jit(partial(init_state, self.setup.problems[0], self.setup.optimizer))

    def first_state(self) -> TrainState:
        """Makes the state before the first step, with the pretrained weights of the config."""
        state: TrainState = self.init(jax.random.fold_in(self.setup.key, 0))
        start = self.start or starting_point(self.config, self.progress)
        if start is not None:
            params, batch_stats = start.into(*state.weights)
            state = state._replace(params=params, batch_stats=batch_stats)
        with watchdog():
            return self.executor.place(state)

    def state_spec(self) -> TrainState:
        """Returns shapes, dtypes and, on several devices, shardings of the state."""
        return self.executor.layout(jax.eval_shape(self.init, self.setup.key))

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprint of settings, preprocessing and data; a resume fails if it differs."""
        settings = flatten(to_dict(self.config))
        for name in _MAY_CHANGE:
            del settings[name]
        return {
            "settings": settings,
            "preprocess": to_dict(self.preprocess),
            "data": {
                "fingerprint": self.data.train.fingerprint,
                "validation": self.data.validation.fingerprint,
            },
        }

    @property
    def shared(self) -> dict[str, Any]:
        """Settings and identity that must be the same for all processes of the run."""
        settings = flatten(to_dict(self.config))
        for name in _OWN:
            del settings[name]
        return {**flatten(self.identity), **flatten({"settings": settings})}

    def check_identity(
        self, meta: dict[str, Any], step: int, *, accept_changed_data: bool = False
    ) -> None:
        """Raises `CheckpointError` if a checkpoint is of other settings or other data."""
        lines = []
        for kind, now in self.identity.items():
            then = meta.get(kind, {})
            if kind == "settings":
                # A setting that is newer than the checkpoint had its default.
                stored = migrate({**then, "schema": meta.get("schema", 0)})
                stored = {**flatten(to_dict(TrainConfig())), **stored}
                then = {name: stored[name] for name in now}
            if kind == "data" and then != now:
                changed = (
                    "the images have changed (a file, its time or size, a label, or the split)"
                )
                if accept_changed_data:
                    self.progress.warn(changed)
                else:
                    lines.append(f"{changed}; to continue with them, use --accept-changed-data")
                continue
            lines += [
                f"{kind}: {name} was {then.get(name)!r}, is {now.get(name)!r}"
                for name in sorted(then.keys() | now.keys())
                if then.get(name) != now.get(name)
            ]
        if lines:
            changed = "\n  ".join(lines[:10])
            raise CheckpointError(
                f"the run has changed since its checkpoint {step} was written; change it back, or "
                f"start a new run:\n  {changed}"
            )
        if meta.get("version") != __version__:
            written = f"checkpoint {step} was written by version {meta.get('version')}"
            self.progress.warn(f"{written}, this is {__version__}")

    def write_examples(self, folder: RunFolder) -> None:
        """Writes a few generated validation images, to look at and to try `predict` on."""
        from PIL import Image

        source = self.data.validation
        pixels_of_one = self.config.data.size[0] * self.config.data.size[1]
        if not isinstance(source, UltraMnist) or pixels_of_one > _EXAMPLE_PIXELS:
            return
        where = folder.path / EXAMPLES
        with disk_errors(f"cannot write {where}"):
            where.mkdir()
            for index in range(min(4, len(source))):
                # As users' images: at full size, before any down-scaling.
                pixels = source.read(index, 0, 0, *self.config.data.size)
                name = self.preprocess.class_names[source.plan(index).label]
                Image.fromarray(pixels).save(where / f"{index}_label_{name}.png")
