"""A small Hub on this machine, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves one repository, "org/model". The fields below may be changed while it runs."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    status: int = 200  # what every request is answered with, unless 200
    error_code: str = ""
    cut_weights_at: int | None = None  # the connection breaks once a response has got this far into a weight file …
    weights_status: int = 200  # … and this is what later requests for one are answered with
    serve_ranges: bool = True
    endpoint: str = ""
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


def handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:  # noqa: N802 - the name http.server calls
            self.answer()

        def do_GET(self) -> None:  # noqa: N802
            self.answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            byte_range = self.headers.get("Range", "")
            hub.seen.append((self.command, path, byte_range))
            if hub.status != 200:
                return self.refuse(hub.status, hub.error_code)
            if path.startswith("/api/models/org/model"):
                return self.answer_api(path.removeprefix("/api/models/org/model"))
            if not path.startswith("/org/model/resolve/"):
                return self.refuse(404, "RepoNotFound")
            name = path.removeprefix("/org/model/resolve/").partition("/")[2]
            if name not in hub.files:
                return self.refuse(404, "EntryNotFound")
            return self.send_file(name, byte_range)

        def answer_api(self, rest: str) -> None:
            kind, _, revision = rest.strip("/").partition("/") if rest else ("revision", "", "main")
            if revision not in hub.revisions:
                return self.refuse(404, "RevisionNotFound")
            if kind == "tree":
                return self.send_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": etag(content)[:40]}
                        for name, content in hub.files.items()
                    ]
                )
            siblings = [{"rfilename": name} for name in hub.files]
            return self.send_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})

        def send_file(self, name: str, byte_range: str) -> None:
            content = hub.files[name]
            is_weight_download = name.endswith(".safetensors") and self.command == "GET"
            if is_weight_download and hub.weights_status != 200:
                return self.refuse(hub.weights_status, "")
            start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and hub.serve_ranges else 0
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
            if is_weight_download and hub.cut_weights_at is not None:
                end = hub.cut_weights_at
                hub.cut_weights_at = None
                hub.weights_status = 503
                self.close_connection = True
            self.wfile.write(content[start:end])

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(
        files={
            "config.json": b'{"model_type": "ernie4_5"}',
            "tokenizer.json": b"{}",
            "model.safetensors": save({"w": torch.arange(200_000, dtype=torch.float32)}),
            "modeling_ernie.py": b"raise SystemExit('run!')",
            "pytorch_model.bin": b"\x80",
            "README.md": b"# model",
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    point_at(monkeypatch, hub.endpoint)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make huggingface_hub, which reads HF_ENDPOINT when it is imported, use another endpoint."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9")  # the discard port: nothing listens there


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
