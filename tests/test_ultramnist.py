"""The generated images: labels, boxes, pools, regions, and the same bytes for ever."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from patchgd_jax import ConfigError, DataConfig, DataError
from patchgd_jax.data.images.pixels import shrink
from patchgd_jax.data.synthetic.digits import load_digits
from patchgd_jax.data.synthetic.trivial_baselines import plan_baselines
from patchgd_jax.data.synthetic.ultramnist import UltraMnist, _enlarge, _noise, multisets

MOST_FREQUENT = DataConfig(digits="font", size=(128, 160), val_size=40)
DIGIT_SUM = DataConfig(digits="font", task="digit-sum", size=(512, 600), scale="absolute")
BENCHMARK = DataConfig(
    digits="font", task="digit-sum", classes=28, size=(400, 400), scale="relative", noise=True
)
CONFIGS = [MOST_FREQUENT, DIGIT_SUM, BENCHMARK]


@pytest.mark.parametrize("config", CONFIGS, ids=["most-frequent", "digit-sum", "benchmark"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_and_boxes(config, split):
    source = UltraMnist(config, split, seed=3)
    labels = []
    for index in range(60):
        plan = source.plan(index)
        values = [d.value for d in plan.digits]
        counts = np.bincount(values, minlength=10)
        if config.task == "digit-sum":
            assert sum(values) == plan.label
            assert 3 <= len(values) <= 5
        else:
            assert counts[plan.label] == 5
            assert len(values) == 8
            assert (np.delete(counts, plan.label) < 5).all()
        taken = np.zeros(config.size, int)
        for d in plan.digits:
            assert source.pool.labels[d.glyph] == d.value
            assert 0 <= d.y <= config.size[0] - d.side
            assert 0 <= d.x <= config.size[1] - d.side
            taken[d.y : d.y + d.side, d.x : d.x + d.side] += 1
        assert taken.max() == 1, "boxes must not overlap"
        labels.append(plan.label)
    assert sorted(set(labels)) == list(range(config.classes)), "classes are balanced"


def test_digit_lists_are_the_published_number_of_multisets():
    assert [len(multisets(s)) for s in range(10)] == [3, 3, 6, 9, 14, 18, 26, 32, 43, 53]
    assert all(sum(m) == 17 for m in multisets(17))


def test_sizes_follow_the_published_law():
    source = UltraMnist(replace(DIGIT_SUM, size=(2000, 2000)), "train", 0)
    sides = [d.side for i in range(600) for d in source.plan(i).digits]
    assert set(sides) == {14} | {28 * f for f in range(1, 10)}
    share = np.array([np.mean([s == 28 * f for s in sides]) for f in range(2, 10)])
    wanted = np.array([4, 3, 2, 1, 1, 2, 3, 4]) / 25
    assert np.abs(share - wanted).max() < 5 * np.sqrt(0.16 / len(sides))
    assert abs(np.mean([s == 14 for s in sides]) - 0.1) < 0.03


def test_object_ratio_and_scale():
    ratio = (0.2, 0.3)
    for scale, reference in (("relative", 100), ("absolute", 256)):
        config = replace(
            MOST_FREQUENT, size=(100, 200), object_ratio=ratio, scale=scale, digit_count=1
        )
        config = replace(config, label_share=1.0)
        source = UltraMnist(config, "train", 0)
        sides = [d.side for i in range(40) for d in source.plan(i).digits]
        assert min(sides) >= round(0.2 * reference)
        assert max(sides) <= round(0.3 * reference)


def test_object_ratio_takes_the_place_of_ultramnists_law():
    config = DataConfig(task="digit-sum", size=(128, 128), object_ratio=(0.1, 0.14))
    source = UltraMnist(config, "train", 0)
    plans = [source.plan(i) for i in range(40)]
    assert {d.side for plan in plans for d in plan.digits} == set(range(13, 19))
    assert all(sum(d.value for d in plan.digits) == plan.label for plan in plans)


@pytest.mark.parametrize("config", CONFIGS, ids=["most-frequent", "digit-sum", "benchmark"])
def test_a_region_is_the_crop_of_the_image(config):
    source = UltraMnist(config, "train", seed=1)
    for index in range(3):
        whole = source[index]["image"][..., 0]
        assert whole.shape == config.size
        for y in range(-20, config.size[0], 67):
            for x in range(-20, config.size[1], 71):
                padded = np.zeros((90, 80), np.uint8)
                top, left = max(y, 0), max(x, 0)
                part = whole[top : y + 90, left : x + 80]
                padded[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = (
                    part
                )
                np.testing.assert_array_equal(source.read(index, y, x, 90, 80), padded)


def test_a_huge_image_costs_only_the_region_read():
    config = replace(MOST_FREQUENT, size=(100_000, 100_000))
    source = UltraMnist(config, "train", 0)
    digit = source.plan(0).digits[0]
    middle = digit.side // 2
    region = source.read(0, digit.y + middle - 500, digit.x, 1000, 2000)
    assert region.shape == (1000, 2000)
    assert digit.side > 15_000


def test_an_example_is_a_function_of_seed_split_and_index():
    def image(seed, split, index):
        return UltraMnist(MOST_FREQUENT, split, seed)[index]["image"]

    one = image(0, "train", 5)
    np.testing.assert_array_equal(one, image(0, "train", 5))
    for other in (image(1, "train", 5), image(0, "validation", 5), image(0, "train", 6)):
        assert (one != other).any()
    source = UltraMnist(MOST_FREQUENT, "train", 0)
    source[9]


GOLDEN = {
    "most-frequent": "ef0b1c9c769f40c2",
    "digit-sum": "b63b3d9b59ace260",
    "benchmark": "d2b70eb3694069a5",
    "sklearn": "61e62965458ad59f",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_plans_never_change(name):
    """If this fails, published seeds mean other images: raise GENERATOR_VERSION and say so."""
    configs = dict(zip(GOLDEN, [*CONFIGS, replace(MOST_FREQUENT, digits="sklearn")], strict=True))
    source = UltraMnist(configs[name], "validation", 11)
    # Not pixels: glyphs depend on the libraries that draw or hold them.
    plans = repr([source.plan(i) for i in range(20)])
    assert hashlib.sha256(plans.encode()).hexdigest()[:16] == GOLDEN[name]


def test_the_renderer_never_changes():
    """As above, for pixels: on a glyph that no library has a part in."""
    glyph = (np.add.outer(np.arange(28) * 9, np.arange(28) * 5) % 256).astype(np.uint8)
    every = np.arange(90)
    pixels = _enlarge(glyph, 90, every, every, smooth=True).tobytes()
    pixels += _enlarge(glyph, 90, every, every, smooth=False).tobytes()
    pixels += _noise(5, (300, 200), every, every).tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "cb874f0e571acedf"


@pytest.mark.parametrize("source", ["sklearn", "font"])
def test_splits_share_no_digit(source):
    train, validation = (load_digits(source, split) for split in ("train", "validation"))
    assert len(train.glyphs) > 3.5 * len(validation.glyphs)
    for pool in (train, validation):
        assert pool.glyphs.dtype == np.uint8
        assert pool.glyphs.shape[1:] == (28, 28)
        assert set(pool.labels) == set(range(10))
        assert (pool.glyphs[:, :4] == 0).all(), "an empty margin stays empty"
    seen = {glyph.tobytes() for glyph in train.glyphs}
    assert not any(glyph.tobytes() in seen for glyph in validation.glyphs)


def write_mnist(folder, count=20, packed=False):
    import gzip

    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], ">u4").tobytes()
            data = header + array.tobytes()
            path = folder / f"{stem}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files(tmp_path, packed):
    write_mnist(tmp_path, packed=packed)
    train, validation = (
        load_digits("mnist", split, str(tmp_path)) for split in ("train", "validation")
    )
    assert train.glyphs.shape == validation.glyphs.shape == (20, 28, 28)
    assert (train.glyphs != validation.glyphs).any()
    np.testing.assert_array_equal(train.labels, np.arange(20) % 10)


def test_damaged_mnist_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no MNIST file .*train-images-idx3-ubyte"):
        load_digits("mnist", "train", str(tmp_path))
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="train-images-idx3-ubyte cannot be read"):
        load_digits("mnist", "train", str(tmp_path))
    path.write_bytes(b"\x00\x00\x00\x01rest")
    with pytest.raises(DataError, match="is no MNIST file: it starts with 1"):
        load_digits("mnist", "train", str(tmp_path))


def test_mnist_prepared_by_tensorflow_datasets(tmp_path):
    """Prepared and read without TensorFlow."""
    import io
    import sys

    import tensorflow_datasets as tfds
    from PIL import Image

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(30), "test": self._generate_examples(10)}

        def _generate_examples(self, count):
            for i in range(count):
                file = io.BytesIO()
                Image.fromarray(np.full((28, 28), i % 10, np.uint8)).save(file, "PNG")
                yield i, {"image": file.getvalue(), "label": i % 10}

    builder = Mnist(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    pool = load_digits("mnist", "train", builder.data_dir)
    assert pool.glyphs.shape == (30, 28, 28)
    np.testing.assert_array_equal(pool.glyphs[:, 0, 0], pool.labels)
    assert len(load_digits("mnist", "validation", builder.data_dir).labels) == 10
    assert "tensorflow" not in sys.modules


def test_digits_without_room_are_an_error():
    config = replace(MOST_FREQUENT, size=(64, 64), object_ratio=(0.6, 0.7))
    with pytest.raises(DataError, match="8 digits find no room in 64 x 64 px"):
        UltraMnist(config, "train", 0).plan(0)


def test_a_label_that_cannot_be_the_most_frequent_is_an_error():
    with pytest.raises(ConfigError, match=r"raise data.label_share"):
        UltraMnist(replace(MOST_FREQUENT, label_share=0.1), "train", 0)


def test_shrink_averages_blocks():
    image = np.arange(5 * 7 * 2, dtype=np.uint8).reshape(5, 7, 2)
    got = shrink(image, 3, background=9)
    padded = np.full((6, 9, 2), 9.0)
    padded[:5, :7] = image
    for i in range(2):
        for j in range(3):
            block = padded[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_array_equal(got[i, j], np.round(block.mean((0, 1))))
    assert shrink(image, 1) is image


def test_trivial_baselines_find_what_is_hidden_in_the_labels():
    def scores(**options):
        config = replace(MOST_FREQUENT, train_size=600, val_size=600, **options)
        sources = (UltraMnist(config, split, 0) for split in ("train", "validation"))
        return plan_baselines(*sources, examples=600)

    got = scores()
    assert got["chance"] == 0.1
    # Five of eight digits show the label, so the biggest does in 5/8 of all images.
    assert abs(got["biggest digit only"] - 0.625) < 0.1
    assert got["number of digits"] < 0.2
    official = replace(DIGIT_SUM, train_size=3000, val_size=3000)
    sources = (UltraMnist(official, split, 0) for split in ("train", "validation"))
    known = plan_baselines(*sources, examples=3000)
    assert abs(known["largest value only"] - 0.37) < 0.05
    assert abs(known["digits and zeros"] - 0.32) < 0.05
    assert abs(known["number of zeros"] - 0.20) < 0.05
