"""Writes small pyramids in the layouts that scanners and programs use."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import tensorstore
import tifffile
from PIL import Image


def tissue(height, width, channels=3, seed=0):
    """Smooth coloured blobs on white with some grain: `uint8 [height, width, channels]`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (height, width, 1))
    image = np.clip(np.asarray(smooth).astype(int) + grain, 0, 255).astype(np.uint8)
    return image if channels == 3 else image[..., :1].copy()


def halved(image, by=2):
    """Area-averaged by a whole factor; sides are rounded down, as scanners do."""
    height, width = (side // by * by for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // by, by, width // by, by, -1)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def levels_of(image, factors=(1, 4, 16)):
    """The image at each downsample."""
    return [image if by == 1 else halved(image, by) for by in factors]


def _plain(image):
    return image[..., 0] if image.shape[-1] == 1 else image


def write_pages(path, levels, *, tile=128, compression="jpeg", reduced=True, **options):
    """One page for each level, as PANDA and `vips` have it."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, image in enumerate(levels):
            writer.write(
                _plain(image),
                tile=(tile, tile),
                compression=compression,
                subfiletype=int(reduced and number > 0),
                photometric=options.get("photometric", _photometric(image)),
                metadata=None,
                **{k: v for k, v in options.items() if k != "photometric"},
            )
    return path


def _photometric(image):
    return "rgb" if image.shape[-1] >= 3 else "minisblack"


def write_ome(path, levels, *, tile=128, compression="deflate", mpp=0.5):
    """OME-TIFF: the levels are sub-directories of the first page."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (tile, tile), "compression": compression, "photometric": "rgb"}
        writer.write(
            levels[0],
            subifds=len(levels) - 1,
            metadata={
                "axes": "YXS",
                "PhysicalSizeX": mpp * 1000,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": mpp * 1000,
                "PhysicalSizeYUnit": "nm",
            },
            **options,
        )
        for image in levels[1:]:
            writer.write(image, subfiletype=1, **options)
    return path


def write_svs(path, levels, *, tile=128, compression="jpeg", mpp=0.2498):
    """Aperio: full level, thumbnail in strips, other levels, label, macro picture."""
    height, width = levels[0].shape[:2]
    head = f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}]"
    with tifffile.TiffWriter(path) as writer:

        def level(image):
            writer.write(
                image,
                tile=(tile, tile),
                compression=compression,
                photometric="rgb",
                description=f"{head} ({tile}x{tile}) JPEG/RGB Q=70|AppMag = 40|MPP = {mpp}",
                metadata=None,
            )

        def picture(image, text, subfiletype):
            writer.write(
                image,
                rowsperstrip=16,
                photometric="rgb",
                description=f"Aperio Image Library v11.2.1 \r\n{text}",
                subfiletype=subfiletype,
                metadata=None,
            )

        level(levels[0])
        picture(halved(levels[0], 8), "thumbnail", 0)
        for image in levels[1:]:
            level(image)
        picture(np.full((60, 50, 3), 40, np.uint8), "label 50x60", 1)
        picture(np.full((90, 200, 3), 80, np.uint8), "macro 200x90", 9)
    return path


def write_ndpi(path, levels, *, magnification=40.0, mpp=0.23):
    """Hamamatsu: one JPEG with restart markers for each level, and a macro picture.

    The file is classic TIFF with 64-bit places of directories, and after each directory four more
    bytes for each of its tags. The macro picture has the proportions of a level, and is none.
    """
    data = io.BytesIO()
    data.write(struct.pack("<2sHQ", b"II", 42, 0))
    link = 4
    pages = [(image, magnification / (levels[0].shape[1] / image.shape[1])) for image in levels]
    for image, power in [*pages, (np.full((88, 128, 3), 90, np.uint8), -1.0)]:
        jpeg, starts = _jpeg_with_restarts(image)
        place = data.tell()
        data.write(jpeg)

        def put(raw):
            here = data.tell()
            data.write(raw)
            return here

        per_cm = 1e4 / mpp * image.shape[1] / levels[0].shape[1]
        resolution = put(struct.pack("<II", round(1e3 * per_cm), 1000))
        make = put(b"Hamamatsu\0")
        mcus = put(np.asarray(starts, "<u4").tobytes()) if len(starts) > 1 else 0
        bits = put(struct.pack("<3H", 8, 8, 8))
        height, width = image.shape[:2]
        tags = [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 3, bits),
            (259, 3, 1, 7),
            (262, 3, 1, 6),
            (273, 4, 1, place),
            (277, 3, 1, 3),
            (278, 4, 1, height),
            (279, 4, 1, len(jpeg)),
            (282, 5, 1, resolution),
            (283, 5, 1, resolution),
            (296, 3, 1, 3),
            (271, 2, 10, make),
            (65420, 4, 1, 1),
            (65421, 11, 1, struct.unpack("<I", struct.pack("<f", power))[0]),
        ]
        tags += [(65422, 9, 1, 0), (65423, 9, 1, 0), (65424, 9, 1, 0)]
        if mcus:
            tags.append((65426, 4, len(starts), mcus))
        tags.sort()
        here = data.tell()
        data.write(struct.pack("<H", len(tags)))
        for tag in tags:
            data.write(struct.pack("<HHII", *tag))
        following = data.tell()
        data.write(struct.pack("<Q", 0))
        data.write(bytes(4 * len(tags)))
        end = data.tell()
        data.seek(link)
        data.write(struct.pack("<Q", here))
        data.seek(end)
        link = following
    path.write_bytes(data.getvalue())
    return path


def _jpeg_with_restarts(image):
    """A JPEG, and where each of its restart intervals starts; small images have none."""
    buffer = io.BytesIO()
    options = {"restart_marker_blocks": 8} if image.shape[1] >= 256 else {}
    Image.fromarray(image).save(buffer, "JPEG", quality=90, subsampling=0, **options)
    jpeg = buffer.getvalue()
    scan = jpeg.index(b"\xff\xda")
    begin = scan + 2 + struct.unpack(">H", jpeg[scan + 2 : scan + 4])[0]
    starts = [begin]
    for at in range(begin, len(jpeg) - 1):
        if jpeg[at] == 0xFF and 0xD0 <= jpeg[at + 1] <= 0xD7:
            starts.append(at + 2)
    return jpeg, starts if options else [begin]


def write_zarr(folder, levels, *, version=3, axes="cyx", chunk=128, mpp=0.5):
    """OME-Zarr: an array for each level in a group with `multiscales`."""
    datasets = []
    for number, image in enumerate(levels):
        data = image.transpose(["yxc".index(a) for a in axes if a in "yxc"])
        data = data.reshape([1 if a not in "yxc" else image.shape["yxc".index(a)] for a in axes])
        chunks = [chunk if a in "yx" else n for a, n in zip(axes, data.shape, strict=True)]
        write_array(folder / str(number), data, version=version, chunks=chunks)
        scale = [mpp * 2**number if a in "yx" else 1.0 for a in axes]
        transformation = {"type": "scale", "scale": scale}
        datasets.append({"path": str(number), "coordinateTransformations": [transformation]})
    kinds = {"c": "channel", "t": "time"}
    named = [
        {"name": a, "type": kinds[a]}
        if a in kinds
        else {"name": a, "type": "space", "unit": "micrometer"}
        for a in axes
    ]
    image = {"multiscales": [{"axes": named, "datasets": datasets, "version": "0.5"}]}
    if version == 3:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": image}}
        (folder / "zarr.json").write_text(json.dumps(group))
    else:
        (folder / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
        (folder / ".zattrs").write_text(json.dumps(image))
    return folder


def write_array(folder, data, *, version, chunks):
    """A Zarr array."""
    spec = {
        "driver": "zarr3" if version == 3 else "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
    }
    store = tensorstore.open(
        spec,
        create=True,
        dtype=tensorstore.dtype(data.dtype.name),
        shape=data.shape,
        chunk_layout=tensorstore.ChunkLayout(read_chunk_shape=chunks, write_chunk_shape=chunks),
    ).result()
    store.write(data).result()
    return folder
