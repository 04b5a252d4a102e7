from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ernie45.memory.plan import MemoryPlan
from tests.memory.test_table import GIB, SPLIT, STREAMS, TOO_LARGE, made_up_device, made_up_plan


class Card(HTMLParser):
    """The text of a card and its tags with their attributes; every tag must be closed."""

    def __init__(self, plan: MemoryPlan) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(plan._repr_html_())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def widths(self) -> dict[str, float]:
        """Of the bars' segments in percent, by what hovering over them shows."""
        found = {}
        for _, attributes in self.tags:
            width = re.match(r"width:([\d.]+)%", attributes.get("style") or "")
            if width:
                found[attributes["title"] or ""] = float(width[1])
        return found


def test_the_card_says_what_the_table_says() -> None:
    card = Card(made_up_plan())
    for text in ("baidu/ERNIE-4.5-9B-PT", "fits", "as int4, bfloat16, 8,192 tokens x 1", "10.00 GiB of 20.00 GiB",
                 "routed experts", "5.00 GiB", "up to 131,072 tokens", "about 7.2 tokens/s", "Bottleneck"):  # fmt: skip
        assert text in card.text


def test_a_card_of_a_plan_that_streams() -> None:
    card = Card(STREAMS)
    for text in ("streams", "673 of 1,728 in memory, 39 %", "2.00 GiB for each token", "a disk that reads 1.5 GB/s"):
        assert text in card.text
    assert card.widths()["routed experts 5.00 GiB"] == 25


def test_the_bar_is_as_long_as_what_may_be_used() -> None:
    widths = Card(made_up_plan()).widths()
    assert widths["routed experts 5.00 GiB"] == 25
    assert sum(widths.values()) == 50


def test_what_is_too_much_is_hatched_and_named() -> None:
    html = TOO_LARGE._repr_html_()
    card = Card(TOO_LARGE)
    assert sum(card.widths().values()) == pytest.approx(100)
    assert html.count("left:80.000%") == 2
    assert re.search("too much +2.00 GiB", card.text)
    assert "repeating-linear-gradient" not in made_up_plan()._repr_html_()


def test_a_peak_while_loading_is_part_of_the_bar() -> None:
    plan = made_up_plan(made_up_device(capacity_bytes=10 * GIB, kv_cache=0))
    assert Card(plan).widths()["more while loading 512.0 MiB"] == 5


def test_each_device_has_a_bar() -> None:
    card = Card(made_up_plan(*SPLIT))
    assert [attributes["aria-label"] for _, attributes in card.tags if attributes.get("role") == "img"] == [
        "cuda:0: 4.50 GiB of 8.00 GiB",
        "cpu: 6.50 GiB of 20.00 GiB",
    ]
    assert "routed experts of layers 1-3" in card.text


def test_remedies_are_a_numbered_list() -> None:
    card = Card(TOO_LARGE)
    assert [tag for tag, _ in card.tags if tag in ("ol", "li")] == ["ol", "li", "li"]


def test_nothing_in_a_plan_is_taken_for_html() -> None:
    nasty = "<script>alert('&\")</script>"
    plan = replace(
        TOO_LARGE,
        model=nasty,
        preset=nasty,
        dtype=nasty,
        bottleneck=nasty,
        remedies=(nasty,),
        notes=(nasty,),
        devices=(replace(made_up_device(), device=nasty),),
    )
    assert {tag for tag, _ in Card(plan).tags} == {"div", "span", "b", "ol", "li"}
    assert Card(plan).text.count(nasty) == 7


@pytest.mark.parametrize("plan", [made_up_plan(), TOO_LARGE, STREAMS, made_up_plan(*SPLIT)])
def test_a_card_brings_all_it_needs_and_suits_any_page(plan: MemoryPlan) -> None:
    html = plan._repr_html_()
    assert not re.search(r"<style|<script|<link|url\(|class=|https?:", html)
    assert "background:#fff" not in html
    styles = [attributes.get("style") or "" for _, attributes in Card(plan).tags]
    coloured = [style for style in styles if re.search(r"(?<!-)\bcolor:", style)]
    assert ["background:" in style for style in coloured] == [True]
