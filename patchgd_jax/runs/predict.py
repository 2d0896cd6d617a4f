"""Evaluates the model of a trained run, or labels image files with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from patchgd_jax.baselines.registry import WHOLE_IMAGE, make_algorithm, method_model
from patchgd_jax.config import StreamConfig, TrainConfig
from patchgd_jax.core.grid import Grid, PatchGrid
from patchgd_jax.core.problem import Weights
from patchgd_jax.data.images.pixels import shrink
from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.safe_image import read_image
from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.data.run_data import RunData, file_reader, make_data
from patchgd_jax.data.sources.file_reader import used_patches
from patchgd_jax.engine.build import build
from patchgd_jax.engine.setup import make_grid, make_model, make_problem, make_run_task, method_grid
from patchgd_jax.engine.streaming.step import StreamedStep
from patchgd_jax.errors import ConfigError, DataError
from patchgd_jax.models.registry import encoder_entry, head_entry
from patchgd_jax.runs import evaluate as evaluation
from patchgd_jax.runs.checkpoint import Checkpoints, restore_params
from patchgd_jax.runs.folder import METRICS, RunFolder
from patchgd_jax.runs.record.metrics_log import read_metrics
from patchgd_jax.runs.record.progress import Progress

Which = Literal["best", "last"]
EvaluationSplit = Literal["validation", "test"]

RESIDENT_BYTES = 2**28
"""Bytes of an image's pixels up to which it is read whole to label it."""


class TrainedModel:
    """The weights of a run and the preprocessing of its images.

    Args:
        run_dir: the run folder.
        which: the checkpoint with the best validation score, or the last one.
        progress: gets a warning for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: if there is no usable checkpoint.
    """

    def __init__(
        self, run_dir: str | Path, which: Which = "best", progress: Progress | None = None
    ) -> None:
        self.folder = RunFolder(run_dir)
        self.config: TrainConfig = self.folder.config()
        self.preprocess = self.folder.preprocess()
        self.task = make_run_task(self.config, len(self.preprocess.class_names))
        self._reader = file_reader(self.config.data, self.preprocess.background)
        self._grid = self._grid_of(self.preprocess.shapes[0])
        model = make_model(self.config, self._grid, self.preprocess)
        checkpoints = Checkpoints(self.folder.checkpoints, (progress or Progress()).warn)
        self.step = checkpoints.best() if which == "best" else checkpoints.newest_intact()
        params, batch_stats = jax.eval_shape(model.init, jax.random.key(0))
        self.weights = Weights(
            {
                part: restore_params(checkpoints, self.step, self.config, params, part)
                for part in params
            },
            checkpoints.restore_part(self.step, "model_state", batch_stats),
        )
        self._eval = lru_cache(maxsize=None)(self._jitted_eval)
        self._streamed = lru_cache(maxsize=4)(self._streamed_step)

    def _grid_of(self, shape: tuple[int, int]) -> Grid:
        return method_grid(self.config, *shape, self.preprocess.background)

    def _jitted_eval(self, grid: Grid) -> Any:
        config = self.config
        algorithm = make_algorithm(config.method, config.baseline, config.patchgd)
        problem = make_problem(config, grid, self.preprocess, self.task)
        return jax.jit(partial(algorithm.eval_step, problem))

    def source(self, split: EvaluationSplit, data: RunData | None = None) -> ExampleSource:
        """Returns the images of a split, from `data` if given.

        Raises:
            ConfigError: if the run has no test images.
            DataError: if they cannot be used.
        """
        data = data or make_data(self.config)
        if split == "validation":
            return data.validation
        if data.test is None:
            raise ConfigError(
                f"run {self.folder.path} has no test images; name them in the split column of its "
                "CSV file, or train with --data.split.test-fold, or on a tensorflow-datasets set "
                "with splits validation and test"
            )
        return data.test

    def evaluate(
        self, progress: Progress | None = None, split: EvaluationSplit = "validation"
    ) -> dict[str, Any]:
        """Evaluates the images of a split, as in training.

        Returns:
            The metrics, `step`, and `recorded`: the metrics of the validation images at that step
            in the run's log, or None.

        Raises:
            ConfigError: if there are no such images.
            DataError: if they cannot be used.
        """
        data = make_data(self.config)
        source = self.source(split, data)
        # On one device, even if it was trained on several.
        config = dataclasses.replace(
            self.config,
            mesh=None,
            param_rules=(),
            stream=dataclasses.replace(self.config.stream, max_age=0),
        )
        executor = build(config, data, self.preprocess)
        progress = progress or Progress()

        def show(done: int) -> bool:
            progress.evaluating(done, len(source))
            return True

        metrics = evaluation.evaluate(executor, source, self.weights, progress.left_out, show)
        assert metrics is not None
        recorded = [
            {k: v for k, v in line.items() if k in metrics}
            for line in read_metrics(self.folder.path / METRICS)
            if line["kind"] == "eval" and line["step"] == self.step and split == "validation"
        ]
        return {"step": self.step, **metrics, "recorded": recorded[0] if recorded else None}

    def read(self, path: str | Path) -> np.ndarray:
        """Reads an image file as the model's input, `uint8 [H, W, C]`.

        Raises:
            DataError: if it cannot be read, or is smaller than a patch.
            ConfigError: if the model's head cannot take an image of that size.
        """
        background, data = self.preprocess.background, self.config.data
        if data.generated:
            image = read_image(path, channels=data.num_channels, background=background)
            image = shrink(image, data.downscale, background)
        else:
            image, _ = self._reader.read(path)
            if data.fit == "native":
                height, width = image.shape[:2]
                rows, cols = self._padded(height, width)
                pad = ((0, max(0, rows - height)), (0, max(0, cols - width)), (0, 0))
                image = np.pad(image, pad, constant_values=background)
        self._check_shape(path, image.shape[:2])
        return image

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size that such an image was padded to in training; at least a patch."""
        if self.config.method in WHOLE_IMAGE:
            for rows, cols in sorted(self.preprocess.shapes, key=lambda s: s[0] * s[1]):
                if rows >= height and cols >= width:
                    return rows, cols
        return self._at_least_a_patch(height, width)

    def _check_shape(self, path: str | Path, shape: tuple[int, int]) -> Grid:
        """Makes the grid of an image, and checks it against the encoder and the head."""
        try:
            grid = self._grid_of(shape)
        except ConfigError as error:
            raise DataError(f"image {path}: {error}") from error
        tables = encoder_entry(self.config.model.encoder).side_multiple > 1
        if tables and grid.patch_shape != self._grid.patch_shape:
            raise ConfigError(
                f"image {path} has {shape[0]} x {shape[1]} px, but {self.config.model.encoder} has "
                f"a table of positions for {' x '.join(map(str, self._grid.patch_shape))} px; "
                "resize the image"
            )
        trained = (self._grid.rows, self._grid.cols)
        head = method_model(self.config.method, self.config.model).head
        if head_entry(head).fixed_grid and (grid.rows, grid.cols) != trained:
            raise ConfigError(
                f"image {path} gives a grid of {grid.rows} x {grid.cols} patches, but the head "
                f"{head} works only on the {trained[0]} x {trained[1]} it was "
                "trained on; resize the image, or train with --model.head attention"
            )
        return grid

    def open_streamed(self, path: str | Path) -> RegionSource | None:
        """Opens an image for reading patch by patch; the caller closes it.

        Returns:
            The image; or None if it must be read whole: small images of a run that does not stream,
            resized images, and methods that see images whole.

        Raises:
            DataError: if it cannot be opened, or is smaller than a patch.
            ConfigError: if the model's head cannot take an image of that size.
        """
        data = self.config.data
        if self.config.method not in ("patchgd", "mil"):
            return None
        if data.downscale > 1 or (data.fit != "native" and not data.generated):
            return None
        with ExitStack() as stack:
            source = stack.enter_context(closing(self._reader.open(path)))
            shapes = source.level_shapes
            height, width = shapes[0] if data.generated else self._reader.shape(shapes, path)
            small = height * width * data.num_channels <= RESIDENT_BYTES
            if small and not self.config.stream.enabled:
                return None
            self._check_shape(path, self._at_least_a_patch(height, width))
            stack.pop_all()
        return source

    def _at_least_a_patch(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patchgd.patch if self.config.data.fit == "native" else 0
        return max(height, patch), max(width, patch)

    def predict_streamed(
        self, source: RegionSource, name: str, patches: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Labels one image as `predict`, but patch by patch, with only a few patches in memory.

        Args:
            source: from `open_streamed`.
            name: name of the image in errors.
            patches: from `patches`; the others are neither read nor encoded.

        Raises:
            DataError: if a patch cannot be read.
        """
        shape = source.level_shapes[self.config.data.level]
        grid = make_grid(self.config, *self._at_least_a_patch(*shape), self.preprocess.background)
        batch = self._batch(grid, patches)
        return self._answer(self._streamed(grid).evaluate(self.weights, [source], batch, [name]))

    def _streamed_step(self, grid: PatchGrid) -> StreamedStep:
        config = self.config
        problem = make_problem(config, grid, self.preprocess, self.task)
        # Evaluation ignores the gradient's mode, but streaming has no mode full.
        patchgd = dataclasses.replace(config.patchgd, mode="accumulate", importance="none")
        problem = dataclasses.replace(problem, config=patchgd)
        stream = StreamConfig(buffers=config.stream.buffers, readers=config.stream.readers)
        return StreamedStep(problem, optax.identity(), stream, level=config.data.level)

    def patches(self, path: str | Path) -> np.ndarray | None:
        """Finds ids of a file's patches that are not background, `int32 [m]`; None: all."""
        if self.config.data.empty.method == "none":
            return None
        with closing(self._reader.open(path)) as source:
            shape = self._at_least_a_patch(*self._reader.shape(source.level_shapes, path))
        grid = make_grid(self.config, *shape, self.preprocess.background)
        return np.flatnonzero(used_patches(path, self._reader, grid)).astype(np.int32)

    def predict(self, image: np.ndarray, patches: np.ndarray | None = None) -> dict[str, Any]:
        """Labels one image.

        Args:
            image: from `read`.
            patches: from `patches`; the others are not encoded.

        Returns:
            `label` (class name; for multi-label a list of names; for regression a number), and
            `probabilities` by class name except for regression.
        """
        grid = self._grid_of(image.shape[:2])
        batch = {"image": image[None], **self._batch(grid, patches)}
        return self._answer(self._eval(grid)(self.weights, jax.device_put(batch)))

    def _batch(self, grid: Grid, patches: np.ndarray | None) -> dict[str, np.ndarray]:
        """Makes a batch of one image, without its pixels."""
        spec = self.task.label_spec(1, len(self.preprocess.class_names))
        batch = {"label": np.zeros(spec.shape, spec.dtype)}
        if patches is not None:
            # The same number of slots for every image of a size, so that one program serves all.
            slots = np.full((1, grid.num_patches), grid.num_patches, np.int32)
            slots[0, : len(patches)] = patches
            batch["patches"] = slots
        return batch

    def _answer(self, on_device: dict[str, jax.Array]) -> dict[str, Any]:
        names = self.preprocess.class_names
        out = jax.device_get(on_device)
        (answer,) = out["prediction"]
        if self.task.name == "regression":
            return {"label": float(answer)}
        (probabilities,) = self.task.probabilities(out["logits"]).tolist()
        if self.task.name == "multi-label":
            label: Any = [name for name, holds in zip(names, answer, strict=True) if holds]
        else:
            label = names[int(answer)]
        return {"label": label, "probabilities": dict(zip(names, probabilities, strict=True))}

    def predict_files(self, paths: Sequence[str | Path]) -> list[dict[str, Any]]:
        """Labels image files; all are checked before any is labelled.

        Returns:
            Per file `image` (the path) and what `predict` gives.

        Raises:
            DataError: for the first file that cannot be used.
            ConfigError: for the first that the head cannot take.
        """
        for path in paths:
            if (source := self.open_streamed(path)) is None:
                self.read(path)
            else:
                source.close()
        return [{"image": str(path), **self.predict_file(path)} for path in paths]

    def predict_file(self, path: str | Path) -> dict[str, Any]:
        """Labels an image file, read whole or patch by patch; as `predict`."""
        source = self.open_streamed(path)
        if source is None:
            return self.predict(self.read(path), self.patches(path))
        with closing(source):
            return self.predict_streamed(source, str(path), self.patches(path))


def load_run(run_dir: str | Path, which: Which = "best") -> TrainedModel:
    """Loads a run's model, to evaluate it and to label images; arguments as `TrainedModel`'s."""
    return TrainedModel(run_dir, which)


def evaluate(run_dir: str | Path, split: EvaluationSplit = "validation") -> dict[str, Any]:
    """Evaluates the best checkpoint of a run; see `TrainedModel.evaluate`."""
    return load_run(run_dir).evaluate(split=split)
