"""Fetch a picture or clip from a URL that somebody else may have chosen.

Nothing of the standard library's opener is used, as it follows redirects and proxies by itself: each hop is looked up,
every address checked, and the connection made to the very address that was checked.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.types.media import MediaKind

_REDIRECTS = (301, 302, 303, 307, 308)
_NO_CLAIM = ("", "application/octet-stream", "binary/octet-stream")
_CHUNK_BYTES = 1 << 16
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_YOURSELF = "fetch it yourself and pass its bytes"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, limits: MediaLimits, *, kind: MediaKind = "image") -> bytes:
    """The body of an http or https URL, at most `limits.max_bytes`, of type `kind`/* or of no particular type.

    Proxies set in the environment are not used: a proxy looks names up itself, so that no address could be checked.
    Looking a name up is bounded by the system's resolver and by the time that is left once it answers.

    Raises:
        MediaError: the URL is malformed or names a private address; the server cannot be reached, answers with
            another status than 200, sends another type or a compressed body; or a limit is passed, which is named.
    """
    clock = _Clock(limits=limits, url=url, end=time.monotonic() + limits.total_seconds)
    target = url
    for _ in range(limits.max_redirects + 1):
        name = url_name(url) if target == url else f"{url_name(url)}, which leads to {url_name(target)},"
        body, location = _request(_split(target, name), name, clock, kind)
        if location is None:
            return body
        try:
            target = urljoin(target, location)
        except ValueError as error:
            raise MediaError(
                f"{name} leads to {location!r:.100}, which is not a URL", hint="give the address of the picture itself"
            ) from error
    raise MediaError(
        f"{url_name(url)}: more than max_redirects={limits.max_redirects} redirects",
        hint="give the address that it leads to in the end",
    )


def is_media_type(content_type: str, kind: MediaKind) -> bool:
    """Whether a content type is a picture's (or clip's, which an animated picture is as well), or makes no claim."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type in _NO_CLAIM or media_type.startswith(("image/", f"{kind}/"))


def url_name(url: str) -> str:
    """A URL as messages show it: short, and without user, password and what follows "?", which may be secret."""
    bare = re.sub(r"^([A-Za-z]+://)[^/?#]*@", r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
    shown = bare if len(bare) <= 120 else f"{bare[:90]}...{bare[-27:]}"
    return shown if shown.isprintable() else repr(shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clock:
    """Counts the time of one fetch, over all its redirects."""

    limits: MediaLimits
    url: str
    end: float

    def seconds_for(self, step_seconds: float) -> float:
        """How long the next step may take: its own limit, or what is left of the total. TimeoutError: nothing is."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(step_seconds, left)

    def error(self, step: str) -> MediaError:
        """The error of the limit that was passed: the total, or that of one step."""
        name = "total_seconds" if time.monotonic() >= self.end else step
        return MediaError(
            f"{url_name(self.url)}: slower than {name}={getattr(self.limits, name):g}",
            hint=f"raise MediaLimits.{name}, or {_YOURSELF}",
        )


class _TimedStream(io.RawIOBase):
    """A socket's bytes. Each wait is bounded anew, so that a server that drips bytes gets no more than the total."""

    def __init__(self, connected: socket.socket, clock: _Clock) -> None:
        self._socket = connected
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._clock.seconds_for(self._clock.limits.read_seconds))
        return self._socket.recv_into(buffer)


class _TimedSocket:
    """What http.client needs of a socket."""

    def __init__(self, connected: socket.socket, clock: _Clock) -> None:
        self._socket = connected
        self._clock = clock

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedStream(self._socket, self._clock))

    def sendall(self, content: bytes) -> None:
        self._socket.settimeout(self._clock.seconds_for(self._clock.limits.read_seconds))
        self._socket.sendall(content)

    def close(self) -> None:
        """http.client calls this before the answer is read; `_request` closes the socket."""


def _split(url: str, name: str) -> SplitResult:
    """The parts of a URL that may be fetched; MediaError, which calls it `name`, for any other."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a ValueError when it is no port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:  # a UnicodeError of idna is one
        raise MediaError(f"{name} is not a URL: {error}", hint="check how it is written") from error
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{name}: only http and https are fetched", hint=_YOURSELF)
    if not _HOST.fullmatch(host):
        raise MediaError(f"{name}: {host!r:.100} is no host", hint="check how it is written")
    if "@" in parts.netloc:
        raise MediaError(f"{name} has a user or password in it", hint=f"give a URL without; or {_YOURSELF}")
    return parts


def _request(parts: SplitResult, name: str, clock: _Clock, kind: MediaKind) -> tuple[bytes, str | None]:
    """One hop: the body, or the address that it is redirected to."""
    host, secure = (parts.hostname or "").encode("idna").decode(), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = make(host, port)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?") if parts.query else ""
    try:
        connected = _connect(host, port, clock, secure=secure)
        with connected:
            connection.sock = _TimedSocket(connected, clock)
            headers = {"User-Agent": "ernie45", "Accept": f"{kind}/*", "Accept-Encoding": "identity"}
            connection.request("GET", path + query, headers=headers | {"Connection": "close"})
            with connection.getresponse() as response:
                if response.status in _REDIRECTS and (location := response.getheader("Location")):
                    return b"", location
                _check_headers(response, name, clock.limits.max_bytes, kind)
                return _read_body(response, name, clock.limits.max_bytes), None
    except TimeoutError as error:
        raise clock.error("read_seconds") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise MediaError(
            f"{name} cannot be fetched: {reason:.200}",
            hint=f"check the address and the network (proxies are not used); or {_YOURSELF}",
        ) from error


def _connect(host: str, port: int, clock: _Clock, *, secure: bool) -> socket.socket:
    """A connection to the first of the host's addresses that answers, all of them checked before."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not clock.limits.allow_private_urls:
        for *_, address in found:
            if not _is_public(ipaddress.ip_address(str(address[0]))):
                where = host if host == address[0] else f"{host} ({address[0]})"
                raise MediaError(
                    f"{url_name(clock.url)} leads to {where}, which is not on the public internet",
                    hint="pass MediaLimits(allow_private_urls=True) if every URL can be trusted",
                )
    failure: OSError = OSError(f"{host} has no address")
    for family, type_, protocol, _, address in found:
        connected = socket.socket(family, type_, protocol)
        try:
            connected.settimeout(clock.seconds_for(clock.limits.connect_seconds))
            connected.connect(address)
            if secure:
                connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        except OSError as error:
            connected.close()
            failure = error
        else:
            return connected
    if isinstance(failure, TimeoutError):
        raise clock.error("connect_seconds") from failure
    raise failure


def _is_public(address: Address) -> bool:
    """Whether an address is on the public internet; what carries an IPv4 address inside is judged by that."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return _is_public(inside)
        if address.is_site_local or address.teredo is not None:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _check_headers(response: http.client.HTTPResponse, name: str, max_bytes: int, kind: MediaKind) -> None:
    if response.status != 200:
        raise MediaError(f"{name}: the server answers {response.status} {response.reason:.60}", hint=_YOURSELF)
    for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        encoding = response.getheader(header, plain).strip()
        if encoding.lower() != plain:
            raise MediaError(f"{name}: the server sends {header}: {encoding:.60}, unasked", hint=_YOURSELF)
    content_type = response.getheader("Content-Type", "")
    if not is_media_type(content_type, kind):
        raise MediaError(
            f"{name} is of type {content_type:.60}, and {kind}/* is wanted",
            hint="give the address of the file itself, not of a page that shows it",
        )
    if response.length is not None and response.length > max_bytes:
        _too_large(name, f"{response.length} bytes are", max_bytes)


def _read_body(response: http.client.HTTPResponse, name: str, max_bytes: int) -> bytes:
    announced, body = response.length, bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            _too_large(name, "it is", max_bytes)
    if announced is not None and len(body) < announced:
        raise MediaError(f"{name}: cut short after {len(body)} of {announced} bytes", hint="try again")
    return bytes(body)


def _too_large(name: str, what: str, max_bytes: int) -> NoReturn:
    raise MediaError(
        f"{name}: {what} more than max_bytes={max_bytes}",
        hint="raise MediaLimits.max_bytes if the server can be trusted",
    )
