"""How much each expert of each layer is used, as an SVG picture, which browsers, notebooks and documents show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# In pixels.
_CELL = 11
_LEFT, _TOP = 60, 70  # of the cells
_LEGEND, _SWATCH = 60, 64
_LEAST_WIDTH = 690
_FEW, _NUMBER_EVERY = 10, 8  # experts: few are all numbered

_COLOURS = ("#eff5fb", "#d3e4f3", "#b3d0e8", "#8db8db", "#649ccb", "#4080b9", "#2566a3", "#134b83", "#08305c")


def draw_shares(title: str, layers: Sequence[int], shares: NDArray[np.float64], *, even: float) -> str:
    """A cell for each layer and expert, the darker the larger its share [layers, E]; `even` is what every share would
    be if all experts were used alike."""
    num_experts = shares.shape[1]
    width = max(_LEAST_WIDTH, _LEFT + num_experts * _CELL + 20)
    bottom = _TOP + len(layers) * _CELL
    height = bottom + _LEGEND
    most = float(shares.max(initial=0)) or 1.0
    levels = np.minimum((shares / most * len(_COLOURS)).astype(int), len(_COLOURS) - 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="10" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="20" y="26" font-size="15" font-weight="bold">{title}</text>',
        '<text x="20" y="44" fill="#666">layers down, experts across; share of the tokens that chose each, '
        f"{even:.1%} if all were used alike</text>",
        *_numbers(layers, num_experts),
        *(_cells(levels == level, colour) for level, colour in enumerate(_COLOURS)),
        *_legend(bottom + 18, most),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _numbers(layers: Sequence[int], num_experts: int) -> Iterator[str]:
    for expert in range(0, num_experts, 1 if num_experts <= _FEW else _NUMBER_EVERY):
        yield f'<text x="{_LEFT + expert * _CELL + _CELL / 2}" y="{_TOP - 6}" text-anchor="middle">{expert}</text>'
    for row, layer in enumerate(layers):
        yield f'<text x="{_LEFT - 8}" y="{_TOP + row * _CELL + 9}" text-anchor="end">{layer}</text>'


def _cells(where: NDArray[np.bool_], colour: str) -> str:
    """All cells of a colour as one path: a picture of 3,000 cells stays small."""
    side = _CELL - 1
    squares = (
        f"M{_LEFT + expert * _CELL} {_TOP + row * _CELL}h{side}v{side}h-{side}z"
        for row, expert in np.argwhere(where).tolist()
    )
    return f'<path fill="{colour}" d="{"".join(squares)}"/>'


def _legend(y: int, most: float) -> Iterator[str]:
    for level, colour in enumerate(_COLOURS):
        x = _LEFT + level * _SWATCH
        yield f'<rect x="{x}" y="{y}" width="{_SWATCH - 2}" height="12" fill="{colour}"/>'
        yield f'<text x="{x}" y="{y + 26}">{level * most / len(_COLOURS):.1%}</text>'
    yield f'<text x="{_LEFT + len(_COLOURS) * _SWATCH}" y="{y + 26}">{most:.1%}</text>'
