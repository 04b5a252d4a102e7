"""Bars as an SVG picture, which browsers, notebooks and documents show."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

# In pixels.
_WIDTH = 760
_LEFT, _RIGHT = 120, 640  # of the bars
_BAR, _GAP = 18, 6
_HEADING = 40
_TOP, _BOTTOM = 50, 40
_COLOURS = ("#2f6db5", "#d9822b", "#3d9a5f", "#8a5fb0", "#b5473f")


def draw_bars(title: str, note: str, names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """One panel below the other, each with a bar for each of `names`.

    A bar is as long as the median of its numbers, on a scale of the panel's own, and has a line from the lowest to the
    highest where there are several.
    """
    panel_height = _HEADING + len(names) * (_BAR + _GAP)
    height = _TOP + len(panels) * panel_height + _BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(20, 30, title, 'font-size="16" font-weight="bold"'),
        *(
            line
            for index, (heading, values) in enumerate(panels.items())
            for line in _panel(_TOP + index * panel_height, heading, names, values)
        ),
        _text(20, height - 14, note, 'font-size="10" fill="#666"'),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _panel(top: int, heading: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> Iterator[str]:
    yield _text(20, top + 26, heading, 'font-weight="bold"')
    scale = (_RIGHT - _LEFT) / max(max(each) for each in values)
    for index, (name, each) in enumerate(zip(names, values, strict=True)):
        y = top + _HEADING + index * (_BAR + _GAP)
        middle = y + _BAR / 2
        median, lowest, highest = statistics.median(each), min(each), max(each)
        colour = _COLOURS[index % len(_COLOURS)]
        yield _text(_LEFT - 8, y + 14, name, 'text-anchor="end"')
        yield f'<rect x="{_LEFT}" y="{y}" width="{median * scale:.1f}" height="{_BAR}" fill="{colour}"/>'
        if highest > lowest:
            start, end = _LEFT + lowest * scale, _LEFT + highest * scale
            yield f'<path d="M{start:.1f} {middle}H{end:.1f}" stroke="#222" stroke-width="2"/>'
        yield _text(_LEFT + highest * scale + 8, y + 14, number_in_words(median))


def number_in_words(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {style}>{escape(text)}</text>'
