"""Compiled memory of one outer step against the image's side, at a fixed number of patches.

Command:   python benchmarks/step_memory.py
Time:      about a minute on two CPU cores; nothing is allocated, only compiled
Expected:  temporary memory grows by no more than the input and Z; whole-image autodiff by area
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
from record import record

import patchgd_jax as pgd

PATCHES = 16
SIDES = (512, 1024, 2048, 4096)


def temporary_bytes(side: int, mode: str) -> dict[str, int]:
    grid = pgd.PatchGrid(side, side, 64)
    model = pgd.build_model(
        pgd.ModelConfig(norm="group"), grid=grid, channels=1, classes=10, mean=0.0, std=1.0
    )
    optimizer = optax.adam(1e-3)
    key = jax.random.key(0)
    batch = {
        "image": jax.ShapeDtypeStruct((1, side, side, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((1,), np.int32),
    }
    patchgd = pgd.PatchGDConfig(
        patch=64, mode=mode, inner_steps=grid.num_patches // PATCHES, fill_chunk=PATCHES
    )
    problem = pgd.Problem(model, grid, patchgd)
    state = jax.eval_shape(partial(pgd.init_state, problem, optimizer), key)
    step = partial(pgd.train_step, problem, optimizer)
    # As `patchgd-jax train` compiles it.
    jitted = jax.jit(step, donate_argnums=0, compiler_options=pgd.compiler_options())
    compiled = jitted.lower(state, batch, key).compile()
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "image": side * side,
        "z": grid.num_patches * 128 * 4,
    }


def main() -> None:
    figures = {}
    for mode in ("patchgd", "accumulate", "exact", "full"):
        figures[mode] = {side: temporary_bytes(side, mode) for side in SIDES}
        row = "  ".join(f"{s}: {v['temporary'] / 2**20:.2f} MiB" for s, v in figures[mode].items())
        print(f"{mode:<11}{row}")
    record("step_memory", figures)


if __name__ == "__main__":
    main()
