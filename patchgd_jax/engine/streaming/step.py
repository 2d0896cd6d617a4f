"""Outer steps on images that stay in host memory or on disk: only chunks of patches travel.

The mathematics, sampling and random draws of `step.train_step`, with the host between the chunks.
Z, the parameters and the optimizer's state stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from patchgd_jax.config import AugmentConfig, PatchGDConfig
from patchgd_jax.core.freezing import combine_frozen, partition_frozen
from patchgd_jax.core.gradients import Gradient, listed_patches
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.model import Params, PatchModel, PyTree
from patchgd_jax.core.step import TrainState
from patchgd_jax.core.tasks import SINGLE_LABEL, Task
from patchgd_jax.engine.streaming.feed import ChunkIds, PatchFeed, PatchReader
from patchgd_jax.engine.streaming.latent_reuse import LatentReuse
from patchgd_jax.engine.streaming.latent_store import LatentStore
from patchgd_jax.engine.streaming.programs import (
    Draw,
    Labels,
    Part,
    StreamedPrograms,
    Weights,
    listed,
)
from patchgd_jax.errors import ConfigError

if TYPE_CHECKING:
    from patchgd_jax.data.images.regions import RegionSource


class _Fill(NamedTuple):
    """One chunk of the fill of one part."""

    number: int
    """The chunk's place among all of the draw's, empty ones too: random draws depend on it."""
    chunk: ChunkIds


class StreamedStep:
    """Training and evaluation steps on images of which no more than some chunks are in memory.

    For the same state, key and images they compute what `train_step` and `eval_step` do: the same
    draws, and the same sums. On the CPU the results are the same bit for bit, unless the compiler
    orders a head's sums differently, as it may where images have a `size` and in mode exact
    (measured in float32: 5e-12 in a gradient, 2e-7 of a parameter). Patches that do not count are
    neither read nor encoded. Slots that hold no patch, where a chunk or group is not full, carry
    background; only an encoder with batch statistics that takes no `mask` can tell.

    Args:
        model: the model.
        optimizer: any optax transformation.
        grid: the patch grid; an image may be smaller if the batch has `size` or `patches`.
        patchgd: gradient mode (all but full), sampling and policies. `fill_chunk` patches of each
            image travel at a time, and k in an inner step.
        task: what the labels are.
        augment: random changes of the patches, on the device.
        frozen: as for `train_step`.
        level: resolution of the images to read.
        buffers: chunks alive at once, from the start of a read to the end of the computation; at
            least 2. Each takes `b * k * p * p * C` bytes of the host, and while it is computed on,
            of the device.
        readers: threads that read patches.
        micro_batch: images that travel together, b; it must divide the batch. Their gradients are
            added up. Dropout and batch statistics are those of the part. None: the whole batch.
        max_age: outer steps for which an entry of Z is reused instead of encoded anew when its
            image comes again. 0: none is. Not for mode exact and norm_policy paper.
        store: where Z is kept between visits; needed with `max_age`.

    Raises:
        ConfigError: for settings that cannot work, or not together.
    """

    def __init__(
        self,
        model: PatchModel,
        optimizer: optax.GradientTransformation,
        grid: PatchGrid,
        patchgd: PatchGDConfig,
        task: Task = SINGLE_LABEL,
        *,
        augment: AugmentConfig | None = None,
        frozen: frozenset[str] = frozenset(),
        level: int = 0,
        buffers: int = 3,
        readers: int = 4,
        micro_batch: int | None = None,
        max_age: int = 0,
        store: LatentStore | None = None,
    ) -> None:
        if patchgd.mode == "full":
            raise ConfigError(
                "patchgd.mode full keeps all patches of an image on the device at once, so the "
                "image cannot be streamed; mode exact has the same gradient"
            )
        for name, value, least in (
            ("buffers", buffers, 2),
            ("readers", readers, 1),
            ("micro_batch", 1 if micro_batch is None else micro_batch, 1),
            ("max_age", max_age, 0),
        ):
            if value < least:
                raise ConfigError(f"streaming with {name} {value}: it must be at least {least}")
        if patchgd.importance != "none":
            raise ConfigError(
                f"patchgd.importance {patchgd.importance} draws patches when Z is filled, but an "
                "image that is streamed is read ahead by a plan of the whole step; keep the images "
                "on the device, or use importance none"
            )
        if (max_age > 0) != (store is not None):
            raise ConfigError("max_age needs a latent store, and a latent store a max_age above 0")
        if max_age > 0 and patchgd.mode == "exact":
            raise ConfigError("max_age reuses old latents, but mode exact needs all of them fresh")
        if max_age > 0 and patchgd.norm_policy == "paper":
            raise ConfigError(
                "max_age leaves patches out of the fill, but norm_policy paper takes batch "
                "statistics of all of them; use inner or frozen"
            )
        self._grid, self._frozen, self._level = grid, frozen, level
        self._buffers, self._readers, self._micro_batch = buffers, readers, micro_batch
        self.read_wait = 0.0
        """Seconds so far that steps have waited for pixels."""
        self._reuse = None if store is None else LatentReuse(store, max_age)
        self._programs = StreamedPrograms(
            model,
            optimizer,
            grid,
            patchgd,
            task,
            augment=augment,
            frozen=bool(frozen),
            partial_fill=store is not None,
        )

    def train(
        self,
        state: TrainState,
        images: Sequence[RegionSource],
        batch: Labels,
        key: jax.Array,
        names: Sequence[str] | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One outer step on one batch of images.

        Returns before the device has finished. If it raises, `state` is as it was; else it may
        have been consumed (donated).

        Args:
            state: from `init_state` or an earlier step.
            images: B sources, each read by several threads at once.
            batch: `label`, and optionally `weight`, `patches` and `size`, as in `gradients.Batch`.
            key: the run's key; the step number is folded into it here.
            names: what errors call the images, and what Z is kept by between visits: the same at
                each visit, and no other image's. Needed with `max_age`.

        Returns:
            The new state and metrics as `train_step` has them; with `max_age` also `z_age_mean`
            and `z_age_max`: outer steps since the entries of Z were computed, as the inner steps
            begin (0 for those of this step's fill). For `z_age` entries that are reused are as old
            as those of the fill; their `z_drift` is that since they were computed.

        Raises:
            DataError: if a patch cannot be read, or an image does not fit the grid. It names the
                image.
            ConfigError: as `train_step`, and if the micro-batch does not divide the batch.
        """
        if names is None and self._reuse is not None:
            raise ConfigError("max_age needs the names of the images, to know them again")
        reader, parts = self._open(images, batch, names)
        self._programs.check(batch, state.model_state)
        # First of all, so that the next call finds it without waiting for the rest of this one.
        step, next_step = int(state.step), state.step + 1
        trained, fixed = partition_frozen(state.params, self._frozen)
        weights = Weights(trained, fixed, state.model_state)
        batch = {name: jnp.asarray(value) for name, value in batch.items()}
        drawn = self._programs.draw(key, np.int32(step), batch)
        drawn = Draw(drawn.key, np.asarray(drawn.fill), np.asarray(drawn.inner))
        run = self._exact_step if self._programs.exact else self._inner_steps
        weights, opt_state, history, stale = run(
            weights, state.opt_state, batch, parts, drawn, reader, step
        )
        metrics = self._programs.summary(weights.trained, fixed, history)
        params = combine_frozen(weights.trained, fixed) if self._frozen else weights.trained
        return TrainState(next_step, params, weights.model_state, opt_state), {**metrics, **stale}

    def evaluate(
        self,
        params: Params,
        model_state: Params,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None = None,
    ) -> dict[str, jax.Array]:
        """One fill in eval mode and one head pass.

        Args:
            params: of both parts, such as `evaluated_params(state)`.
            model_state: of both parts.
            images: B sources.
            batch: as for `train`.
            names: what errors call the images.

        Returns:
            As `eval_step`: per example `loss`, `prediction` and `logits`.

        Raises:
            DataError: as `train`.
            ConfigError: if the micro-batch does not divide the batch.
        """
        read = self._programs.read
        filled = self._fill_to_read(params, model_state, images, batch, names)
        rows = [read(params, model_state, z, part.labels) for part, z in filled]
        return rows[0] if len(rows) == 1 else jax.tree.map(lambda *r: jnp.concatenate(r), *rows)

    def attention_map(
        self,
        params: Params,
        model_state: Params,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None = None,
    ) -> jax.Array:
        """How much the head looks at each patch, as `step.attention_map`.

        Returns:
            `float [B, rows, cols]`.

        Raises:
            DataError: as `train`.
            ConfigError: if the head has no attention, or the micro-batch does not divide the batch.
        """
        attend = self._programs.attend
        filled = self._fill_to_read(params, model_state, images, batch, names)
        return jnp.concatenate([attend(params, model_state, z, part.labels) for part, z in filled])

    def lower(
        self, state: TrainState, batch: Labels, channels: int
    ) -> dict[str, jax.stages.Lowered]:
        """The programs of a training step, to compile them without running any.

        Args:
            state: of arrays or `jax.ShapeDtypeStruct`.
            batch: as for `train`; of arrays or `jax.ShapeDtypeStruct`.
            channels: C.

        Returns:
            `fill`, `update` and `inner`, or in mode exact `head` and `back` for the latter. The
            memory of the one that needs most is what a step needs on the device.
        """
        struct = jax.ShapeDtypeStruct
        trained, fixed = partition_frozen(state.params, self._frozen)
        count = batch["label"].shape[0]
        size = self._part_size(count)
        labels = {k: struct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}
        part = Part(labels, None, None)
        if size < count:
            part = Part(labels, struct((), np.int32), struct((), np.float32))
        weights = Weights(trained, fixed, state.model_state)
        return self._programs.lower(weights, state.opt_state, part, batch, channels)

    def _part_size(self, count: int) -> int:
        size = self._micro_batch or count
        if count % size:
            raise ConfigError(f"micro_batch {size} does not divide the batch of {count} images")
        return size

    def _open(
        self, images: Sequence[RegionSource], batch: Labels, names: Sequence[str] | None
    ) -> tuple[PatchReader, list[Part]]:
        count, grid = len(images), self._grid
        names = [f"image {i} of the batch" for i in range(count)] if names is None else names
        if not count == len(names) == len(batch["label"]) or count == 0:
            raise ConfigError(
                f"{count} images, {len(names)} names and {len(batch['label'])} labels; a batch has "
                "as many of each, and at least one"
            )
        reader = PatchReader(images, names, grid, self._level)
        if not listed(batch):
            for name, (height, width) in zip(names, reader.sizes, strict=True):
                if (grid.windows(height), grid.windows(width)) != (grid.rows, grid.cols):
                    raise ConfigError(
                        f"{name} is {height} x {width} px, but the grid is for {grid.height} x "
                        f"{grid.width} px; images with fewer patches need `size` in the batch"
                    )
        size = self._part_size(count)
        if size == count:
            return reader, [Part({k: jnp.asarray(v) for k, v in batch.items()}, None, None)]
        weight = np.asarray(batch.get("weight", np.ones(count)), np.float64)
        parts = []
        for first in range(0, count, size):
            own = slice(first, first + size)
            # Losses are means over the examples that are no padding, and no less than one.
            share = max((weight[own] > 0).sum(), 1) / max((weight > 0).sum(), 1)
            labels = {k: jnp.asarray(v[own]) for k, v in batch.items()}
            parts.append(Part(labels, np.int32(first), float(share)))
        return reader, parts

    @contextmanager
    def _feed(self, reader: PatchReader, plan: Iterable[ChunkIds]) -> Iterator[PatchFeed]:
        feed = PatchFeed(reader, plan, buffers=self._buffers, readers=self._readers)
        with feed:
            yield feed
        self.read_wait += feed.waited

    def _fill_plan(self, part: Part, ids: np.ndarray) -> list[_Fill]:
        """The part's chunks of `int [n, B, chunk]`, without those that hold no patch."""
        rows = _rows(part)
        return [
            _Fill(number, ChunkIds(rows.start, chunk))
            for number, chunk in enumerate(ids[:, rows])
            if self._programs.fill_moves_statistics or (chunk < self._grid.num_patches).any()
        ]

    def _fill(
        self,
        feed: PatchFeed,
        weights: Weights,
        z: jax.Array,
        part: Part,
        plan: list[_Fill],
        key: jax.Array,
        *,
        spare: bool,
        evaluate: bool = False,
    ) -> tuple[jax.Array, Params]:
        model_state = weights.model_state
        for number, (_, ids) in plan:
            z, model_state, done = self._programs.fill(
                weights._replace(model_state=model_state),
                z,
                feed.take(),
                ids,
                part,
                key,
                np.int32(number),
                spare=spare,
                evaluate=evaluate,
            )
            feed.used(done)
        return z, model_state

    def _zeros(self, weights: Weights, part: Part, channels: int) -> jax.Array:
        form = self._programs.empty_z(weights, len(part.labels["label"]), channels)
        return jnp.zeros(form.shape, form.dtype)

    def _fill_to_read(
        self,
        params: Params,
        model_state: Params,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None,
    ) -> Iterator[tuple[Part, jax.Array]]:
        """Each part and its Z in eval mode."""
        reader, parts = self._open(images, batch, names)
        ids = np.asarray(self._programs.order({k: jnp.asarray(v) for k, v in batch.items()}))
        spare, _ = self._programs.spare(batch, Draw(jax.random.key(0), ids, ids))
        plans = [self._fill_plan(part, ids) for part in parts]
        weights = Weights(params, {"encoder": {}, "head": {}}, model_state)
        with self._feed(reader, (fill.chunk for fill in chain(*plans))) as feed:
            for part, plan in zip(parts, plans, strict=True):
                z = self._zeros(weights, part, reader.channels)
                key = jax.random.key(0)
                z, _ = self._fill(feed, weights, z, part, plan, key, spare=spare, evaluate=True)
                yield part, z

    def _exact_step(
        self,
        weights: Weights,
        opt_state: PyTree,
        batch: dict[str, jax.Array],
        parts: list[Part],
        drawn: Draw,
        reader: PatchReader,
        step: int,
    ) -> tuple[Weights, PyTree, dict[str, jax.Array], dict[str, jax.Array]]:
        """Mode exact: fill, head, and every chunk again; part by part."""
        programs, spare = self._programs, self._programs.spare(batch, drawn)[0]
        plans = [self._fill_plan(part, drawn.fill) for part in parts]
        both = chain.from_iterable([*plan, *plan] for plan in plans)
        total, model_state, results = None, weights.model_state, []
        with self._feed(reader, (fill.chunk for fill in both)) as feed:
            for part, plan in zip(parts, plans, strict=True):
                z = self._zeros(weights, part, reader.channels)
                own = weights._replace(model_state=model_state)
                z, _ = self._fill(feed, own, z, part, plan, drawn.key, spare=spare)
                gradient, dz = programs.head(own, z, part, drawn.key)
                grads = gradient.grads
                total = grads if total is None else jax.tree.map(jnp.add, total, grads)
                for number, (_, ids) in plan:
                    total, done = programs.back(
                        own,
                        total,
                        dz,
                        feed.take(),
                        ids,
                        part,
                        drawn.key,
                        np.int32(number),
                        spare=spare,
                    )
                    feed.used(done)
                model_state = gradient.model_state
                results.append(gradient)
        loss, logits = _joined(results)
        trained, opt_state, _, metrics = programs.update(
            weights.trained, opt_state, model_state, total, loss[None], logits, batch
        )
        history = {name: value[None] for name, value in metrics.items()}
        return Weights(trained, weights.fixed, model_state), opt_state, history, {}

    def _inner_steps(
        self,
        weights: Weights,
        opt_state: PyTree,
        batch: dict[str, jax.Array],
        parts: list[Part],
        drawn: Draw,
        reader: PatchReader,
        step: int,
    ) -> tuple[Weights, PyTree, dict[str, jax.Array], dict[str, jax.Array]]:
        """The fill and the inner steps of the modes patchgd and accumulate."""
        programs = self._programs
        fill_spare, inner_spare = programs.spare(batch, drawn)
        z = [self._zeros(weights, part, reader.channels) for part in parts]
        fill_ids, ages, when = drawn.fill, {}, None
        if self._reuse is not None:
            counted = self._counted(batch)
            visit = self._reuse.begin(step, reader.names, counted, z[0].shape[-1], z[0].dtype)
            # A copy: Z is donated, and the device's array of NumPy memory may be that memory.
            z = [jnp.array(visit.z[_rows(part)]) for part in parts]
            fill_ids, when = self._chunked(visit.missing, drawn.fill.shape[-1]), visit.when
            ages = {
                "z_age_mean": jnp.float32(visit.ages.mean()),
                "z_age_max": jnp.float32(visit.ages.max()),
            }
        plans = [self._fill_plan(part, fill_ids) for part in parts]

        def plan() -> Iterator[ChunkIds]:
            yield from (fill.chunk for fill in chain(*plans))
            for group in drawn.inner:
                for part in parts:
                    yield ChunkIds(_rows(part).start, group[_rows(part)])

        total = jax.tree.map(jnp.zeros_like, weights.trained)
        losses: jax.Array | None = None
        changes: jax.Array | None = None
        history: dict[str, jax.Array] = {}
        with self._feed(reader, plan()) as feed:
            for i, part in enumerate(parts):
                z[i], model_state = self._fill(
                    feed, weights, z[i], part, plans[i], drawn.key, spare=fill_spare
                )
                weights = weights._replace(model_state=model_state)
            for number, group in enumerate(drawn.inner):
                results, moved = [], []
                for i, part in enumerate(parts):
                    gradient, z[i], change = programs.inner(
                        weights,
                        z[i],
                        total,
                        feed.take(),
                        group[_rows(part)],
                        part,
                        drawn.key,
                        np.int32(number),
                        spare=inner_spare,
                    )
                    feed.used(gradient.loss)
                    total = gradient.grads
                    weights = weights._replace(model_state=gradient.model_state)
                    results.append(gradient)
                    moved.append(change)
                changes = self._entry(changes, sum(moved[1:], moved[0]), number, len(drawn.inner))
                loss, logits = _joined(results)
                losses = self._entry(losses, loss, number % programs.epsilon, programs.epsilon)
                if (number + 1) % programs.epsilon:
                    continue
                index = number // programs.epsilon
                several = index == 0 and programs.updates > 1
                update = programs.first_update if several else programs.update
                trained, opt_state, total, metrics = update(
                    weights.trained, opt_state, weights.model_state, total, losses, logits, batch
                )
                weights = weights._replace(trained=trained)
                for name, value in metrics.items():
                    history[name] = self._entry(history.get(name), value, index, programs.updates)
        if self._reuse is not None and when is not None:
            for group in drawn.inner:
                for row, ids in zip(when, group, strict=True):
                    row[ids[ids < self._grid.num_patches]] = step
            for i, part in enumerate(parts):
                rows = _rows(part)
                self._reuse.finish(reader.names[rows], z[i], when[rows])
        assert changes is not None
        return (
            weights,
            opt_state,
            history,
            {
                **programs.staleness(drawn.inner, changes, batch),
                **ages,
            },
        )

    def _entry(self, row: jax.Array | None, value: jax.Array, index: int, length: int) -> jax.Array:
        """Puts an entry in its place of a row that stays on the device."""
        if row is None:
            row = jnp.zeros((length, *value.shape), value.dtype)
        return self._programs.set_entry(row, value, np.int32(index))

    def _counted(self, batch: dict[str, jax.Array]) -> np.ndarray:
        """Which patches count, `bool [B, N]`."""
        count = len(batch["label"])
        ids = listed_patches(batch, self._grid)
        counted = np.zeros((count, self._grid.num_patches), bool)
        if ids is None:
            counted[:] = True
            return counted
        for row, numbers in zip(counted, np.asarray(ids), strict=True):
            row[numbers[numbers < self._grid.num_patches]] = True
        return counted

    def _chunked(self, chosen: np.ndarray, chunk: int) -> np.ndarray:
        """The patches of `bool [B, N]`, some at a time: `int32 [n, B, chunk]`."""
        count = -(-int(chosen.sum(1).max()) // chunk)
        spare = self._grid.num_patches + np.arange(count * chunk, dtype=np.int32)
        ids = np.tile(spare, (len(chosen), 1))
        for row, use in zip(ids, chosen, strict=True):
            numbers = np.flatnonzero(use)
            row[: len(numbers)] = numbers
        return ids.reshape(len(chosen), count, chunk).swapaxes(0, 1)


def _rows(part: Part) -> slice:
    """The part's images in the batch."""
    first = 0 if part.first is None else int(part.first)
    return slice(first, first + len(part.labels["label"]))


def _joined(parts: list[Gradient]) -> tuple[jax.Array, jax.Array]:
    """The loss and the logits of the batch, of those of its parts."""
    if len(parts) == 1:
        return parts[0].loss, parts[0].logits
    return jnp.stack([p.loss for p in parts]).sum(), jnp.concatenate([p.logits for p in parts])
