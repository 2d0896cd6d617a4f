"""Uses a trained run: scores it again, or labels image files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from patchgd_jax.checkpoint import Checkpoints
from patchgd_jax.config import TrainConfig
from patchgd_jax.data.safe_image import read_image
from patchgd_jax.data.shrink import shrink
from patchgd_jax.errors import ConfigError, DataError
from patchgd_jax.evaluate import evaluate
from patchgd_jax.experiment import (
    make_grid,
    make_model,
    make_run_task,
    make_source,
    restore_params,
    training_grid,
)
from patchgd_jax.grid import PatchGrid
from patchgd_jax.metrics_log import read_metrics
from patchgd_jax.models import head_entry
from patchgd_jax.patch_model import Parts
from patchgd_jax.progress import Progress
from patchgd_jax.run_folder import METRICS, RunFolder
from patchgd_jax.step import eval_step

Which = Literal["best", "last"]


class TrainedModel:
    """The parameters of a run and what its images must go through.

    Args:
        run_dir: the run folder.
        which: the checkpoint with the best validation score, or the last one.
        progress: told of damaged checkpoints that were passed over.

    Raises:
        CheckpointError: if no usable checkpoint is there.
    """

    def __init__(
        self, run_dir: str | Path, which: Which = "best", progress: Progress | None = None
    ) -> None:
        self.folder = RunFolder(run_dir)
        self.config: TrainConfig = self.folder.config()
        self.preprocess = self.folder.preprocess()
        self.task = make_run_task(self.config)
        self._grid = training_grid(self.config)
        model = make_model(self.config, self._grid, self.preprocess)
        checkpoints = Checkpoints(self.folder.checkpoints, (progress or Progress()).warn)
        self.step = checkpoints.best() if which == "best" else checkpoints.newest_intact()
        params, model_state = jax.eval_shape(model.init, jax.random.key(0))
        self.params: Parts = {
            part: restore_params(checkpoints, self.step, self.config, params, part)
            for part in params
        }
        self.model_state: Parts = checkpoints.restore_part(self.step, "model_state", model_state)
        self._score = lru_cache(maxsize=None)(self._jitted_score)

    def _jitted_score(self, grid: PatchGrid) -> Any:
        model = make_model(self.config, grid, self.preprocess)
        return jax.jit(
            partial(
                eval_step,
                model=model,
                grid=grid,
                fill_chunk=self.config.patchgd.fill_chunk,
                task=self.task,
            )
        )

    def evaluate(self, progress: Progress | None = None) -> dict[str, Any]:
        """Scores the validation images, as in training.

        Returns:
            The metrics, `step`, and `recorded`: what the run's log says of that step, or None.
        """
        source = make_source(self.config, "validation")
        progress = progress or Progress()

        def show(done: int) -> bool:
            progress.evaluating(done, len(source))
            return True

        metrics = evaluate(
            self._score(self._grid),
            self.params,
            self.model_state,
            source,
            task=self.task,
            batch_size=self.config.eval_batch_size,
            on_batch=show,
        )
        assert metrics is not None
        recorded = [
            {k: v for k, v in line.items() if k in metrics}
            for line in read_metrics(self.folder.path / METRICS)
            if line["kind"] == "eval" and line["step"] == self.step
        ]
        return {"step": self.step, **metrics, "recorded": recorded[0] if recorded else None}

    def read(self, path: str | Path) -> np.ndarray:
        """Reads an image file as the model needs it, `uint8 [H, W, C]`.

        Raises:
            DataError: if it cannot be read, or is smaller than a patch.
            ConfigError: if the model's head cannot take an image of that size.
        """
        background = self.preprocess.background
        image = read_image(path, channels=self.config.data.channels, background=background)
        image = shrink(image, self.config.data.downscale, background)
        try:
            grid = make_grid(self.config, image.shape[0], image.shape[1], background)
        except ConfigError as error:
            raise DataError(f"image {path}: {error}") from error
        trained = (self._grid.rows, self._grid.cols)
        if head_entry(self.config.model.head).fixed_grid and (grid.rows, grid.cols) != trained:
            raise ConfigError(
                f"image {path} gives a grid of {grid.rows} x {grid.cols} patches, but the head "
                f"{self.config.model.head} works only on the {trained[0]} x {trained[1]} it was "
                "trained on; resize the image, or train with --model.head attention"
            )
        return image

    def predict(self, image: np.ndarray) -> dict[str, Any]:
        """Labels one image from `read`.

        Returns:
            `label` (the class name) and `probabilities` by class name.
        """
        grid = make_grid(self.config, image.shape[0], image.shape[1], self.preprocess.background)
        names = self.preprocess.class_names
        spec = self.task.label_spec(1, len(names))
        batch = {"image": image[None], "label": np.zeros(spec.shape, spec.dtype)}
        out = self._score(grid)(self.params, self.model_state, jax.device_put(batch))
        out = jax.device_get(out)
        (probabilities,) = self.task.probabilities(out["logits"]).tolist()
        return {
            "label": names[int(out["prediction"][0])],
            "probabilities": dict(zip(names, probabilities, strict=True)),
        }

    def predict_files(self, paths: Sequence[str | Path]) -> list[dict[str, Any]]:
        """Labels image files; all are checked before any is labelled.

        Returns:
            Per file `image` (the path), `label` and `probabilities`.

        Raises:
            DataError: for the first file that cannot be used.
            ConfigError: for the first that the head cannot take.
        """
        for path in paths:
            self.read(path)
        return [{"image": str(path), **self.predict(self.read(path))} for path in paths]
