from __future__ import annotations

import pytest

from ernie45.catalogue import CATALOGUE, built_in_folder, did_you_mean, find, suggest


@pytest.mark.parametrize(
    "spelling",
    ["baidu/ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B-PT", "ernie-4.5-0.3b-pt", " Baidu/ernie-4.5-0.3B-pt "],
)
def test_finds_a_name_with_or_without_organisation_in_any_case(spelling: str) -> None:
    entry = find(spelling)
    assert entry is not None
    assert entry.name == "baidu/ERNIE-4.5-0.3B-PT"
    assert not entry.built_in


def test_base_and_chat_models_are_told_apart() -> None:
    entry = find("ERNIE-4.5-0.3B-Base-PT")
    assert entry is not None
    assert entry.name == "baidu/ERNIE-4.5-0.3B-Base-PT"


@pytest.mark.parametrize("name", ["", "baidu", "other/ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B"])
def test_unknown_names_are_not_found(name: str) -> None:
    assert find(name) is None


def test_no_two_entries_share_a_name() -> None:
    names = [entry.short_name.lower() for entry in CATALOGUE]
    assert len(set(names)) == len(names)


def test_near_misses_are_suggested_best_first() -> None:
    assert suggest("ernie45/tiny-dens") == ("ernie45/tiny-dense",)
    assert suggest("ERNIE-4.5-0.3B")[0] == "baidu/ERNIE-4.5-0.3B-PT"
    assert suggest("meta/llama-3-8b") == ()


def test_a_hint_quotes_the_suggestion() -> None:
    assert did_you_mean("tiny_dense") == "did you mean 'ernie45/tiny-dense'?"
    assert did_you_mean("gpt2") == ""


def test_built_in_checkpoints_lie_inside_the_package() -> None:
    entry = find("tiny-dense")
    assert entry is not None
    assert entry.built_in
    folder = built_in_folder(entry)
    assert folder.is_absolute()
    assert folder.parts[-4:] == ("ernie45", "assets", "tiny", "tiny-dense")
