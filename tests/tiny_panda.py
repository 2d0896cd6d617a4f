"""A small stand-in for the PANDA challenge's folder, with its faults on request."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

COLUMNS = ["image_id", "data_provider", "isup_grade", "gleason_score"]
SCORES = (("3+3",), ("3+4",), ("4+3",), ("4+4", "3+5", "5+3"), ("4+5", "5+4", "5+5"))
SIZES = {"karolinska": ((1055, 1423), (1371, 901)), "radboud": ((1024, 1536), (1280, 768))}
# The first two are one of each centre without cancer, which the centres spell differently.
GRADES = (0, 0, 5, 3, 1, 4, 2)


def slide_id(name):
    """The 32 hexadecimal digits that stand for a slide: `0` to `n - 1`, or a fault's name."""
    return hashlib.md5(str(name).encode()).hexdigest()


def tissue(height, width, grade, seed):
    """A slide of one strip of tissue on white: `uint8 [height, width, 3]`.

    The dark blobs in the strip grow in number with the grade, so there is something to learn.
    """
    rng = np.random.default_rng(seed)
    strip = Image.new("L", (width, height))
    middle = np.array([width, height]) / 2
    turn = np.deg2rad(rng.uniform(-25, 25)) + (np.pi / 2 if height > width else 0)
    along = 0.4 * max(height, width) * np.array([np.cos(turn), np.sin(turn)])
    ends = [tuple(middle - along), tuple(middle + along)]
    ImageDraw.Draw(strip).line(ends, fill=255, width=int(0.22 * min(height, width)))
    mask = np.asarray(strip.filter(ImageFilter.GaussianBlur(3))) > 127
    coarse = rng.integers(-25, 25, (height // 16 + 1, width // 16 + 1)).astype(np.float32)
    grain = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    pink = np.array([222, 168, 205]) + grain[..., None]
    image = np.where(mask[..., None], pink, 255).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    inside = np.argwhere(mask)
    for y, x in inside[rng.integers(len(inside), size=6 + 18 * grade)]:
        r = rng.uniform(0.8, 1.2) * min(height, width) / 70
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(95, 55, 125))
    return np.asarray(picture)


def shrunk(image, by):
    """Area averages; odd rests are cut off, as in the challenge's files."""
    height, width = (side // by for side in image.shape[:2])
    blocks = image[: height * by, : width * by].reshape(height, by, width, by, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def write_slide(path, image, mpp=0.48):
    """A pyramid of downsamples 1, 4 and 16 in JPEG tiles."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, by in enumerate((1, 4, 16)):
            writer.write(
                shrunk(image, by),
                photometric="rgb",
                tile=(512, 512),
                compression="jpeg",
                compressionargs={"level": 70},
                subfiletype=int(level > 0),
                resolution=(1e4 / mpp / by, 1e4 / mpp / by),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def write_rows(root, rows):
    """train.csv with these rows."""
    with (root / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def make_tiny_panda(root, n=6, faults=False):
    """Writes `train.csv` and `train_images` below `root`.

    Args:
        root: a folder; made if need be.
        n: number of sound slides.
        faults: whether to add the slides `truncated`, `corrupt` (one tile) and `white`, and rows
            without a file (`missing`), of an impossible grade (`grade`, with a file) and of the
            first slide again.

    Returns:
        The folder.
    """
    root = Path(root)
    images = root / "train_images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        grade, provider = GRADES[i % len(GRADES)], ("karolinska", "radboud")[i % 2]
        scores = ({"karolinska": "0+0", "radboud": "negative"}[provider],)
        score = (scores, *SCORES)[grade][i % len((scores, *SCORES)[grade])]
        height, width = SIZES[provider][i // 2 % 2]
        write_slide(images / f"{slide_id(i)}.tiff", tissue(height, width, grade, i), 0.45 + i / 100)
        rows.append([slide_id(i), provider, grade, score])
    if faults:
        rows += [
            [slide_id("truncated"), "radboud", 1, "3+3"],
            [slide_id("corrupt"), "karolinska", 2, "3+4"],
            [slide_id("white"), "radboud", 0, "negative"],
            [slide_id("missing"), "karolinska", 3, "4+3"],
            [slide_id("grade"), "radboud", 6, "5+5"],
            rows[0],
        ]
        files = {name: images / f"{slide_id(name)}.tiff" for name in ("truncated", "corrupt")}
        for name, path in files.items():
            write_slide(path, tissue(1024, 1280, 1, len(name)))
        whole = files["truncated"].read_bytes()
        files["truncated"].write_bytes(whole[: int(0.6 * len(whole))])
        with tifffile.TiffFile(files["corrupt"]) as tif:
            offset, count = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
        with files["corrupt"].open("r+b") as file:
            file.seek(offset)
            file.write(bytes(count))
        write_slide(images / f"{slide_id('white')}.tiff", np.full((768, 1024, 3), 255, np.uint8))
        write_slide(images / f"{slide_id('grade')}.tiff", tissue(512, 768, 5, 99))
    write_rows(root, rows)
    return root
