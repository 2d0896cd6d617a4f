"""The device's side of streaming: an outer step cut into one program per chunk of patches.

Each is made of the functions that `step.train_step` is made of, and draws from the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.core.augment import Augment, augmentation
from patchgd_jax.core.freezing import close_over_frozen, combine_frozen
from patchgd_jax.core.gradients import (
    Gradient,
    chunk_gradient,
    chunks,
    head_loss,
    inner_gradient,
    listed_patches,
    patch_mask,
    read_z,
    real_patches,
    stream,
)
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.latents import encode_patches, has_spare, write_latents
from patchgd_jax.core.model import Params, PatchModel, PyTree
from patchgd_jax.core.sampling import inclusion_probability, sample_groups
from patchgd_jax.core.staleness import drift, mean_age, squared_change
from patchgd_jax.core.step import TrainState, apply_gradient, global_norm
from patchgd_jax.core.tasks import Task
from patchgd_jax.engine.compiling import compiler_options
from patchgd_jax.errors import ConfigError

Labels = Mapping[str, Any]
"""`gradients.Batch` without `image`: `label`, and optionally `weight`, `patches`, `size`."""


class Weights(NamedTuple):
    """What the encoder and the head are applied with."""

    trained: Params
    fixed: Params
    """Frozen parameters, see `partition_frozen`."""
    model_state: Params


class Part(NamedTuple):
    """The images that travel together: a batch, or a micro-batch of it."""

    labels: dict[str, Any]
    """The batch's entries of these images."""
    first: Any
    """Place in the batch of the first image, `int32 []`; None if the part is the whole batch."""
    share: Any
    """Factor of the part's mean loss in the batch's, `float []`; None for the whole batch."""


class Draw(NamedTuple):
    """What an outer step draws, for the whole batch."""

    key: jax.Array
    """The outer step's."""
    fill: Any
    """`int32 [n, B, chunk]`."""
    inner: Any
    """`int32 [J, B, k]`; empty in mode exact."""


class _TakenPatches(PatchGrid):
    """The grid of images whose patches are cut already: what is given for the images is they."""

    def take(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        return images


def listed(batch: Labels) -> bool:
    """Whether each image has patches of its own that count."""
    return "patches" in batch or "size" in batch


class StreamedPrograms:
    """The jitted programs of a streamed step; arguments as for `streaming.StreamedStep`.

    `ids` are patch numbers `int32 [b, k]`, and `patches` their pixels, `uint8 [b, k, p, p, C]`.
    """

    def __init__(
        self,
        model: PatchModel,
        optimizer: optax.GradientTransformation,
        grid: PatchGrid,
        patchgd: PatchGDConfig,
        task: Task,
        *,
        augment: AugmentConfig | None,
        frozen: bool,
        partial_fill: bool,
    ) -> None:
        self._model, self._optimizer, self._grid = model, optimizer, grid
        self._config, self._task, self._augment = patchgd, task, augment
        self._frozen, self._partial_fill = frozen, partial_fill
        self._taken = _TakenPatches(
            grid.height, grid.width, grid.patch, grid.stride, grid.background
        )
        self.exact = patchgd.mode == "exact"
        self._train_encoder = patchgd.norm_policy != "frozen"
        self.fill_moves_statistics = not self.exact and patchgd.norm_policy == "paper"
        self.updates = patchgd.updates_per_step
        self.epsilon = 1 if self.exact else patchgd.num_inner_steps // self.updates

        def program(function: Callable[..., Any], donate: str = "", static: str = "") -> Any:
            return jax.jit(
                function,
                donate_argnames=donate.split(),
                static_argnames=static.split(),
                compiler_options=compiler_options(),
            )

        self.draw = program(self._draw)
        self.order = program(self._order)
        self.fill = program(self._fill, "z", "spare evaluate")
        self.inner = program(self._inner, "z total", "spare")
        self.head = program(self._head)
        self.back = program(self._back, "total", "spare")
        # An update that is not the step's last must leave the caller's state as it is: reading
        # what comes after it may fail.
        self.first_update = program(self._update, "total")
        self.update = program(self._update, "total trained opt_state")
        self.set_entry = program(lambda row, value, index: row.at[index].set(value), "row")
        self.staleness = program(self._staleness)
        self.summary = program(self._summary)
        self.read = program(self._read)
        self.attend = program(self._attend)

    def check(self, batch: Labels, model_state: Params) -> None:
        """Raises the `ConfigError` of what `train_step` would refuse, before anything is read."""
        if self.exact and self._train_encoder and jax.tree.leaves(model_state["encoder"]):
            raise ConfigError(
                "mode exact needs an encoder without batch statistics (norm group) or norm_policy "
                "frozen: statistics taken chunk by chunk are not those of the whole image"
            )
        self._encoder_scale(batch)

    def spare(self, batch: Labels, drawn: Draw) -> tuple[bool, bool]:
        """Whether the fill's chunks and the inner steps' may have slots without a patch."""
        lists, uniform = listed(batch), self._config.sampling == "uniform"
        fill = lists or self._partial_fill or has_spare(drawn.fill, self._grid)
        return fill, lists or uniform or has_spare(drawn.inner, self._grid)

    def empty_z(self, weights: Weights, images: int, channels: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of Z."""
        side = self._grid.patch
        latents = jax.eval_shape(
            lambda weights, patches: self._model_of(weights).encode(
                weights.trained,
                weights.model_state,
                patches,
                train=False,
                rng=jax.random.key(0),
            )[0],
            weights,
            jax.ShapeDtypeStruct((1, side, side, channels), np.uint8),
        )
        shape = (images, self._grid.num_patches, latents.shape[-1])
        return jax.ShapeDtypeStruct(shape, latents.dtype)

    def lower(
        self, weights: Weights, opt_state: PyTree, part: Part, batch: Labels, channels: int
    ) -> dict[str, jax.stages.Lowered]:
        """See `streaming.StreamedStep.lower`; all arrays may be `jax.ShapeDtypeStruct`."""
        struct = jax.ShapeDtypeStruct
        images, side = part.labels["label"].shape[0], self._grid.patch
        number, key = struct((), np.int32), jax.eval_shape(lambda: jax.random.key(0))
        drawn = jax.eval_shape(self._draw, key, number, dict(batch))
        fill_spare, inner_spare = self.spare(batch, drawn)
        z = self.empty_z(weights, images, channels)

        def chunk(ids: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
            slots = (images, ids.shape[-1])
            return struct((*slots, side, side, channels), np.uint8), struct(slots, np.int32)

        fill = (weights, z, *chunk(drawn.fill), part, key, number)
        lowered = {"fill": self.fill.lower(*fill, spare=fill_spare, evaluate=False)}
        if self.exact:
            head = (weights, z, part, key)
            lowered["head"] = self.head.lower(*head)
            gradient, dz = jax.eval_shape(self._head, *head)
            back = (weights, gradient.grads, dz, *chunk(drawn.fill), part, key, number)
            lowered["back"] = self.back.lower(*back, spare=fill_spare)
        else:
            inner = (weights, z, weights.trained, *chunk(drawn.inner), part, key, number)
            lowered["inner"] = self.inner.lower(*inner, spare=inner_spare)
            gradient, _, _ = jax.eval_shape(
                lambda *arguments: self._inner(*arguments, spare=inner_spare), *inner
            )
        logits = struct(
            (batch["label"].shape[0], *gradient.logits.shape[1:]), gradient.logits.dtype
        )
        losses = struct((self.epsilon,), gradient.loss.dtype)
        lowered["update"] = self.update.lower(
            weights.trained,
            opt_state,
            weights.model_state,
            weights.trained,
            losses,
            logits,
            dict(batch),
        )
        return lowered

    def _model_of(self, weights: Weights) -> PatchModel:
        return (
            close_over_frozen(self._model, lambda: weights.fixed) if self._frozen else self._model
        )

    def _changes(self, key: jax.Array, name: str, part: Part) -> Augment | None:
        return augmentation(
            self._augment, stream(key, name), 0 if part.first is None else part.first
        )

    def _fill_key(self, key: jax.Array, part: Part, number: jax.Array) -> jax.Array:
        key = stream(key, "encoder" if self.exact else "fill")
        return jax.random.fold_in(_of_part(key, part), number)

    def _encoder_scale(self, batch: Labels) -> float:
        scale = self._config.encoder_grad_scale
        if scale != "unbiased":
            return scale
        if self.exact:
            return 1.0
        if self._config.sampling == "uniform" and listed(batch):
            raise ConfigError(
                "patchgd.encoder_grad_scale unbiased with patchgd.sampling uniform has a factor of "
                "its own for each number of patches, and these images differ; use partition"
            )
        steps = self._config.num_inner_steps
        return 1 / inclusion_probability(
            self._grid.num_patches, steps, self._config.sampling, self._config.strata
        )

    def _order(self, batch: dict[str, jax.Array]) -> jax.Array:
        """The patches that count, in order, some at a time."""
        return chunks(batch, self._grid, self._config.fill_chunk, self._config.strata)[0]

    def _draw(self, key: jax.Array, step: jax.Array, batch: dict[str, jax.Array]) -> Draw:
        key = jax.random.fold_in(key, step)
        config, count = self._config, batch["label"].shape[0]

        def groups(name: str, sampling: Any) -> jax.Array:
            return sample_groups(
                stream(key, name),
                num_patches=self._grid.num_patches,
                inner_steps=config.num_inner_steps,
                batch=count,
                sampling=sampling,
                sample_per=config.sample_per,
                patches=listed_patches(batch, self._grid),
                strata=config.strata,
            )

        if self.exact:
            return Draw(key, self._order(batch), jnp.zeros((0, count, 0), jnp.int32))
        inner = groups("sampling", config.sampling)
        if config.norm_policy == "paper":
            return Draw(key, groups("fill-order", "partition"), inner)
        return Draw(key, self._order(batch), inner)

    def _fill(
        self,
        weights: Weights,
        z: jax.Array,
        patches: jax.Array,
        ids: jax.Array,
        part: Part,
        key: jax.Array,
        number: jax.Array,
        *,
        spare: bool,
        evaluate: bool,
    ) -> tuple[jax.Array, Params, jax.Array]:
        """Writes one chunk into Z; the last result is for waiting only."""
        counts = not evaluate and not self.exact
        train = self._train_encoder if self.exact else self.fill_moves_statistics
        latents, model_state = encode_patches(
            weights.trained,
            weights.model_state,
            patches,
            ids,
            self._fill_key(key, part, number),
            model=self._model_of(weights),
            grid=self._taken,
            train=train and not evaluate,
            real=real_patches(part.labels, self._grid) if counts else None,
            spare=spare,
            augment=None if evaluate else self._changes(key, "augment", part),
        )
        return write_latents(z, ids, latents), model_state, latents[0, 0, 0]

    def _inner(
        self,
        weights: Weights,
        z: jax.Array,
        total: Params,
        patches: jax.Array,
        ids: jax.Array,
        part: Part,
        key: jax.Array,
        number: jax.Array,
        *,
        spare: bool,
    ) -> tuple[Gradient, jax.Array, jax.Array]:
        """One inner step.

        Returns:
            The gradient with `total` in it, Z with the fresh entries, and their
            `staleness.squared_change`.
        """
        same = self._augment is None or self._augment.same_draw
        gradient, fresh = inner_gradient(
            weights.trained,
            weights.model_state,
            z,
            ids,
            {**part.labels, "image": patches},
            _of_part(jax.random.fold_in(key, number), part),
            model=self._model_of(weights),
            grid=self._taken,
            train_encoder=self._train_encoder,
            spare=spare,
            task=self._task,
            augment=self._changes(key, "augment" if same else "augment-inner", part),
        )
        gradient = _scaled(gradient, part)
        total = jax.tree.map(lambda t, g: t + g / self.epsilon, total, gradient.grads)
        moved = squared_change(z, fresh, ids, part.labels.get("weight"))
        return gradient._replace(grads=total), fresh, moved

    def _head(
        self, weights: Weights, z: jax.Array, part: Part, key: jax.Array
    ) -> tuple[Gradient, jax.Array]:
        """The head's gradient and `dL/dZ`, in mode exact."""

        def loss_fn(params: Params, z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Params]]:
            return head_loss(
                params,
                weights.model_state,
                z,
                part.labels,
                _of_part(stream(key, "head"), part),
                model=self._model_of(weights),
                grid=self._grid,
                task=self._task,
            )

        (loss, (logits, new_state)), (grads, dz) = jax.value_and_grad(
            loss_fn, argnums=(0, 1), has_aux=True
        )(weights.trained, z)
        gradient = _scaled(Gradient(grads, new_state, loss, logits), part)
        return gradient, dz if part.share is None else dz * part.share

    def _back(
        self,
        weights: Weights,
        total: Params,
        dz: jax.Array,
        patches: jax.Array,
        ids: jax.Array,
        part: Part,
        key: jax.Array,
        number: jax.Array,
        *,
        spare: bool,
    ) -> tuple[Params, jax.Array]:
        """Adds the encoder's gradient through one chunk; the last result is for waiting only."""
        own = chunk_gradient(
            weights.trained,
            weights.model_state,
            patches,
            ids,
            dz,
            self._fill_key(key, part, number),
            model=self._model_of(weights),
            grid=self._taken,
            train_encoder=self._train_encoder,
            spare=spare,
            augment=self._changes(key, "augment", part),
        )
        return jax.tree.map(jnp.add, total, own), jax.tree.leaves(own)[0].ravel()[0]

    def _update(
        self,
        trained: Params,
        opt_state: PyTree,
        model_state: Params,
        total: Params,
        losses: jax.Array,
        logits: jax.Array,
        batch: dict[str, jax.Array],
    ) -> tuple[Params, PyTree, Params, dict[str, jax.Array]]:
        """One update of the optimizer; the third result is zeros for the next gradient."""
        state = TrainState(jnp.zeros((), jnp.int32), trained, model_state, opt_state)
        gradient = Gradient(total, model_state, losses.mean(), logits)
        scale = self._encoder_scale(batch)
        state, metrics = apply_gradient(state, gradient, batch, self._optimizer, self._task, scale)
        return state.params, state.opt_state, jax.tree.map(jnp.zeros_like, total), metrics

    def _staleness(
        self, ids: jax.Array, moved: jax.Array, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """How stale Z was, of the groups `int [J, B, k]` and their `float [J, 2]`."""
        age = mean_age(ids, self._grid.num_patches, real_patches(batch, self._grid))
        return {"z_age": age, "z_drift": drift(moved)}

    def _summary(
        self, trained: Params, fixed: Params, history: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        metric = self._task.training_metric
        return {
            "loss": history["loss"].mean(),
            metric: history[metric][-1],
            "grad_norm": history["grad_norm"].mean(),
            "param_norm": global_norm(combine_frozen(trained, fixed) if self._frozen else trained),
        }

    def _read(
        self, params: Params, model_state: Params, z: jax.Array, labels: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        logits, losses, _ = read_z(
            params,
            model_state,
            z,
            labels,
            jax.random.key(0),
            model=self._model,
            grid=self._grid,
            train=False,
            task=self._task.for_evaluation(),
        )
        return {"loss": losses, "prediction": self._task.predict(logits), "logits": logits}

    def _attend(
        self, params: Params, model_state: Params, z: jax.Array, labels: dict[str, jax.Array]
    ) -> jax.Array:
        if self._model.attend is None:
            raise ConfigError("the model has no attention to show: its `attend` is None")
        z = z.reshape(z.shape[0], self._grid.rows, self._grid.cols, z.shape[-1])
        return self._model.attend(params, model_state, z, patch_mask(labels, self._grid))


def _of_part(key: jax.Array, part: Part) -> jax.Array:
    return key if part.first is None else jax.random.fold_in(key, part.first)


def _scaled(gradient: Gradient, part: Part) -> Gradient:
    if part.share is None:
        return gradient
    grads = jax.tree.map(lambda g: g * part.share, gradient.grads)
    return gradient._replace(grads=grads, loss=gradient.loss * part.share)
