"""A MemoryPlan as an HTML card for notebooks: no scripts, no fonts, all styles inline, on a light or a dark page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING

from ernie45.memory.budget import in_words
from ernie45.memory.table import (
    LABELS,
    describe_options,
    describe_place,
    facts,
    loading_peak_bytes,
    running_bytes,
    verdict,
)

if TYPE_CHECKING:
    from ernie45.memory.plan import DevicePlan, MemoryPlan

_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "#4e79a7",
        "head": "#86b1dc",
        "attention": "#f28e2b",
        "dense_mlp": "#b07aa1",
        "routed_experts": "#59a14f",
        "shared_experts": "#9bd58b",
        "router": "#d37295",
        "norms": "#9c755f",
        "vision": "#edc948",
        "scales": "#2f8f8b",
        "kv_cache": "#d1605e",
        "workspace": "#f5a6a3",
        "runtime": "#a8a29e",
    }
)
_LOADING = "more while loading"
_LOADING_COLOUR = "#78716c"
_BADGES: Mapping[str, str] = MappingProxyType({"fits": "#2e7d32", "streams": "#9a5b00", "does not fit": "#b3261e"})

_CARD = (
    "max-width:46em;padding:1em 1.2em;border:1px solid rgba(128,128,128,.4);border-radius:8px;"
    "font:14px/1.45 system-ui,sans-serif;text-align:left;overflow-wrap:anywhere"
)
_BADGE = "color:#fff;border-radius:1em;padding:.1em .7em;font-weight:600;white-space:nowrap;background:"
_TRACK = "position:relative;height:22px;margin:.3em 0;border-radius:4px;background:rgba(128,128,128,.2)"
_SEGMENTS = "display:flex;height:100%;overflow:hidden;border-radius:4px"
_HATCHING = "repeating-linear-gradient(45deg,rgba(0,0,0,.55) 0 3px,transparent 3px 9px)"
_EXCESS = f"position:absolute;top:0;bottom:0;right:0;background:{_HATCHING};left:"
_MARK = "position:absolute;top:-4px;bottom:-4px;border-left:3px solid currentColor;left:"
_LEGEND = "display:flex;flex-wrap:wrap;gap:.1em 1.4em"
_ENTRY = "display:inline-flex;align-items:center;gap:.4em;white-space:nowrap"
_SWATCH = "display:inline-block;width:.8em;height:.8em;border-radius:2px;background:"
_FACT = "display:flex;gap:.8em;margin-top:.3em"


def card(plan: MemoryPlan) -> str:
    """The plan as a self-contained HTML card."""
    return "".join(_card(plan))


def _card(plan: MemoryPlan) -> Iterator[str]:
    yield f'<div style="{_CARD}"><div style="display:flex;flex-wrap:wrap;gap:.3em .8em;align-items:center">'
    yield f'<b style="font-size:1.1em">{escape(plan.model)}</b>'
    yield f'<span style="{_BADGE}{_BADGES[plan.verdict]}">{escape(plan.verdict)}</span></div>'
    yield f"<div>{escape(describe_options(plan))}: {escape(verdict(plan))}</div>"
    for device in plan.devices:
        yield from _device(plan, device)
    yield '<div style="margin-top:.9em">'
    for label, text in facts(plan):
        yield _fact(label, escape(text))
    if plan.remedies:
        items = "".join(f"<li>{escape(remedy)}</li>" for remedy in plan.remedies)
        yield _fact("Remedies", f'<ol style="margin:0;padding-left:1.3em">{items}</ol>')
    for note in plan.notes:
        yield _fact("Note", escape(note))
    yield "</div></div>"


def _device(plan: MemoryPlan, device: DevicePlan) -> Iterator[str]:
    """A bar as long as the capacity or the peak, whichever is more, and its legend."""
    place = describe_place(plan, device)
    title = f"<b>{escape(device.device)}</b>" + (f": {escape(place)}" if place else "")
    used = f"{in_words(device.peak_bytes)} of {in_words(device.capacity_bytes)}"
    yield f'<div style="margin-top:.9em;display:flex;gap:1em;justify-content:space-between"><span>{title}</span>'
    yield f'<span style="white-space:nowrap">{used}</span></div>'

    segments = [(LABELS[part], num_bytes, _COLOURS[part]) for part, num_bytes in device.parts.items() if num_bytes]
    loading = loading_peak_bytes(device) - running_bytes(device)
    if loading > 0:
        segments.append((_LOADING, loading, _LOADING_COLOUR))
    excess = device.peak_bytes - device.capacity_bytes
    scale = max(device.peak_bytes, device.capacity_bytes) / 100
    yield f'<div role="img" aria-label="{escape(device.device)}: {used}" style="{_TRACK}"><div style="{_SEGMENTS}">'
    for label, num_bytes, colour in segments:
        text = f"{label} {in_words(num_bytes)}"
        yield f'<div title="{text}" style="width:{num_bytes / scale:.3f}%;background:{colour}"></div>'
    yield "</div>"
    if excess > 0:
        left = device.capacity_bytes / scale
        yield f'<div style="{_EXCESS}{left:.3f}%"></div><div style="{_MARK}{left:.3f}%"></div>'
        segments.append(("too much", excess, f"{_HATCHING},rgba(128,128,128,.4)"))
    yield f'</div><div style="{_LEGEND}">'
    for label, num_bytes, colour in segments:
        swatch = f'<span style="{_SWATCH}{colour}"></span>'
        yield f'<span style="{_ENTRY}">{swatch}{label} <b>{in_words(num_bytes)}</b></span>'
    yield "</div>"


def _fact(label: str, content: str) -> str:
    """`content` is HTML."""
    return f'<div style="{_FACT}"><b style="flex:0 0 7em;white-space:nowrap">{label}</b><div>{content}</div></div>'
