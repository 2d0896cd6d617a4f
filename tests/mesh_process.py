"""One of several processes that train the toy model together; started by `test_distributed.py`.

Arguments: what to do, coordinator, number of processes, number of this one, folder.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from toy import recording_sgd, toy_batch, toy_model, toy_params

from patchgd_jax import ConfigError, PatchGDConfig, PatchGrid, Problem, init_state, train_step
from patchgd_jax.engine.distributed import check_same, initialize, watchdog
from patchgd_jax.engine.sharding.layout import sharded_train_step
from patchgd_jax.engine.sharding.mesh import DATA, PATCH, make_mesh, own_images, shard_batch
from patchgd_jax.engine.sharding.params import param_shardings

# No array is made at import: processes must join before jax is used.
SEED = 5
ODD = PatchGrid(11, 17, 5, 3)
CONFIG = PatchGDConfig(patch=5, stride=3, fraction=0.5, strata=8, mode="patchgd", fill_chunk=8)
RULES = (("encoder/w1", (None, PATCH)),)
STEPS = 3


def start():
    """Problem, optimizer, first state and batch."""
    problem = Problem(toy_model(toy_params(0, pixels=50, hidden=8)), ODD, CONFIG)
    optimizer = recording_sgd(0.1)
    state = jax.jit(partial(init_state, problem, optimizer))(jax.random.key(SEED))
    return problem, optimizer, state, toy_batch(0, ODD, batch=4)


def alone():
    """The state after training on one device."""
    problem, optimizer, state, batch = start()
    step = jax.jit(partial(train_step, problem, optimizer))
    for _ in range(STEPS):
        state, _ = step(state, batch, jax.random.key(SEED))
    return state


def save(state, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "state", state)


def main(what, coordinator, processes, process, folder):
    processes, process, folder = int(processes), int(process), Path(folder)
    initialize(coordinator, processes, process)
    try:
        check_same({"seed": process if what == "differ" else 0, "patch": 4})
    except ConfigError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    problem, optimizer, state, batch = start()
    count = jax.device_count()
    layout = f"data=2,patch={count // 2}"
    mesh = make_mesh(layout, batch_size=4, strata=8)
    assert mesh.shape[DATA] == 2
    mine = own_images(mesh, 4)
    # Only the images that this process's devices have a part of.
    part = {name: values[mine.start : mine.stop] for name, values in batch.items()}
    arrays = shard_batch(part, ODD, mesh, first=mine.start, total=4)
    key = jax.random.key(SEED)
    state = jax.device_put(jax.tree.map(np.asarray, state), param_shardings(state, RULES, mesh))
    step = jax.jit(partial(sharded_train_step, problem, optimizer, mesh=mesh, rules=RULES))
    steps, seconds = {"die": (10_000, 30), "hang": (10_000, 8)}.get(what, (STEPS, 60))
    for number in range(steps):
        if process == 1 and number == 5 and what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if process == 1 and number == 5 and what == "hang":
            # Heartbeats go on, so that only the watchdog can tell.
            time.sleep(1000)
        with watchdog(seconds):
            state, metrics = step(state, arrays, key)
            float(metrics["loss"])
    save(state, folder)
    print("done", jax.process_count(), count, mine, flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
