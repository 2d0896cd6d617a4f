"""Compile time of one outer step, cold and warm.

Command:   python benchmarks/compile_time.py
Time:      about four minutes on two CPU cores
Expected:  over 10 s cold, about 2 s with the persistent cache

Each measurement is a process of its own; cold ones get an empty cache folder. The order is
cold, warm, cold, warm, ...
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

from record import record

WORKER = """
import json, sys, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
from functools import partial
import numpy as np, optax
import patchgd_jax as pgd

grid = pgd.PatchGrid(512, 512, 64)
model = pgd.build_model(
    pgd.ModelConfig(encoder=sys.argv[2], norm="batch", latent_dim=256, head="cnn-original"),
    grid=grid, channels=3, classes=10, mean=0.0, std=1.0,
)
optimizer = optax.adam(1e-3)
key = jax.random.key(0)
state = jax.eval_shape(partial(pgd.init_state, model=model, optimizer=optimizer), key)
batch = {
    "image": jax.ShapeDtypeStruct((2, 512, 512, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((2,), np.int32),
}
patchgd = pgd.PatchGDConfig(patch=64, fraction=0.25, fill_chunk=16)
step = partial(pgd.train_step, model=model, optimizer=optimizer, grid=grid, patchgd=patchgd)
begun = time.perf_counter()
lowered = jax.jit(step, donate_argnums=0).lower(state, batch, key)
traced = time.perf_counter()
lowered.compile()
print(json.dumps({"trace": traced - begun, "compile": time.perf_counter() - traced}))
"""


def measure(cache: str, encoder: str) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-c", WORKER, cache, encoder], capture_output=True, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    figures = {}
    for encoder in ("resnet34", "resnet50"):
        runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    runs[kind].append(measure(cache, encoder))
                    print(encoder, kind, runs[kind][-1])
        medians = {
            kind: {name: statistics.median(run[name] for run in of) for name in of[0]}
            for kind, of in runs.items()
        }
        figures[encoder] = {"median_seconds": medians, "runs": runs}
    record("compile_time", figures)


if __name__ == "__main__":
    main()
