"""Fetches published weight files by name, Hugging Face repository or URL, and caches them."""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from patchgd_jax.errors import ConfigError, DataError, unknown_name
from patchgd_jax.io.files import atomic_file, disk_errors, sha256
from patchgd_jax.io.text import first_line
from patchgd_jax.weights.files import SUFFIXES


class PinnedFile(NamedTuple):
    """A published file of an encoder and the SHA-256 of its content, in hexadecimal."""

    encoder: str
    url: str
    sha256: str
    """Possibly only the first digits."""


_TORCHVISION = "https://download.pytorch.org/models/"
_DEIT = "https://dl.fbaipublicfiles.com/deit/"
_FILES = {
    "resnet18-imagenet1k-v1": f"{_TORCHVISION}resnet18-f37072fd.pth",
    "resnet34-imagenet1k-v1": f"{_TORCHVISION}resnet34-b627a593.pth",
    "resnet50-imagenet1k-v1": f"{_TORCHVISION}resnet50-0676ba61.pth",
    "resnet50-imagenet1k-v2": f"{_TORCHVISION}resnet50-11ad3fa6.pth",
    "resnet101-imagenet1k-v1": f"{_TORCHVISION}resnet101-63fe2227.pth",
    "resnet101-imagenet1k-v2": f"{_TORCHVISION}resnet101-cd907fc2.pth",
    "mobilenet-v2-imagenet1k-v1": f"{_TORCHVISION}mobilenet_v2-b0353104.pth",
    "mobilenet-v2-imagenet1k-v2": f"{_TORCHVISION}mobilenet_v2-7ebf99e0.pth",
    "efficientnet-b0-imagenet1k-v1": f"{_TORCHVISION}efficientnet_b0_rwightman-7f5810bc.pth",
    "deit-tiny-imagenet1k": f"{_DEIT}deit_tiny_patch16_224-a1311bcf.pth",
    "deit-small-imagenet1k": f"{_DEIT}deit_small_patch16_224-cd65a155.pth",
    "deit-base-imagenet1k": f"{_DEIT}deit_base_patch16_224-b5f2ef4d.pth",
}
PINNED: Mapping[str, PinnedFile] = {
    name: PinnedFile(name.partition("-imagenet1k")[0], url, url[-12:-4])
    for name, url in _FILES.items()
}
"""Names as in torchvision's weight enums. The publishers write the first 8 digits of the hash into
the file name and check no more: enough against a damaged transfer but not against a forged file;
HTTPS and a reader that executes nothing protect against that."""

REVISIONS: Mapping[str, str] = {
    "timm/resnet18.a1_in1k": "491b427b45c94c7fb0e78b5474cc919aff584bbf",
    "timm/resnet50.a1_in1k": "767268603ca0cb0bfe326fa87277f19c419566ef",
    "timm/deit_tiny_patch16_224.fb_in1k": "80e968688553f219e4a86f940ed945a23709c16f",
    "timm/deit_small_patch16_224.fb_in1k": "91327a9c99f98fe6b524cd4d397b7226b80e1365",
    "timm/deit_base_patch16_224.fb_in1k": "b78cc5532a69df6bcad9c3a8d76653fd20b31ac6",
}
"""Default commit of a Hugging Face repository."""

_HUB_FILE = "model.safetensors"
_BY_HAND = "Without a network, fetch it elsewhere and name the file with --model.weights"


def locate_weights(weights: str, encoder: str, message: Callable[[str], None]) -> Path:
    """Finds the file named by `--model.weights`; fetches it if it is not in the cache.

    Args:
        weights: a file, a name of `PINNED`, `hf:OWNER/NAME`, `hf:OWNER/NAME@COMMIT`, or
            `https://...#sha256=<64 digits>`.
        encoder: name of the encoder to load.
        message: gets one line about the fetched file.

    Raises:
        ConfigError: for an unknown name, or one of another encoder.
        DataError: if there is no such file, or it cannot be fetched, or differs from its pin.
        DiskError: if a fetched file cannot be written.
    """
    if weights in PINNED:
        pinned = PINNED[weights]
        if pinned.encoder != encoder:
            raise ConfigError(
                f"the weights {weights} are of the encoder {pinned.encoder}, not {encoder}; "
                f"set --model.encoder {pinned.encoder}"
            )
        return _fetched(pinned.url, pinned.sha256, message)
    if weights.startswith("hf:"):
        return _from_hub(weights, message)
    if weights.startswith(("http://", "https://")):
        url, _, fragment = weights.partition("#")
        pin = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if pin is None:
            raise ConfigError(
                f"{weights}: missing checksum; append #sha256=<64 hex digits> to the URL"
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


def _from_hub(weights: str, message: Callable[[str], None]) -> Path:
    """Fetches `model.safetensors` of a Hugging Face repository, or finds it in the hub's cache."""
    from huggingface_hub import errors, hf_hub_download

    name = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}))?", weights)
    if name is None:
        raise ConfigError(
            f"weights {weights} is neither hf:OWNER/NAME nor hf:OWNER/NAME@COMMIT with a full "
            f"commit hash (40 digits), such as hf:{next(iter(REVISIONS))}"
        )
    repository, revision = name[1], name[2] or REVISIONS.get(name[1], "main")
    reasons = {
        errors.GatedRepoError: "it is gated; accept its conditions on its page, then run: hf auth "
        "login",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private; check the "
        "name, or run: hf auth login",
        errors.RevisionNotFoundError: f"it has no revision {revision}",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and it has not been fetched "
        f"here before. {_BY_HAND}",
        errors.EntryNotFoundError: f"it has no {_HUB_FILE}; name another repository, or a file",
        errors.HTTPError: f"the transfer failed; try again. {_BY_HAND}",
    }
    with disk_errors(f"cannot keep {weights}"):
        try:
            path = Path(hf_hub_download(repository, _HUB_FILE, revision=revision))
        except tuple(reasons) as error:
            reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
            raise DataError(f"cannot fetch {weights}: {reason} ({first_line(error)})") from error
    # The folder of a snapshot has the commit's name.
    message(f"Weights: hf:{repository}@{path.parent.name}")
    return path


def _fetched(url: str, pin: str, message: Callable[[str], None]) -> Path:
    """Finds the cached copy of a file; fetches it if there is no intact one."""
    import platformdirs

    name = Path(urlsplit(url).path).name
    if not re.fullmatch(r"[\w.-]+", name) or Path(name).suffix not in SUFFIXES:
        raise ConfigError(f"{url} does not end in a file name with one of {', '.join(SUFFIXES)}")
    folder = Path(platformdirs.user_cache_dir("patchgd-jax")) / "weights"
    kept = folder / f"{pin[:16]}-{name}"
    with disk_errors(f"cannot keep weights in {folder}"):
        if kept.is_file() and sha256(kept).startswith(pin):
            return kept
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        message(f"Fetching {url}")
        content = _download(url)
        found = hashlib.sha256(content).hexdigest()
        if not found.startswith(pin):
            raise DataError(
                f"{url} is not the pinned file: its SHA-256 is {found}, not {pin}"
                f"{'' if len(pin) == 64 else '...'}; nothing of it was kept"
            )
        with atomic_file(kept) as partial:
            partial.write_bytes(content)
    return kept


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "patchgd-jax"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot fetch {url}, which has not been fetched here before: {first_line(error)}. "
            f"{_BY_HAND}"
        ) from error
