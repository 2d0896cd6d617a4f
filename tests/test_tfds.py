"""Frozen data sets: what is written is what was generated, whole or not there; any set is read."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from patchgd_jax import ConfigError, DataConfig, DataError, TrainConfig
from patchgd_jax.data.images.safe_image import decode_image, read_image
from patchgd_jax.data.run_data import make_data
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.data.sources.tfds_source import TfdsSource, stored_channels
from patchgd_jax.data.synthetic import tfds_builder
from patchgd_jax.data.synthetic.png_folder import make_folder
from patchgd_jax.data.synthetic.tfds_builder import UltraMnistBuilder, config_name, make_dataset
from patchgd_jax.data.synthetic.ultramnist import UltraMnist
from patchgd_jax.errors import DiskError

DATA = DataConfig(
    digits="font", task="digit-sum", size=(60, 80), downscale=2, train_size=12, val_size=5
)
RNG = np.random.default_rng(0)

# A process without TensorFlow, even if it is installed, and without network.
ALONE = """
import sys, socket
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "tensorflow":
            return self.finder.find_spec(name, path, target)
def refuse(*_, **__): raise AssertionError("network")
sys.meta_path[:] = map(Without, sys.meta_path)
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def python(code, *arguments, **options):
    """A process that runs some code; its arguments are `sys.argv[1:]`."""
    script = ALONE + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A prepared set of `DATA`, not to be changed."""
    return make_dataset(DATA, 7, tmp_path_factory.mktemp("frozen"))


def all_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def contents(folder):
    """Everything but the order of fields inside a record, which differs between processes."""
    texts = {n: d for n, d in all_bytes(folder).items() if "array_record" not in n}
    records = [
        record
        for split in ("train", "validation")
        for record in tfds.builder_from_directory(folder).as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
    ]
    return texts, repr(records)


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_without_tensorflow_and_network(tmp_path, channels):
    config = replace(DATA, channels=channels)
    out = finish(
        python(
            """
            import importlib, json
            import numpy as np
            import tensorflow_datasets as tfds
            from patchgd_jax.config import DataConfig, from_dict
            from patchgd_jax.data.synthetic import tfds_builder
            from patchgd_jax.data.sources.tfds_source import TfdsSource, stored_channels
            from patchgd_jax.data.synthetic.ultramnist import UltraMnist

            config, root = from_dict(DataConfig, json.loads(sys.argv[1])), sys.argv[2]
            importlib.reload(tfds_builder)
            folder = tfds_builder.make_dataset(config, 7, root)
            (height, width), channels = config.size, config.channels
            for split in ("train", "validation"):
                generated = UltraMnist(config, split, 7)
                read = TfdsSource(folder, split, channels=channels)
                assert len(read) == len(generated)
                assert read.class_names == tuple("0123456789")
                records = tfds.builder_from_directory(folder).as_data_source(split)
                for i, record in enumerate(records):
                    for name, value in generated[i].items():
                        np.testing.assert_array_equal(read[i][name], value)
                        assert read[i][name].dtype == value.dtype, name
                    plan = generated.plan(i)
                    np.testing.assert_array_equal(record["image"], generated[i]["image"])
                    assert (record["index"], record["label"]) == (i, plan.label)
                    assert record["boxes"]["digit"] == [d.value for d in plan.digits]
                    got = np.array(record["boxes"]["bbox"]) * [height, width, height, width]
                    want = [(d.y, d.x, d.y + d.side, d.x + d.side) for d in plan.digits]
                    np.testing.assert_allclose(got, want, atol=1e-3)
            name = f"ultra_mnist/{folder.parent.name}"
            part = tfds.data_source(name, data_dir=root, split="train[25%:50%]+validation[-1:]")
            assert [record["index"] for record in part] == [3, 4, 5, 4]
            registered = tfds.builder("ultra_mnist/512px-10classes-font", data_dir=root)
            limit = tfds.download.DownloadConfig(max_examples_per_split=2)
            registered.download_and_prepare(download_config=limit)
            assert registered.as_data_source("train")[1]["image"].shape == (512, 512, 1)
            assert len(registered.as_data_source("validation")) == 2
            assert "tensorflow" not in sys.modules
            print(folder)
            """,
            json.dumps(
                {
                    "digits": "font",
                    "task": "digit-sum",
                    "size": DATA.size,
                    "downscale": 2,
                    "train_size": 12,
                    "val_size": 5,
                    "channels": channels,
                }
            ),
            tmp_path,
        )
    )
    folder = Path(out.splitlines()[-1])
    assert stored_channels(folder) == channels
    assert folder.parent.name == config_name(config, 7)
    assert [p.name for p in folder.parent.iterdir()] == ["1.0.0"]


def test_order_is_the_generators_over_several_files(tmp_path, monkeypatch, frozen):
    monkeypatch.setattr(tfds_builder, "_SHARD_BYTES", 2000)
    folder = make_dataset(DATA, 7, tmp_path)
    files = [p for p in folder.iterdir() if "train.array_record" in p.name]
    assert len(files) > 2
    many, one = (TfdsSource(f, "train", channels=1) for f in (folder, frozen))
    for a, b in zip(many, one, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["label"] == b["label"]
    # Without TensorFlow, tfds' own writer fails beyond what it keeps in memory.
    records = tfds.builder_from_directory(folder).as_data_source("train")
    assert [r["index"] for r in records] == list(range(12))


def test_equal_settings_give_equal_sets_and_different_ones_different_names(tmp_path, frozen):
    assert contents(make_dataset(DATA, 7, tmp_path)) == contents(frozen)
    named = set(tfds_builder._LOOK)
    others = {f.name for f in fields(DataConfig)} - named
    assert others == {
        *("csv", "root", "tfds", "panda", "columns", "split", "empty", "panda_options", "fit"),
        "level",
        "class_names",
        *("background", "bad_images", "bad_limit", "digits_dir"),
    }, "a new setting of the images must be in the name of a set"
    variants = [replace(DATA, **c) for c in ({"size": (60, 90)}, {"noise": True}, {"channels": 3})]
    names = [config_name(DATA, 7), config_name(DATA, 8), *(config_name(v, 7) for v in variants)]
    assert len(set(names)) == 5
    published = [c.name for c in UltraMnistBuilder.BUILDER_CONFIGS]
    assert len(set(published)) == len(published)


def test_what_is_there_is_never_written_over(frozen):
    before = all_bytes(frozen)
    with pytest.raises(ConfigError, match=f"{frozen} holds this data set already"):
        make_dataset(DATA, 7, frozen.parents[2])
    assert all_bytes(frozen) == before
    with pytest.raises(ConfigError, match=r"data\.csv names images that exist already"):
        make_dataset(replace(DATA, csv="a.csv", downscale=1), 7, frozen.parents[2])


def test_places_where_nothing_can_be_made(tmp_path, frozen):
    (tmp_path / "file").touch()
    for make in (make_dataset, make_folder):
        with pytest.raises((DiskError, ConfigError), match=f"{tmp_path}/file"):
            make(DATA, 7, tmp_path / "file")
        with pytest.raises(DiskError, match=f"{tmp_path}/file"):
            make(DATA, 7, tmp_path / "file" / "below")
    foreign = tmp_path / frozen.relative_to(frozen.parents[2])
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty; name another folder"):
        make_dataset(DATA, 7, tmp_path)
    assert [p.name for p in foreign.iterdir()] == ["mine.txt"]


MAKE = """
    import time, os
    from pathlib import Path
    from patchgd_jax.config import DataConfig
    from patchgd_jax.data.synthetic import tfds_builder
    data = DataConfig(digits="font", task="digit-sum", size=(60, 80), downscale=2,
                      train_size=12, val_size=5)
    root = Path(sys.argv[1])
"""


def test_two_processes_that_make_one_set_both_end_well(tmp_path, frozen):
    code = (
        MAKE
        + """
    write = tfds_builder.UltraMnistBuilder.write_records
    def together(self, *arguments, **options):
        (root / f"here-{os.getpid()}").touch()
        while len(list(root.glob("here-*"))) < 2:
            time.sleep(0.01)
        write(self, *arguments, **options)
    tfds_builder.UltraMnistBuilder.write_records = together
    print(tfds_builder.make_dataset(data, 7, root))
    """
    )
    folders = [finish(p) for p in [python(code, tmp_path), python(code, tmp_path)]]
    assert folders[0] == folders[1]
    folder = Path(folders[0].strip())
    assert contents(folder) == contents(frozen)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path):
    code = (
        MAKE
        + """
    features = tfds_builder._features
    def stuck(config, example):
        if example.index == 8:
            print("half", flush=True)
            time.sleep(1000)
        return features(config, example)
    tfds_builder._features = stuck
    tfds_builder.make_dataset(data, 7, root)
    """
    )
    process = python(code, tmp_path)
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    name = f"ultra_mnist/{config_name(DATA, 7)}"
    (left,) = (tmp_path / name).iterdir()
    with pytest.raises(ConfigError, match="no prepared tensorflow-datasets set"):
        TfdsSource(name, "train", channels=1, data_dir=tmp_path)

    notes, seen = [], []
    folder = make_dataset(
        DATA, 7, tmp_path, on_example=lambda *counts: seen.append(counts), on_note=notes.append
    )
    assert notes == [f"{left} is unfinished work; delete it if no other process is writing it"]
    assert seen == [(i + 1, total) for total in (12, 5) for i in range(total)]
    assert len(TfdsSource(name, "train", channels=1, data_dir=tmp_path)) == 12
    assert {left, folder} == set(folder.parent.iterdir()), "another's work is not deleted"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    code = (
        MAKE
        + """
    import resource
    from patchgd_jax.data.synthetic.png_folder import make_folder
    from patchgd_jax.errors import DiskError
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    for make in (tfds_builder.make_dataset, make_folder):
        try:
            make(data, 7, root / make.__name__)
        except DiskError as error:
            assert "cannot write" in str(error), error
            print(error)
        else:
            raise AssertionError(make)
    """
    )
    out = finish(python(code, tmp_path, 150))
    assert out.count("cannot write") >= 2
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not list(tmp_path.rglob("1.0.0"))


def test_png_folder_holds_the_generators_pixels(tmp_path):
    config = replace(DATA, channels=3)
    folder = make_folder(config, 7, tmp_path / "out")
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "split"]
    assert sum(1 for p in folder.rglob("*.png")) == len(rows) == 17
    for split in ("train", "validation"):
        source = UltraMnist(config, split, 7)
        for index, row in enumerate(r for r in rows if r["split"] == split):
            want = source[index]
            np.testing.assert_array_equal(
                read_image(folder / row["path"], channels=3), want["image"]
            )
            assert row["label"] == str(want["label"])
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ConfigError, match=f"{folder} is not empty"):
        make_folder(config, 7, folder)
    (tmp_path / "empty").mkdir()
    make_folder(config, 7, tmp_path / "empty")


def test_an_error_half_way_leaves_no_folder(tmp_path, monkeypatch):
    class Breaks(UltraMnist):
        def __getitem__(self, index):
            if index == 9:
                raise DataError("broken")
            return super().__getitem__(index)

    monkeypatch.setattr("patchgd_jax.data.synthetic.png_folder.UltraMnist", Breaks)
    monkeypatch.setattr(tfds_builder, "UltraMnist", Breaks)
    for make in (make_folder, make_dataset):
        with pytest.raises(DataError, match="broken"):
            make(DATA, 7, tmp_path / make.__name__)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not (tmp_path / "make_folder").exists()


def test_reads_from_threads(frozen):
    source = TfdsSource(frozen, "train", channels=1)
    want = [source[i]["image"] for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source[i % 12]["image"], range(120)))
    for i, image in enumerate(got):
        np.testing.assert_array_equal(image, want[i % 12])
    for index in (-1, 12):
        with pytest.raises(IndexError):
            source[index]


def test_fingerprint_follows_the_content_not_the_place(tmp_path, frozen):
    moved = shutil.copytree(frozen, tmp_path / "elsewhere")
    one = TfdsSource(frozen, "train", channels=1)
    assert TfdsSource(moved, "train", channels=1).fingerprint == one.fingerprint
    other = make_dataset(DATA, 8, tmp_path)
    renewed = shutil.copytree(frozen, tmp_path / "renewed")
    about = renewed / "metadata.json"
    about.write_text(about.read_text().replace('"seed": 7', '"seed": 9'))
    prints = {
        one.fingerprint,
        TfdsSource(frozen, "validation", channels=1).fingerprint,
        TfdsSource(frozen, "train", channels=3).fingerprint,
        TfdsSource(frozen, "train", channels=1, background=255).fingerprint,
        TfdsSource(other, "train", channels=1).fingerprint,
        TfdsSource(renewed, "train", channels=1).fingerprint,
    }
    assert len(prints) == 6


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


COLOUR = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8))
DEEP = Image.fromarray(RNG.integers(0, 2**16, (12, 5), dtype=np.uint16))
FILES = [
    encoded(COLOUR.quantize(64)),
    encoded(ALPHA),
    encoded(DEEP),
    encoded(COLOUR.convert("CMYK"), "JPEG", quality=95),
    encoded(COLOUR),
]


def own_set(root, files=FILES, *, splits=("train",), name="own", **features):
    """A set that somebody made with tfds, of images of all kinds and sizes."""

    class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            standard = {
                "picture": tfds.features.Image(shape=(None, None, 3)),
                "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
                "note": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features or standard),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for i, data in enumerate(files):
                example = {"picture": data, "kind": i % 2, "note": f"number {i}"}
                yield i, {k: example.get(k, data) for k in self.info.features}

    Own.name = name
    builder = Own(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The data dir of a set with one split, not to be changed."""
    root = tmp_path_factory.mktemp("own")
    own_set(root)
    return root


def test_images_of_any_kind_are_decoded_by_our_rules(own):
    source = TfdsSource("own", "train", channels=3, background=9, data_dir=own)
    assert source.class_names == ("cat", "dog")
    for i in range(4):
        got = source[i]
        np.testing.assert_array_equal(
            got["image"], decode_image(FILES[i], "file", channels=3, background=9)
        )
        assert (got["label"], got["id"]) == (i % 2, i)
        assert got["image"].dtype == np.uint8
    palette, alpha, deep = (source[i]["image"] for i in range(3))
    np.testing.assert_array_equal(palette, np.asarray(COLOUR.quantize(64).convert("RGB")))
    opacity = np.asarray(ALPHA)[..., 3:] / 255
    over = np.asarray(ALPHA)[..., :3] * opacity + 9 * (1 - opacity)
    np.testing.assert_allclose(alpha, over, atol=1)
    np.testing.assert_array_equal(deep[..., 1], np.round(np.asarray(DEEP) / 257))
    grey = TfdsSource("own", "validation", channels=1, data_dir=own)
    np.testing.assert_array_equal(grey[0]["image"][..., 0], np.asarray(COLOUR.convert("L")))


def test_splits(tmp_path, own):
    def count(root, split, name="own"):
        return len(TfdsSource(name, split, channels=1, data_dir=root))

    assert (count(own, "train"), count(own, "validation")) == (4, 1)
    own_set(tmp_path, FILES[:3], splits=("train", "test"))
    assert (count(tmp_path, "train"), count(tmp_path, "validation")) == (3, 3)
    with pytest.raises(ConfigError, match="no split 'test' besides its validation images"):
        count(tmp_path, "test")
    own_set(tmp_path, FILES[:2], splits=("train", "test", "validation"), name="three")
    for split in ("train", "validation", "test"):
        source = TfdsSource("three", split, channels=1, data_dir=tmp_path)
        assert f" {split} " in source.fingerprint
    own_set(tmp_path, FILES[:1], splits=("test",), name="no_train")
    with pytest.raises(ConfigError, match="has no split 'train'; its splits: test"):
        count(tmp_path, "train", "no_train")
    own_set(tmp_path, FILES[:1], name="single")
    with pytest.raises(DataError, match=r"split train\[80%:\] is empty"):
        count(tmp_path, "validation", "single")


def test_a_run_has_the_sets_test_images_and_says_what_chooses_the_model(tmp_path, own):
    def data(folder):
        config = DataConfig(tfds=str(folder), size=(32, 32))
        return make_data(resolve_channels(TrainConfig(data=config, batch_size=1)))

    three = data(own_set(tmp_path, FILES[:2], splits=("train", "test", "validation"), name="three"))
    assert three.test is not None
    assert three.notes == ()
    assert three.test.describe(1).endswith("split test")
    assert three.test[1]["image"].shape == (32, 32, 3)
    two = data(own_set(tmp_path, FILES[:3], splits=("train", "test"), name="two"))
    assert two.test is None
    assert two.notes == (
        "The set has no split validation; its split test is used to select the best model.",
    )
    assert "the last fifth of its split train is" in data(own / "own").notes[0]


def test_a_set_says_whether_its_images_are_grey(tmp_path, own):
    assert stored_channels("own", own) == 3
    image = tfds.features.Image(shape=(None, None, None))
    kind = tfds.features.ClassLabel(num_classes=2)
    grey = encoded(COLOUR.convert("L"))
    unsaid = own_set(tmp_path, [grey] * 2, name="unsaid", picture=image, kind=kind)
    with pytest.raises(ConfigError, match=r"set --data\.channels 1 or 3"):
        stored_channels(unsaid)


def test_a_set_is_found_by_name_config_version_or_folder(tmp_path, frozen):
    root, config = frozen.parents[2], frozen.parent.name
    names = ("ultra_mnist", f"ultra_mnist/{config}", f"ultra_mnist/{config}:1.0.0")
    for name in (*names, frozen, frozen.parent):
        assert len(TfdsSource(name, "train", channels=1, data_dir=root)) == 12
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shutil.copytree(frozen, tmp_path / "ultra_mnist" / "second" / "1.0.0")
    with pytest.raises(ConfigError, match=f"several configs.*{config}, second"):
        TfdsSource("ultra_mnist", "train", channels=1, data_dir=tmp_path)


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path, own, monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'own'") as caught:
        TfdsSource("owm", "train", channels=1, data_dir=own)
    assert (
        f"tfds.builder('owm', data_dir='{own}').download_and_prepare(file_format='array_record')"
        in str(caught.value)
    )
    with pytest.raises(ConfigError, match="Prepared there: own"):
        TfdsSource("mnist", "train", channels=1, data_dir=own)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=f"{tmp_path}/none/mnist holds no dataset_info"):
        TfdsSource("mnist", "train", channels=1)


def test_sets_of_another_kind_are_refused(tmp_path, own):
    image, label = tfds.features.Image, tfds.features.ClassLabel
    own_set(tmp_path, FILES[:1], left=image(), right=image(), kind=label(num_classes=2))
    with pytest.raises(ConfigError, match="2 images and 1 class labels") as caught:
        TfdsSource("own", "train", channels=1, data_dir=tmp_path)
    assert "kind (ClassLabel), left (Image), right (Image)" in str(caught.value)
    folder = shutil.copytree(own / "own" / "1.2.0", tmp_path / "other")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ConfigError, match="stored as tfrecord, which has no random access"):
        TfdsSource(folder, "train", channels=1)


def test_damaged_sets_are_data_errors(tmp_path, own):
    def damaged(change):
        folder = shutil.copytree(own / "own" / "1.2.0", tmp_path / change.__name__)
        change(folder)
        with pytest.raises(DataError) as caught:
            for _ in TfdsSource(folder, "train", channels=1):
                pass
        return str(caught.value)

    def records(folder):
        return next(p for p in folder.iterdir() if "array_record" in p.name)

    def missing(folder):
        records(folder).unlink()

    def truncated(folder):
        path = records(folder)
        os.truncate(path, path.stat().st_size // 3)

    def flipped(folder):
        data = bytearray(records(folder).read_bytes())
        at = data.find(b"IDAT") + 10
        data[at : at + 50] = bytes(50)
        records(folder).write_bytes(data)

    def no_features(folder):
        (folder / "features.json").unlink()

    def no_json(folder):
        (folder / "dataset_info.json").write_text("{")

    assert "is missing" in damaged(missing)
    assert "own/1.2.0" in damaged(truncated)
    assert "of own/1.2.0, split train" in damaged(flipped)
    assert "cannot be read as a prepared data set" in damaged(no_features)
    assert "cannot be read as a prepared data set" in damaged(no_json)
    bad = own_set(tmp_path, [FILES[4], FILES[4][:-200]], splits=("train", "test"), name="bad")
    source = TfdsSource(bad, "train", channels=1)
    source[0]
    with pytest.raises(DataError, match=r"cannot read image record 1 of bad/1\.2\.0, split train"):
        source[1]


def test_decoding_bytes_is_reading_the_file(tmp_path):
    path = tmp_path / "a.png"
    for data in [*FILES, *(encoded(COLOUR, kind) for kind in ("TIFF", "BMP", "WEBP"))]:
        path.write_bytes(data)
        for channels in (1, 3):
            options = {"channels": channels, "background": 77}
            np.testing.assert_array_equal(
                decode_image(data, "a", **options), read_image(path, **options)
            )
    with pytest.raises(DataError, match="truncated"):
        decode_image(encoded(COLOUR, "TIFF")[:-1000], "a", channels=1)
    with pytest.raises(DataError, match="more than the 10 px allowed"):
        decode_image(FILES[0], "a", channels=1, max_pixels=10)
