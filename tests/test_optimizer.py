"""Schedules and update rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchgd_jax import OptimizerConfig, make_optimizer, make_schedule


def rates(config, total_steps, warmup_steps):
    schedule = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)
    return np.array([float(schedule(jnp.asarray(step))) for step in range(total_steps)])


def test_the_papers_schedule_ends_near_half():
    """Linear warm-up, then linear towards zero at twice the run's length."""
    config = OptimizerConfig(schedule="linear", learning_rate=1.0)
    got = rates(config, 1000, 20)
    np.testing.assert_allclose(got[:20], np.arange(1, 21) / 20, rtol=1e-5)
    wanted = [1 - (step - 20) / (2000 - 20) for step in range(20, 1000)]
    np.testing.assert_allclose(got[20:], wanted, rtol=1e-5)
    assert 0.5 < got[-1] < 0.51


def test_cosine_ends_at_zero():
    got = rates(OptimizerConfig(schedule="cosine", learning_rate=2.0), 100, 10)
    wanted = 1 + np.cos(np.pi * np.arange(90) / 90)
    np.testing.assert_allclose(got[10:], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_warm_up_starts_at_the_peak(schedule):
    config = OptimizerConfig(schedule=schedule, learning_rate=0.25)
    assert rates(config, 10, 0)[0] == pytest.approx(0.25)


def test_the_schedule_counts_outer_steps():
    """All updates of an outer step have one rate."""
    config = OptimizerConfig(name="sgd", momentum=0.0, schedule="cosine", warmup_epochs=0)
    optimizer = make_optimizer(config, total_steps=5, steps_per_epoch=5, updates_per_step=3)
    state = optimizer.init(jnp.zeros(()))
    taken = []
    for _ in range(15):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        taken.append(-float(update))
    np.testing.assert_allclose(taken, np.repeat(rates(config, 5, 0), 3), rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig(
        name="sgd", momentum=0.0, clip_norm=0.5, learning_rate=1.0, warmup_epochs=0
    )
    optimizer = make_optimizer(config, total_steps=9, steps_per_epoch=9, updates_per_step=1)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.4], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (OptimizerConfig(name="adam", learning_rate=0.1), optax.adam(0.1)),
        (
            OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.3),
            optax.adamw(0.1, weight_decay=0.3),
        ),
        (OptimizerConfig(name="sgd", learning_rate=0.1), optax.sgd(0.1, momentum=0.9)),
    ],
)
def test_names_are_optaxs_rules(config, same):
    config = OptimizerConfig(**{**vars(config), "schedule": "constant", "warmup_epochs": 0})
    built = make_optimizer(config, total_steps=9, steps_per_epoch=9, updates_per_step=1)
    params, states = {"w": jnp.array([1.0, -2.0])}, []
    for optimizer in (built, same):
        state, current = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(jax.tree.map(jnp.sin, current), state, current)
            current = optax.apply_updates(current, updates)
        states.append(current["w"])
    np.testing.assert_allclose(*states, rtol=1e-6)
