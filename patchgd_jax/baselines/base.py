"""What a method is: a training step and an evaluation step that the loop calls alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import optax

from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.core.augment import Augment, augmentation
from patchgd_jax.core.gradients import Batch, Gradient, stream
from patchgd_jax.core.grid import Grid
from patchgd_jax.core.model import Params, PatchModel
from patchgd_jax.core.placement import ALONE, Placement
from patchgd_jax.core.step import TrainState, apply_gradient, global_norm, step_beside_frozen
from patchgd_jax.core.tasks import SINGLE_LABEL, Task

Metrics = dict[str, jax.Array]


class Method(NamedTuple):
    """A way to train, and the way to score that goes with it."""

    train_step: Callable[..., tuple[TrainState, Metrics]]
    """Arguments and results of `step.train_step`."""
    eval_step: Callable[..., Metrics]
    """Arguments and results of `step.eval_step`."""


class GradientOf(Protocol):
    """The gradient of a method that updates once per outer step."""

    def __call__(
        self,
        params: Params,
        model_state: Params,
        batch: Batch,
        key: jax.Array,
        *,
        model: PatchModel,
        grid: Grid,
        patchgd: PatchGDConfig,
        task: Task,
        augment: Augment | None,
    ) -> Gradient:
        """Arguments as `gradients.full_gradient`'s."""
        ...


def one_update(gradient_of: GradientOf) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step that makes one update with a gradient."""

    def step(
        state: TrainState,
        batch: Batch,
        key: jax.Array,
        *,
        model: PatchModel,
        optimizer: optax.GradientTransformation,
        grid: Grid,
        patchgd: PatchGDConfig,
        task: Task = SINGLE_LABEL,
        augment: AugmentConfig | None = None,
        frozen: frozenset[str] = frozenset(),
        placement: Placement = ALONE,
    ) -> tuple[TrainState, Metrics]:
        """See `step.train_step`; on one device."""
        if frozen:
            return step_beside_frozen(
                step,
                state,
                batch,
                key,
                frozen,
                model=model,
                optimizer=optimizer,
                grid=grid,
                patchgd=patchgd,
                task=task,
                augment=augment,
            )
        key = jax.random.fold_in(key, state.step)
        gradient = gradient_of(
            state.params,
            state.model_state,
            batch,
            key,
            model=model,
            grid=grid,
            patchgd=patchgd,
            task=task,
            augment=augmentation(augment, stream(key, "augment"), 0),
        )
        new_state, metrics = apply_gradient(state, gradient, batch, optimizer, task, 1.0)
        metrics["param_norm"] = global_norm(new_state.params)
        return new_state._replace(step=state.step + 1), metrics

    return step


def scores(logits: jax.Array, batch: Batch, task: Task) -> dict[str, Any]:
    """What an evaluation step returns, given the logits `float [B, O]`."""
    losses = task.for_evaluation().loss(logits, batch["label"])
    return {"loss": losses, "prediction": task.predict(logits), "logits": logits}
