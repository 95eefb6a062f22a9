"""Hub ids against a small hub on this machine: what is fetched, what is not, and every way in which it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from memscrub.errors import ExitCode
from memscrub.storage.hub import parse_hub_id

COMMIT, OLDER = "a" * 40, "b" * 40
A, B, OTHER = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2, 3))
WEIGHT_MAP = {"first": A, "second": B}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# a model",
    "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": WEIGHT_MAP}).encode(),
    A: save({"first": torch.ones(2, 3)}),
    B: save({"second": torch.zeros(4)}),
    # What is never fetched:
    OTHER: save({"stray": torch.ones(1)}),
    "consolidated.safetensors": save({"again": torch.ones(9)}),
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
    "model.gguf": b"x",
}
FETCHED = {"README.md", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model", A, B} | {
    "model.safetensors.index.json"
}


class Hub(ThreadingHTTPServer):
    """A hub with the repository `owner/name`, and a few that only answer with errors."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = dict(FILES)
        self.revisions = {"main": COMMIT, "v1.0": OLDER, COMMIT: COMMIT, OLDER: OLDER}
        self.fetched: list[str] = []
        self.asked: list[str] = []
        self.cut: str | None = None  # a file of which half is sent, once
        self.broken: str | None = None  # a file that the hub fails on

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        if path.startswith("api/models/"):
            self._model(*path.split("/")[2:])
        elif "/resolve/" in path:
            self._file(path)
        else:
            self._send(b"", 404, {})

    def _model(self, owner: str, name: str, *rest: str) -> None:
        errors = {
            "gated": (403, {"X-Error-Code": "GatedRepo"}),
            "private": (401, {}),
            "missing": (404, {"X-Error-Code": "RepoNotFound"}),
            "down": (500, {}),
        }
        if name in errors:
            return self._send(b"{}", *errors[name])
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in self.server.revisions:
            return self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        commit = self.server.revisions[revision]
        if rest and rest[0] == "tree":
            return self._json([self._entry(name) for name in self.server.files])
        siblings = [{"rfilename": name} for name in self.server.files]
        return self._json({"_id": "1", "id": f"{owner}/{name}", "sha": commit, "siblings": siblings})

    def _entry(self, name: str) -> dict[str, object]:
        data = self.server.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": self._etag(name)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return entry

    def _etag(self, name: str) -> str:
        data = self.server.files[name]
        kind = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        return kind(data).hexdigest()

    def _file(self, path: str) -> None:
        _owner, _name, _resolve, commit, name = path.split("/", 4)
        if name == self.server.broken:
            return self._send(b"", 501, {})  # one that huggingface_hub does not wait and ask again for
        if name not in self.server.files:
            return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        data = self.server.files[name]
        headers = {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.fetched.append(name)
        if self.headers.get("Range") and self.command == "GET":
            begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self._send(data[begin:], 206, headers)
        if name == self.server.cut and self.command == "GET":
            self.server.cut, self.close_connection = None, True
            return self._send(data, 200, headers, sent=len(data) // 2)
        return self._send(data, 200, headers)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, data: bytes, status: int, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.errors import MemscrubError
try:
    ckpt = open_checkpoint(sys.argv[1])
    print(json.dumps({"path": str(ckpt.path), "files": ckpt.files, "tensors": sorted(ckpt.tensors)}))
except MemscrubError as error:
    print(json.dumps({"code": int(error.exit_code), "error": str(error)}))
"""


def opened(hub: Hub | None, source: str, folder: Path, **environment: str) -> dict[str, object]:
    """`open_checkpoint(source)` in a process of its own: huggingface_hub reads its settings when it is imported."""
    home = folder / "hf"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"} | environment
    if hub is not None:
        settings["HF_ENDPOINT"] = hub.url
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source], env=clean | settings, cwd=folder, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    value: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return value


def refused(found: dict[str, object], code: ExitCode, *parts: str) -> None:
    message = str(found["error"])
    assert found["code"] == code, message
    assert all(part in message for part in parts), message
    assert "\n" not in message and message.count(". ") == 0 and message.endswith(".")


def test_a_model_is_fetched_without_pickles_code_and_weights_that_the_index_does_not_name(
    hub: Hub, tmp_path: Path
) -> None:
    found = opened(hub, "owner/name", tmp_path)
    assert set(found["files"]) == FETCHED and found["tensors"] == ["first", "second"]  # type: ignore[call-overload]
    assert set(hub.fetched) == FETCHED
    assert all(path.startswith(("api/models/owner/name/", "owner/name/resolve/")) for path in hub.asked)
    assert Path(str(found["path"])).name == COMMIT


def test_a_single_file_is_fetched_where_there_is_no_index(hub: Hub, tmp_path: Path) -> None:
    kept = ("config.json", "pytorch_model.bin", "consolidated.safetensors")
    hub.files = {name: FILES[name] for name in kept} | {"model.safetensors": save({"only": torch.ones(3)})}
    assert opened(hub, "owner/name", tmp_path)["tensors"] == ["only"]
    assert set(hub.fetched) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(("revision", "commit"), [("v1.0", OLDER), (OLDER, OLDER), ("main", COMMIT)])
def test_a_revision_is_a_tag_a_branch_or_a_commit(hub: Hub, tmp_path: Path, revision: str, commit: str) -> None:
    found = opened(hub, f"owner/name@{revision}", tmp_path)
    assert Path(str(found["path"])).name == commit
    assert all(f"/resolve/{commit}/" in path for path in hub.asked if "/resolve/" in path)


def test_a_branch_that_moves_while_it_is_fetched_does_not_mix_versions(hub: Hub, tmp_path: Path) -> None:
    class Moving(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            value = super().__getitem__(key)
            if key == "main":  # pushed to right after the first look
                super().__setitem__("main", OLDER)
            return value

    hub.revisions = Moving(hub.revisions)
    assert Path(str(opened(hub, "owner/name", tmp_path)["path"])).name == COMMIT
    assert not [path for path in hub.asked if OLDER in path]


def test_what_was_fetched_is_used_again_offline_without_asking(hub: Hub, tmp_path: Path) -> None:
    online = opened(hub, "owner/name", tmp_path)
    hub.asked.clear()
    assert opened(hub, "owner/name", tmp_path, HF_HUB_OFFLINE="1") == online and hub.asked == []
    hub.shutdown()
    hub.server_close()
    assert opened(hub, "owner/name", tmp_path) == online  # the hub is gone, the cache is not
    assert opened(None, f"owner/name@{COMMIT}", tmp_path, HF_HUB_OFFLINE="1") == online


def test_offline_without_the_model_says_what_forbids_it(tmp_path: Path) -> None:
    found = opened(None, "owner/name", tmp_path, HF_HUB_OFFLINE="1")
    refused(found, ExitCode.USAGE, "owner/name is not complete in the local cache", "HF_HUB_OFFLINE", "unset it")


def test_offline_with_half_the_model_says_so_and_online_fetches_the_rest_only(hub: Hub, tmp_path: Path) -> None:
    hub.broken = B
    found = opened(hub, "owner/name", tmp_path)
    refused(found, ExitCode.INCOMPLETE, "could not be fetched", "status 501", "run again")
    refused(opened(hub, "owner/name", tmp_path, HF_HUB_OFFLINE="1"), ExitCode.USAGE, "is not complete")
    hub.broken = None
    before = set(hub.fetched)
    hub.fetched.clear()
    assert opened(hub, "owner/name", tmp_path)["tensors"] == ["first", "second"]
    assert B in hub.fetched and not before & set(hub.fetched)


def test_a_download_that_breaks_off_is_resumed_and_its_bytes_are_right(hub: Hub, tmp_path: Path) -> None:
    hub.files[A] = save({"first": torch.arange(5000.0)})
    hub.cut = A
    found = opened(hub, "owner/name", tmp_path)
    assert hub.fetched.count(A) > 1
    assert (Path(str(found["path"])) / A).read_bytes() == hub.files[A]


@pytest.mark.parametrize(
    ("source", "code", "parts"),
    [
        ("owner/gated", ExitCode.USAGE, ("gated", "accept its terms", "hf auth login")),
        ("owner/private", ExitCode.USAGE, ("hub refuses access to owner/private", "hf auth login")),
        ("owner/missing", ExitCode.USAGE, ("neither a local directory nor a model", "check the name", "private")),
        ("owner/name@v9", ExitCode.USAGE, ("owner/name has no revision 'v9'",)),
        ("owner/down", ExitCode.INCOMPLETE, ("could not be fetched", "status 500", "run again")),
    ],
)
def test_every_refusal_of_the_hub_is_one_sentence(
    hub: Hub, tmp_path: Path, source: str, code: ExitCode, parts: tuple[str, ...]
) -> None:
    refused(opened(hub, source, tmp_path), code, *parts)
    assert not hub.fetched


def test_a_hub_that_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    refused(
        opened(hub, "owner/name", tmp_path), ExitCode.INCOMPLETE, "could not be fetched", "ConnectError", "run again"
    )


@pytest.mark.parametrize(
    "weight_map",
    [{"first": "../../outside.safetensors"}, {"first": "*.safetensors"}, {"first": "/etc/passwd"}, ["x"], None],
)
def test_an_index_from_the_hub_cannot_name_what_it_likes(hub: Hub, tmp_path: Path, weight_map: object) -> None:
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    found = opened(hub, "owner/name", tmp_path)
    assert found["code"] == ExitCode.USAGE and "model.safetensors.index.json" in str(found["error"])
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_an_adapter_and_its_base_come_from_the_hub_too(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"adapter_config.json": b'{"base_model_name_or_path": "owner/base"}', "adapter_model.bin": b"pickle"}
    found = opened(hub, "owner/name", tmp_path)
    refused(found, ExitCode.USAGE, "is an adapter", "memscrub scan owner/base --adapter owner/name")
    assert set(hub.fetched) == {"adapter_config.json"}


@pytest.mark.parametrize("source", ["name", "owner/name/more", "a b/c", "owner/", "/owner", "owner/name@", "o/n@a b"])
def test_other_words_are_no_hub_ids(source: str) -> None:
    assert parse_hub_id(source) is None


def test_hub_ids_may_have_dots_dashes_and_revisions_with_slashes() -> None:
    assert parse_hub_id("HuggingFaceTB/SmolLM-360M") == ("HuggingFaceTB/SmolLM-360M", None)
    assert parse_hub_id("a_b/c.d-e@refs/pr/3") == ("a_b/c.d-e", "refs/pr/3")
