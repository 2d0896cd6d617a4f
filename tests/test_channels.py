"""Grey or colour: what files say of themselves, and that a run never mixes the two unasked."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json

import numpy as np
import pytest
import tensorstore
import tifffile
from PIL import Image

from patchgd_jax import (
    ConfigError,
    DataConfig,
    DataError,
    PatchGDConfig,
    TrainConfig,
)
from patchgd_jax.cli.main import main
from patchgd_jax.config import AugmentConfig
from patchgd_jax.data.images.regions import open_regions
from patchgd_jax.data.sources.channels import resolve_channels
from patchgd_jax.runs.train import train


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def picture(mode, path, seed=0):
    """Noise of a Pillow mode."""
    Image.fromarray(noise(32, 32, 4, seed=seed)).convert(mode).save(path)


def palette(colours):
    def write(path):
        image = Image.fromarray(noise(32, 32) % len(colours))
        image.putpalette(np.array(colours, np.uint8).ravel().tolist())
        image.save(path)

    return write


def tiled(*shape, **options):
    def write(path):
        tifffile.imwrite(path, noise(*shape), tile=(16, 16), **options)

    return write


def zarr(*shape):
    def write(path):
        kvstore = {"driver": "file", "path": str(path)}
        tensorstore.open(
            {"driver": "zarr3", "kvstore": kvstore},
            create=True, dtype="uint8", shape=shape,
        ).result()  # fmt: skip

    return write


GREYS, ONE_TINTED = [(i, i, i) for i in range(16)], [(i, i, i) for i in range(15)] + [(9, 8, 9)]
# What a person who looks at the picture would say, whatever the format.
FILES = {
    "grey.png": (1, lambda p: picture("L", p)),
    "bits.png": (1, lambda p: picture("1", p)),
    "alpha.png": (1, lambda p: picture("LA", p)),
    "16 bits.png": (1, lambda p: Image.fromarray(noise(32, 32, dtype=np.uint16)).save(p)),
    "grey palette.png": (1, palette(GREYS)),
    "grey palette.bmp": (1, palette(GREYS[::-1])),
    "grey palette.tif": (1, palette(GREYS[::-1])),
    "grey.jpg": (1, lambda p: picture("L", p)),
    "grey tiles.tif": (1, tiled(64, 48)),
    "grey and alpha tiles.tif": (1, tiled(64, 48, 2, photometric="minisblack", extrasamples=[2])),
    "grey.npy": (1, lambda p: np.save(p, noise(32, 32))),
    "grey.zarr": (1, zarr(32, 32)),
    "rgb.png": (3, lambda p: picture("RGB", p)),
    "rgba.png": (3, lambda p: picture("RGBA", p)),
    "palette.png": (3, palette(ONE_TINTED)),
    "palette.bmp": (3, palette(ONE_TINTED)),
    "palette.tif": (3, palette(ONE_TINTED)),
    "cmyk.jpg": (3, lambda p: picture("CMYK", p)),
    "rgb.webp": (3, lambda p: picture("RGB", p)),
    "rgb tiles.tif": (3, tiled(64, 48, 3, photometric="rgb")),
    "rgba tiles.tif": (3, tiled(64, 48, 4, photometric="rgb", extrasamples=[2])),
    "rgb.npy": (3, lambda p: np.save(p, noise(32, 32, 3))),
    "rgb.zarr": (3, zarr(32, 32, 3)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_tells_from_its_header_whether_it_is_grey(name, tmp_path):
    expected, write = FILES[name]
    write(tmp_path / name)
    with contextlib.closing(open_regions(tmp_path / name, channels=None)) as source:
        assert source.channels == expected
        assert source.read(0, 0, 8, 8).shape == (8, 8, expected)


def write_images(folder, colour):
    """An image of 32 px for each entry of `colour`, of two classes in turn, on lines from 2 on."""
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for i, coloured in enumerate(colour):
            picture("RGB" if coloured else "L", folder / f"{i}.png", seed=i)
            rows.writerow([f"{i}.png", "ab"[i % 2]])
    return str(folder / "labels.csv")


def config_for(labels, **data):
    return TrainConfig(
        data=DataConfig(csv=labels, size=(32, 32), **data),
        patchgd=PatchGDConfig(patch=16, fraction=0.5),
        batch_size=4,
    )


def channels_of(config):
    return resolve_channels(config).data.channels


def test_the_files_decide_unless_the_settings_do(tmp_path):
    (tmp_path / "grey").mkdir()
    (tmp_path / "colour").mkdir()
    grey = write_images(tmp_path / "grey", [False] * 12)
    colour = write_images(tmp_path / "colour", [True] * 12)
    assert channels_of(config_for(grey)) == 1
    assert channels_of(config_for(colour)) == 3
    assert channels_of(config_for(grey, channels=3)) == 3
    assert channels_of(config_for(colour, channels=1)) == 1
    assert channels_of(TrainConfig()) == 1
    # Nothing is looked at: there is no such folder.
    assert channels_of(TrainConfig(data=DataConfig(panda="none"))) == 3
    with pytest.raises(ConfigError, match=r"data\.channels must be 1 or 3"):
        _ = config_for(colour).data.num_channels
    jitter = AugmentConfig(saturation=0.5)
    assert channels_of(dataclasses.replace(config_for(colour), augment=jitter)) == 3
    with pytest.raises(ConfigError, match="grey images have no colours"):
        resolve_channels(dataclasses.replace(config_for(grey), augment=jitter))


def test_a_file_that_cannot_be_read_is_left_to_what_reads_it(tmp_path):
    labels = write_images(tmp_path, [True] * 12)
    (tmp_path / "0.png").write_bytes(b"no image")
    assert channels_of(config_for(labels)) == 3
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read"):
        train(config_for(labels), tmp_path / "run")


def test_ten_of_the_rarer_kind_are_named(tmp_path):
    labels = write_images(tmp_path, [i >= 12 for i in range(30)])
    with pytest.raises(DataError) as caught:
        resolve_channels(config_for(labels))
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("12 of 30 images are grey, the others in colour; set --data.channels 3")
    assert lines == [f"  line {i + 2}: {tmp_path}/{i}.png is grey" for i in range(10)] + [
        "  and 2 more"
    ]


def test_mixed_files_end_every_command_before_it_begins(tmp_path, command, capsys):
    labels = write_images(tmp_path, [i not in (4, 9) for i in range(12)])
    data = ["--data.csv", labels, "--data.size", "32", "32", "--patchgd.patch", "16"]
    refused = command("train", *data, "--run-dir", "run")
    assert refused.returncode == 3, refused.stderr
    for text in ("2 of 12 images are grey", "--data.channels 3", "line 6:", "line 11:"):
        assert text in refused.stderr
    assert not (tmp_path / "run").exists()
    for other in (["data", "show", *data], ["plan", *data], ["cross-validate", *data]):
        assert main(other) == 3
        assert "2 of 12 images are grey" in capsys.readouterr().err
    assert main(["data", "check", *data, "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["row"] for problem in problems] == [6, 11]
    assert main(["data", "check", *data, "--data.channels", "1"]) == 0
    assert "10 of 12 images are coloured" in capsys.readouterr().out
