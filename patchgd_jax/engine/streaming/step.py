"""Outer steps on images in host memory or on disk; only chunks of patches go to the device.

Z, the parameters and the optimizer state stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from patchgd_jax.config import StreamConfig
from patchgd_jax.core.freezing import combine_frozen, partition_frozen
from patchgd_jax.core.grid import PatchGrid
from patchgd_jax.core.model import Params, PyTree
from patchgd_jax.core.optimizer import Optimizer
from patchgd_jax.core.patch_ids import PatchIds, valid_mask
from patchgd_jax.core.problem import Problem, Weights
from patchgd_jax.core.update import Gradient, Metrics, TrainState
from patchgd_jax.engine.streaming.feed import ChunkIds, PatchFeed, PatchReader
from patchgd_jax.engine.streaming.latent_reuse import LatentReuse
from patchgd_jax.engine.streaming.latent_store import LatentStore
from patchgd_jax.engine.streaming.programs import (
    Chunk,
    Draw,
    Labels,
    Part,
    SplitWeights,
    StreamedPrograms,
)
from patchgd_jax.errors import ConfigError

if TYPE_CHECKING:
    from patchgd_jax.data.images.region_base import RegionSource


class _Fill(NamedTuple):
    """One chunk of the fill of one part."""

    number: int
    """Place among all chunks of the draw, with the empty ones: random draws depend on it."""
    chunk: ChunkIds


class _Outer(NamedTuple):
    """Inputs of an outer step."""

    number: int
    batch: dict[str, Array]
    parts: list[Part]
    drawn: Draw
    reader: PatchReader


class StreamedStep:
    """Train and eval steps that keep only a few chunks of patches of an image in memory.

    For the same state, key and images they compute what `train_step` and `eval_step` do: the same
    draws, and the same sums. On the CPU the results are the same bit for bit, unless the compiler
    orders a head's sums differently, as it may where images have a `size` and in mode exact
    (measured in float32: 5e-12 in a gradient, 2e-7 of a parameter). Patches that are not valid are
    neither read nor encoded. Padding slots, where a chunk or group is not full, carry background.

    Args:
        problem: on one device, in any mode but full. `config.fill_chunk` patches of each image
            travel at a time, and k in an inner step. An image may be smaller than the grid if the
            batch has `size` or `patches`.
        stream: `buffers`, `readers`, `micro_batch` and `max_age`. A buffer takes `b * k * p * p *
            C` bytes of the host, and while it is computed on, of the device. The gradients of
            micro-batches are added up; dropout and batch statistics are those of each.
        level: resolution of the images to read.
        store: keeps Z between visits; needed with `max_age`.

    Raises:
        ConfigError: for settings that streaming does not support, or that conflict.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer,
        stream: StreamConfig = StreamConfig(),  # noqa: B008  frozen
        *,
        level: int = 0,
        store: LatentStore | None = None,
    ) -> None:
        config = problem.config
        if config.mode == "full":
            raise ConfigError(
                "patchgd.mode full keeps all patches of an image on the device at once, so the "
                "image cannot be streamed; mode exact has the same gradient"
            )
        if config.importance != "none":
            raise ConfigError(
                f"patchgd.importance {config.importance} draws patches when Z is filled, but a "
                "streamed image is read ahead by a plan of the whole step; keep the images on the "
                "device, or use importance none"
            )
        max_age = stream.max_age
        if (max_age > 0) != (store is not None):
            raise ConfigError("max_age needs a latent store, and a latent store a max_age above 0")
        if max_age > 0 and config.mode == "exact":
            raise ConfigError("max_age reuses old latents, but mode exact needs all of them fresh")
        if max_age > 0 and config.norm_policy == "paper":
            raise ConfigError(
                "max_age leaves patches out of the fill, but norm_policy paper takes batch "
                "statistics of all of them; use inner or frozen"
            )
        assert isinstance(problem.grid, PatchGrid)
        self._grid, self._frozen, self._level = problem.grid, problem.frozen, level
        self._stream = stream
        self.read_wait = 0.0
        """Seconds so far that steps have waited for pixels."""
        self._reuse = None if store is None else LatentReuse(store, max_age)
        self._programs = StreamedPrograms(problem, optimizer, partial_fill=store is not None)

    def train(
        self,
        state: TrainState,
        images: Sequence[RegionSource],
        batch: Labels,
        key: Array,
        names: Sequence[str] | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Runs one outer step on one batch of images.

        Returns before the device has finished. If it raises, `state` is unchanged; else it may have
        been donated.

        Args:
            state: from `init_state` or an earlier step.
            images: B sources, each read by several threads at once.
            batch: `label`, and optionally `weight`, `patches` and `size`, as in `problem.Batch`.
            key: the run's key; the step number is folded into it here.
            names: of the images, for errors and to keep Z by between visits: the same at each
                visit, and no other image's. Needed with `max_age`.

        Returns:
            The new state and metrics as `train_step` has them; with `max_age` also `z_age_mean` and
            `z_age_max`: outer steps since the entries of Z were computed, as the inner steps begin
            (0 for those of this step's fill). In `z_age` reused entries are as old as those of the
            fill; their `z_drift` is that since they were computed.

        Raises:
            DataError: if a patch cannot be read, or an image does not fit the grid. It names the
                image.
            ConfigError: as `train_step`, and if the micro-batch does not divide the batch.
        """
        if names is None and self._reuse is not None:
            raise ConfigError("max_age needs the names of the images, to recognise them")
        reader, parts = self._open(images, batch, names)
        self._programs.check(batch, state.batch_stats)
        # First of all, so that the next call does not wait for the rest of this one to read it.
        step, next_step = int(state.step), state.step + 1
        weights = self._split(state.weights)
        batch = {name: jnp.asarray(value) for name, value in batch.items()}
        drawn = self._programs.draw(key, np.int32(step), batch)
        outer = _Outer(step, batch, parts, jax.tree.map(_on_host, drawn), reader)
        run = self._exact_step if self._programs.exact else self._inner_steps
        weights, opt_state, history, stale = run(weights, state.opt_state, outer)
        metrics = self._programs.summary(weights.trained, weights.frozen, history)
        params = combine_frozen(weights.trained, weights.frozen)
        return TrainState(next_step, params, weights.batch_stats, opt_state), {**metrics, **stale}

    def evaluate(
        self,
        weights: Weights,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None = None,
    ) -> Metrics:
        """Evaluates a batch as `eval_step`; arguments and errors as `train`'s."""
        filled = self._fill_to_read(weights, images, batch, names)
        rows = [self._programs.read(weights, z, part.labels) for part, z in filled]
        return rows[0] if len(rows) == 1 else jax.tree.map(lambda *r: jnp.concatenate(r), *rows)

    def attention_map(
        self,
        weights: Weights,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None = None,
    ) -> Array:
        """Computes attention as `forward.attention_map`; arguments and errors as `train`'s."""
        filled = self._fill_to_read(weights, images, batch, names)
        maps = [self._programs.attend(weights, z, part.labels) for part, z in filled]
        return jnp.concatenate(maps)

    def lower(
        self, state: TrainState, batch: Labels, channels: int
    ) -> dict[str, jax.stages.Lowered]:
        """Lowers the programs of a train step, to compile them without running them.

        Arrays may be `jax.ShapeDtypeStruct`. Returns `fill`, `update` and `inner`, or in mode exact
        `head` and `back` for the latter. A step needs the device memory of the largest.
        """
        struct = jax.ShapeDtypeStruct
        count = batch["label"].shape[0]
        size = self._part_size(count)
        labels = {k: struct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}
        part = Part(labels, None, None)
        if size < count:
            part = Part(labels, struct((), np.int32), struct((), np.float32))
        weights = self._split(state.weights)
        return self._programs.lower(weights, state.opt_state, part, batch, channels)

    def _split(self, weights: Weights) -> SplitWeights:
        return SplitWeights(*partition_frozen(weights.params, self._frozen), weights.batch_stats)

    def _part_size(self, count: int) -> int:
        size = self._stream.micro_batch or count
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
                f"{count} images, {len(names)} names and {len(batch['label'])} labels; pass as "
                "many of each, and at least one"
            )
        reader = PatchReader(images, names, grid, self._level)
        if "patches" not in batch and "size" not in batch:
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
            # A loss is a mean over the real examples, at least one.
            share = max((weight[own] > 0).sum(), 1) / max((weight > 0).sum(), 1)
            labels = {k: jnp.asarray(v[own]) for k, v in batch.items()}
            parts.append(Part(labels, np.int32(first), float(share)))
        return reader, parts

    @contextmanager
    def _feed(self, reader: PatchReader, plan: Iterable[ChunkIds]) -> Iterator[PatchFeed]:
        stream = self._stream
        feed = PatchFeed(reader, plan, buffers=stream.buffers, readers=stream.readers)
        with feed:
            yield feed
        self.read_wait += feed.waited

    def _fill_plan(self, part: Part, ids: np.ndarray) -> list[_Fill]:
        """Lists the part's chunks of `int [n, B, chunk]`, without the empty ones."""
        rows = _rows(part)
        return [
            _Fill(number, ChunkIds(rows.start, chunk))
            for number, chunk in enumerate(ids[:, rows])
            if self._programs.fill_moves_statistics or (chunk < self._grid.num_patches).any()
        ]

    def _filled(
        self,
        feed: PatchFeed,
        weights: SplitWeights,
        z: Array,
        part: Part,
        chunks: Iterator[Chunk],
        key: Array | None,
    ) -> tuple[Array, Params]:
        """Writes all chunks of a part's fill into Z; without a key in eval mode."""
        batch_stats = weights.batch_stats
        for chunk in chunks:
            z, batch_stats, done = self._programs.fill(
                weights._replace(batch_stats=batch_stats),
                z,
                chunk,
                part,
                jax.random.key(0) if key is None else key,
                evaluate=key is None,
            )
            feed.used(done)
        return z, batch_stats

    def _zeros(self, weights: SplitWeights, part: Part, channels: int) -> Array:
        form = self._programs.empty_z(weights, len(part.labels["label"]), channels)
        return jnp.zeros(form.shape, form.dtype)

    def _fill_to_read(
        self,
        weights: Weights,
        images: Sequence[RegionSource],
        batch: Labels,
        names: Sequence[str] | None,
    ) -> Iterator[tuple[Part, Array]]:
        """Yields each part and its Z in eval mode."""
        reader, parts = self._open(images, batch, names)
        order = self._programs.order({k: jnp.asarray(v) for k, v in batch.items()})
        plans = [self._fill_plan(part, np.asarray(order.ids)) for part in parts]
        split = self._split(weights)
        with self._feed(reader, (fill.chunk for fill in chain(*plans))) as feed:
            for part, plan in zip(parts, plans, strict=True):
                z = self._zeros(split, part, reader.channels)
                chunks = _chunks(feed, plan, order.padded)
                yield part, self._filled(feed, split, z, part, chunks, None)[0]

    def _exact_step(
        self, weights: SplitWeights, opt_state: PyTree, outer: _Outer
    ) -> tuple[SplitWeights, PyTree, Metrics, Metrics]:
        """Runs mode exact: fill, head, and every chunk again; part by part."""
        programs, parts, reader = self._programs, outer.parts, outer.reader
        key, fill = outer.drawn.key, outer.drawn.fill
        plans = [self._fill_plan(part, fill.ids) for part in parts]
        both = chain.from_iterable([*plan, *plan] for plan in plans)
        total, batch_stats, results = None, weights.batch_stats, []
        with self._feed(reader, (fill.chunk for fill in both)) as feed:
            for part, plan in zip(parts, plans, strict=True):
                z = self._zeros(weights, part, reader.channels)
                own = weights._replace(batch_stats=batch_stats)
                chunks = _chunks(feed, plan, fill.padded)
                z, _ = self._filled(feed, own, z, part, chunks, key)
                gradient, dz = programs.head(own, z, part, key)
                grads = gradient.grads
                total = grads if total is None else jax.tree.map(jnp.add, total, grads)
                for chunk in _chunks(feed, plan, fill.padded):
                    total, done = programs.back(own, total, dz, chunk, part, key)
                    feed.used(done)
                batch_stats = gradient.batch_stats
                results.append(gradient)
        loss, logits = _joined(results)
        trained, opt_state, _, metrics = programs.update(
            weights.trained, opt_state, total, loss[None], logits, outer.batch
        )
        history = {name: value[None] for name, value in metrics.items()}
        return SplitWeights(trained, weights.frozen, batch_stats), opt_state, history, {}

    def _inner_steps(
        self, weights: SplitWeights, opt_state: PyTree, outer: _Outer
    ) -> tuple[SplitWeights, PyTree, Metrics, Metrics]:
        """Runs the fill and the inner steps of the modes patchgd and accumulate."""
        programs, (number, batch, parts, drawn, reader) = self._programs, outer
        z = [self._zeros(weights, part, reader.channels) for part in parts]
        fill_ids, ages, visit = drawn.fill.ids, {}, None
        if self._reuse is not None:
            valid, width = self._valid(batch), z[0].shape[-1]
            visit = self._reuse.begin(number, reader.names, valid, width, z[0].dtype)
            # A copy: Z is donated, and the device's array of NumPy memory may be that memory.
            z = [jnp.array(visit.z[_rows(part)]) for part in parts]
            fill_ids = self._chunk_ids(visit.missing, drawn.fill.ids.shape[-1])
            ages = {
                "z_age_mean": jnp.float32(visit.ages.mean()),
                "z_age_max": jnp.float32(visit.ages.max()),
            }
        plans = [self._fill_plan(part, fill_ids) for part in parts]

        def plan() -> Iterator[ChunkIds]:
            yield from (fill.chunk for fill in chain(*plans))
            for group in drawn.inner.ids:
                for part in parts:
                    yield ChunkIds(_rows(part).start, group[_rows(part)])

        steps, epsilon, updates = len(drawn.inner.ids), programs.epsilon, programs.updates
        total = jax.tree.map(jnp.zeros_like, weights.trained)
        losses: Array | None = None
        changes: Array | None = None
        history: dict[str, Array] = {}
        with self._feed(reader, plan()) as feed:
            for i, part in enumerate(parts):
                chunks = _chunks(feed, plans[i], drawn.fill.padded)
                z[i], batch_stats = self._filled(feed, weights, z[i], part, chunks, drawn.key)
                weights = weights._replace(batch_stats=batch_stats)
            for inner, ids in enumerate(drawn.inner.ids):
                results, moved = [], []
                for i, part in enumerate(parts):
                    group = PatchIds(ids[_rows(part)], drawn.inner.padded)
                    chunk = Chunk(feed.take(), group, np.int32(inner))
                    gradient, z[i], change = programs.inner(
                        weights, z[i], total, chunk, part, drawn.key
                    )
                    feed.used(gradient.loss)
                    total = gradient.grads
                    weights = weights._replace(batch_stats=gradient.batch_stats)
                    results.append(gradient)
                    moved.append(change)
                changes = self._entry(changes, sum(moved[1:], moved[0]), inner, steps)
                loss, logits = _joined(results)
                losses = self._entry(losses, loss, inner % epsilon, epsilon)
                if (inner + 1) % epsilon:
                    continue
                index = inner // epsilon
                first = index == 0 and updates > 1
                update = programs.first_update if first else programs.update
                trained, opt_state, total, metrics = update(
                    weights.trained, opt_state, total, losses, logits, batch
                )
                weights = weights._replace(trained=trained)
                for name, value in metrics.items():
                    history[name] = self._entry(history.get(name), value, index, updates)
        if self._reuse is not None and visit is not None:
            self._keep(self._reuse, outer, visit.when, z)
        assert changes is not None
        stale = {**programs.staleness(drawn.inner.ids, changes, batch), **ages}
        return weights, opt_state, history, stale

    def _keep(self, reuse: LatentReuse, outer: _Outer, when: np.ndarray, z: list[Array]) -> None:
        """Stores the Z of each part, computed in the steps `when` or this one, for later visits."""
        for group in outer.drawn.inner.ids:
            for row, ids in zip(when, group, strict=True):
                row[ids[ids < self._grid.num_patches]] = outer.number
        for part, part_z in zip(outer.parts, z, strict=True):
            rows = _rows(part)
            reuse.finish(outer.reader.names[rows], part_z, when[rows])

    def _entry(self, row: Array | None, value: Array, index: int, length: int) -> Array:
        """Sets an entry of a row `[length, ...]` that stays on the device; None: a row of zeros."""
        if row is None:
            row = jnp.zeros((length, *value.shape), value.dtype)
        return self._programs.set_entry(row, value, np.int32(index))

    def _valid(self, batch: dict[str, Array]) -> np.ndarray:
        """Marks the valid patches, `bool [B, N]`."""
        shape = (len(batch["label"]), self._grid.num_patches)
        mask = valid_mask(batch, self._grid)
        return np.ones(shape, bool) if mask is None else np.asarray(mask).reshape(shape)

    def _chunk_ids(self, chosen: np.ndarray, chunk: int) -> np.ndarray:
        """Divides the patches of `bool [B, N]` into chunks `int32 [n, B, chunk]`."""
        count = -(-int(chosen.sum(1).max()) // chunk)
        padding = self._grid.num_patches + np.arange(count * chunk, dtype=np.int32)
        ids = np.tile(padding, (len(chosen), 1))
        for row, use in zip(ids, chosen, strict=True):
            numbers = np.flatnonzero(use)
            row[: len(numbers)] = numbers
        return ids.reshape(len(chosen), count, chunk).swapaxes(0, 1)


def _on_host(leaf: Array) -> Array | np.ndarray:
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def _chunks(feed: PatchFeed, plan: list[_Fill], padded: bool) -> Iterator[Chunk]:
    """Takes the chunks of a part's fill from the feed, in order."""
    for number, (_, ids) in plan:
        yield Chunk(feed.take(), PatchIds(ids, padded), np.int32(number))


def _rows(part: Part) -> slice:
    """Returns the part's places in the batch."""
    first = 0 if part.first is None else int(part.first)
    return slice(first, first + len(part.labels["label"]))


def _joined(parts: list[Gradient]) -> tuple[Array, Array]:
    """Joins the loss and the logits of a batch's parts."""
    if len(parts) == 1:
        return parts[0].loss, parts[0].logits
    return jnp.stack([p.loss for p in parts]).sum(), jnp.concatenate([p.logits for p in parts])
