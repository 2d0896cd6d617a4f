"""The image reader on every kind of file a user may have."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from patchgd_jax.data.images.safe_image import ImageHeader, ImageReadError, read_header, read_image

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


# Where the row and the column of the file end up: EXIF 2.3, table 6.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_exif_orientation_is_applied_before_the_size_is_told(tmp_path, suffix):
    flat = np.kron(np.arange(0, 240, 40, np.uint8).reshape(2, 3), np.ones((16, 16), np.uint8))
    stored = np.stack([flat] * 3, -1)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    for orientation, upright in UPRIGHT.items():
        image = Image.fromarray(stored)
        exif = image.getexif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"{orientation}.{suffix}", image, exif=exif, **options)
        got, wanted = read_image(path, channels=3), upright(stored)
        assert got.shape == wanted.shape
        assert np.abs(got.astype(int) - wanted).max() <= 2, orientation
        assert got.flags.c_contiguous
        header = read_header(path)
        assert (header.height, header.width) == wanted.shape[:2], orientation


def test_orientation_behind_the_pixels_or_damaged_is_ignored(tmp_path):
    exif = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 1, 6) + bytes(4)
    rows = b"".join(b"\0" + row.tobytes() for row in GREY)
    parts = {"before": [("eXIf", exif), ("IDAT", zlib.compress(rows))]}
    parts["behind"] = parts["before"][::-1]
    parts["damaged"] = [("eXIf", b"no TIFF at all"), ("IDAT", zlib.compress(rows))]
    for name, chunks in parts.items():
        path = png(tmp_path / f"{name}.png", 30, 20, 8, 0, chunks)
        wanted = UPRIGHT[6](GREY) if name == "before" else GREY
        np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], wanted)
        assert read_header(path)[:2] == wanted.shape[::-1]


def test_cmyk_is_converted(tmp_path):
    blocks = np.array([[255, 0, 0], [0, 200, 0], [20, 30, 250], [128, 128, 128]], np.uint8)
    wanted = np.kron(blocks[:, None], np.ones((16, 16, 1), np.uint8))
    for suffix in ("jpg", "tiff"):
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(wanted).convert("CMYK"))
        got = read_image(path, channels=3)
        assert np.abs(got.astype(int) - wanted).max() <= 4, suffix
        assert read_header(path).channels == 3


def test_every_kind_of_grey_and_alpha(tmp_path):
    image = Image.fromarray(GREY)
    alpha = Image.fromarray(np.where(GREY > 99, 255, 0).astype(np.uint8))
    over = np.where(GREY > 99, GREY, 7)
    bits = np.where(GREY > 127, 255, 0)
    both = Image.merge("LA", (image, alpha))
    palette = Image.fromarray(COLOUR).quantize(8)
    with_alpha = palette.convert("RGBA")
    with_alpha.putalpha(alpha)
    indexed = palette.convert("PA")
    indexed.putalpha(alpha)
    colours = np.where(np.asarray(alpha)[..., None], np.asarray(palette.convert("RGB")), 7)
    cases = [
        ("1.png", Image.fromarray(GREY > 127), bits, 1),
        ("1.tiff", Image.fromarray(GREY > 127), bits, 1),
        ("la.png", both, over, 1),
        ("la.tiff", both, over, 1),
        ("la.webp", both, over, 3),
        ("rgba.tiff", with_alpha, colours, 3),
        ("pa.tiff", indexed, colours, 3),
        ("p.bmp", palette, np.asarray(palette.convert("RGB")), 3),
        ("ycc.tiff", Image.new("YCbCr", (30, 20), (99, 128, 128)), np.full((20, 30), 99), 3),
    ]
    for name, made, wanted, channels in cases:
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        path = save(tmp_path / name, made, **options)
        got = read_image(path, channels=3, background=7)
        wanted = wanted if wanted.ndim == 3 else np.stack([wanted] * 3, -1)
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        header = ImageHeader(30, 20, channels, name.split(".")[1].upper())
        assert read_header(path) == header, name
        grey = read_image(path, channels=1, background=7)
        luma = np.asarray(Image.fromarray(wanted.astype(np.uint8)).convert("L"))
        np.testing.assert_array_equal(grey[..., 0], luma, err_msg=name)


def test_premultiplied_alpha_is_undone(tmp_path):
    pixels = bytes([100, 255, 50, 128, 0, 0])
    path = tiff(tmp_path / "la.tiff", 3, 1, (8, 8), pixels, {277: 2, 338: 1})
    # Over black a premultiplied value shows as it is.
    np.testing.assert_allclose(read_image(path, channels=1)[0, :, 0], [100, 50, 0], atol=1)
    rgb = bytes([100, 50, 20, 128, 0, 0, 0, 0])
    path = tiff(tmp_path / "rgba.tiff", 2, 1, (8,) * 4, rgb, {277: 4, 338: 1, 262: 2})
    got = read_image(path, channels=3, background=200)[0]
    np.testing.assert_allclose(got, [[200, 150, 120], [200, 200, 200]], atol=2)


def test_deep_tiffs_are_scaled_by_their_bits(tmp_path):
    values = np.array([[0, 257, 1000, 40_000, 65_535]], np.uint16)
    wanted = np.round(values / 257)
    little = tiff(tmp_path / "little.tiff", 5, 1, (16,), values.tobytes())
    white = tiff(tmp_path / "white.tiff", 5, 1, (16,), values.tobytes(), {262: 0})
    big = tiff(tmp_path / "big.tiff", 5, 1, (16,), values.astype(">u2").tobytes(), order=">")
    np.testing.assert_array_equal(read_image(little, channels=1)[..., 0], wanted)
    np.testing.assert_array_equal(read_image(big, channels=1)[..., 0], wanted)
    np.testing.assert_array_equal(read_image(white, channels=1)[..., 0], 255 - wanted)
    # Two values of 12 bits in three bytes: 0x000 0xFFF, 0x800 0x080.
    twelve = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x80])
    path = tiff(tmp_path / "twelve.tiff", 4, 1, (12,), twelve)
    np.testing.assert_array_equal(read_image(path, channels=1)[0, :, 0], [0, 255, 128, 8])
    colour = np.array([[[0, 257, 65_535]]], np.uint16)
    path = tiff(tmp_path / "rgb.tiff", 1, 1, (16,) * 3, colour.tobytes(), {262: 2, 277: 3})
    np.testing.assert_array_equal(read_image(path, channels=3), [[[0, 1, 255]]])
    sixteen = b"\0" + colour.astype(">u2").tobytes()
    path = png(tmp_path / "rgb.png", 1, 1, 16, 2, [("IDAT", zlib.compress(sixteen))])
    np.testing.assert_array_equal(read_image(path, channels=3), [[[0, 1, 255]]])


def test_a_truncated_tiff_is_told_by_its_header(tmp_path):
    data = zlib.compress(GREY.tobytes())
    path = tiff(tmp_path / "whole.tiff", 30, 20, (8,), data, {259: 8})
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], GREY)
    size = path.stat().st_size
    for tags in ({259: 8, 279: size}, {259: 8, 273: size}, {259: 1, 273: size}):
        path = tiff(tmp_path / "cut.tiff", 30, 20, (8,), data, tags)
        for read in (read_header, lambda path: read_image(path, channels=1)):
            with pytest.raises(ImageReadError, match=f"truncated: {size} of at least "):
                read(path)
    # A count that is too high harms nobody where there is no compression.
    path = tiff(tmp_path / "count.tiff", 30, 20, (8,), GREY.tobytes(), {279: 99_999})
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], GREY)


def test_a_transparent_colour_is_found_at_every_depth(tmp_path):
    """PNG's tRNS chunk is in the file's own bits, Pillow's pixels are in 8."""
    cases = {
        "1": (1, 0, bytes([0b01010101]), (1,), np.arange(8) % 2 == 1),
        "2": (2, 0, bytes([0b00011011] * 2), (2,), np.arange(8) % 4 == 2),
        "4": (4, 0, bytes([0x01, 0x23, 0x45, 0x67]), (5,), np.arange(8) == 5),
        "8": (8, 0, bytes(range(8)), (6,), np.arange(8) == 6),
        "16": (16, 0, np.arange(1000, 1008).astype(">u2").tobytes(), (1003,), np.arange(8) == 3),
        "rgb": (8, 2, bytes(range(24)), (9, 10, 11), np.arange(8) == 3),
        "rgb16": (
            16,
            2,
            np.arange(0, 24_000, 1000).astype(">u2").tobytes(),
            (9000, 10_000, 11_000),
            np.arange(8) == 3,
        ),
    }
    for name, (depth, kind, row, colour, transparent) in cases.items():
        chunks = [("tRNS", struct.pack(f">{len(colour)}H", *colour))]
        chunks.append(("IDAT", zlib.compress(b"\0" + row)))
        path = png(tmp_path / f"{name}.png", 8, 1, depth, kind, chunks)
        solid = png(tmp_path / f"{name}-solid.png", 8, 1, depth, kind, chunks[1:])
        wanted = read_image(solid, channels=3)[0].copy()
        wanted[transparent] = 201
        got = read_image(path, channels=3, background=201)[0]
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    palette = Image.fromarray(COLOUR).quantize(4)
    path = save(tmp_path / "p.png", palette, transparency=bytes([255, 0, 255, 128]))
    got = read_image(path, channels=3, background=90)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    assert (got[index == 1] == 90).all()
    np.testing.assert_array_equal(got[index == 0], colours[index == 0])
    half = (colours[index == 3].astype(int) * 128 + 90 * 127) / 255
    assert np.abs(got[index == 3] - half).max() <= 1


def test_a_phones_extra_pictures_are_left_out(tmp_path):
    path = tmp_path / "a.jpg"
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    first.save(path, "MPO", save_all=True, append_images=[second], quality=100)
    with Image.open(path) as image:
        assert image.format == "MPO"
    alone = save(tmp_path / "alone.jpg", first, quality=100)
    np.testing.assert_array_equal(read_image(path, channels=3), read_image(alone, channels=3))
    assert read_header(path) == ImageHeader(30, 20, 3, "JPEG")


def test_limits_hold_for_one_call_and_no_other(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", COLOUR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(path, channels=3).shape == (20, 30, 3)
    for read in (read_header, lambda path, **limit: read_image(path, channels=3, **limit)):
        read(path, max_pixels=600)
        with pytest.raises(ImageReadError, match="30 x 20 px, more than the 599 px allowed"):
            read(path, max_pixels=599)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_header_decodes_no_pixel(tmp_path, monkeypatch):
    from PIL import ImageFile

    def refuse(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for suffix in ("png", "jpg", "tiff", "bmp"):
        path = save(tmp_path / f"a.{suffix}", COLOUR)
        assert read_header(path)[:3] == (30, 20, 3)
        with pytest.raises(ImageReadError, match="decoded"):
            read_image(path, channels=3)


def test_an_error_names_the_file_safely():
    error = ImageReadError("\x1b[31m.png", "it is truncated")
    assert "\x1b" not in str(error)
    assert (error.path, error.reason) == ("\x1b[31m.png", "it is truncated")


def png(path, width, height, depth, kind, chunks):
    """A PNG file of the chunks given as (name, data)."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [("IHDR", header), *chunks, ("IEND", b"")]:
        body = name.encode() + content
        data += struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data)
    return path


def tiff(path, width, height, bits, pixels, tags=(), order="<"):
    """A TIFF file of one strip; further tags are longs."""
    values = {256: width, 257: height, 259: 1, 262: 1, 277: 1, 278: height}
    values |= dict(tags)
    if 324 not in values:
        values = {273: 8, 279: len(pixels), **values}
    entries = {tag: ("I", (value,)) for tag, value in values.items()}
    entries[258] = ("H", bits)
    table, extra = b"", b""
    start = 8 + len(pixels) + len(pixels) % 2
    end = start + 2 + 12 * len(entries) + 4
    for tag, (kind, numbers) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(data) > 4:
            offset = struct.pack(f"{order}I", end + len(extra))
            extra += data
            data = offset
        code = {"H": 3, "I": 4}[kind]
        table += struct.pack(f"{order}HHI", tag, code, len(numbers)) + data.ljust(4, b"\0")
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start)
    table = struct.pack(f"{order}H", len(entries)) + table + bytes(4)
    path.write_bytes(magic + pixels + bytes(len(pixels) % 2) + table + extra)
    return path


def bomb(path, side=60_000):
    """A tiny PNG that claims side x side pixels."""
    return png(path, side, side, 8, 0, [("IDAT", zlib.compress(bytes(1000)))])


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
    moving = tmp_path / "moving.webp"
    Image.fromarray(GREY).save(moving, save_all=True, append_images=[Image.fromarray(255 - GREY)])
    drawn = tmp_path / "drawn.png"
    Image.fromarray(GREY).save(drawn, save_all=True, append_images=[Image.fromarray(255 - GREY)])
    gif = save(tmp_path / "gif.png", GREY, format="GIF")
    deep = save(tmp_path / "deep.tiff", np.zeros((4, 4), np.float32))
    lab = tiff(tmp_path / "lab.tiff", 1, 1, (8,) * 3, bytes(3), {262: 8, 277: 3})
    none = png(tmp_path / "none.png", 0, 5, 8, 0, [("IDAT", zlib.compress(b""))])
    tiles = {322: 40_000, 323: 40_000, 324: 8, 325: 100, 259: 8}
    tile_bomb = tiff(tmp_path / "tile.tiff", 4, 4, (8,), zlib.compress(bytes(90_000)), tiles)
    tail = save(tmp_path / "tail.jpg", COLOUR, quality=100)
    tail.write_bytes(tail.read_bytes()[:-300])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = {
        tmp_path / "missing.png": "there is no such file",
        tmp_path: "it is not a file",
        cut: "truncated",
        empty: "none of PNG",
        text: "none of PNG",
        frames: "several frames",
        moving: "several frames",
        drawn: "several frames",
        gif: "none of PNG",
        deep: "32-bit",
        lab: "LAB",
        none: "an unsupported PNG file, or damaged",
        tile_bomb: "its tiles claim 40000 x 40000",
        tail: "truncated",
        pipe: "it is not a file",
        tmp_path / "nul\0.png": "there is no such file",
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
        assert str(path).replace("\0", "?") in str(caught.value)
        assert caught.value.exit_code == 3
        if reason != "truncated":
            with pytest.raises(ImageReadError, match=reason):
                read_header(path)
