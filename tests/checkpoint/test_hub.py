"""Downloads from a small Hub on this machine, which can be told to misbehave."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from ernie45 import ErnieModel
from ernie45.checkpoint import download, hub
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.resolve import resolve
from ernie45.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    HubUnreachableError,
    ModelNotFoundError,
)

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves one repository, "org/model". The fields below may be changed while it runs."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    status: int = 200  # what every request is answered with, unless 200
    error_code: str = ""
    api_body: bytes | None = None  # what every API request is answered with, if given
    cut_weights_at: int | None = None  # the next weight file breaks off here …
    then_weights_status: int = 200  # … and later requests for one are answered with this
    weights_status: int = 200
    serve_ranges: bool = True
    endpoint: str = ""
    tokens: set[str] = field(default_factory=set)
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Range header)

    def downloads(self) -> dict[str, list[str]]:
        """File name -> the Range header of every GET for it."""
        found: dict[str, list[str]] = {}
        for method, path, byte_range in self.seen:
            if method == "GET" and "/resolve/" in path:
                found.setdefault(path.rsplit("/", 1)[1], []).append(byte_range)
        return found


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def handler_for(fake: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            byte_range = self.headers.get("Range", "")
            fake.seen.append((self.command, path, byte_range))
            fake.tokens.add(self.headers.get("Authorization", ""))
            if fake.status != 200:
                return self.refuse(fake.status, fake.error_code)
            if path.startswith("/api/models/org/model"):
                return self.answer_api(path.removeprefix("/api/models/org/model"))
            if not path.startswith("/org/model/resolve/"):
                return self.refuse(404, "RepoNotFound")
            name = path.removeprefix("/org/model/resolve/").partition("/")[2]
            if name not in fake.files:
                return self.refuse(404, "EntryNotFound")
            return self.send_file(name, byte_range)

        def answer_api(self, rest: str) -> None:
            kind, _, revision = rest.strip("/").partition("/") if rest else ("revision", "", "main")
            if revision not in fake.revisions:
                return self.refuse(404, "RevisionNotFound")
            if kind == "tree":
                return self.send_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": etag(content)[:40]}
                        for name, content in fake.files.items()
                    ]
                )
            siblings = [{"rfilename": name} for name in fake.files]
            return self.send_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})

        def send_file(self, name: str, byte_range: str) -> None:
            content = fake.files[name]
            is_weight_download = name.endswith(".safetensors") and self.command == "GET"
            if is_weight_download and fake.weights_status != 200:
                return self.refuse(fake.weights_status, "")
            start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and fake.serve_ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{etag(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            end = len(content)
            if is_weight_download and fake.cut_weights_at is not None:
                end = fake.cut_weights_at
                fake.cut_weights_at = None
                fake.weights_status = fake.then_weights_status
                self.close_connection = True
            self.wfile.write(content[start:end])

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, value: object) -> None:
            body = json.dumps(value).encode() if fake.api_body is None else fake.api_body
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(
        files={
            "config.json": b'{"model_type": "ernie4_5"}',
            "tokenizer.json": b"{}",
            "model.safetensors": save({"w": torch.arange(200_000, dtype=torch.float32)}),
            "modeling_ernie.py": b"raise SystemExit('run!')",
            "pytorch_model.bin": b"\x80",
            "README.md": b"# model",
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.endpoint = f"http://127.0.0.1:{server.server_port}"
    point_at(monkeypatch, fake.endpoint)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("HF_TOKEN", "")
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make huggingface_hub, which reads HF_ENDPOINT when it is imported, use another endpoint."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_fetches_what_is_needed_and_nothing_that_could_run(fake_hub: FakeHub, cache: Path) -> None:
    folder = resolve("org/model", cache_dir=cache)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert set(fake_hub.downloads()) == {"config.json", "model.safetensors", "tokenizer.json"}
    for path in folder.iterdir():
        assert path.read_bytes() == fake_hub.files[path.name]
    assert read_headers(folder).tensors["w"].shape == (200_000,)


def test_a_checkpoint_can_be_refused_before_its_weights_are_fetched(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(ConfigError, match="llama"):
        ErnieModel.from_pretrained("org/model", cache_dir=cache)
    assert set(fake_hub.downloads()) == {"config.json", "tokenizer.json"}


def test_a_complete_cache_downloads_nothing_again(fake_hub: FakeHub, cache: Path) -> None:
    folder = resolve("org/model", cache_dir=cache)
    fake_hub.seen.clear()
    assert resolve("org/model", cache_dir=cache) == folder
    assert fake_hub.downloads() == {}


def test_fetches_the_shards_the_index_names(fake_hub: FakeHub, cache: Path) -> None:
    del fake_hub.files["model.safetensors"]
    shards = {f"model-0000{i}-of-00003.safetensors": save({f"w{i}": torch.ones(i)}) for i in (1, 2, 3)}
    weight_map = {f"w{i}": name for i, name in enumerate(shards, start=1)}
    index = json.dumps({"weight_map": weight_map}).encode()
    fake_hub.files |= shards | {"model.safetensors.index.json": index, "consolidated.safetensors": b"unnamed"}
    folder = resolve("org/model", cache_dir=cache)
    assert set(read_headers(folder).tensors) == {"w1", "w2", "w3"}
    assert "consolidated.safetensors" not in fake_hub.downloads()


def test_a_broken_download_goes_on_with_the_next_call(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.cut_weights_at, fake_hub.then_weights_status = 300_000, 500
    with pytest.raises(HubUnreachableError, match="500"):
        resolve("org/model", cache_dir=cache)

    fake_hub.weights_status = 200
    fake_hub.seen.clear()
    folder = resolve("org/model", cache_dir=cache)
    assert fake_hub.downloads() == {"model.safetensors": ["bytes=300000-"]}
    assert (folder / "model.safetensors").read_bytes() == fake_hub.files["model.safetensors"]
    assert not list(cache.rglob("*.incomplete"))


def test_a_broken_download_goes_on_within_the_call(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.cut_weights_at = 300_000
    folder = resolve("org/model", cache_dir=cache)
    assert fake_hub.downloads()["model.safetensors"] == ["", "bytes=300000-"]
    assert (folder / "model.safetensors").read_bytes() == fake_hub.files["model.safetensors"]


def test_a_server_without_ranges_is_asked_for_the_whole_file(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.cut_weights_at, fake_hub.serve_ranges = 300_000, False
    folder = resolve("org/model", cache_dir=cache)
    assert (folder / "model.safetensors").read_bytes() == fake_hub.files["model.safetensors"]


def test_a_server_that_sends_nothing_is_given_up(fake_hub: FakeHub, cache: Path) -> None:
    plant_partial(fake_hub, cache).write_bytes(fake_hub.files["model.safetensors"][:1000])
    fake_hub.weights_status = 206  # an answer without a body
    with pytest.raises(HubUnreachableError, match="ends after 1000 of"):
        resolve("org/model", cache_dir=cache)
    assert fake_hub.downloads()["model.safetensors"] == ["bytes=1000-"] * download.MAX_FRUITLESS_TRIES


def test_a_failing_file_stops_the_others(fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_or_wait(blob: object, headers: object, advance: object, stopping: threading.Event) -> None:
        if first_come.acquire(blocking=False):
            raise OSError(errno.EIO, "broken disk")
        assert stopping.wait(30)

    first_come = threading.Lock()
    monkeypatch.setattr(hub, "download", fail_or_wait)
    shards = {f"model-0000{i}-of-00002.safetensors": save({f"w{i}": torch.ones(i)}) for i in (1, 2)}
    weight_map = {f"w{i}": name for i, name in enumerate(shards, start=1)}
    fake_hub.files |= shards | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    with pytest.raises(CheckpointError, match="broken disk"):
        resolve("org/model", cache_dir=cache)
    assert not fake_hub.downloads().keys() & shards.keys()


def test_a_partial_file_of_other_content_is_found_out(fake_hub: FakeHub, cache: Path) -> None:
    partial = plant_partial(fake_hub, cache)
    partial.write_bytes(b"not the first bytes of this file")
    with pytest.raises(CorruptFileError, match="damaged"):
        resolve("org/model", cache_dir=cache)
    folder = resolve("org/model", cache_dir=cache)
    assert (folder / "model.safetensors").read_bytes() == fake_hub.files["model.safetensors"]


def test_a_full_disk_is_told_with_what_to_do(fake_hub: FakeHub, cache: Path) -> None:
    plant_partial(fake_hub, cache).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        resolve("org/model", cache_dir=cache)
    assert "cache_dir=" in caught.value.hint


def test_a_download_that_cannot_fit_the_disk_does_not_start(
    fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    num_bytes = len(fake_hub.files["model.safetensors"])
    with pytest.raises(CheckpointError, match=f"needs {num_bytes:,} bytes, but .* has room for 1,000"):
        resolve("org/model", cache_dir=cache)
    assert "model.safetensors" not in fake_hub.downloads()


def test_a_repository_with_pickles_only_is_refused(fake_hub: FakeHub, cache: Path) -> None:
    del fake_hub.files["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors on the Hub") as caught:
        resolve("org/model", cache_dir=cache)
    assert "pickles" in caught.value.hint
    assert "pytorch_model.bin" not in fake_hub.downloads()


def test_a_revision_is_fetched(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.revisions = ("refs%2Fpr%2F11", COMMIT)
    assert resolve("org/model", revision="refs/pr/11", cache_dir=cache).name == COMMIT


def test_an_unknown_revision_is_named(fake_hub: FakeHub, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="org/model has no revision 'v9'"):
        resolve("org/model", revision="v9", cache_dir=cache)


@pytest.mark.parametrize("code", ["RepoNotFound", ""])
def test_an_unknown_repository_is_named(fake_hub: FakeHub, cache: Path, code: str) -> None:
    fake_hub.status, fake_hub.error_code = 404, code
    with pytest.raises(ModelNotFoundError, match="has no model org/other"):
        resolve("org/other", cache_dir=cache)


def test_a_near_miss_of_a_known_name_gets_a_suggestion(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.status = 404
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("baidu/ERNIE-4.5-0.3B-TP", cache_dir=cache)
    assert "baidu/ERNIE-4.5-0.3B-PT" in caught.value.hint


@pytest.mark.parametrize(("status", "code"), [(401, ""), (403, ""), (403, "GatedRepo"), (401, "GatedRepo")])
def test_refused_access_names_token_and_terms(fake_hub: FakeHub, cache: Path, status: int, code: str) -> None:
    fake_hub.status, fake_hub.error_code = status, code
    with pytest.raises(AccessDeniedError, match=f"refuses access to org/model .*{status}") as caught:
        resolve("org/model", cache_dir=cache)
    assert "token=" in caught.value.hint


def test_the_token_is_sent(fake_hub: FakeHub, cache: Path) -> None:
    resolve("org/model", cache_dir=cache, token="hf_secret")
    assert fake_hub.tokens == {"Bearer hf_secret"}


def test_a_failing_hub_is_unreachable(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.status = 500
    with pytest.raises(HubUnreachableError, match="HTTP 500"):
        resolve("org/model", cache_dir=cache)


def test_a_server_that_is_no_hub_is_told_apart(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.api_body = b"<html>please log in</html>"
    with pytest.raises(HubUnreachableError, match="does not answer like a Hub"):
        resolve("org/model", cache_dir=cache)


def test_without_network_and_cache_the_endpoint_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, CLOSED)
    with pytest.raises(HubUnreachableError, match=CLOSED) as caught:
        resolve("org/model", cache_dir=cache)
    assert "HF_ENDPOINT" in caught.value.hint


def test_without_network_a_complete_cache_serves(
    fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("org/model", cache_dir=cache)
    point_at(monkeypatch, CLOSED)
    assert resolve("org/model", cache_dir=cache) == folder


def test_without_network_a_cache_that_lacks_weights_is_unreachable(
    fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (resolve("org/model", cache_dir=cache) / "model.safetensors").unlink()
    point_at(monkeypatch, CLOSED)
    with pytest.raises(HubUnreachableError, match=CLOSED):
        resolve("org/model", cache_dir=cache)


def test_local_files_only_serves_from_the_cache_without_asking(fake_hub: FakeHub, cache: Path) -> None:
    folder = resolve("org/model", cache_dir=cache)
    fake_hub.seen.clear()
    assert resolve("org/model", cache_dir=cache, local_files_only=True) == folder
    assert fake_hub.seen == []


def test_local_files_only_without_a_cache_asks_nobody(fake_hub: FakeHub, cache: Path) -> None:
    with pytest.raises(HubUnreachableError, match=r"org/model is not .* in the cache") as caught:
        resolve("org/model", cache_dir=cache, local_files_only=True)
    assert "local_files_only=False" in caught.value.hint
    assert fake_hub.seen == []


def test_local_files_only_names_missing_weights(fake_hub: FakeHub, cache: Path) -> None:
    (resolve("org/model", cache_dir=cache) / "model.safetensors").unlink()
    with pytest.raises(HubUnreachableError, match=r"lacks 1 of 1 weight files of org/model: model\.safetensors"):
        resolve("org/model", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["org/mo del", "org/model--x", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_refused(cache: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=repr(name)):
        resolve(name, cache_dir=cache)


def test_a_fresh_process_uses_hf_endpoint_and_prints_nothing_without_progress(fake_hub: FakeHub, cache: Path) -> None:
    script = (
        "import sys; from ernie45.checkpoint.resolve import resolve; "
        "print(resolve('org/model', cache_dir=sys.argv[1], progress=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(cache)],
        env=os.environ | {"HF_ENDPOINT": fake_hub.endpoint},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()
    assert done.stderr == ""


def test_a_terminal_sees_one_bar_in_bytes(fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    resolve("org/model", cache_dir=cache)
    assert "Downloading org/model: 100%" in terminal.getvalue()
    assert "800k/800k" in terminal.getvalue()
    assert "Fetching" not in terminal.getvalue()


def plant_partial(fake_hub: FakeHub, cache: Path) -> Path:
    """Where a partly fetched weight file would lie."""
    blobs = cache / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    return blobs / f"{etag(fake_hub.files['model.safetensors'])}.incomplete"
