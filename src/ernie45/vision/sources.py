"""Where pictures and clips come from: a path, a URL, a data URI or bytes."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.types.media import MediaKind
from ernie45.vision.fetch import fetch, is_media_type, url_name

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview

_SHOWN_CHARS = 120
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def read_source(source: FileSource, limits: MediaLimits, *, kind: MediaKind) -> bytes:
    """The file's bytes from a path, an "http(s)://" URL, a base64 "data:" URI or bytes, at most `limits.max_bytes`.

    Raises MediaError: missing, empty, too large, not a file, or not a URL that may be fetched.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        _check_size(size, source, limits)
        content = bytes(source)
    elif isinstance(source, str) and is_url(source):
        content = fetch(source, limits, kind=kind)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content = _decode_data_uri(source, limits, kind)
    elif isinstance(source, str) and _OTHER_SCHEME.match(source):
        raise MediaError(
            f"{source_name(source)}: only http, https and data URLs can be opened",
            hint="give a file's path without a scheme; fetch anything else yourself and pass its bytes",
        )
    else:
        content = _read_file(source, limits)
    if not content:
        raise MediaError(f"{source_name(source)} is empty: 0 bytes", hint="check how the file was made or sent")
    return content


def is_url(source: str) -> bool:
    """Whether a text is a URL to fetch, and not a path."""
    return source[:8].lower().startswith(("http://", "https://"))


def source_name(source: object) -> str:
    """What messages call a source: short, without the content of a data URI or what follows a URL's "?"."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"data URI ({len(source)} characters, {source[:30].split(',')[0]!r})"
    if isinstance(source, str) and is_url(source):
        return url_name(source)
    if isinstance(source, str | os.PathLike):
        return _shortened(str(source))
    if isinstance(source, memoryview):
        return f"{source.nbytes} bytes"
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    return f"object of class {type(source).__name__}"


def _shortened(text: str) -> str:
    shown = text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 30]}...{text[-27:]}"
    return shown if shown.isprintable() and shown else repr(shown)


def _check_size(num_bytes: int, source: FileSource, limits: MediaLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaError(
            f"{source_name(source)}: {num_bytes} bytes are more than max_bytes={limits.max_bytes}",
            hint="make it smaller, or raise MediaLimits.max_bytes if it can be trusted",
        )


def _read_file(source: str | os.PathLike[str], limits: MediaLimits) -> bytes:
    name = source_name(source)
    try:
        path = Path(source)
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise MediaError(f"{name} is a folder", hint="give the path of one file")
        if not stat.S_ISREG(found.st_mode):
            raise MediaError(f"{name} is not a regular file", hint="read it yourself and pass its bytes")
        _check_size(found.st_size, source, limits)
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)  # it may have grown, or not tell its size
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file", hint=f"paths are relative to {_shortened(os.getcwd())}") from None
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError(
            f"cannot read {name}: {reason}",
            hint="give a path, an http(s) URL or a data URI (data:image/png;base64,...)",
        ) from error
    _check_size(len(content), source, limits)
    return content


def _decode_data_uri(uri: str, limits: MediaLimits, kind: MediaKind) -> bytes:
    name = source_name(uri)
    hint = f"write it as data:{kind}/...;base64,<the file's bytes in base64>"
    header, comma, payload = uri[5:].partition(",")
    media_type, *parameters = header.split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise MediaError(f"{name} is not in base64", hint=hint)
    if not is_media_type(media_type, kind):
        raise MediaError(f"{name} is of type {media_type[:60]!r}, and {kind}/* is wanted", hint=hint)
    text = b"".join((unquote_to_bytes(payload) if "%" in payload else payload.encode(errors="replace")).split())
    try:
        content = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{name} is damaged: {error}", hint=hint) from error
    _check_size(len(content), uri, limits)
    return content
