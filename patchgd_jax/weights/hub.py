"""Published weight files by name: fetched once, checked against a pinned SHA-256, kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from patchgd_jax.errors import ConfigError, DataError, unknown_name
from patchgd_jax.io.files import atomic_file, disk_errors
from patchgd_jax.io.files import sha256 as file_sha256
from patchgd_jax.weights.files import SUFFIXES


class PinnedFile(NamedTuple):
    """A published file and what its content must hash to."""

    encoder: str
    """The encoder that it is for."""
    url: str
    sha256: str
    """Hexadecimal SHA-256, or the first digits of it."""


def _named(encoder: str, url: str) -> PinnedFile:
    """PyTorch's publishers write the first 8 digits of the hash into the name, and pin no more."""
    pin = re.search(r"-([0-9a-f]{8})\.pth$", url)
    assert pin is not None, url
    return PinnedFile(encoder, url, pin[1])


_TORCHVISION = "https://download.pytorch.org/models/"
_DEIT = "https://dl.fbaipublicfiles.com/deit/"

PINNED: Mapping[str, PinnedFile] = {
    "resnet18-imagenet1k-v1": _named("resnet18", f"{_TORCHVISION}resnet18-f37072fd.pth"),
    "resnet34-imagenet1k-v1": _named("resnet34", f"{_TORCHVISION}resnet34-b627a593.pth"),
    "resnet50-imagenet1k-v1": _named("resnet50", f"{_TORCHVISION}resnet50-0676ba61.pth"),
    "resnet50-imagenet1k-v2": _named("resnet50", f"{_TORCHVISION}resnet50-11ad3fa6.pth"),
    "resnet101-imagenet1k-v1": _named("resnet101", f"{_TORCHVISION}resnet101-63fe2227.pth"),
    "resnet101-imagenet1k-v2": _named("resnet101", f"{_TORCHVISION}resnet101-cd907fc2.pth"),
    "mobilenet-v2-imagenet1k-v1": _named(
        "mobilenet-v2", f"{_TORCHVISION}mobilenet_v2-b0353104.pth"
    ),
    "mobilenet-v2-imagenet1k-v2": _named(
        "mobilenet-v2", f"{_TORCHVISION}mobilenet_v2-7ebf99e0.pth"
    ),
    "efficientnet-b0-imagenet1k-v1": _named(
        "efficientnet-b0", f"{_TORCHVISION}efficientnet_b0_rwightman-7f5810bc.pth"
    ),
    "deit-tiny-imagenet1k": _named("deit-tiny", f"{_DEIT}deit_tiny_patch16_224-a1311bcf.pth"),
    "deit-small-imagenet1k": _named("deit-small", f"{_DEIT}deit_small_patch16_224-cd65a155.pth"),
    "deit-base-imagenet1k": _named("deit-base", f"{_DEIT}deit_base_patch16_224-b5f2ef4d.pth"),
}
"""Names as in torchvision's weight enums. The pins are those the publishers' own loaders check: 8
hexadecimal digits, enough against a damaged transfer but not against a forger; against one stand
HTTPS, and a reader that executes nothing."""


def locate_weights(weights: str, encoder: str, message: Callable[[str], None]) -> Path:
    """The file that `--model.weights` means; fetches it if need be.

    Args:
        weights: a file, a name of `PINNED`, or `https://...#sha256=<64 digits>`.
        encoder: the encoder that is to be loaded.
        message: told before something is fetched.

    Raises:
        ConfigError: for an unknown name, or one of another encoder.
        DataError: if there is no such file, or it cannot be fetched, or is not what was pinned.
        DiskError: if a fetched file cannot be kept.
    """
    if weights in PINNED:
        pinned = PINNED[weights]
        if pinned.encoder != encoder:
            raise ConfigError(
                f"the weights {weights} are of the encoder {pinned.encoder}, not {encoder}; "
                f"set --model.encoder {pinned.encoder}"
            )
        return _fetched(pinned.url, pinned.sha256, message)
    if weights.startswith(("http://", "https://")):
        url, _, fragment = weights.partition("#")
        pin = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if pin is None:
            raise ConfigError(
                f"{weights} says not what the file must hash to; end it in #sha256=<64 digits>"
            )
        return _fetched(url, pin[1].lower(), message)
    path = Path(weights)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"weights {path} is a folder; name the weight file in it")
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise DataError(f"weights {path}: there is no such file")
    raise unknown_name("weights", weights, PINNED)


def _fetched(url: str, sha256: str, message: Callable[[str], None]) -> Path:
    """The kept copy of a file, which is fetched if there is none that is intact."""
    import platformdirs

    name = re.fullmatch(r"[\w.-]+", Path(urlsplit(url).path).name)
    if name is None or Path(name[0]).suffix not in SUFFIXES:
        raise ConfigError(f"{url} does not end in a file name with one of {', '.join(SUFFIXES)}")
    folder = Path(platformdirs.user_cache_dir("patchgd-jax")) / "weights"
    kept = folder / f"{sha256[:16]}-{name[0]}"
    with disk_errors(f"cannot keep weights in {folder}"):
        if kept.is_file() and file_sha256(kept).startswith(sha256):
            return kept
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        message(f"Fetching {url}")
        with atomic_file(kept) as path:
            _download(url, path)
            found = file_sha256(path)
            if not found.startswith(sha256):
                raise DataError(
                    f"{url} is not the pinned file: its SHA-256 is {found}, not {sha256}"
                    f"{'' if len(sha256) == 64 else '...'}; nothing of it was kept"
                )
    return kept


def _download(url: str, path: Path) -> None:
    import pooch
    import requests

    try:
        pooch.HTTPDownloader(timeout=30, chunk_size=2**20)(url, str(path), None)
    except requests.RequestException as error:
        raise DataError(
            f"cannot fetch {url}, which has not been fetched here before: {error}. Without a "
            "network, fetch it elsewhere and name the file with --model.weights"
        ) from error
