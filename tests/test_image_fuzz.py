"""Hostile and damaged files cannot crash, hang or flood the process that reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_safe_image import png, tiff

HERE = Path(__file__).parent


def in_a_process(*arguments):
    """Runs a Python program and returns what it prints."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=HERE,
        # The child needs the package that is tested here, also where it is not installed.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("count", "seed"), [(3000, 0), pytest.param(30_000, 1, marks=pytest.mark.slow)]
)
def test_damaged_files_decode_or_raise_our_error(tmp_path, count, seed):
    result = json.loads(in_a_process(HERE / "image_fuzz.py", tmp_path, count, seed))
    print(result)
    decoded, refused = sum(result["decoded"].values()), sum(result["refused"].values())
    assert decoded + refused == count
    # Damage that is always or never noticed would test one way only.
    assert set(result["refused"]) == {"png", "jpg", "tiff", "webp", "bmp"}
    assert decoded > count / 20
    assert refused > count / 4
    assert result["growth_mb"] < 500


BOMB = """
import resource, sys, time
from patchgd_jax.data.images.safe_image import ImageReadError, read_header, read_image
read_image(sys.argv[1], channels=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (read_header, lambda path: read_image(path, channels=3)):
    start = time.perf_counter()
    try:
        read(sys.argv[2])
    except ImageReadError as error:
        print(error.reason, f"({time.perf_counter() - start:.4f} s)")
unit = 2**20 if sys.platform == "darwin" else 2**10
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)
"""


def test_a_small_file_that_claims_a_huge_image_is_refused_without_memory(tmp_path):

    small = png(tmp_path / "small.png", 1, 1, 8, 0, [("IDAT", zlib.compress(b"\0\0"))])
    rows = zlib.compress(bytes(60_001 * 850), 9)
    assert 45_000 < len(rows) < 55_000
    bomb = png(tmp_path / "bomb.png", 60_000, 60_000, 8, 0, [("IDAT", rows)])
    *reasons, grown = in_a_process("-c", BOMB, small, bomb).splitlines()
    print(reasons, grown)
    assert len(reasons) == 2
    assert all(reason.startswith("it claims 60000 x 60000 px") for reason in reasons)
    assert float(grown) < 200


def test_a_small_image_of_a_huge_tile_is_refused_without_memory(tmp_path):

    small = png(tmp_path / "small.png", 1, 1, 8, 0, [("IDAT", zlib.compress(b"\0\0"))])
    packer = zlib.compressobj(9)
    side = 20_000
    data = b"".join(packer.compress(bytes(side * 1000)) for _ in range(side // 1000))
    data += packer.flush()
    tags = {322: side, 323: side, 324: 8, 325: len(data), 259: 8}
    tile = tiff(tmp_path / "tile.tiff", 16, 16, (8,), data, tags)
    *reasons, grown = in_a_process("-c", BOMB, small, tile).splitlines()
    assert len(reasons) == 2
    assert all(reason.startswith("its tiles claim 20000 x 20000 px") for reason in reasons)
    assert float(grown) < 200
