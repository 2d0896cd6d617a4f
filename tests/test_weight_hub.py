"""Published files by name: fetched from a server on this machine, checked, kept."""

from __future__ import annotations

import hashlib
import io
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import platformdirs
import pytest
from test_pretrained import assert_equal_trees, config_of, random_trees, start_of, write_export

from patchgd_jax import ConfigError, DataError, DiskError
from patchgd_jax.weights import hub as weight_hub
from patchgd_jax.weights.hub import PINNED, REVISIONS, PinnedFile, locate_weights
from patchgd_jax.weights.published import PUBLISHED

CONTENT = bytes(range(256)) * 40
COMMIT = "c0ffee" * 6 + "c0de"
HASH = hashlib.sha256(CONTENT).hexdigest()


class _Server(ThreadingHTTPServer):
    def __init__(self, folder):
        self.requests = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def send_head(self):
        """As a Hugging Face hub, for `/OWNER/NAME/resolve/COMMIT/FILE`."""
        resolved = re.fullmatch(r"/(\w+)/\w+/resolve/(\w+)/([\w.]+)", self.path)
        if not resolved:
            return super().send_head()
        owner, commit, name = resolved.groups()
        self.path = f"/{name}"
        file = Path(self.directory) / name
        error = {"gated": (403, "GatedRepo"), "nobody": (404, "RepoNotFound")}.get(owner)
        if commit == "0" * 40:
            error = 404, "RevisionNotFound"
        elif error is None and not file.exists():
            error = 404, "EntryNotFound"
        self.send_response(error[0] if error else 200)
        if error:
            self.send_header("X-Error-Code", error[1])
        content = b"" if error else file.read_bytes()
        self.send_header("X-Repo-Commit", COMMIT if commit == "main" else commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content)

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path == "/short.pth":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "net.pth").write_bytes(CONTENT)
    server = _Server(folder)
    yield server
    server.close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as the Hugging Face hub, with a cache of its own; its requests are HEAD first."""
    download = partial(
        huggingface_hub.hf_hub_download, endpoint=server.url, cache_dir=tmp_path / "hub"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return server


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder that fetched files are kept in."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def locate(weights, encoder="resnet18"):
    messages = []
    return locate_weights(weights, encoder, messages.append), messages


def test_a_file_is_fetched_once_and_then_used_without_a_network(server, kept):
    weights = f"{server.url}/net.pth#sha256={HASH}"
    path, messages = locate(weights)
    assert path.read_bytes() == CONTENT
    assert messages == [f"Fetching {server.url}/net.pth"]
    server.close()
    again, messages = locate(weights)
    assert (again, messages) == (path, [])
    assert server.requests == ["/net.pth"]
    assert list(kept.iterdir()) == [path]
    assert kept.stat().st_mode & 0o777 == 0o700


def test_names_are_pinned_by_the_first_digits(server, kept, monkeypatch):
    table = {
        "good": PinnedFile("resnet18", f"{server.url}/net.pth", HASH[:8]),
        "forged": PinnedFile("resnet18", f"{server.url}/net.pth", "0123abcd"),
    }
    monkeypatch.setattr(weight_hub, "PINNED", table)
    path, _ = locate("good")
    assert path.read_bytes() == CONTENT
    with pytest.raises(DataError, match=rf"its SHA-256 is {HASH}, not 0123abcd\.\.\.; nothing"):
        locate("forged")
    assert list(kept.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"set --model\.encoder resnet18"):
        locate("good", "resnet50")


def test_a_model_starts_from_a_name_also_without_a_network(server, kept, tmp_path, monkeypatch):
    config = config_of("small-cnn", "small-cnn-test")
    trees = random_trees(config)
    path = tmp_path / "served" / "small.safetensors"
    write_export(path, config, trees)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table = {"small-cnn-test": PinnedFile("small-cnn", f"{server.url}/{path.name}", digest)}
    monkeypatch.setattr(weight_hub, "PINNED", table)
    for _ in range(2):
        assert_equal_trees(start_of(config).into(*random_trees(config, seed=1)), trees)
        server.close()


def test_a_wrong_hash_leaves_nothing(server, kept):
    with pytest.raises(DataError, match="is not the pinned file"):
        locate(f"{server.url}/net.pth#sha256={'0' * 64}")
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("name", ["short.pth", "missing.pth"])
def test_a_broken_transfer_leaves_nothing(server, kept, name):
    with pytest.raises(DataError, match=f"cannot fetch .*{name}.*name the file"):
        locate(f"{server.url}/{name}#sha256={HASH}")
    assert list(kept.iterdir()) == []


def test_without_a_network_what_was_never_fetched_is_told(server, kept):
    server.close()
    with pytest.raises(DataError, match="has not been fetched here before"):
        locate(f"{server.url}/net.pth#sha256={HASH}")
    assert list(kept.iterdir()) == []


def test_a_kept_file_that_has_changed_is_fetched_anew(server, kept):
    weights = f"{server.url}/net.pth#sha256={HASH}"
    path, _ = locate(weights)
    path.write_bytes(CONTENT[:-1])
    assert locate(weights)[0].read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_cache_that_cannot_be_written_is_a_disk_error(server, kept):
    kept.parent.touch()
    with pytest.raises(DiskError, match="cannot keep weights"):
        locate(f"{server.url}/net.pth#sha256={HASH}")


@pytest.mark.parametrize("path", ["net", "net.exe", "..", "a%2fb.pth"])
def test_addresses_must_name_a_weight_file(server, kept, path):
    with pytest.raises(ConfigError, match="does not end in a file name"):
        locate(f"{server.url}/{path}#sha256={HASH}")
    assert not kept.exists()


def test_the_pinned_names_are_of_encoders_that_can_be_loaded():
    for name, pinned in PINNED.items():
        assert pinned.encoder in PUBLISHED
        assert name.startswith(pinned.encoder)
        assert pinned.url.startswith("https://")
        assert re.fullmatch(r"[0-9a-f]{8}", pinned.sha256)


def test_a_model_starts_from_a_repository_and_again_without_a_network(hub, tmp_path):
    config = config_of("small-cnn", f"hf:owner/small@{COMMIT}")
    trees = random_trees(config)
    write_export(tmp_path / "served" / "model.safetensors", config, trees)
    for _ in range(2):
        assert_equal_trees(start_of(config).into(*random_trees(config, seed=1)), trees)
        hub.close()
    path, messages = locate(f"hf:owner/small@{COMMIT}")
    assert messages == [f"Weights: hf:owner/small@{COMMIT}"]
    assert path.read_bytes() == (tmp_path / "served" / "model.safetensors").read_bytes()


def test_without_a_commit_the_table_or_the_newest_one_counts(hub, tmp_path, monkeypatch):
    (tmp_path / "served" / "model.safetensors").write_bytes(CONTENT)
    monkeypatch.setattr(weight_hub, "REVISIONS", {"owner/pinned": "abad1dea" * 5})
    assert locate("hf:owner/pinned")[1] == [f"Weights: hf:owner/pinned@{'abad1dea' * 5}"]
    assert locate("hf:owner/other")[1] == [f"Weights: hf:owner/other@{COMMIT}"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("hf:gated/net", "it is gated; accept its conditions"),
        ("hf:nobody/net", "no such repository, or it is private"),
        (f"hf:owner/net@{'0' * 40}", f"it has no revision {'0' * 40}"),
        ("hf:owner/net", r"it has no model\.safetensors"),
    ],
)
def test_what_the_hub_does_not_give_is_named(hub, weights, words):
    with pytest.raises(DataError, match=f"cannot fetch {weights}: .*{words}"):
        locate(weights)


def test_a_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    # The client waits between its attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.close()
    with pytest.raises(DataError, match=r"the hub cannot be reached.* --model\.weights"):
        locate("hf:owner/net")


def test_the_pinned_revisions_are_full_commit_hashes():
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in REVISIONS.values())
