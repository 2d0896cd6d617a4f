"""Every encoder with every head: an outer step compiles and lowers the loss on a fixed batch."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
import pytest

from patchgd_jax import (
    ENCODERS,
    HEADS,
    ModelConfig,
    PatchGDConfig,
    PatchGrid,
    build_model,
    init_state,
    train_step,
)

KEY = jax.random.key(29)
GRID = PatchGrid(32, 48, 16)
QUICK = {
    *(
        ("small-cnn", head)
        for head in ("attention", "linear", "transformer", "adaptive-cnn", "cnn-original")
    ),
    ("resnet18", "attention"),
}
"""Each kind of head and of encoder once; the rest is for `-m slow`."""


@pytest.mark.parametrize(
    ("encoder", "head"),
    [
        pytest.param(encoder, head, marks=[] if (encoder, head) in QUICK else pytest.mark.slow)
        for encoder in sorted(ENCODERS)
        for head in sorted(HEADS)
    ],
)
def test_an_outer_step_lowers_the_loss(encoder, head):
    config = ModelConfig(encoder=encoder, head=head, latent_dim=8, dropout=0.0, remat="none")
    model = build_model(config, grid=GRID, channels=3, classes=4, mean=0.5, std=0.3)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8),
        "label": np.arange(4, dtype=np.int32),
    }
    optimizer = optax.adam(1e-3)
    # The numbers matter here, not the speed.
    fast = {"xla_backend_optimization_level": 0}
    state = jax.jit(partial(init_state, model=model, optimizer=optimizer), compiler_options=fast)(
        KEY
    )
    step = jax.jit(
        partial(
            train_step,
            model=model,
            optimizer=optimizer,
            grid=GRID,
            patchgd=PatchGDConfig(patch=16, fraction=0.5, fill_chunk=3),
        ),
        compiler_options=fast,
    )
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
