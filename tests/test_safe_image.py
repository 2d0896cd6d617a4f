"""The image reader on every kind of file a user may have."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from patchgd_jax.data.safe_image import ImageReadError, read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def save(path, array_or_image, **options):
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", COLOUR, **options)
    got = read_image(path, channels=3)
    np.testing.assert_array_equal(got, COLOUR)
    assert got.flags.c_contiguous
    if suffix != "webp":
        grey = save(tmp_path / f"g.{suffix}", GREY)
        np.testing.assert_array_equal(read_image(grey, channels=1)[..., 0], GREY)
        np.testing.assert_array_equal(read_image(grey, channels=3), np.stack([GREY] * 3, -1))


def test_the_content_decides_not_the_name(tmp_path):
    path = save(tmp_path / "a.png", COLOUR)
    other = path.rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(other, channels=3), COLOUR)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    wide = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    path = save(tmp_path / "a.png", wide)
    np.testing.assert_array_equal(
        read_image(path, channels=1)[..., 0], np.round(wide / 257).astype(np.uint8)
    )


def test_transparent_pixels_show_the_background(tmp_path):
    alpha = np.dstack([COLOUR, np.zeros((20, 30), np.uint8)])
    alpha[:, 15:, 3] = 255
    path = save(tmp_path / "a.png", alpha)
    got = read_image(path, channels=3, background=200)
    assert (got[:, :15] == 200).all()
    np.testing.assert_array_equal(got[:, 15:], COLOUR[:, 15:])


def test_a_palette_gives_colours_not_indices(tmp_path):
    image = Image.fromarray(COLOUR).quantize(256)
    path = save(tmp_path / "a.png", image)
    np.testing.assert_array_equal(read_image(path, channels=3), np.asarray(image.convert("RGB")))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", image, exif=exif)
    np.testing.assert_array_equal(read_image(path, channels=3), np.rot90(COLOUR, -1))


def test_cmyk_is_converted(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(COLOUR).convert("CMYK"), quality=95)
    assert read_image(path, channels=3).shape == (20, 30, 3)


def bomb(path, side=60_000):
    """A tiny PNG that claims side x side pixels."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    return path


def test_bad_files_are_errors_with_path_and_reason(tmp_path):
    whole = save(tmp_path / "whole.png", RNG.integers(0, 256, (200, 200), dtype=np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-2000])
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "text.png"
    text.write_text("not an image")
    frames = tmp_path / "frames.tiff"
    Image.fromarray(GREY).save(frames, save_all=True, append_images=[Image.fromarray(GREY)])
    deep = save(tmp_path / "deep.tiff", np.zeros((4, 4), np.float32))
    cases = {
        tmp_path / "missing.png": "there is no such file",
        tmp_path: "it is not a file",
        cut: "truncated",
        empty: "none of PNG",
        text: "none of PNG",
        frames: "several frames",
        deep: "32-bit",
        bomb(tmp_path / "bomb.png"): "claims",
        bomb(tmp_path / "big.png", 11_000): None,
    }
    for path, reason in cases.items():
        if reason is None:
            with pytest.raises(ImageReadError, match="claims 11000 x 11000 px, more than the 1000"):
                read_image(path, channels=1, max_pixels=1000)
            continue
        with pytest.raises(ImageReadError, match=reason) as caught:
            read_image(path, channels=1)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 3


def test_nothing_but_our_error_escapes_damaged_files(tmp_path):
    rng = np.random.default_rng(5)
    for suffix, options in (("png", {}), ("jpg", {}), ("tiff", {"compression": "tiff_lzw"})):
        good = save(tmp_path / f"good.{suffix}", COLOUR, **options).read_bytes()
        bad = tmp_path / f"bad.{suffix}"
        for _ in range(60):
            data = bytearray(good)
            for _ in range(int(rng.integers(1, 8))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            bad.write_bytes(bytes(data[: int(rng.integers(1, len(data) + 1))]))
            with contextlib.suppress(ImageReadError):
                assert read_image(bad, channels=3).dtype == np.uint8
