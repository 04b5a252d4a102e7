"""Presets: which names they may have, and what is said of unknown ones."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import InvalidRequestError
from ernie45.presets import PRESETS, QuantPreset, find_preset


@pytest.mark.parametrize("name", ["", " ", None, 4, b"int4"])
def test_a_preset_has_a_name(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="name="):
        QuantPreset(name=name, experts="int4")


@pytest.mark.parametrize(
    "preset", [QuantPreset(name="none", linear="int4"), QuantPreset(name="int8"), QuantPreset(name="nf4", linear="nf4")]
)
def test_the_name_of_another_preset_is_refused(preset: QuantPreset) -> None:
    with pytest.raises(InvalidRequestError, match=f"name='{preset.name}'.* has the name of another preset"):
        find_preset(preset)


def test_presets_are_found_by_name_or_given() -> None:
    int4 = QuantPreset(name="int4", experts="int4", linear="int4", embedding="int8")
    assert find_preset("int4") == find_preset(int4) == PRESETS["int4"]
    for mine in (QuantPreset(name="mine", experts="int8"), QuantPreset(name="gptq")):
        assert find_preset(mine) is mine
    assert find_preset("auto") is None


@pytest.mark.parametrize("name", ["int3", "", None])
def test_an_unknown_name_is_told_all_that_are_known(name: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        find_preset(name)
    assert caught.value.message == f"quantization={name!r} is unknown"
    assert caught.value.hint == "use 'auto', 'none', 'int8', 'int4', 'nf4', 'bnb-int8', or a QuantPreset"
