"""`patchgd-jax data check | show | tile | make`: inspects and prepares data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from patchgd_jax.cli.options import Command, command, parse_options
from patchgd_jax.config import TrainConfig
from patchgd_jax.errors import ConfigError, DataError, unknown_name

PROGRAM = "patchgd-jax data"
Flag = FlagCreatePairsOff[bool]

_SECONDS_PER_LINE = 10.0


@dataclass(frozen=True)
class CheckOptions:
    """Settings of `data check`."""

    config: Annotated[TrainConfig, arg(name="")]
    decode: Flag = False
    """Decode every image in full, not its header only."""
    as_json: Annotated[Flag, arg(name="json")] = False
    """Print one JSON object."""
    bad_list: str | None = None
    """CSV file to write the unreadable images to."""


@dataclass(frozen=True)
class ShowOptions:
    """Settings of `data show`."""

    config: Annotated[TrainConfig, arg(name="")]
    output: str = "data.png"
    """PNG file to write."""
    count: int = 12
    """Images to show."""
    split: Literal["train", "validation"] = "train"
    """Split to show, in the order of its images."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1")


def check_command(arguments: Sequence[str]) -> None:
    """Open every image and check labels and splits: check [PRESET] --data.csv FILE ..."""
    options, _ = parse_options(CheckOptions, "data check", str(check_command.__doc__), arguments)
    config = options.config
    if config.data.generated or config.data.tfds is not None:
        raise ConfigError(
            "data check reads image files, but these settings name none; name them with "
            "--data.csv, --data.root or --data.panda"
        )

    from patchgd_jax.data.images.regions import open_regions
    from patchgd_jax.data.inspect.check import check_images, write_bad_list
    from patchgd_jax.data.run_data import file_background, read_files

    files = read_files(config)
    assert files is not None
    table, splits = files.table, files.split
    report = check_images(
        table,
        splits,
        channels=config.data.declared_channels,
        open_image=partial(open_regions, background=file_background(config.data, table)),
        decode=options.decode,
    )
    print(json.dumps(report.to_dict()) if options.as_json else report.text())
    if options.bad_list is not None:
        write_bad_list(Path(options.bad_list), report.problems)
    if report.problems:
        many = "problems" if len(report.problems) > 1 else "problem"
        raise DataError(
            f"{len(report.problems)} {many} in {len(table.paths)} images, see above; repair "
            "these files, or remove them"
        )


def show_command(arguments: Sequence[str]) -> None:
    """Draw images with their patch grid and what the first inner step samples."""
    options, _ = parse_options(ShowOptions, "data show", str(show_command.__doc__), arguments)
    output = Path(options.output)
    if output.exists():
        raise ConfigError(f"{output} exists; choose another --output")

    from patchgd_jax.data.inspect.contact_sheet import contact_sheet
    from patchgd_jax.runs.preview import IMPORTANCE_NOTE, preview

    importance = options.config.patchgd.importance != "none"
    contact_sheet(
        preview(options.config, options.count, options.split),
        output,
        note=IMPORTANCE_NOTE if importance else "",
    )
    print(f"Written to {output}")


@command("data tile")
def tile_command(
    image: Positional[str],
    output: Positional[str],
    channels: Literal[1, 3] = 3,
    background: int = 255,
    tile: int = 512,
    quality: int = 90,
    lossless: Flag = False,
    max_pixels: int | None = None,
) -> None:
    """Write an image file as a tiled, pyramidal TIFF, which is read by regions.

    Args:
        image: Image file.
        output: TIFF file to write; must not exist.
        channels: 1 for grey, 3 for colour.
        background: Grey value under transparent pixels.
        tile: Side of a tile in pixels.
        quality: Quality of JPEG compression, 1 to 100.
        lossless: Compress without loss (deflate) instead.
        max_pixels: Pixels that the image may have. None: as in training.
    """
    from patchgd_jax.data.images.safe_image import MAX_PIXELS
    from patchgd_jax.data.images.tiling import tile_image

    levels = tile_image(
        image,
        output,
        channels=channels,
        background=background,
        tile=tile,
        quality="lossless" if lossless else quality,
        max_pixels=max_pixels or MAX_PIXELS,
    )
    listed = ", ".join(f"{height} x {width}" for height, width in levels)
    many = "levels" if len(levels) > 1 else "level"
    print(f"Written to {output}, {len(levels)} {many} of {listed} px")


@dataclass(frozen=True)
class MakeOptions:
    """Settings of `data make`."""

    config: Annotated[TrainConfig, arg(name="")]
    output: str
    """Folder to write to."""
    to: Literal["tfds", "folder"] = "tfds"
    """tfds: a tensorflow-datasets set in array_record files. folder: PNG files and a labels.csv."""


def make_command(arguments: Sequence[str]) -> None:
    """Write the generated images of a preset to disk, to keep or share them."""
    about = str(make_command.__doc__)
    options, _ = parse_options(MakeOptions, "data make", about, arguments, output=tyro.MISSING)
    config = options.config
    if not config.data.generated:
        raise ConfigError(
            "data make writes generated images, but these settings name image files; leave them out"
        )

    from patchgd_jax.runs.record.progress import ConsoleProgress

    console = ConsoleProgress()
    shown = time.monotonic()

    def on_example(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _SECONDS_PER_LINE:
            shown = time.monotonic()
            console.message(f"{done} of {total} images")

    make: Callable[..., Path]
    if options.to == "tfds":
        from patchgd_jax.data.synthetic.tfds_builder import make_dataset

        make = make_dataset
    else:
        from patchgd_jax.data.synthetic.png_folder import make_folder

        make = make_folder
    where = make(
        config.data, config.seed, options.output, on_example=on_example, on_note=console.warn
    )
    height, width, channels = config.data.image_shape
    shape = f"--data.size {height} {width} --data.channels {channels}"
    source = f"--data.tfds {where}"
    if options.to == "folder":
        source = f"--data.csv {where}/labels.csv --data.columns.split split"
    print(f"Written to {where}. Train on it with:\n  patchgd-jax train {shape} {source}")


COMMANDS: dict[str, Command] = {
    "check": check_command,
    "show": show_command,
    "tile": tile_command,
    "make": make_command,
}


def data_command(arguments: Sequence[str]) -> None:
    """Check, show, tile or make images: data check | show | tile | make."""
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = [f"  {name:<6} {function.__doc__}" for name, function in COMMANDS.items()]
        print("\n".join([f"usage: {PROGRAM} COMMAND [ARGUMENTS]", "", *listed]))
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise unknown_name("data command", name, COMMANDS)
    COMMANDS[name](rest)
