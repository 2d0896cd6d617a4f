"""Compiles steps for meshes of eight virtual devices, without running them, and prints figures.

Not a test itself: `test_sharding.py` and `benchmarks/weak_scaling.py` start it.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import jax
import numpy as np
import optax

from patchgd_jax import ModelConfig, PatchGDConfig, PatchGrid, Problem, build_model, init_state
from patchgd_jax.engine.compiling import compiler_options
from patchgd_jax.engine.sharding.layout import model_options, sharded_train_step
from patchgd_jax.engine.sharding.mesh import Bands, batch_shardings, make_mesh
from patchgd_jax.engine.sharding.params import PATCH, param_shardings

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|"
    r"collective-broadcast)(?:-start)?\("
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
FSDP = (("Conv_0/kernel$", (None, None, None, PATCH)),)


def collectives(text):
    """Name, dtype and element count of each array that a compiled program moves."""
    found = []
    for match in _COLLECTIVE.finditer(text):
        for dtype, shape in _SHAPE.findall(match[1]):
            count = int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
            found.append([match[2], dtype, count])
    return found


def compiled(
    data, patch, *, height, width=256, batch=4, mode="patchgd", rules=(), rows=1, side=32,
    **settings,
):  # fmt: skip
    """One outer step on `height` x `width` images, of whose patches a quarter per inner step."""
    grid = PatchGrid(height, width, side)
    settings = {"strata": 8, "fill_chunk": 16, "inner_steps": 4, **settings}
    config = PatchGDConfig(patch=side, mode=mode, **settings)
    mesh = make_mesh(
        f"data={data},patch={patch},rows={rows}", batch_size=batch, strata=config.strata,
        devices=jax.devices()[: data * patch * rows],
    )  # fmt: skip
    model = build_model(
        ModelConfig(norm="group", head="linear", latent_dim=16),
        grid=grid, channels=3, classes=10, mean=0.0, std=1.0, **model_options(mesh),
    )  # fmt: skip
    problem, optimizer, key = Problem(model, grid, config), optax.adam(1e-3), jax.random.key(0)
    state = jax.eval_shape(partial(init_state, problem, optimizer), key)
    shardings = param_shardings(state, rules, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    bands = Bands(grid, patch)

    forms = {
        "image": ((batch, patch * bands.height, width, 3), np.uint8),
        "label": ((batch,), np.int32),
    }
    shardings = batch_shardings(forms, mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(*form, sharding=shardings[name]) for name, form in forms.items()
    }
    step = partial(sharded_train_step, problem, optimizer, mesh=mesh, rules=rules)
    program = (
        jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
        .lower(state, arrays, key)
        .compile()
    )
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return {
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "image": batch // data * bands.height * width * 3,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "collectives": collectives(program.as_text()),
        "z": batch * grid.num_patches * 16,
        "largest parameter": max(x.size for x in jax.tree.leaves(state.params)),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }


if __name__ == "__main__":
    for line in sys.argv[1:]:
        request = json.loads(line)
        request["rules"] = FSDP if request.pop("fsdp", False) else ()
        print(json.dumps(compiled(**request)), flush=True)
