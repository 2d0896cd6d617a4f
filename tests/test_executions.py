"""A run is the same whichever way its steps are carried out, through the loop and the command."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from micro import BASE, MICRO, changed, final, lines_of, run_here, start
from PIL import Image
from virtual_devices import several_devices

from patchgd_jax import ConfigError, OptimizerConfig
from patchgd_jax.config import DataConfig, StreamConfig
from patchgd_jax.data.images import regions
from patchgd_jax.data.protocols import Band, BandExamples, as_regions
from patchgd_jax.data.run_data import make_data
from patchgd_jax.runs.predict import TrainedModel
from patchgd_jax.runs.train import resume, train


def streamed(config, **settings):
    return dataclasses.replace(config, stream=StreamConfig(enabled=True, **settings))


def distance(one, other):
    """Of two trees, relative to the second: some of its leaves are nothing but rounding."""
    one, other = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other)
    )
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.fixture
def folders(tmp_path):
    """Images of several sizes and two classes, in a folder for each class."""
    rng = np.random.default_rng(0)
    for number in range(16):
        height, width = [(33, 45), (12, 20)][number % 4 // 2]
        pixels = rng.integers(0, 200, (height, width, 3)).astype(np.uint8)
        pixels[..., number % 2] //= 3
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return dataclasses.replace(
        BASE,
        data=DataConfig(root=str(tmp_path / "images"), fit="native", channels=3),
        # Adam would make much of the rounding of gradients that are zero.
        optimizer=OptimizerConfig(name="sgd"),
        batch_size=2,
        eval_batch_size=4,
    )


def test_a_streamed_run_of_files_is_the_resident_one(folders, tmp_path):
    """Images of several sizes, some smaller than a patch."""
    whole = train(folders, tmp_path / "whole")
    parts = train(streamed(folders), tmp_path / "parts")
    wanted, got = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert distance(got["params"], wanted["params"]) < 1e-6
    assert distance(got["model_state"], wanted["model_state"]) < 1e-6
    assert parts["best"]["loss"] == pytest.approx(whole["best"]["loss"], rel=1e-5)
    scored = TrainedModel(tmp_path / "parts").evaluate()
    assert scored["recorded"]["loss"] == scored["loss"]


def test_a_streamed_run_goes_on_where_it_was_stopped(tmp_path):
    config = streamed(changed({"size": (40, 57)}), buffers=2, readers=1)
    train(config, tmp_path / "whole")
    wanted = final(tmp_path / "whole")
    train(dataclasses.replace(config, save_every=2), tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "00000004")
    resume(tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path / "stopped"), wanted)


def test_reused_latents_and_micro_batches_train(tmp_path):
    config = dataclasses.replace(BASE, epochs=3)
    config = streamed(config, max_age=6, micro_batch=4, store_dir=str(tmp_path))
    train(config, tmp_path / "run")
    ages = [line["z_age_max"] for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    # The first visit of each image finds nothing, later ones what was written steps ago.
    assert ages[:4] == [0] * 4
    assert max(ages) > 0


def test_predict_reads_large_images_by_patches(tmp_path, monkeypatch):
    train(changed({"size": (40, 57)}), tmp_path / "run")
    model = TrainedModel(tmp_path / "run")
    paths = sorted((tmp_path / "run" / "examples").glob("*.png"))
    wanted = model.predict_files(paths)
    monkeypatch.setattr("patchgd_jax.runs.predict.RESIDENT_BYTES", 0)
    monkeypatch.setattr(model, "read", lambda path: pytest.fail("read whole"))
    got = model.predict_files(paths)
    for one, two in zip(wanted, got, strict=True):
        assert one["label"] == two["label"]
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-6)
    with pytest.raises(regions.ImageReadError, match="there is no such file"):
        model.predict_files([tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": DataConfig(root="x", channels=3)}, "add --data.fit native"),
        ({"data": DataConfig(tfds="mnist")}, "not data.tfds or data.panda"),
        ({"mesh": "data=2"}, "stream.enabled is for one device"),
        ({"batch_size": 6, "stream": StreamConfig(enabled=True, micro_batch=4)}, "does not divide"),
    ],
)
def test_what_cannot_be_streamed_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **{"stream": StreamConfig(enabled=True), **settings})


def test_stream_settings_are_checked():
    for settings in ({"buffers": 1}, {"readers": 0}, {"micro_batch": 0}, {"max_age": -1}):
        with pytest.raises(ConfigError, match=f"stream.{next(iter(settings))}"):
            StreamConfig(enabled=True, **settings)
    with pytest.raises(ConfigError, match=r"add --stream\.enabled"):
        StreamConfig(max_age=3)


def test_bands_of_images_are_those_of_the_whole_ones(folders):
    """Of files of several sizes, and of generated images; beyond an image is its background."""
    for config in (folders, changed({"size": (40, 57)})):
        data = make_data(config)
        whole = as_regions(data.train)
        bands = [Band(8, height - 4, width) for height, width in data.shapes]
        for index in range(len(whole)):
            wanted, got = whole[index], BandExamples(whole, bands, 0)[index]
            height = wanted["image"].shape[0]
            padded = np.pad(wanted.pop("image"), ((0, 4), (0, 0), (0, 0)))
            np.testing.assert_array_equal(got.pop("image"), padded[8 : height + 4])
            wanted.pop("size", None)
            assert wanted.keys() == got.keys()
            assert all(np.array_equal(wanted[name], got[name]) for name in got)


def process(folder, *arguments, devices=1, number=None, port=0, what="train"):
    """A process of the command, in the run folder `run`; one of two if it has a number."""
    environment = several_devices(devices)
    named = ["--run-dir", "run"] if what == "train" else ["run"]
    coordinator = f"127.0.0.1:{port}"
    if number == 0:
        named += ["--coordinator", coordinator, "--processes", 2, "--process", 0]
    elif number is not None:
        environment |= {
            "PATCHGD_COORDINATOR": coordinator,
            "PATCHGD_PROCESSES": "2",
            "PATCHGD_PROCESS": str(number),
        }
    return start(what, *arguments, *named, cwd=folder, **environment)


def ended(*processes, timeout=250):
    """Exit codes and what was written to standard error; none is left running."""
    try:
        texts = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# Adam would make much of the rounding of gradients that are zero; and a rate that depends on the
# length of a run would not let its first steps be compared.
SHARED = [
    *MICRO, "--patchgd.strata", 2, "--save-every", 4, "--optimizer.name", "sgd",
    "--optimizer.schedule", "constant", "--optimizer.warmup-epochs", 0,
]  # fmt: skip
RULE = "Conv.*kernel$=-,-,-,data"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_here("train", *SHARED, "--run-dir", folder) == 0
    return folder


def test_a_mesh_trains_as_one_device_and_goes_on_as_one(alone, tmp_path):
    """Four devices, of which the images, their patches and a parameter are divided among."""
    mesh = ["--mesh", "data=2,patch=2", "--param-rules", RULE]
    codes, texts = ended(process(tmp_path, *SHARED, *mesh, devices=4))
    assert codes == [0], texts
    wanted = final(alone)["params"]
    assert distance(final(tmp_path / "run")["params"], wanted) < 1e-5
    # Scored again on one device, whatever it was trained on.
    scored = TrainedModel(tmp_path / "run").evaluate()
    assert scored["loss"] == pytest.approx(scored["recorded"]["loss"], rel=1e-4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000008")
    with pytest.raises(ConfigError, match="mesh data=2,patch=2 is of 4 devices, but there are 1"):
        resume(tmp_path / "run")
    resume(tmp_path / "run", mesh="auto")
    assert distance(final(tmp_path / "run")["params"], wanted) < 1e-5


def test_processes_stop_together_and_one_goes_on(alone, tmp_path):
    """A signal to one of two processes saves and stops both; one process ends the run.

    Each has half of every image, and reads no more of it.
    """
    port = free_port()
    long = [*SHARED, "--epochs", 20, "--save-every", 10_000, "--eval-every", 10_000]
    long += ["--mesh", "patch=2"]
    pair = [process(tmp_path, *long, number=number, port=port) for number in range(2)]
    log = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 8):
        if time.monotonic() > until or any(process.poll() is not None for process in pair):
            pytest.fail(str(ended(*pair, timeout=20)))
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)
    codes, texts = ended(*pair)
    assert codes == [143, 143], texts
    assert all("stopped by SIGTERM after step" in text for text in texts)
    assert len(list((tmp_path / "run" / "checkpoints").glob("0*"))) == 1
    for one, other in zip(lines_of(alone)[:7], lines_of(tmp_path / "run"), strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    resume(tmp_path / "run", mesh="auto")
    steps = [line["step"] for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    assert steps == list(range(1, 161))


@pytest.mark.slow
def test_processes_whose_border_cuts_an_image(tmp_path):
    """Three devices each: the second image's bands are on devices of two processes."""
    six = [*SHARED, "--batch-size", 6, "--eval-batch-size", 6, "--data.train-size", 24]
    port = free_port()
    mesh = ["--mesh", "data=3,patch=2"]
    pair = [
        process(tmp_path, *six, *mesh, devices=3, number=number, port=port) for number in range(2)
    ]
    codes, texts = ended(*pair)
    assert codes == [0, 0], texts
    assert run_here("train", *six, "--run-dir", tmp_path / "one") == 0
    wanted = final(tmp_path / "one")
    assert distance(final(tmp_path / "run")["params"], wanted["params"]) < 1e-5


def test_processes_that_do_not_agree_end_with_what_differs(tmp_path):
    port = free_port()
    pair = [
        process(tmp_path, *SHARED, "--seed", number, number=number, port=port)
        for number in range(2)
    ]
    codes, texts = ended(*pair)
    assert codes == [2, 2], texts
    assert all("settings.seed: process 1 has 1, process 0 has 0" in text for text in texts)
    assert not (tmp_path / "run").exists()
