"""Sizes, hand sums, the solver, measurement and the command."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import pytest

from patchgd_jax import ConfigError, ModelConfig, OptimizerConfig, PatchGDConfig
from patchgd_jax.cli.main import main
from patchgd_jax.cli.plan import PlanOptions, make_plan, plan_command, train_arguments
from patchgd_jax.config import DataConfig, TrainConfig
from patchgd_jax.planner import (
    Calibration,
    Estimator,
    Line,
    MeasureError,
    MemoryBudgetError,
    PlanRequest,
    calibrate,
    calibration,
    compiled_total,
    device_limit,
    encoder_table,
    explain,
    free_memory,
    keep_calibration,
    measure,
    parse_size,
    show_size,
    solve,
)
from patchgd_jax.planner.explain import (
    conv_weights,
    dense_weights,
    hand_activation_bytes,
    hand_parameter_bytes,
    hand_total,
    image_bytes,
    parameter_copies,
)
from patchgd_jax.planner.measure import Measured, _calibrations, other_size
from patchgd_jax.planner.report import _merged

MIB = 2**20
# By name, which in its package is the function's.
MODULE = sys.modules["patchgd_jax.planner.measure"]


def small(side=128, batch=2, **changes) -> PlanRequest:
    settings = {
        "batch_size": batch,
        "eval_batch_size": 2,
        "model": ModelConfig(norm="group", latent_dim=16),
        "patchgd": PatchGDConfig(patch=32, fraction=0.25),
    }
    return PlanRequest(TrainConfig(**{**settings, **changes}), (side, side))


def test_textbook_sums():
    assert image_bytes(2400, 2400, 3) == 69_120_000
    assert image_bytes(2400, 2400, 3) / MIB == pytest.approx(65.9, abs=0.05)
    assert hand_parameter_bytes(19_072_984) / MIB == pytest.approx(218.27, abs=0.005)
    assert hand_activation_bytes(532_752) / MIB == pytest.approx(4.06, abs=0.005)
    total = hand_total(19_072_984, 532_752, 128, round(4.39 * MIB))
    assert 742 <= total / MIB <= 743
    assert conv_weights(3, 96, 192) == 165_888
    assert image_bytes(980, 980, 3) / MIB == pytest.approx(10.99, abs=0.005)
    assert dense_weights(256, 128) == 32_896
    assert [parameter_copies(OptimizerConfig(name=n)) for n in ("sgd", "adam", "adamw")] == [
        3,
        4,
        4,
    ]
    assert parameter_copies(OptimizerConfig(ema_decay=0.9)) == 5


def test_explanation_has_the_users_own_numbers():
    plan = small()
    row = Estimator(plan).row("accumulate")
    table = encoder_table(plan.model, 1, (32, 32))
    text = "\n".join(explain(plan, table, row, compiled=50 * MIB))
    assert f"{table.total('parameters'):,} parameters" in text
    assert show_size(row.total) in text
    assert show_size(2 * 128 * 128 * 4) in text
    assert "50.0 MiB" in text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gb", 8 * 10**9),
        ("512MiB", 512 * MIB),
        ("0.5g", 5 * 10**8),
        ("1048576", MIB),
        (" 2 TiB ", 2 * 2**40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 XiB", "-1GiB", "1e9", "0", "8GiB 2"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_sizes_are_shown_with_their_unit():
    assert [show_size(x) for x in (2048, 5 * MIB, 3 * 2**30, 2**41)] == [
        "2.0 KiB",
        "5.0 MiB",
        "3.00 GiB",
        "2.00 TiB",
    ]


def test_a_cpus_limit_is_the_control_groups_if_that_is_less(tmp_path, monkeypatch):
    path = tmp_path / "memory.max"
    monkeypatch.setattr("patchgd_jax.planner.size._CGROUPS", ((path, "memory.current"),))
    device = jax.devices("cpu")[0]
    machine, _ = device_limit(device)
    path.write_text("max\n")
    assert device_limit(device)[0] == machine
    path.write_text("123456789\n")
    limit, source = device_limit(device)
    assert limit == 123_456_789
    assert str(path) in source


def test_what_a_control_group_has_left_is_less_what_all_its_processes_use(tmp_path, monkeypatch):
    path = tmp_path / "memory.max"
    monkeypatch.setattr("patchgd_jax.planner.size._CGROUPS", ((path, "memory.current"),))
    path.write_text(f"{64 * 2**30}\n")
    device = jax.devices("cpu")[0]
    (tmp_path / "memory.current").write_text(f"{64 * 2**30 - 100 * MIB}\n")
    free, source = free_memory(device)
    assert free == 100 * MIB
    assert str(path) in source
    # Pages of files that nobody has read lately are the system's to drop.
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {20 * MIB}\n")
    assert free_memory(device)[0] == 120 * MIB


def test_a_line():
    line = Line.through([(1, 110), (3, 130)])
    assert line.at(10) == pytest.approx(200)
    assert line.largest(200) == pytest.approx(10)
    assert Line.through([(1, 110)]).largest(100) == 0
    assert Line.through([(1, 110)]).largest(200) == float("inf")


@pytest.mark.parametrize("quantity", ["batch", "fraction", "patch", "image"])
def test_solver_finds_the_largest_setting(quantity):
    """Against a known law with a kink, as where a compiler takes another kernel."""
    plan = small(side=1024, patchgd=PatchGDConfig(patch=32, fraction=1 / 64))

    def total(request):
        patches = request.batch * request.sampled * request.patchgd.patch**2
        pixels = request.batch * request.image[0] * request.image[1]
        return 5_000_000 + 7 * patches + 3 * pixels + max(0, patches - 200_000)

    budget = 12_000_000
    answer = solve(plan, "accumulate", quantity, budget, total=total)
    assert total(answer.request) == answer.bytes <= budget
    assert answer.next_bytes > budget
    assert answer.compiles <= 6
    if quantity == "batch":
        following = plan.changed(batch_size=int(answer.next_value))
        assert total(following) > budget
    if quantity == "image":
        assert answer.request.sampled <= plan.sampled


def test_solver_says_when_nothing_fits():
    with pytest.raises(MemoryBudgetError, match="with the smallest, 1, it needs") as caught:
        solve(small(), "accumulate", "batch", 10, total=lambda request: 100)
    assert caught.value.exit_code == 4
    with pytest.raises(ConfigError, match="quantity"):
        solve(small(), "accumulate", "batchs", 10, total=lambda request: 100)


def test_solver_takes_the_most_there_can_be():
    answer = solve(small(), "accumulate", "fraction", 10**9, total=lambda request: 5)
    assert answer.value == 1
    assert answer.next_value is None


@pytest.mark.slow
def test_a_batch_is_proved_by_a_compile():
    plan = small()
    budget = round(1.6 * compiled_total(plan.changed(batch_size=4), "accumulate"))
    answer = solve(plan, "accumulate", "batch", budget)
    assert compiled_total(answer.request, "accumulate") == answer.bytes <= budget
    above = answer.request.changed(batch_size=answer.request.batch + 1)
    assert compiled_total(above, "accumulate") > 0.97 * budget


def test_a_real_step_is_measured_in_its_own_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys.modules[Measured.__module__], "_PROBES", 1)
    device = jax.devices("cpu")[0]
    assert not calibration(device).measured
    result = measure(small(batch=16), "accumulate", platform="cpu")
    assert result.compiled == pytest.approx(
        compiled_total(small(batch=16), "accumulate", evaluation=False), rel=0.01
    )
    assert 0.5 * result.compiled < result.peak < 3 * result.compiled + 64 * MIB
    factor = keep_calibration(result)
    known = calibration(device)
    assert known.measured
    assert known.factor == factor >= 1
    # The largest counts, and a damaged file is as none.
    keep_calibration(result._replace(peak=10**12))
    keep_calibration(result)
    assert calibration(device).factor > 100
    _calibrations().write_text("{broken")
    assert not calibration(device).measured


def test_a_step_that_does_not_run_is_one_message(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--no_such_flag")
    with pytest.raises(MeasureError, match="did not run here") as caught:
        measure(small(), "accumulate", platform="cpu")
    assert caught.value.exit_code == 4


def test_calibration_is_its_own_inverse():
    known = Calibration(1.25, 100, 50, True)
    # Below what the C library keeps, at it, and above.
    for compiled in (8, 24, 800):
        assert known.within(known.expected(compiled)) == pytest.approx(compiled)
    assert known.expected(8) == 100 + 10 + 2 * 8
    assert known.expected(800) == 100 + 1000 + 50
    assert Measured(2**30, 2**30, "x", "gpu").factor == 1


@pytest.mark.parametrize("compiled", [2**20, 2**30])
def test_a_factor_is_what_gives_the_measured_peak(compiled):
    measured = Measured(4 * compiled + 24 * MIB, compiled, "x", "cpu")
    known = Calibration.of("cpu", measured.factor, measured=True)
    assert known.expected(compiled) == pytest.approx(measured.peak, abs=1)


def test_the_second_size_is_larger_where_that_fits():
    known = Calibration(1.0, 10, 0, True)
    request = small(batch=2)
    assert other_size(request, 100, known, free=210).batch == 4
    assert other_size(request, 100, known, free=209).batch == 1
    one = request.changed(batch_size=1)
    assert request.sampled == 4
    assert other_size(one, 100, known, free=0).sampled == 2
    least = one.changed(patchgd=PatchGDConfig(patch=32, fraction=1 / 16))
    assert other_size(least, 100, known, free=0) is None


@pytest.mark.parametrize("larger", [1, 4])
def test_the_larger_factor_of_two_sizes_is_kept(larger, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def fake(request, method, **options):
        asked.append(request.batch)
        excess = 2 if request.batch == larger else 1
        return Measured((1 + excess) * 2**30, 2**30, "cpu", "cpu")

    monkeypatch.setattr(MODULE, "measure", fake)
    monkeypatch.setattr(MODULE, "free_memory", lambda device: (2**40, ""))
    measured = calibrate(small(batch=2 if larger == 4 else 1), "accumulate", platform="cpu")
    assert asked == ([2, 4] if larger == 4 else [1, 2])
    # What is returned is of the request itself.
    assert measured.peak == (2 if larger == 4 else 3) * 2**30
    known = calibration(jax.devices("cpu")[0])
    assert known.expected(2**30) == 3 * 2**30


def test_a_second_size_that_does_not_run_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fake(request, method, **options):
        if request.batch != 2:
            raise MeasureError("too large")
        return Measured(2**31, 2**30, "cpu", "cpu")

    monkeypatch.setattr(MODULE, "measure", fake)
    assert calibrate(small(batch=2), "accumulate", platform="cpu").peak == 2**31
    assert calibration(jax.devices("cpu")[0]).expected(2**30) == 2**31


CONFIG = TrainConfig(
    data=DataConfig(size=(128, 128)),
    model=ModelConfig(norm="group", latent_dim=16),
    patchgd=PatchGDConfig(patch=32),
    batch_size=2,
    eval_batch_size=2,
    device="cpu",
)


def test_a_plan_in_text_json_and_a_picture(tmp_path):
    path = tmp_path / "plan.png"
    options = PlanOptions(CONFIG, budget="20MiB", explain=True, layers=True, plot=str(path))
    plan = make_plan(options)
    figures = json.loads(json.dumps(plan["json"]))
    rows = {row["method"]: row for row in figures["methods"]}
    assert len(rows) == 12
    for row in rows.values():
        assert row["fits"] == (row["expected"] <= 20 * MIB)
    assert rows["gd"]["total"] > rows["exact"]["total"]
    assert rows["downscale"]["side"] >= 32
    for word in ("patchwise", "label noise", "Stage_0/Conv_0", "By hand", "fits 20.0 MiB"):
        assert word in plan["text"]
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_methods_whose_lines_are_one_are_drawn_as_one():
    same = [(64, 1000), (128, 4000)]
    lines = {
        "gd": same,
        "full": [(64, 1000), (128, 5000)],
        "gd-extended": [(64, 1001), (128, 4001)],
    }
    assert _merged(lines) == [(["gd", "gd-extended"], same), (["full"], lines["full"])]


def test_the_command_prints_json(capsys):
    settings = ["--data.size", "96", "96", "--batch-size", "3", "--device", "cpu"]
    plan_command(["tiny", "--json", "--methods", "accumulate", *settings])
    figures = json.loads(capsys.readouterr().out)
    assert figures["request"]["image"] == [96, 96, 1]
    assert figures["request"]["config"]["batch_size"] == 3
    assert [row["method"] for row in figures["methods"]] == ["accumulate"]
    assert figures["layers"]


def test_the_train_command_has_what_differs_from_the_preset():
    request = PlanRequest.from_config(CONFIG)
    larger = dataclasses.replace(request.changed(batch_size=7), size=(256, 128))
    words = train_arguments(CONFIG, larger, "default").split()
    assert words[:2] == ["patchgd-jax", "train"]
    assert words[words.index("--batch-size") + 1] == "7"
    assert words[words.index("--data.size") + 1 :][:2] == ["256", "128"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "10KiB", "--methods", "accumulate"], 4, "below the parameters, which alone"),
        (["--budget", "lots"], 2, "the size 'lots' cannot be read; write a number and a unit"),
        (
            ["--model.encoder", "deit-tiny", "--methods", "fully-conv"],
            2,
            "deit-tiny is not convolutional",
        ),
    ],
)
def test_the_command_says_what_cannot_be_and_ends(capsys, arguments, code, message):
    ended, text = main(["plan", *arguments]), capsys.readouterr()
    assert ended == code, text.err
    assert message in text.err
    assert text.err.startswith("error: ")
    assert len(text.err.splitlines()) == 1
    assert text.out == ""


@pytest.mark.parametrize(
    "setting",
    [
        ["--model.encoder", "resnet-50"],
        ["--model.norm", "layer"],
        ["--model.head", "atention"],
    ],
)
def test_what_no_method_can_have_is_the_message_of_train(setting, capsys, tmp_path):
    codes, errors = [], []
    for command in (["plan", "tiny"], ["train", "tiny", "--run-dir", str(tmp_path / "run")]):
        codes.append(main([*command, *setting, "--device", "cpu"]))
        text = capsys.readouterr()
        errors.append([x for x in text.err.splitlines() if x.startswith("error: ")])
    assert codes == [2, 2]
    assert len(errors[0]) == 1
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "lots"}, "cannot be read"),
        ({"solve": ("batch",)}, "needs a --budget"),
        ({"methods": ("patchgd2",)}, "did you mean 'patchgd'"),
        ({"methods": ("exact",)}, "batch statistics"),
    ],
)
def test_bad_input_is_one_message(options, message):
    config = dataclasses.replace(CONFIG, model=ModelConfig(norm="batch"))
    with pytest.raises(ConfigError, match=message):
        make_plan(PlanOptions(config, **options))
