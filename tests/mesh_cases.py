"""Runs training on meshes of eight virtual devices and prints how far it is from one device's.

Not a test itself: `test_sharding.py` starts it in a process of its own, since the number of devices
is fixed when jax starts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_ragged import LARGE, listed, masked_toy, ragged_batch
from toy import max_relative, recording_sgd, toy_batch, toy_model, toy_params

from patchgd_jax import (
    AugmentConfig,
    ModelConfig,
    OptimizerConfig,
    PatchGDConfig,
    PatchGrid,
    Problem,
    build_model,
    eval_step,
    from_linen,
    init_state,
    make_optimizer,
    train_step,
)
from patchgd_jax.contrib.importance import importance_groups
from patchgd_jax.core.problem import Weights
from patchgd_jax.engine.sharding.layout import (
    model_options,
    sharded_eval_step,
    sharded_train_step,
)
from patchgd_jax.engine.sharding.mesh import make_mesh, shard_batch
from patchgd_jax.engine.sharding.params import param_shardings
from patchgd_jax.models.encoders.small_cnn import SmallCNN
from patchgd_jax.models.heads.simple import CNNHead, LinearHead

KEY = jax.random.key(5)
STEPS = 3
SPLITS = [(d, p) for n in (1, 2, 4, 8) for d in (1, 2, 4, 8) for p in (1, 2, 4, 8) if d * p == n]
COMPARED = ("loss", "grad_norm", "param_norm", "z_age", "z_drift")
MODES = ("patchgd", "accumulate", "exact", "full")
EVEN, ODD, SMALL = PatchGrid(16, 16, 4), PatchGrid(11, 17, 5, 3), PatchGrid(40, 56, 16, 12)


def mesh_of(data, patch, rows, batch, strata):
    devices = jax.devices()[: data * patch * rows]
    layout = f"data={data},patch={patch},rows={rows}"
    return make_mesh(layout, batch_size=batch, strata=strata, devices=devices)


def patchgd(grid, **settings):
    settings = {"fraction": 0.5, "strata": 8, "fill_chunk": 8, **settings}
    return PatchGDConfig(patch=grid.patch, stride=grid.stride, **settings)


def differences(problem, optimizer, batch, splits, *, rules=(), model_on=None):
    """The largest relative difference of anything in the state after some steps, by split.

    `model_on(mesh)` builds the model for a mesh, where its layers must know it.
    """
    first = jax.jit(partial(init_state, problem, optimizer))(KEY)
    alone = jax.jit(partial(train_step, problem, optimizer))
    wanted = first
    for _ in range(STEPS):
        wanted, metrics = alone(wanted, batch, KEY)
    assert max_relative(wanted.params, first.params) > 1e-6, "nothing was learned"
    found = {}
    for data, patch, *rows in splits:
        (rows,) = rows or [1]
        mesh = mesh_of(data, patch, rows, len(batch["label"]), problem.config.strata)
        state = jax.device_put(first, param_shardings(first, rules, mesh))
        arrays = shard_batch(batch, problem.grid, mesh)
        meshed = replace(problem, model=model_on(mesh)) if model_on else problem
        step = partial(sharded_train_step, meshed, optimizer, mesh=mesh, rules=rules)
        step = jax.jit(step)
        for _ in range(STEPS):
            # Virtual devices share the cores' threads: steps in flight would starve each other.
            state, got = jax.block_until_ready(step(state, arrays, KEY))
        found[f"{data}x{patch}x{rows}"] = {
            "params": max_relative(state.params, wanted.params),
            "statistics": max_relative(state.batch_stats, wanted.batch_stats),
            "optimizer": max_relative(state.opt_state, wanted.opt_state),
            "metrics": max_relative(
                {k: got[k] for k in COMPARED if k in metrics},
                {k: metrics[k] for k in COMPARED if k in metrics},
            ),
        }
    return found


def toy(
    grid, splits, *, batch=None, model=toy_model, optimizer=None, rules=(), frozen=(), augment=None,
    **settings,
):  # fmt: skip
    config = patchgd(grid, **settings)
    with jax.enable_x64(True):
        problem = Problem(
            model(toy_params(0, pixels=grid.patch**2 * 2, hidden=8)), grid, config,
            augment=augment, frozen=frozenset(frozen),
            sampler=None if config.importance == "none" else importance_groups,
        )  # fmt: skip
        batch = toy_batch(0, grid, batch=8) if batch is None else batch()
        optimizer = optimizer() if optimizer else recording_sgd(0.1)
        return differences(problem, optimizer, batch, splits, rules=rules)


def ragged(form=dict):
    # Sizes of `ragged_batch` twice, so that eight devices have an image each.
    pairs = [form(ragged_batch(seed)) for seed in (0, 1)]
    return {name: np.concatenate([b[name] for b in pairs]) for name in pairs[0]}


def weighted():
    batch = toy_batch(0, ODD, batch=8)
    return {**batch, "weight": np.array([1.0, 0.5, 0, 2, 1, 1, 0, 0])}


def averaged_adam():
    config = OptimizerConfig(clip_norm=0.05, ema_decay=0.9, schedule="constant")
    return make_optimizer(
        config, total_steps=9, steps_per_epoch=3, updates_per_step=1
    )  # fmt: skip


def shipped(names, splits, **settings):
    config = ModelConfig(**{"latent_dim": 16, "dropout": 0.0, "head": "linear", **names})
    build = partial(build_model, config, grid=SMALL, channels=1, classes=10, mean=0.1, std=0.3)
    problem = Problem(build(), SMALL, patchgd(SMALL, **settings))
    return differences(
        problem, optax.sgd(0.01), digits(), splits,
        model_on=lambda mesh: build(**model_options(mesh)),
    )  # fmt: skip


def digits():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, SMALL.height, SMALL.width, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(10, size=8).astype(np.int32)}


def double(norm, head, splits, **settings):
    """Shipped layers in double precision."""
    with jax.enable_x64(True):

        def build(axis_name, rows_sharded):
            encoder = SmallCNN(
                16, norm, jnp.float64, widths=(8, 8, 8),
                axis_name=axis_name.get("encoder", ()), rows_sharded=rows_sharded,
            )  # fmt: skip
            on_mesh = isinstance(head, CNNHead) and "head" in axis_name
            return from_linen(
                encoder, head.copy(axis_name=axis_name["head"]) if on_mesh else head,
                grid=SMALL, channels=1, mean=0.1, std=0.3, dtype=jnp.float64,
            )  # fmt: skip

        problem = Problem(build({}, False), SMALL, patchgd(SMALL, **settings))
        return differences(
            problem, optax.sgd(0.01), digits(), splits,
            model_on=lambda mesh: build(**model_options(mesh)),
        )  # fmt: skip


# Batch statistics in the encoder and the head. The head's are of few values, which magnify rounding
# (to 8e-5 in single precision).
statistics = partial(double, "batch", CNNHead(10, 0, 3, 32, 0.0, jnp.float64), [(2, 4)])
# Patches whose rows are on several devices: convolutions and norms reach beyond them.
rows = partial(
    double, head=LinearHead(10, 0.0, jnp.float64), splits=[(1, 1, 2), (1, 2, 4), (2, 2, 2)]
)
FSDP = (("encoder/w1", (None, "data")), ("encoder/b1", ("patch",)), ("head/v1", ("patch", "data")))


def evaluation(splits):
    with jax.enable_x64(True):
        problem = Problem(masked_toy(toy_params(2, pixels=32)), LARGE, patchgd(LARGE))
        weights, batch = Weights(*problem.model.init(KEY)), ragged()
        wanted = jax.jit(partial(eval_step, problem))(weights, batch)
        found = {}
        for data, patch in splits:
            mesh = mesh_of(data, patch, 1, 8, patch)
            step = jax.jit(partial(sharded_eval_step, problem, mesh=mesh))
            got = step(weights, shard_batch(batch, LARGE, mesh))
            assert np.array_equal(got["prediction"], wanted["prediction"])
            found[f"{data}x{patch}"] = {
                name: max_relative(got[name], wanted[name]) for name in ("loss", "logits")
            }
        return found


TWO = [(2, 4), (1, 8)]
FLIPS = AugmentConfig(flips=True, turns=True, brightness=0.2, same_draw=False)

CASES = {
    **{f"toy {mode}": partial(toy, ODD, SPLITS, mode=mode) for mode in MODES},
    "patchgd": partial(toy, ODD, [*TWO, (4, 1), (2, 2)], mode="patchgd"),
    "exact": partial(toy, ODD, TWO, mode="exact"),
    "even": partial(toy, EVEN, TWO, mode="accumulate"),
    "per image": partial(toy, ODD, TWO, sample_per="image", mode="patchgd", fraction=0.25),
    "epsilon": partial(toy, ODD, TWO, mode="patchgd", fraction=0.25, epsilon=2),
    "uniform": partial(toy, ODD, TWO, mode="patchgd", sampling="uniform"),
    "importance": partial(
        toy, ODD, [(2, 1), (8, 1)], mode="patchgd", sampling="uniform", importance="loss", strata=1
    ),
    "remat": partial(toy, ODD, TWO, mode="full", remat=True),
    "weight": partial(toy, ODD, TWO, batch=weighted),
    "sizes": partial(toy, LARGE, TWO, batch=ragged, model=masked_toy, mode="patchgd"),
    "lists": partial(toy, LARGE, TWO, batch=partial(ragged, listed), model=masked_toy),
    "exact lists": partial(
        toy, LARGE, TWO, batch=partial(ragged, listed), model=masked_toy, mode="exact"
    ),
    "augment": partial(toy, ODD, [(2, 4)], augment=FLIPS, mode="patchgd"),
    "frozen": partial(toy, ODD, [(2, 4)], frozen=("w1", "b1")),
    "average": partial(toy, ODD, [(2, 4)], optimizer=averaged_adam),
    "fsdp": partial(toy, ODD, [(2, 4)], optimizer=averaged_adam, rules=FSDP, mode="patchgd"),
    "fsdp exact": partial(toy, ODD, [(2, 4)], rules=FSDP, mode="exact"),
    "evaluation": partial(evaluation, [(2, 4), (8, 1), (1, 8)]),
    "rows": partial(rows, "batch", mode="patchgd"),
    "rows exact": partial(rows, "group", mode="exact"),
    "group norm": partial(shipped, {"norm": "group"}, TWO),
    "batch norm": partial(shipped, {"norm": "batch"}, [(2, 4)]),
    "batch norm in the fill": partial(shipped, {"norm": "batch"}, [(2, 4)], norm_policy="paper"),
    "float64 statistics": partial(statistics, mode="full"),
    "float64 statistics in the fill": partial(statistics, mode="patchgd", norm_policy="paper"),
}


def main() -> None:
    jax.config.update("jax_enable_x64", False)
    for name, case in CASES.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(json.dumps({name: case()}), flush=True)


if __name__ == "__main__":
    main()
