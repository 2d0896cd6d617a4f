"""Weight files in their real formats: what is loaded, what is refused, and that nothing is run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import MICRO

from patchgd_jax import (
    ENCODERS,
    ConfigError,
    DataConfig,
    DataError,
    ModelConfig,
    PatchGrid,
    TrainConfig,
    build_model,
)
from patchgd_jax.cli.main import main
from patchgd_jax.data.preprocess import Preprocess
from patchgd_jax.runs.checkpoint import Checkpoints
from patchgd_jax.runs.export import export_header, export_tensors
from patchgd_jax.runs.record.progress import Progress
from patchgd_jax.runs.starting_point import starting_point
from patchgd_jax.weights.files import read_weights, write_safetensors
from patchgd_jax.weights.matching import StartingPoint

RESNET = ["--model.encoder", "resnet18", "--data.channels", 3]
PREPROCESS = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0, tuple("0123456789"), ((32, 32),))


def config_of(encoder, weights=None, *, classes=10, channels=3, **model) -> TrainConfig:
    task = "digit-sum" if classes == 28 else "most-frequent"
    return TrainConfig(
        data=DataConfig(task=task, classes=classes, channels=channels),
        model=ModelConfig(encoder, weights=weights and str(weights), latent_dim=8, **model),
    )


def model_of(config, mean=0.0, std=1.0):
    return build_model(
        config.model,
        grid=PatchGrid(64, 64, 32),
        channels=config.data.num_channels,
        classes=config.data.classes,
        mean=mean,
        std=std,
    )


def shapes_of(config):
    return jax.eval_shape(model_of(config).init, jax.random.key(0))


def random_trees(config, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes_of(config))


def start_of(config) -> StartingPoint:
    start = starting_point(config, Progress())
    assert start is not None
    return start


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def write_export(path, config, trees, preprocess=PREPROCESS):
    tensors = export_tensors(config.model.encoder, *trees)
    write_safetensors(Path(path), tensors, export_header(config, preprocess))


# --- weights of PyTorch ---


def torchvision_view(torch, reference, counts):
    """The reference's layers under torchvision's names, as a module that shares their tensors."""
    nn = torch.nn
    view = nn.Module()
    view.conv1, view.bn1 = reference.conv, reference.norm
    blocks = iter(reference.blocks)
    for stage, count in enumerate(counts, 1):
        layer = nn.Sequential()
        for _ in range(count):
            block, named = next(blocks), nn.Module()
            for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True), 1):
                setattr(named, f"conv{i}", conv)
                setattr(named, f"bn{i}", norm)
            if isinstance(block.shortcut, nn.Sequential):
                named.downsample = block.shortcut
            layer.append(named)
        setattr(view, f"layer{stage}", layer)
    view.fc = nn.Linear(reference.dense.in_features, 1000)
    return view


@pytest.mark.parametrize(
    ("depth", "counts", "suffix"),
    [(18, (2, 2, 2, 2), ".pth"), (50, (3, 4, 6, 3), ".safetensors")],
)
def test_features_are_pytorchs_and_the_way_back_is_the_identity(tmp_path, depth, counts, suffix):
    torch = pytest.importorskip("torch", reason="the reference implementation is in PyTorch")
    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    torch_reference = importlib.import_module("torch_reference")
    torch.manual_seed(0)
    reference = torch_reference.ResNet(depth, latent_dim=8).eval()
    for layer in reference.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    for block in reference.blocks:
        # Otherwise each block enlarges the rounding errors of float32.
        torch.nn.init.uniform_(block.norms[-1].weight, 0.1, 0.3)
    view = torchvision_view(torch, reference, counts)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(view.state_dict(), path)
    else:
        from safetensors.torch import save_file as save_torch_file

        save_torch_file(view.state_dict(), path)

    config = config_of(f"resnet{depth}", path)
    before = random_trees(config)
    start = start_of(config)
    params, state = start.into(*before)

    latent = params["encoder"]["Dense_0"]
    assert_equal_trees(latent, before[0]["encoder"]["Dense_0"])
    assert_equal_trees(params["head"], before[0]["head"])
    with torch.no_grad():
        reference.dense.weight.copy_(torch.from_numpy(latent["kernel"].T.copy()))
        reference.dense.bias.copy_(torch.from_numpy(latent["bias"].copy()))
    patches = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    model = model_of(config, start.mean, start.std)
    encode = jax.jit(
        lambda *trees: model.encode(*trees, patches, train=False, rng=jax.random.key(0))[0],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    # ImageNet's statistics, as torchvision documents them for all of its weights.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        scaled = (torch.from_numpy(patches) / 255 - mean) / std
        wanted = reference(scaled.permute(0, 3, 1, 2)).numpy()
    got = encode(params, state)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()

    exported = tmp_path / "export.safetensors"
    write_export(exported, config, (params, state))
    theirs = {name: tensor.clone() for name, tensor in view.state_dict().items()}
    with torch.no_grad():
        for tensor in view.state_dict().values():
            tensor.zero_()
    from safetensors.torch import load_file as load_torch_file

    result = view.load_state_dict(load_torch_file(exported), strict=False)
    assert all(k.startswith(("fc.", "bn", "layer")) for k in result.missing_keys)
    new = {k for k in result.missing_keys if not k.endswith("num_batches_tracked")}
    assert new == {"fc.weight", "fc.bias"}
    assert all(key.startswith("patchgd.") for key in result.unexpected_keys)
    for name, tensor in view.state_dict().items():
        if name not in result.missing_keys:
            assert torch.equal(tensor, theirs[name]), name


# --- what is loaded ---


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("encoder", ["small-cnn", "resnet18"])
def test_an_export_comes_back_bit_for_bit(tmp_path, encoder, norm):
    config = config_of(encoder, tmp_path / "export.safetensors", norm=norm, head="cnn-smaller-feat")
    trees = random_trees(config)
    write_export(config.model.weights, config, trees)
    start = start_of(config)
    assert (start.mean, start.std) == (PREPROCESS.mean, PREPROCESS.std)
    assert_equal_trees(start.into(*random_trees(config, seed=1)), trees)
    names = load_file(config.model.weights)
    published = {name for name in names if not name.startswith("patchgd.")}
    if (encoder, norm) == ("resnet18", "batch"):
        assert "layer1.0.bn1.running_var" in published
        assert "patchgd.encoder.params.Dense_0.kernel" in names
    else:
        assert not published


SMALL = ("mobilenet-v2", "deit-tiny")


@pytest.mark.parametrize("encoder", [name for name in SMALL if name in ENCODERS])
def test_other_architectures_come_back_as_well(tmp_path, encoder):
    config = config_of(encoder, tmp_path / "export.safetensors")
    trees = random_trees(config)
    write_export(config.model.weights, config, trees)
    assert_equal_trees(start_of(config).into(*random_trees(config, seed=1)), trees)


def published_resnet18(config=None):
    """A full list of ResNet-18's published tensors, with the classifier."""
    config = config or config_of("resnet18")
    tensors = export_tensors("resnet18", *random_trees(config))
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items() if "patchgd." not in k}
    return {
        **tensors,
        "bn1.num_batches_tracked": np.zeros((), np.int64),
        "fc.weight": np.zeros((1000, 512), np.float32),
        "fc.bias": np.zeros(1000, np.float32),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(tmp_path, suffix, dtype):
    config = config_of("resnet18", tmp_path / f"half{suffix}")
    numpy_type = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    tensors = {
        k: v.astype(numpy_type) if v.dtype == np.float32 else v
        for k, v in published_resnet18().items()
    }
    if suffix == ".safetensors":
        save_file(tensors, config.model.weights)
    else:
        torch = pytest.importorskip("torch", reason="it writes the .pth file")
        as_torch = {
            k: torch.from_numpy(np.asarray(v, v.dtype if v.dtype.kind == "i" else np.float32))
            for k, v in tensors.items()
        }
        halves = {
            k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v
            for k, v in as_torch.items()
        }
        torch.save({"epoch": 90, "state_dict": halves}, config.model.weights)
    params, state = start_of(config).into(*random_trees(config, seed=1))
    kernel = params["encoder"]["BasicBlock_0"]["Conv_0"]["kernel"]
    wanted = tensors["layer1.0.conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, wanted)
    variance = state["encoder"]["batch_stats"]["Normalize_0"]["var"]
    np.testing.assert_array_equal(variance, tensors["bn1.running_var"].astype(np.float32))


# --- what does not fit ---


def test_all_keys_that_do_not_fit_are_in_one_error(tmp_path):
    config = config_of("resnet18", tmp_path / "bad.safetensors")
    tensors = published_resnet18()
    for name in [f"layer{stage}.0.bn{i}.weight" for stage in range(1, 5) for i in (1, 2)]:
        del tensors[name]
    del tensors["bn1.weight"], tensors["bn1.bias"], tensors["bn1.running_mean"]
    tensors["layer5.0.conv1.weight"] = np.zeros(3, np.float32)
    tensors["escape\x1b[2J"] = np.zeros(3, np.float32)
    tensors["conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    tensors["layer1.0.bn1.bias"] = np.zeros(64, np.int32)
    save_file(tensors, config.model.weights)
    with pytest.raises(ConfigError) as caught:
        start_of(config).into(*shapes_of(config))
    text = str(caught.value)
    assert "bad.safetensors do not fit the encoder resnet18" in text
    assert "11 missing: " in text
    assert "bn1.bias" in text
    assert "... and 1 more" in text
    assert "2 unexpected: " in text
    assert "layer5.0.conv1.weight" in text
    assert "\x1b" not in text
    assert "2 of another shape: " in text
    assert "conv1.weight is float32[64, 3, 3, 3], the model needs float32[64, 3, 7, 7]" in text
    assert "layer1.0.bn1.bias is int32[64], the model needs float32[64]" in text


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(published_resnet18(), tmp_path / "resnet18.safetensors")
    config = config_of("resnet50", tmp_path / "resnet18.safetensors")
    with pytest.raises(ConfigError, match=r"missing: .*\n.*another shape: layer1.0.conv1.weight"):
        start_of(config).into(*shapes_of(config))
    with pytest.raises(ConfigError, match="no published weights of the encoder small-cnn"):
        start_of(config_of("small-cnn", tmp_path / "resnet18.safetensors"))


def test_published_weights_need_the_published_norm(tmp_path):
    save_file(published_resnet18(), tmp_path / "resnet18.safetensors")
    config = config_of("resnet18", tmp_path / "resnet18.safetensors", norm="group")
    with pytest.raises(ConfigError, match=r"set --model\.norm batch"):
        start_of(config).into(*shapes_of(config))


def test_a_head_for_other_classes_needs_allow_partial(tmp_path):
    ten = config_of("small-cnn", channels=3, head="attention")
    trees = random_trees(ten)
    path = tmp_path / "ten.safetensors"
    write_export(path, ten, trees)
    config = config_of("small-cnn", path, classes=28, head="attention")
    with pytest.raises(ConfigError) as caught:
        start_of(config).into(*shapes_of(config))
    assert "10], the model needs" in str(caught.value)
    assert "data.classes 10" in str(caught.value)
    assert "add --model.allow-partial" in str(caught.value)
    partial = dataclasses.replace(
        config, model=dataclasses.replace(config.model, allow_partial=True)
    )
    before = random_trees(config, seed=1)
    params, state = start_of(partial).into(*before)
    assert_equal_trees(params["head"], before[0]["head"])
    assert_equal_trees(params["encoder"], trees[0]["encoder"])
    assert_equal_trees(state["encoder"], trees[1]["encoder"])
    # Only the head is optional.
    narrow = dataclasses.replace(partial, model=dataclasses.replace(partial.model, latent_dim=4))
    with pytest.raises(ConfigError, match=r"patchgd\.encoder\.params\.Dense_0\.bias"):
        start_of(narrow).into(*shapes_of(narrow))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="name one"):
        TrainConfig(init_encoder="run", model=ModelConfig(weights="file.pth"))
    with pytest.raises(ConfigError, match="allow_partial needs"):
        ModelConfig(allow_partial=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    tensors = published_resnet18()
    tensors["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    save_file(tensors, tmp_path / "nan.safetensors")
    config = config_of("resnet18", tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match=r"not finite .* 1 tensors: .*BasicBlock_2/Conv_0/kernel"):
        start_of(config).into(*shapes_of(config))


# --- bad files, through the command line ---


def refused(capsys, tmp_path, code, *words, arguments):
    """The command fails with one clear message, and leaves no run folder."""
    folder = tmp_path / "new"
    result = main(["train", *map(str, [*MICRO, *arguments, "--run-dir", folder])])
    text = " ".join(capsys.readouterr().err.split())
    assert result == code, text
    assert text.count("error: ") == 1
    for word in words:
        assert str(word) in text
    assert not folder.exists()
    return text


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_in_it_is_not_run(capsys, tmp_path):
    torch = pytest.importorskip("torch", reason="it writes the .pth files")
    marker = tmp_path / "marker"
    good = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    files = {"plain.pth": tmp_path / "plain.pth", "zip.pth": tmp_path / "zip.pth"}
    files["plain.pth"].write_bytes(pickle.dumps({"x": Payload(marker)}, protocol=2))
    torch.save({**good, "x": Payload(marker)}, files["zip.pth"])
    for name, path in files.items():
        words = [name, "damaged, or holds more than tensors (nothing of it was executed)"]
        refused(capsys, tmp_path, 3, *words, arguments=[*RESNET, "--model.weights", path])
        assert not marker.exists()
    torch.load(files["zip.pth"], weights_only=False)
    assert marker.exists(), "the payload works where pickles are trusted"


def test_damaged_files_are_told(capsys, tmp_path):
    torch = pytest.importorskip("torch", reason="it writes the .pth files")
    tensors = {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}
    save_file(tensors, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "good.pth")
    wide = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"conv1.weight": wide}, tmp_path / "wide.pth")
    torch.save({"conv1.weight": [1.0]}, tmp_path / "list.pth")
    torch.save(torch.zeros(3), tmp_path / "bare.pth")
    zipped = (tmp_path / "good.pth").read_bytes()
    for name, content in {
        "cut.safetensors": good[:-1],
        "header.safetensors": good[:20],
        "empty.safetensors": b"",
        "trailing.safetensors": good + b"#!/bin/sh",
        "absurd.safetensors": (2**62).to_bytes(8, "little") + good[8:],
        "text.safetensors": b"version https://git-lfs.github.com/spec/v1",
        "cut.pth": zipped[: len(zipped) // 2],
        "empty.pth": b"",
        "text.pth": b"<html>not found</html>",
        "weights.h5": good,
    }.items():
        (tmp_path / name).write_bytes(content)
    cases = {
        **dict.fromkeys(
            [f"{n}.safetensors" for n in ("cut", "header", "empty", "trailing", "absurd", "text")],
            "damaged or no safetensors file",
        ),
        **dict.fromkeys(["cut.pth", "empty.pth", "text.pth"], "damaged, or holds more"),
        "weights.h5": "none of .safetensors, .pth",
        "wide.pth": "conv1.weight claims more bytes than the file holds",
        "list.pth": "conv1.weight is no tensor but of type list",
        "bare.pth": "holds no tensors by name",
    }
    for name, words in cases.items():
        with pytest.raises(DataError) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
        assert words in str(caught.value)
    for name in ("cut.safetensors", "cut.pth"):
        arguments = [*RESNET, "--model.weights", tmp_path / name]
        refused(capsys, tmp_path, 3, name, cases[name], arguments=arguments)


@pytest.mark.parametrize(
    ("weights", "code", "words"),
    [
        ("nowhere.pth", 3, "there is no such file"),
        ("folder/nowhere", 3, "there is no such file"),
        (".", 3, "is a folder; name the weight file in it"),
        ("resnet18-imagenet-v1", 2, "did you mean 'resnet18-imagenet1k-v1'"),
        ("resnet50-imagenet1k-v2", 2, "set --model.encoder resnet50"),
        ("hf:resnet50", 2, "neither hf:OWNER/NAME nor hf:OWNER/NAME@COMMIT"),
        ("hf:timm/resnet50.a1_in1k@7672686", 2, "full commit hash"),
        ("https://127.0.0.1/model.pth", 2, "append #sha256=<64 hex digits>"),
    ],
)
def test_unknown_names_are_told(capsys, tmp_path, weights, code, words):
    refused(capsys, tmp_path, code, words, arguments=[*RESNET, "--model.weights", weights])


def test_colour_weights_want_colour_images(capsys, tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    arguments = ["--model.encoder", "resnet18", "--model.weights", tmp_path / "a.safetensors"]
    refused(capsys, tmp_path, 2, "set --data.channels 3", arguments=arguments)


def test_without_pytorch_a_pth_file_says_what_to_install(capsys, tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = [*RESNET, "--model.weights", tmp_path / "a.pth"]
    refused(capsys, tmp_path, 2, "install patchgd-jax[torch]", arguments=arguments)


# --- export, through the command line ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A finished run and its export."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    assert main(["train", *map(str, MICRO), "--run-dir", str(folder)]) == 0
    assert main(["export", str(folder), "--to", "safetensors"]) == 0
    return folder, folder / "export" / "model.safetensors"


def best_of(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    arrays = checkpoints.restore_arrays(checkpoints.best())
    return arrays["params"], arrays["model_state"]


def test_a_run_starts_from_the_export_of_another(exported, capsys, tmp_path):
    folder, weights = exported
    assert sorted(p.name for p in weights.parent.iterdir()) == [weights.name, "preprocess.json"]
    preprocess = json.loads((folder / "preprocess.json").read_text())
    assert json.loads((weights.parent / "preprocess.json").read_text()) == preprocess

    second = tmp_path / "second"
    # With smaller digits, its own statistics would be others.
    more = ["--data.object-ratio", 0.5, 0.6, "--seed", 5, "--model.weights", weights]
    assert main(["train", *map(str, [*MICRO, *more, "--run-dir", second])]) == 0
    assert "new are none" in " ".join(capsys.readouterr().out.split())
    ours = json.loads((second / "preprocess.json").read_text())
    assert (ours["mean"], ours["std"]) == (preprocess["mean"], preprocess["std"])
    # In eight steps Adam moves a weight by a few times eight learning rates, not by its size.
    for x, y in zip(*(jax.tree.leaves(best_of(f)[0]) for f in (second, folder)), strict=True):
        np.testing.assert_allclose(x, y, atol=0.03)
    image = sorted((second / "examples").glob("*.png"))[0]
    assert main(["predict", str(second), str(image), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"]


def test_export_and_import_are_the_identity(exported):
    folder, weights = exported
    config = TrainConfig(
        data=DataConfig(),
        model=ModelConfig(latent_dim=16, weights=str(weights)),
    )
    params, state = start_of(config).into(*random_trees(config))
    wanted = best_of(folder)
    assert_equal_trees(params, wanted[0])
    assert_equal_trees(state["encoder"], wanted[1]["encoder"])


def test_an_export_overwrites_nothing(exported, capsys, tmp_path):
    folder, weights = exported
    before = weights.read_bytes()
    assert main(["export", str(folder)]) == 2
    assert "is not empty; name another folder" in capsys.readouterr().err
    assert weights.read_bytes() == before
    (tmp_path / "file").touch()
    assert main(["export", str(folder), "--output", str(tmp_path / "file" / "x")]) == 7
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export", str(folder), "--output", str(tmp_path / "empty")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]
    assert main(["export", str(tmp_path)]) == 6


def test_bad_exports_are_told(exported, capsys, tmp_path):
    _, weights = exported
    arguments = ["--model.latent-dim", 8, "--model.weights", weights]
    words = ["patchgd.encoder.params.Dense_0.kernel is float32[256, 16], the model needs "
             "float32[256, 8]", "model.latent_dim 16"]  # fmt: skip
    text = refused(capsys, tmp_path, 2, *words, arguments=arguments)
    assert "patchgd.head." in text
    arguments += ["--model.allow-partial"]
    text = refused(capsys, tmp_path, 2, *words, arguments=arguments)
    assert "patchgd.head." not in text
    arguments = ["--model.head", "linear", "--model.weights", weights]
    refused(capsys, tmp_path, 2, "add --model.allow-partial", arguments=arguments)
    tensors = load_file(weights)
    name = "patchgd.encoder.params.Dense_0.kernel"
    header = read_weights(weights).metadata
    save_file({**tensors, name: tensors[name] * np.nan}, tmp_path / "nan.safetensors", header)
    arguments = ["--model.weights", tmp_path / "nan.safetensors"]
    refused(capsys, tmp_path, 3, "not finite", "encoder/params/Dense_0", arguments=arguments)
    save_file(tensors, tmp_path / "header.safetensors", {"patchgd_jax": '{"settings": {}}'})
    arguments = ["--model.weights", tmp_path / "header.safetensors"]
    refused(capsys, tmp_path, 3, "header of weight file", arguments=arguments)
