"""Settings that are auto: what the planner makes of them, and that nothing else ever sees them."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import micro
import pytest
from test_files import config_for, write_csv, write_images

from patchgd_jax import ConfigError, PatchGDConfig
from patchgd_jax.config import StreamConfig
from patchgd_jax.planner import (
    MemoryBudgetError,
    PlanRequest,
    compiled_total,
    device_limit,
    free_memory,
)
from patchgd_jax.planner.auto_settings import is_resolved, resolve_auto
from patchgd_jax.planner.run_plan import RunPlan, plan_of
from patchgd_jax.runs.cross_validation import cross_validate
from patchgd_jax.runs.folder import RunFolder

MIB = 2**20
BASE = dataclasses.replace(micro.BASE, data=dataclasses.replace(micro.BASE.data, size=(64, 64)))


def auto(batch=False, fraction=False, **changes):
    config = dataclasses.replace(BASE, **changes)
    if batch:
        config = dataclasses.replace(config, batch_size="auto")
    if fraction:
        patchgd = dataclasses.replace(config.patchgd, fraction="auto")
        config = dataclasses.replace(config, patchgd=patchgd)
    return config


@pytest.fixture
def law(monkeypatch):
    """A MiB, and one more for each image's sampled patch; no compiles."""

    def compiled(self, request):
        return (1 + request.batch * request.sampled) * MIB

    monkeypatch.setattr(RunPlan, "compiled", compiled)


def test_the_largest_batch_is_taken_and_told(law):
    told = []
    config = resolve_auto(auto(batch=True), "84MiB", told.append)
    # 8 of 16 patches at a time: 1 + 10 * 8 = 81, and 89 is too much.
    assert (config.batch_size, config.eval_batch_size) == (10, 4)
    assert config == dataclasses.replace(BASE, batch_size=10)
    (line,) = told
    for words in ("batch_size auto: 10", "81.0 MiB of 84.0 MiB (given)", "next larger 89.0 MiB"):
        assert words in line


def test_an_evaluation_is_no_larger_than_a_batch_that_hardly_fits(law):
    config = resolve_auto(auto(batch=True), "20MiB")
    assert (config.batch_size, config.eval_batch_size) == (2, 2)


def test_a_batch_is_at_most_all_training_images(law):
    told = []
    assert resolve_auto(auto(batch=True), "9GiB", told.append).batch_size == 32
    assert "all training images" in told[0]


def test_the_largest_fraction_is_taken_and_told(law):
    told = []
    config = resolve_auto(auto(fraction=True), "50MiB", told.append)
    # 8 images: 1 + 8 * 6 = 49 for 3 inner steps, 65 for 2.
    assert config.patchgd.num_inner_steps == 3
    assert config == dataclasses.replace(BASE, patchgd=config.patchgd)
    assert "patchgd.fraction auto: 0.3333 (6 of 16 patches" in told[0]


def test_a_fraction_leads_to_inner_steps_that_epsilon_divides(law):
    patchgd = PatchGDConfig(patch=16, mode="patchgd", fraction=0.5, epsilon=2)
    config = resolve_auto(auto(fraction=True, patchgd=patchgd), "50MiB")
    assert (config.patchgd.num_inner_steps, config.patchgd.epsilon) == (4, 2)


@pytest.mark.parametrize(
    ("budget", "inner_steps", "batch"), [("100MiB", 4, 24), ("3MiB", 8, 1), ("9GiB", 4, 32)]
)
def test_both_are_the_usual_fraction_if_one_image_fits_and_then_the_batch(
    law, budget, inner_steps, batch
):
    config = resolve_auto(auto(batch=True, fraction=True), budget)
    assert (config.patchgd.num_inner_steps, config.batch_size) == (inner_steps, batch)


def test_without_a_budget_it_is_what_is_free(law, monkeypatch):
    monkeypatch.setattr(
        "patchgd_jax.planner.auto_settings.free_memory", lambda device: (340 * MIB, "what is free")
    )
    told = []
    # Of which 256 MiB are for read images.
    assert resolve_auto(auto(batch=True), None, told.append).batch_size == 10
    assert "what is free, less 256 MiB of read images" in told[0]


def test_the_figures_are_the_compilers_for_the_runs_own_settings():
    """With no law in between: the batch of a real compile."""
    config = auto(fraction=True, data=dataclasses.replace(BASE.data, size=(16, 16)))
    chosen = resolve_auto(config, "9GiB")
    assert chosen.patchgd.fraction == 1
    plan = plan_of(chosen)
    request = PlanRequest.from_config(chosen)
    assert plan.requests == (request,)
    compiled = compiled_total(request, "accumulate")
    assert plan.compiled(request) == plan.expected(request, compiled)
    # The next batch is on the device, too.
    image = request.batch * math.prod(request.image)
    assert plan.expected(request, compiled) >= plan.calibration.expected(compiled) + image


def test_images_of_several_sizes_are_planned_by_the_largest(tmp_path):
    sizes = [(40, 56)] * 12 + [(20, 20)] * 12 + [(33, 33)] * 12
    labels = write_csv(tmp_path / "labels.csv", write_images(tmp_path, sizes))
    plan = plan_of(config_for(labels, fit="native"))
    (request,) = plan.requests
    assert request.image == (48, 64, 1)
    assert request.classes == 2
    assert request.patches == 12
    assert plan.fewest_patches == 4
    config = dataclasses.replace(
        config_for(labels, fit="native"), patchgd=PatchGDConfig(patch=16, fraction="auto")
    )
    # No more inner steps than the smallest images have patches.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunPlan, "compiled", lambda self, request: request.sampled * MIB)
        assert resolve_auto(config, "3MiB").patchgd.num_inner_steps == 4
        with pytest.raises(MemoryBudgetError):
            resolve_auto(config, "2MiB")


def test_every_fold_of_a_cross_validation_has_the_same(law, tmp_path, monkeypatch):
    labels = write_csv(tmp_path / "labels.csv", write_images(tmp_path, [(32, 32)] * 24))
    config = dataclasses.replace(config_for(labels), batch_size="auto")
    seen = []

    def train(config, path, progress):
        seen.append((config.batch_size, config.eval_batch_size))
        RunFolder.create(path, config, {})
        (path / "summary.json").write_text(json.dumps({"best": {"step": 1, "loss": 1.0}}))
        return {"best": {"step": 1, "loss": 1.0}}

    monkeypatch.setattr("patchgd_jax.runs.cross_validation.train", train)
    cross_validate(config, tmp_path / "folds", budget="30MiB")
    assert len(seen) == 5
    assert len(set(seen)) == 1
    # What was chosen then holds, whatever the memory is now.
    cross_validate(config, tmp_path / "folds", budget="90MiB")
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: auto(batch=True).total_steps(9), "batch_size is auto, which is no number yet"),
        (lambda: auto(batch=True).images_per_step, "batch_size is auto"),
        (lambda: auto(fraction=True).patchgd.num_inner_steps, "patchgd.fraction is auto"),
        (
            lambda: PatchGDConfig(fraction="auto", inner_steps=3),
            "patchgd.inner_steps 3 and patchgd.fraction auto both decide",
        ),
        (lambda: PatchGDConfig(fraction="auto", mode="exact"), "mode exact samples no patches"),
        (lambda: auto(batch=True, mesh="data=2"), "for one device"),
        (lambda: auto(fraction=True, stream=StreamConfig(enabled=True)), "for one device"),
        (lambda: resolve_auto(BASE, "3GiB"), "none is; set --batch-size auto"),
        (lambda: resolve_auto(auto(batch=True), "lots"), "'lots' cannot be read"),
    ],
)
def test_what_cannot_be_is_one_message(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_config_with_numbers_is_left_as_it_is():
    assert is_resolved(BASE)
    assert not is_resolved(auto(batch=True))
    assert resolve_auto(BASE) is BASE


def test_what_is_free_is_less_than_there_is():
    device = jax.devices("cpu")[0]
    free, source = free_memory(device)
    assert 0 < free < device_limit(device)[0]
    assert "what is free of" in source
