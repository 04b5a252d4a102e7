"""Fixtures for all tests."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NoReturn

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real ERNIE 4.5 tokenizer files, templates and golden outputs, kept beside the repository."""
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Folder of small Paddle checkpoints with their reference logits, kept beside the repository."""
    return _shared_folder("fixtures")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test as soon as it looks up a host or connects to one."""

    def refuse(*arguments: object) -> NoReturn:
        pytest.fail(f"tried to reach the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


def _shared_folder(name: str) -> Path:
    folder = REPO_ROOT.parent / "shared" / name
    if folder.is_dir():
        return folder
    reason = f"../shared/{name} is not there"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and with CI=true it must be")
    pytest.skip(reason)
