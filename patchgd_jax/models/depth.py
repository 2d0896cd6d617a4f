"""The depth and stage of an encoder's parameters, for freezing and layer-wise rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from patchgd_jax.errors import ConfigError


class Layers(NamedTuple):
    """An encoder's top-level parameters, by name."""

    depth: dict[str, int]
    """0 for the stem, `i + 1` for block `i` of `n`, and `n + 1` for later layers."""
    stage: dict[str, int]
    """0 for the stem, `s + 1` for stage `s` of `m`, and `m + 1` for later layers."""

    def depth_of(self, path: Sequence[str]) -> int:
        """The depth of a parameter by its Flax path, `("BasicBlock_3", "Conv_0", "kernel")`."""
        return self.depth[path[0]]

    def until(self, stages: int) -> frozenset[str]:
        """Lists the entries of the stem and the first stages; none for 0.

        Raises:
            ConfigError: if the encoder has fewer.
        """
        last = max(self.stage.values()) - 1
        if stages > last:
            raise ConfigError(
                f"optimizer.freeze_stages is {stages}, but the encoder has {last} stages"
            )
        return frozenset(n for n, stage in self.stage.items() if stages and stage <= stages)


def encoder_layers(encoder: nn.Module, *, patch: int, channels: int) -> Layers:
    """Finds the blocks of an encoder, without computing anything.

    Blocks are the entries `<Name>_0` to `<Name>_<n - 1>`, where `n` is the sum of the encoder's
    field `blocks`, the number of blocks in each stage. Other layers are placed by order of use:
    before the first block is the stem; a layer between two blocks belongs to the later one.

    Args:
        encoder: called as `encoder(patches, train=...)`.
        patch: side p of its patches.
        channels: C of its patches.

    Raises:
        ConfigError: if the blocks cannot be identified.
    """
    names: list[str] = []

    def record(key: Array) -> None:
        patches = jnp.zeros((1, patch, patch, channels))
        # Flax keeps the order of use; what leaves a JAX transformation is sorted by name.
        names.extend(encoder.init(key, patches, train=False)["params"])

    jax.eval_shape(record, jax.random.key(0))
    stages = tuple(getattr(encoder, "blocks", ()))
    count = sum(stages)
    kinds = {match[1] for name in names if (match := re.fullmatch(r"(.+)_\d+", name))}
    wanted = [
        kind
        for kind in sorted(kinds)
        if {n for n in names if re.fullmatch(rf"{re.escape(kind)}_\d+", n)}
        == {f"{kind}_{i}" for i in range(count)}
    ]
    if len(wanted) != 1:
        raise ConfigError(
            f"the blocks of the encoder {type(encoder).__name__} cannot be identified: its field "
            f"`blocks` gives {count}, its parameters are {', '.join(names)}; stages and "
            "layer-wise rates need blocks named <Name>_0, <Name>_1, ..."
        )
    stage_of = [stage for stage, size in enumerate(stages, 1) for _ in range(size)]
    blocks = [f"{wanted[0]}_{i}" for i in range(count)]
    order = [names.index(block) for block in blocks]
    layers = Layers({}, {})
    for place, name in enumerate(names):
        # The block that it is, or else the next one.
        block = sum(at < place for at in order)
        stem = place < order[0]
        layers.depth[name] = 0 if stem else block + 1
        layers.stage[name] = 0 if stem else [*stage_of, len(stages) + 1][block]
    return layers
