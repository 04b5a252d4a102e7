"""Fetching one large file so that it can break off at any byte and go on later."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from ernie45.checkpoint.progress import Advance
from ernie45.errors import CorruptFileError, HubUnreachableError

MAX_FRUITLESS_TRIES: Final = 5
RETRY_SECONDS: Final = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """A file to fetch from `url` to `path`, which is named by its etag: its SHA-256, on the Hub."""

    url: str
    path: Path
    num_bytes: int

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.incomplete")

    @property
    def partial_bytes(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0


def download(blob: Blob, headers: dict[str, str], advance: Advance, stopping: threading.Event) -> None:
    """Fetch a blob to its path, going on where `blob.partial` ends; `advance` hears of old bytes too.

    Connections that break are taken up again while bytes keep coming. Returns early once `stopping` is set.
    Raises huggingface_hub's errors, HubUnreachableError when no bytes come, and CorruptFileError when the
    content is not what its name promises.
    """
    with blob.partial.open("ab") as file:
        if file.tell() > blob.num_bytes:
            _empty(file)
        advance(file.tell())
        fruitless_tries = 0
        while file.tell() < blob.num_bytes and not stopping.is_set():
            start = file.tell()
            failure: Exception = HubUnreachableError(
                f"{blob.url} ends after {start} of {blob.num_bytes} bytes", hint="try again later"
            )
            try:
                _append_rest(blob.url, file, headers, advance, stopping)
            except HfHubHTTPError:
                raise  # an answer that says no, where asking again is in vain
            except HTTPError as error:
                failure = error
                stopping.wait(RETRY_SECONDS)
            fruitless_tries = 0 if file.tell() > start else fruitless_tries + 1
            if fruitless_tries == MAX_FRUITLESS_TRIES:
                raise failure
    if stopping.is_set():
        return
    _check_content(blob)
    blob.partial.replace(blob.path)


def _append_rest(
    url: str, file: BinaryIO, headers: dict[str, str], advance: Advance, stopping: threading.Event
) -> None:
    start = file.tell()
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429, 502, 503, 504),
    ) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # this server sends the whole file whatever the range
            _empty(file)
            advance(-start)
        for chunk in response.iter_bytes():
            file.write(chunk)
            advance(len(chunk))
            if stopping.is_set():
                return


def _empty(file: BinaryIO) -> None:
    file.seek(0)  # or tell() would go on from the old end
    file.truncate()


def _check_content(blob: Blob) -> None:
    digest = hashlib.sha256()
    with blob.partial.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        num_bytes = file.tell()
    # Not every server that speaks like the Hub names large files by their SHA-256.
    sha256 = blob.path.name if _SHA256.fullmatch(blob.path.name) else None
    if num_bytes != blob.num_bytes or sha256 not in (None, digest.hexdigest()):
        blob.partial.unlink()
        raise CorruptFileError(
            f"{blob.url} arrived damaged: {num_bytes} of {blob.num_bytes} bytes, SHA-256 {digest.hexdigest()}",
            hint="load the model again to fetch this file anew",
        )
