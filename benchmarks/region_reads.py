"""Random reads of 256 px from a large JPEG-tiled TIFF, on one thread.

Command:   python benchmarks/region_reads.py
Time:      about a minute on one CPU core; needs 150 MB in the temporary folder
Expected:  at least 250 reads a second anywhere and 700 on multiples of 256 px, in 150 MB
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
from record import record

from patchgd_jax.data.images.region_base import RegionSource
from patchgd_jax.data.images.regions import open_regions

SIDE, TILE, PATCH = 16_384, 512, 256
READS = 2000


def tissue_tiles():
    """JPEG's usual fare: smooth colour with grain, no two tiles alike."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for _ in range((SIDE // TILE) ** 2):
        coarse = rng.integers(90, 256, (12, 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((TILE, TILE), Image.Resampling.BICUBIC)
        grain = rng.integers(-6, 7, (TILE, TILE, 1), dtype=np.int16)
        yield np.clip(np.asarray(smooth, np.int16) + grain, 0, 255).astype(np.uint8)


def write_slide(path: Path) -> None:
    import tifffile

    tifffile.imwrite(
        path,
        tissue_tiles(),
        shape=(SIDE, SIDE, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        compression="jpeg",
        compressionargs={"level": 80},
        photometric="rgb",
        bigtiff=True,
        metadata=None,
    )


def reads_per_second(source: RegionSource, positions: np.ndarray) -> float:
    start = time.perf_counter()
    for y, x in positions:
        source.read(int(y), int(x), PATCH, PATCH)
    return len(positions) / (time.perf_counter() - start)


def main() -> None:
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        # In a process of its own, so that its memory does not hide that of the reads.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_slide, path).result()
        before = psutil.Process().memory_info().rss
        source = open_regions(path, channels=3, background=255)
        source.read(0, 0, PATCH, PATCH)
        anywhere = rng.integers(0, SIDE - PATCH, (READS, 2))
        multiples = rng.integers(0, SIDE // PATCH, (READS, 2)) * PATCH
        figures = {
            "unaligned_reads_per_s": round(reads_per_second(source, anywhere), 1),
            "aligned_reads_per_s": round(reads_per_second(source, multiples), 1),
            "memory_growth_mb": round((psutil.Process().memory_info().rss - before) / 1e6, 1),
            "file_mb": round(path.stat().st_size / 1e6, 1),
            "packages": {name: metadata.version(name) for name in ("tifffile", "imagecodecs")},
        }
        source.close()
    print(figures)
    record("region_reads", figures)


if __name__ == "__main__":
    main()
