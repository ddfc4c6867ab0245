"""A chart as SVG inside the page: a few kilobytes, in the page's own colours, readable by a screen reader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 560, 360, 56, 48, 16, 24
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Dot:
    """A point with its name.

    Attributes:
        x, y: Where.
        size: Its area, relative to 1; None: as 1.
        hollow: Drawn as a ring.
    """

    name: str
    x: float
    y: float
    size: float | None = None
    hollow: bool = False


def scatter(dots: Sequence[Dot], x: str, y: str) -> str:
    """Dots in the unit square with their names and a grid; the same numbers are in its description.

    The axes are whole, so that a small difference looks small.
    """

    def across(value: float) -> float:
        return _LEFT + value * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - value * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in _TICKS:
        parts.append(
            f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
        parts.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:.3g}</text>')
    for tick in _TICKS:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y)}</text>')
    taken: list[float] = []
    for dot in sorted(dots, key=lambda each: -each.y):
        radius = min(16.0, 6 * math.sqrt(dot.size or 1.0))
        kind = "dot hollow" if dot.hollow else "dot"
        left = across(dot.x) > _WIDTH * 0.65
        at = across(dot.x) + (-radius - 5 if left else radius + 5)
        line = up(dot.y) + 4
        while any(abs(line - other) < 14 for other in taken):  # names never lie on each other
            line += 14
        taken.append(line)
        parts.append(f'<circle class="{kind}" cx="{across(dot.x):.1f}" cy="{up(dot.y):.1f}" r="{radius:.1f}"/>')
        name = dot.name if len(dot.name) <= 32 else dot.name[:29] + "..."
        anchor = "end" if left else "start"
        parts.append(f'<text class="name" x="{at:.1f}" y="{line:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    told = "; ".join(f"{dot.name}: {x} {dot.x:.3f}, {y} {dot.y:.3f}" for dot in dots)
    described = escape(f"{y} against {x}. {told}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'
