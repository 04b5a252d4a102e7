from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from ernie45.errors import InvalidRequestError, MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision import sources
from ernie45.vision.sources import FileSource, read_source, source_name

CONTENT = bytes(range(256)) * 4
BASE64 = base64.b64encode(CONTENT).decode()


def test_paths_bytes_and_data_uris_give_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "with space, %20 and ü.png"
    path.write_bytes(CONTENT)
    given: list[FileSource] = [path, str(path), CONTENT, bytearray(CONTENT), memoryview(CONTENT)]
    for source in given:
        assert read_source(source, MediaLimits(max_bytes=1024), kind="image") == CONTENT


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:image/png;name=a.png;base64,{BASE64}",
        f"data:application/octet-stream;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;base64," + BASE64.replace("+", "%2B").replace("=", "%3D"),
        "data:image/png;base64,\n" + "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    ],
)
def test_data_uris(uri: str) -> None:
    assert read_source(uri, MediaLimits(), kind="image") == CONTENT


def test_urls_are_fetched_for_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(url: str, limits: MediaLimits, *, kind: str) -> bytes:
        asked.append((url, kind))
        return CONTENT

    monkeypatch.setattr(sources, "fetch", fetch)
    read_source("https://pictures.example/a.png", MediaLimits(), kind="image")
    read_source("HTTP://pictures.example/a.mp4", MediaLimits(), kind="video")
    assert asked == [("https://pictures.example/a.png", "image"), ("HTTP://pictures.example/a.mp4", "video")]


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/nowhere/a.png", "/nowhere/a.png: no such file"),
        ("", "folder"),
        ("/", "folder"),
        ("/dev/zero", "not a regular file"),
        ("a" * 10_000, "too long"),
        ("a\0b", "null"),
        ("file:///a.png", "only http, https and data"),
        ("s3://bucket/a.png", "only http, https and data"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64", "base64"),
        ("data:text/html;base64,aaaa", "'text/html'"),
        ("data:video/mp4;base64,aaaa", "'video/mp4'"),
        ("data:image/png;base64,a", "damaged"),
        ("data:image/png;base64,@@@@", "damaged"),
        ("data:image/png;base64,", "0 bytes"),
        (b"", "0 bytes"),
    ],
)
def test_what_cannot_be_read(source: FileSource, shown: str) -> None:
    with pytest.raises(MediaError) as caught:
        read_source(source, MediaLimits(), kind="image")
    assert shown in str(caught.value)
    assert caught.value.hint
    assert len(str(caught.value)) < 600


def test_an_empty_or_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.touch()
    with pytest.raises(MediaError, match=r"a\.png is empty: 0 bytes"):
        read_source(path, MediaLimits(), kind="image")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(MediaError, match="not a regular file"):  # and does not wait for somebody to write
        read_source(pipe, MediaLimits(), kind="image")


def test_the_limit_in_bytes_counts_for_every_source(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(CONTENT)
    given: list[FileSource] = [path, CONTENT, bytearray(CONTENT), memoryview(CONTENT), f"data:;base64,{BASE64}"]
    for source in given:
        with pytest.raises(MediaError, match="1024 bytes are more than max_bytes=1023"):
            read_source(source, MediaLimits(max_bytes=1023), kind="image")


def test_names_are_short_and_without_secrets() -> None:
    assert source_name(f"data:image/png;base64,{BASE64}") == "data URI (1390 characters, 'data:image/png;base64')"
    assert source_name("https://u:p@pictures.example/a.png?key=secret#x") == "https://pictures.example/a.png"
    assert len(source_name("https://pictures.example/" + "a" * 1000)) == 120
    assert len(source_name("x" * 1000)) == 120
    assert source_name(Path("a.png")) == "a.png"
    assert "\n" not in source_name("a\nb")
    assert source_name(CONTENT) == source_name(memoryview(CONTENT)) == "1024 bytes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_bytes", value) for value in (0, -1, 1.5, True, None, "1")),
        *(("max_pixels", value) for value in (0, 1e6)),
        *(("max_redirects", value) for value in (-1, 0.5)),
        *(("total_seconds", value) for value in (0, -1, float("nan"), float("inf"), None)),
        *(("allow_private_urls", value) for value in (0, 1, None, "no")),
    ],
)
def test_limits_that_are_none(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        MediaLimits(**{name: value})  # type: ignore[arg-type]


def test_no_redirect_may_be_asked_for() -> None:
    assert MediaLimits(max_redirects=0).max_redirects == 0
