"""Reads damaged image files in a process of its own: `image_fuzz.py FOLDER COUNT SEED`.

Writes a line of JSON to stdout. A file that takes more than five seconds of computing ends the
process by SIGPROF; the file is then in the folder.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from test_safe_image import tiff

from patchgd_jax.data.images.safe_image import ImageReadError, read_header, read_image

SECONDS = 5


def read_both(path):
    """Reads the pixels; they must be as the header says."""
    pixels = read_image(path, channels=3)
    header = read_header(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (header.height, header.width, 3), (pixels.shape, header)


READERS = [read_both, read_header, lambda path: read_image(path, channels=1, background=255)]
"""What is given each file: callables that return, or raise ImageReadError."""


def sound_files(folder):
    """Small files of every format and kind, by name."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((96, 80))
    grey = colour.convert("L")
    clear = colour.copy()
    clear.putalpha(grey)
    deep = Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16))
    palette = colour.quantize(32)
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "rgb.png": (colour, {}),
        "turned.png": (colour, {"exif": turned}),
        "grey.png": (grey, {}),
        "bits.png": (grey.convert("1"), {}),
        "alpha.png": (clear, {}),
        "la.png": (clear.convert("LA"), {}),
        "deep.png": (deep, {}),
        "palette.png": (palette, {"transparency": bytes(range(0, 256, 8))}),
        "rgb.jpg": (colour, {"quality": 90}),
        "progressive.jpg": (colour, {"progressive": True, "exif": turned}),
        "grey.jpg": (grey, {"optimize": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "raw.tiff": (colour, {}),
        "lzw.tiff": (colour, {"compression": "tiff_lzw", "exif": turned}),
        "deflate.tiff": (deep, {"compression": "tiff_adobe_deflate"}),
        "packbits.tiff": (clear, {"compression": "packbits"}),
        "jpeg.tiff": (colour, {"compression": "jpeg"}),
        "fax.tiff": (grey.convert("1"), {"compression": "group4"}),
        "strips.tiff": (colour, {"compression": "tiff_lzw", "strip_size": 2000}),
        "palette.tiff": (palette, {}),
        "lossy.webp": (colour, {}),
        "lossless.webp": (clear, {"lossless": True}),
        "turned.webp": (colour, {"exif": turned}),
        "rgb.bmp": (colour, {}),
        "palette.bmp": (palette, {}),
    }
    files = {}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name[-3:], name.split(".")[1]), **options)
        files[name] = buffer.getvalue()
    block = zlib.compress(np.asarray(grey)[:64, :64].tobytes())
    tile = {322: 64, 323: 64, 324: 8, 325: len(block), 259: 8}
    files["tiled.tiff"] = tiff(folder / "tiled.tiff", 60, 50, (8,), block, tile).read_bytes()
    wide = rng.integers(0, 65536, 600, dtype=np.uint16).astype(">u2").tobytes()
    files["big.tiff"] = tiff(folder / "big.tiff", 30, 20, (16,), wide, order=">").read_bytes()
    return files


def damage(data, rng):
    """Flips bytes (half of the time near the start, where formats keep their numbers) or cuts."""
    data = bytearray(data)
    kind = rng.integers(3)
    if kind != 1:
        reach = len(data) if rng.random() < 0.5 else min(len(data), 200)
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(reach))] = int(rng.integers(256))
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        correct(data)
    if kind != 0:
        data = data[: int(rng.integers(len(data)))]
    return bytes(data)


def correct(png):
    """Makes the checksums of a PNG fit again, so that damage reaches what is behind them."""
    at = 8
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if at + 12 + length > len(png):
            return
        checksum = zlib.crc32(png[at + 4 : at + 8 + length])
        struct.pack_into(">I", png, at + 8 + length, checksum)
        at += 12 + length


def megabytes():
    """Highest resident memory of this process so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(folder, count, seed):
    """Damages and reads `count` files."""
    warnings.simplefilter("ignore")
    files = list(sound_files(folder).items())
    for name, data in files:
        path = folder / name
        path.write_bytes(data)
        for read in READERS:
            read(path)
    before = megabytes()
    decoded, refused = Counter(), Counter()
    slowest = 0.0
    for number in range(count):
        name, data = files[number % len(files)]
        path = folder / f"damaged-{name}"
        path.write_bytes(damage(data, np.random.default_rng([seed, number])))
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        for read in READERS:
            try:
                read(path)
            except ImageReadError:
                outcome = refused
            else:
                outcome = decoded
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
        outcome[name.split(".")[1]] += 1
    result = {
        "decoded": dict(decoded),
        "refused": dict(refused),
        "slowest_seconds": round(slowest, 3),
        "growth_mb": round(megabytes() - before),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
