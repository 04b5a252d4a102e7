"""Lines as an SVG picture, which browsers and documents show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

# In pixels.
_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 600, 60, 350
_COLOURS = ("#2f6db5", "#8a8a8a", "#d9822b", "#3d9a5f")

Points = Sequence[tuple[float, float]]


def draw_lines(title: str, note: str, axes: tuple[str, str], lines: Mapping[str, Points]) -> str:
    """One line for each name through its points, from left to right; both axes start at 0. The second is dashed."""
    most_x = max(x for points in lines.values() for x, _ in points) * 1.05
    most_y = max(y for points in lines.values() for _, y in points) * 1.1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(20, 30, title, 'font-size="16" font-weight="bold"'),
        *_grid(axes, sorted({x for points in lines.values() for x, _ in points}), most_x, most_y),
        *_lines(lines, most_x, most_y),
        _text(20, _HEIGHT - 14, note, 'font-size="10" fill="#666"'),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(axes: tuple[str, str], ticks: Sequence[float], most_x: float, most_y: float) -> Iterator[str]:
    step = _round_step(most_y / 5)
    for number in range(int(most_y / step) + 1):
        y = _BOTTOM - number * step / most_y * (_BOTTOM - _TOP)
        yield f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#ddd"/>'
        yield _text(_LEFT - 8, y + 4, f"{number * step:g}", 'text-anchor="end"')
    for tick in ticks:
        yield _text(_LEFT + tick / most_x * (_RIGHT - _LEFT), _BOTTOM + 20, f"{tick:g}", 'text-anchor="middle"')
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, axes[0], 'text-anchor="middle"')
    yield _text(_LEFT, _TOP - 10, axes[1])


def _lines(lines: Mapping[str, Points], most_x: float, most_y: float) -> Iterator[str]:
    for index, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [
            (_LEFT + x / most_x * (_RIGHT - _LEFT), _BOTTOM - y / most_y * (_BOTTOM - _TOP)) for x, y in sorted(points)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="6 4"' if index == 1 else ""
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places)
        y = _TOP + 20 * index
        yield f'<path d="M{_RIGHT + 20} {y}H{_RIGHT + 44}" stroke="{colour}" stroke-width="2"{dashes}/>'
        yield _text(_RIGHT + 52, y + 4, name)


def _round_step(most: float) -> float:
    """The largest of 1, 2, 5, 10, … and their tenths, hundredths that is not above `most`; 0.01 at least."""
    steps = [digit * 10.0**power for power in range(-2, 4) for digit in (1, 2, 5)]
    return max((step for step in steps if step <= most), default=steps[0])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
