"""Device programs of streaming: an outer step cut into one program per chunk of patches.

They call the functions of `core.step.train_step`, and draw from the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from patchgd_jax.core.forward import apply_head, encode, read_attention, score_logits, write_latents
from patchgd_jax.core.freezing import close_over_frozen, combine_frozen
from patchgd_jax.core.gradients import check_exact, chunk_gradient, z_gradient
from patchgd_jax.core.model import Params, PyTree
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.patch_ids import PatchIds, chunk_patch_ids, real_mask
from patchgd_jax.core.problem import Layout, Problem, Weights, named_key
from patchgd_jax.core.sampling import encoder_scale
from patchgd_jax.core.staleness import drift, mean_age, squared_change
from patchgd_jax.core.step import draw, inner_gradient, inner_stream
from patchgd_jax.core.update import Gradient, Metrics, TrainState, apply_gradient, global_norm
from patchgd_jax.engine.compiling import compiler_options

Labels = Mapping[str, Any]
"""`problem.Batch` without `image`: `label`, and optionally `weight`, `patches`, `size`."""


class SplitWeights(NamedTuple):
    """Weights split into trained and frozen parameters (`freezing.partition_frozen`)."""

    trained: Params
    frozen: Params
    batch_stats: Params


class Part(NamedTuple):
    """Images computed together: a batch, or a micro-batch of it."""

    labels: dict[str, Any]
    """The batch's entries of these images."""
    first: Any
    """Place in the batch of the first image, `int32 []`; None if the part is the whole batch."""
    share: Any
    """Factor of the part's mean loss in the batch's, `float []`; None for the whole batch."""


class Chunk(NamedTuple):
    """Patches of a part's images that go to the device together."""

    patches: Any
    """`uint8 [b, k, p, p, C]`."""
    group: PatchIds
    """`int32 [b, k]`."""
    number: Any
    """`int32 []`, number of the chunk of the fill, or of the inner step."""


class Draw(NamedTuple):
    """Random draws of an outer step, for the whole batch."""

    key: Array
    """Key of the outer step."""
    fill: PatchIds
    """`int32 [n, B, chunk]`."""
    inner: PatchIds
    """`int32 [J, B, k]`; empty in mode exact."""


@dataclass(frozen=True)
class PartLayout(Layout):
    """The layout of a part, whose images begin at place `first` of the batch."""

    first: Any

    def first_image(self, count: int) -> Any:
        """See `Layout`."""
        return 0 if self.first is None else self.first


class StreamedPrograms:
    """The jitted programs of a streamed step, for a problem on one device.

    `partial_fill`: fills leave patches out, so that chunks may have padding slots.
    """

    def __init__(self, problem: Problem, optimizer: Optimizer, *, partial_fill: bool) -> None:
        self.problem, self._optimizer, self._partial_fill = problem, optimizer, partial_fill
        config = problem.config
        self.exact = config.mode == "exact"
        self.fill_moves_statistics = not self.exact and config.norm_policy == "paper"
        self.updates = config.updates_per_step
        self.epsilon = 1 if self.exact else config.num_inner_steps // self.updates

        def program(function: Callable[..., Any], donate: str = "", static: str = "") -> Any:
            return jax.jit(
                function,
                donate_argnames=donate.split(),
                static_argnames=static.split(),
                compiler_options=compiler_options(),
            )

        self.draw = program(self._draw)
        self.order = program(self._order)
        self.fill = program(self._fill, "z", "evaluate")
        self.inner = program(self._inner, "z total")
        self.head = program(self._head)
        self.back = program(self._back, "total")
        # The first of several updates must not donate the caller's state: a later read may fail.
        self.first_update = program(self._update, "total")
        self.update = program(self._update, "total trained opt_state")
        self.set_entry = program(lambda row, value, index: row.at[index].set(value), "row")
        self.staleness = program(self._staleness)
        self.summary = program(self._summary)
        self.read = program(self._read)
        self.attend = program(partial(read_attention, problem))

    def check(self, batch: Labels, batch_stats: Params) -> None:
        """Raises the `ConfigError`s of `train_step`, before anything is read."""
        if self.exact:
            check_exact(self.problem, batch_stats)
        self._encoder_scale(batch)

    def _encoder_scale(self, batch: Labels) -> float:
        config = self.problem.config
        if self.exact:
            scale = config.encoder_grad_scale
            return 1.0 if scale == "unbiased" else scale
        return encoder_scale(config, self.problem.grid.num_patches, batch)

    def empty_z(self, weights: SplitWeights, images: int, channels: int) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of Z."""
        patches = jax.ShapeDtypeStruct((1, *self.problem.grid.patch_shape, channels), np.uint8)

        def latents_of(weights: SplitWeights, patches: Array) -> Array:
            problem, (params, batch_stats) = self._closed(weights)
            key = jax.random.key(0)
            return problem.model.encode(params, batch_stats, patches, train=False, rng=key)[0]

        latents = jax.eval_shape(latents_of, weights, patches)
        shape = (images, self.problem.grid.num_patches, latents.shape[-1])
        return jax.ShapeDtypeStruct(shape, latents.dtype)

    def lower(
        self, weights: SplitWeights, opt_state: PyTree, part: Part, batch: Labels, channels: int
    ) -> dict[str, jax.stages.Lowered]:
        """See `streaming.StreamedStep.lower`; all arrays may be `jax.ShapeDtypeStruct`."""
        struct = jax.ShapeDtypeStruct
        images, side = part.labels["label"].shape[0], self.problem.grid.patch_shape
        number, key = struct((), np.int32), jax.eval_shape(lambda: jax.random.key(0))
        drawn = jax.eval_shape(self._draw, key, number, dict(batch))
        z = self.empty_z(weights, images, channels)

        def chunk(groups: PatchIds) -> Chunk:
            slots = (images, groups.ids.shape[-1])
            group = PatchIds(struct(slots, np.int32), groups.padded)
            return Chunk(struct((*slots, *side, channels), np.uint8), group, number)

        filled = chunk(drawn.fill)
        lowered = {"fill": self.fill.lower(weights, z, filled, part, key, evaluate=False)}
        if self.exact:
            lowered["head"] = self.head.lower(weights, z, part, key)
            gradient, dz = lowered["head"].out_info
            lowered["back"] = self.back.lower(weights, gradient.grads, dz, filled, part, key)
        else:
            inner = (weights, z, weights.trained, chunk(drawn.inner), part, key)
            lowered["inner"] = self.inner.lower(*inner)
            gradient, _, _ = lowered["inner"].out_info
        logits = struct(
            (batch["label"].shape[0], *gradient.logits.shape[1:]), gradient.logits.dtype
        )
        losses = struct((self.epsilon,), gradient.loss.dtype)
        lowered["update"] = self.update.lower(
            weights.trained, opt_state, weights.trained, losses, logits, dict(batch)
        )
        return lowered

    def _closed(self, weights: SplitWeights, part: Part | None = None) -> tuple[Problem, Weights]:
        """Closes the problem over the frozen parameters, and over the part's place."""
        problem = self.problem
        if problem.frozen:
            model = close_over_frozen(problem.model, lambda: weights.frozen)
            problem = dataclasses.replace(problem, model=model, frozen=frozenset())
        if part is not None:
            problem = dataclasses.replace(problem, layout=PartLayout(part.first))
        return problem, Weights(weights.trained, weights.batch_stats)

    def _fill_key(self, key: Array, part: Part, number: Array) -> Array:
        key = named_key(key, "encoder" if self.exact else "fill")
        return jax.random.fold_in(_of_part(key, part), number)

    def _order(self, batch: dict[str, Array]) -> PatchIds:
        """Lists the valid patches in order, some at a time."""
        config = self.problem.config
        groups = chunk_patch_ids(batch, self.problem.grid, config.fill_chunk, config.strata)
        return dataclasses.replace(groups, padded=True) if self._partial_fill else groups

    def _draw(self, key: Array, step: Array, batch: dict[str, Array]) -> Draw:
        key = jax.random.fold_in(key, step)
        if self.exact:
            none = jnp.zeros((0, batch["label"].shape[0], 0), jnp.int32)
            return Draw(key, self._order(batch), PatchIds(none, padded=False))
        fill, inner = draw(self.problem, batch, key)
        return Draw(key, dataclasses.replace(fill, padded=fill.padded or self._partial_fill), inner)

    def _fill(
        self,
        weights: SplitWeights,
        z: Array,
        chunk: Chunk,
        part: Part,
        key: Array,
        *,
        evaluate: bool,
    ) -> tuple[Array, Params, Array]:
        """Writes one chunk into Z; the last result is for waiting only."""
        problem, both = self._closed(weights, part)
        train = problem.trains_encoder if self.exact else self.fill_moves_statistics
        latents, batch_stats = encode(
            problem,
            both,
            chunk.patches if evaluate else _augmented(problem, chunk, key, "augment"),
            chunk.group,
            part.labels,
            self._fill_key(key, part, chunk.number),
            train=train and not evaluate,
        )
        return write_latents(z, chunk.group.ids, latents), batch_stats, latents[0, 0, 0]

    def _inner(
        self, weights: SplitWeights, z: Array, total: Params, chunk: Chunk, part: Part, key: Array
    ) -> tuple[Gradient, Array, Array]:
        """Runs one inner step: the gradient added to `total`, the new Z, and `squared_change`."""
        problem, both = self._closed(weights, part)
        patches = _augmented(problem, chunk, key, inner_stream(problem))
        inner_key = _of_part(jax.random.fold_in(key, chunk.number), part)
        gradient, fresh = inner_gradient(
            problem, both, z, patches, chunk.group, part.labels, inner_key
        )
        gradient = _scaled(gradient, part)
        total = jax.tree.map(lambda t, g: t + g / self.epsilon, total, gradient.grads)
        moved = squared_change(z, fresh, chunk.group.ids, part.labels.get("weight"))
        return gradient._replace(grads=total), fresh, moved

    def _head(
        self, weights: SplitWeights, z: Array, part: Part, key: Array
    ) -> tuple[Gradient, Array]:
        """Computes the head's gradient and `dL/dZ`, in mode exact."""
        head_key = _of_part(named_key(key, "head"), part)
        problem, both = self._closed(weights, part)
        gradient, dz = z_gradient(problem, both, z, part.labels, head_key)
        return _scaled(gradient, part), dz if part.share is None else dz * part.share

    def _back(
        self, weights: SplitWeights, total: Params, dz: Array, chunk: Chunk, part: Part, key: Array
    ) -> tuple[Params, Array]:
        """Adds the encoder's gradient through one chunk; the last result is for waiting only."""
        problem, both = self._closed(weights, part)
        patches = _augmented(problem, chunk, key, "augment")
        chunk_key = self._fill_key(key, part, chunk.number)
        own = chunk_gradient(problem, both, dz, patches, chunk.group, part.labels, chunk_key)
        return jax.tree.map(jnp.add, total, own), jax.tree.leaves(own)[0].ravel()[0]

    def _update(
        self,
        trained: Params,
        opt_state: PyTree,
        total: Params,
        losses: Array,
        logits: Array,
        batch: dict[str, Array],
    ) -> tuple[Params, PyTree, Params, Metrics]:
        """Runs one optimizer update; the third result is zeros for the next gradient."""
        state = TrainState(jnp.zeros((), jnp.int32), trained, {}, opt_state)
        gradient = Gradient(total, {}, losses.mean(), logits)
        scale = self._encoder_scale(batch)
        state, metrics = apply_gradient(
            self.problem, self._optimizer, state, gradient, batch, scale
        )
        return state.params, state.opt_state, jax.tree.map(jnp.zeros_like, total), metrics

    def _staleness(self, ids: Array, moved: Array, batch: dict[str, Array]) -> Metrics:
        """Measures how stale Z was, from groups `int [J, B, k]` and their `float [J, 2]`."""
        grid = self.problem.grid
        age = mean_age(ids, grid.num_patches, real_mask(batch, grid))
        return {"z_age": age, "z_drift": drift(moved)}

    def _summary(self, trained: Params, frozen: Params, history: dict[str, Array]) -> Metrics:
        metric = self.problem.task.training_metric
        params = combine_frozen(trained, frozen)
        return {
            "loss": history["loss"].mean(),
            metric: history[metric][-1],
            "grad_norm": history["grad_norm"].mean(),
            "param_norm": global_norm(params),
        }

    def _read(self, weights: Weights, z: Array, labels: dict[str, Array]) -> Metrics:
        key = jax.random.key(0)
        logits, _ = apply_head(self.problem, weights, z, labels, key, train=False)
        return score_logits(self.problem, logits, labels)


def _of_part(key: Array, part: Part) -> Array:
    return key if part.first is None else jax.random.fold_in(key, part.first)


def _augmented(problem: Problem, chunk: Chunk, key: Array, name: str) -> Any:
    augment = problem.augmentation(key, name, len(chunk.patches))
    return chunk.patches if augment is None else augment(chunk.patches, chunk.group.ids)


def _scaled(gradient: Gradient, part: Part) -> Gradient:
    if part.share is None:
        return gradient
    grads = jax.tree.map(lambda g: g * part.share, gradient.grads)
    return gradient._replace(grads=grads, loss=gradient.loss * part.share)
