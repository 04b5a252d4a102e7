"""Fetching against a local server that behaves well, badly, or leads somewhere else."""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision import fetch as fetching
from ernie45.vision.fetch import fetch

BODY = b"picture" * 1000
PUBLIC = "93.184.215.14"
OPEN = MediaLimits(allow_private_urls=True)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # the client hangs up, as it should
            getattr(self, f"get_{self.path.split('?')[0].strip('/').split('/')[0]}")()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, *headers: tuple[str, str], status: int = 200, body: bytes = BODY) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def get_plain(self) -> None:
        self.answer(("Content-Type", "image/png"), ("Content-Length", str(len(BODY))))

    def get_untyped(self) -> None:
        self.answer()

    def get_octets(self) -> None:
        self.answer(("Content-Type", "application/octet-stream; x=y"))

    def get_clip(self) -> None:
        self.answer(("Content-Type", "video/mp4"))

    def get_nowhere(self) -> None:
        self.answer(("Location", "http://[::1"), status=302)

    def get_chunked(self) -> None:
        chunks = b"".join(b"%x\r\n%s\r\n" % (700, BODY[i : i + 700]) for i in range(0, 7000, 700))
        self.answer(("Transfer-Encoding", "chunked"), ("Content-Type", "image/png"), body=chunks + b"0\r\n\r\n")

    def get_page(self) -> None:
        self.answer(("Content-Type", "text/html"))

    def get_missing(self) -> None:
        self.answer(("Content-Length", "0"), status=404, body=b"")

    def get_squeezed(self) -> None:
        self.answer(("Content-Encoding", "gzip"), ("Content-Type", "image/png"))

    def get_announced(self) -> None:
        self.answer(("Content-Length", "999999999"), ("Content-Type", "image/png"))

    def get_short(self) -> None:
        self.answer(("Content-Length", str(len(BODY) + 5)), ("Content-Type", "image/png"))

    def get_endless(self) -> None:
        self.answer(("Content-Type", "image/png"))
        while True:
            self.wfile.write(BODY)

    def get_understated(self) -> None:
        self.answer(("Content-Length", "10"), ("Content-Type", "image/png"))

    def get_silent(self) -> None:
        time.sleep(3)

    def get_drip(self) -> None:
        self.answer(("Content-Type", "image/png"))
        self.drip()

    def get_dripping(self) -> None:
        self.answer(("Content-Type", "image/png"), ("Transfer-Encoding", "chunked"), body=b"")
        self.drip()

    def get_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip()

    def drip(self) -> None:
        for _ in range(40):
            self.wfile.write(b"1")
            time.sleep(0.1)

    def get_loop(self) -> None:
        self.answer(("Location", self.path), ("Content-Length", "0"), status=302, body=b"")

    def get_hops(self) -> None:
        left = int(self.path.rsplit("/", 1)[1])
        self.answer(("Location", f"{left - 1}" if left > 1 else "/plain"), status=307, body=b"")

    def get_inside(self) -> None:
        port = self.server.port  # type: ignore[attr-defined]
        self.answer(("Location", f"http://127.0.0.1:{port}/plain"), status=301, body=b"")

    def get_file(self) -> None:
        self.answer(("Location", "file:///etc/passwd"), status=302, body=b"")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    asked: list[tuple[str, dict[str, str]]]

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def public_name(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], str]:
    """Makes pictures.example a name with a public address, and connections to that one end at the local server."""

    def prepare(server: Server) -> str:
        connect, look_up = socket.socket.connect, socket.getaddrinfo

        def resolve(host: str, *arguments: Any, **options: Any) -> Any:
            return look_up(PUBLIC if host == "pictures.example" else host, *arguments, **options)

        def reroute(self: socket.socket, address: Any) -> None:
            connect(self, ("127.0.0.1", server.port) if address[0] == PUBLIC else address)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket.socket, "connect", reroute)
        return f"http://pictures.example:{server.port}"

    return prepare


def refused(url: str, limits: MediaLimits, *shown: str) -> None:
    with pytest.raises(MediaError) as caught:
        fetch(url, limits)
    assert caught.value.hint
    for part in shown:
        assert part in str(caught.value)


@pytest.mark.parametrize("path", ["plain", "untyped", "octets", "chunked", "hops/5", "plain?a=b c&d=ü#part"])
def test_a_body_is_fetched(server: Server, path: str) -> None:
    assert fetch(f"http://127.0.0.1:{server.port}/{path}", OPEN) == BODY
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


def test_a_clip_is_fetched_as_a_clip_only(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/clip"
    assert fetch(url, OPEN, kind="video") == BODY
    refused(url, OPEN, "video/mp4", "image/*")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("page", "text/html"),
        ("missing", "404"),
        ("squeezed", "gzip"),
        ("announced", "999999999 bytes"),
        ("announced", "max_bytes=1000000"),
        ("endless", "max_bytes=1000000"),
        ("short", "7000 of 7005 bytes"),
        ("loop", "max_redirects=5"),
        ("hops/6", "max_redirects=5"),
        ("file", "only http and https"),
        ("nowhere", "not a URL"),
    ],
)
def test_bad_answers_are_refused(server: Server, path: str, shown: str) -> None:
    limits = MediaLimits(allow_private_urls=True, max_bytes=1_000_000)
    refused(f"http://127.0.0.1:{server.port}/{path}", limits, shown, "127.0.0.1")


def test_an_understated_length_is_not_read_past(server: Server) -> None:
    assert fetch(f"http://127.0.0.1:{server.port}/understated", OPEN) == BODY[:10]


@pytest.mark.parametrize("path", ["drip", "dripping", "headers"])
def test_a_slow_drip_ends_with_the_total(server: Server, path: str) -> None:
    limits = MediaLimits(allow_private_urls=True, total_seconds=0.7, read_seconds=0.5)
    start = time.monotonic()
    refused(f"http://127.0.0.1:{server.port}/{path}", limits, "total_seconds=0.7")
    assert time.monotonic() - start < 3


def test_silence_ends_with_the_wait(server: Server) -> None:
    limits = MediaLimits(allow_private_urls=True, read_seconds=0.3)
    refused(f"http://127.0.0.1:{server.port}/silent", limits, "read_seconds=0.3")


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused(f"http://127.0.0.1:{unused.getsockname()[1]}/", OPEN, "cannot be fetched")


# Private addresses


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::"),
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_addresses_that_are_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    url = f"http://[{address}]/x.png" if ":" in address else f"http://{address}/x.png"
    refused(url, MediaLimits(), address, "not on the public internet", "allow_private_urls")


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert fetching._is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1", "017700000001"])
def test_other_ways_to_write_this_machine(host: str) -> None:
    refused(f"http://{host}:9/x.png", MediaLimits(), "127.0.0.1" if host != "localhost" else "localhost")


def test_a_name_with_one_private_address_among_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in (PUBLIC, "10.1.2.3")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    refused("http://pictures.example/x.png", MediaLimits(), "pictures.example (10.1.2.3)")


def test_a_public_name_is_fetched(server: Server, public_name: Callable[[Server], str]) -> None:
    assert fetch(f"{public_name(server)}/plain", MediaLimits()) == BODY
    assert server.asked[0][1]["Host"] == f"pictures.example:{server.port}"


def test_a_redirect_to_a_private_address_is_refused(server: Server, public_name: Callable[[Server], str]) -> None:
    refused(f"{public_name(server)}/inside", MediaLimits(), "127.0.0.1", "not on the public internet")
    assert [path for path, _ in server.asked] == ["/inside"]


def test_the_name_is_looked_up_once_and_the_checked_address_used(
    server: Server, public_name: Callable[[Server], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, answers = public_name(server), [PUBLIC, "127.0.0.1"]
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(answers.pop(0), *rest, **more))
    assert fetch(f"{base}/plain", MediaLimits()) == BODY
    assert answers == ["127.0.0.1"]


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(f"http://127.0.0.1:{server.port}/plain", OPEN) == BODY


# TLS

# Made for this test alone, for pictures.example, valid until 2126.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBqzCCAVCgAwIBAgIUQgnAsdLKOrEl17wAIUgA0XH6CCEwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTAgFw0yNjExMjIwNTI1NDRaGA8y
MTI2MTAyOTA1MjU0NFowGzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABJAP9jH5q0KLJiyiN8QWHQdnb4lWxebPRLwH
y1/C182oSrTb7OOrPOM+KIRCyv3FeJwB6i/qcKCw2ZaBA9lgCWqjcDBuMB0GA1Ud
DgQWBBQRJ9j+0XS4VJkv+59zJjWrQEW6MzAfBgNVHSMEGDAWgBQRJ9j+0XS4VJkv
+59zJjWrQEW6MzAPBgNVHRMBAf8EBTADAQH/MBsGA1UdEQQUMBKCEHBpY3R1cmVz
LmV4YW1wbGUwCgYIKoZIzj0EAwIDSQAwRgIhAN+URNRef6Mt5Wt1Uu4xDbxJKyUi
xN5d7gZK9owWAziSAiEA3twma7YXr2Fw6i/VJyh39BXSMYDD4DuIskGC2ROAH1o=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQghflgykGEn/+yBRuE
8++y1iGDOpUkBxSsdIghjWv+TvyhRANCAASQD/Yx+atCiyYsojfEFh0HZ2+JVsXm
z0S8B8tfwtfNqEq02+zjqzzjPiiEQsr9xXicAeov6nCgsNmWgQPZYAlq
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize("host", ["pictures.example", "other.example"])
def test_the_certificate_is_checked_against_the_name(
    server: Server,
    public_name: Callable[[Server], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    host: str,
) -> None:
    (tmp_path / "both.pem").write_text(KEY + CERTIFICATE)
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    public_name(server)
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **more: resolve(PUBLIC, *rest, **more))
    url = f"https://{host}:{server.port}/plain"
    refused(url, MediaLimits(), "certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    if host == "pictures.example":
        assert fetch(url, MediaLimits()) == BODY
    else:
        refused(url, MediaLimits(), "certificate")


# URLs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@pictures.example/x.png?key=hidden", "user or password"),
        ("http://@pictures.example/x.png", "user or password"),
        ("ftp://pictures.example/x.png", "only http and https"),
        ("http:///x.png", "no host"),
        ("http://pictures.example:99999/x.png", "not a URL"),
        ("http://[::1/x.png", "not a URL"),
        ("http://a b/x.png", "no host"),
        ("http://a\0b/x.png", "no host"),
        ("http://" + "a" * 70 + ".example/x.png", "not a URL"),
    ],
)
def test_malformed_urls_are_refused(url: str, shown: str, no_network: None) -> None:
    refused(url, MediaLimits(), shown)
    with pytest.raises(MediaError) as caught:
        fetch(url, MediaLimits())
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_header_cannot_be_smuggled_in(server: Server) -> None:
    fetch(f"http://127.0.0.1:{server.port}/plain?a=\r\nX-Evil: 1", OPEN)
    assert "X-Evil" not in server.asked[0][1]
