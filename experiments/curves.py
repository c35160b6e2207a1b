"""A plain line chart as SVG, for figures that belong to the repository: no browser, small diffs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN = 460, 320, 52
COLOURS = ("#8a8f98", "#2563eb", "#7c3aed", "#c2570c", "#15803d", "#b91c1c", "#0e7490", "#a16207")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line; a single point is a mark."""

    x: Sequence[float]
    y: Sequence[float]


def drawn(panels: Mapping[str, Mapping[str, Curve]], x_title: str, y_title: str) -> str:
    """One panel beside the other, each with its own axes and legend."""
    body = "".join(
        f'<g transform="translate({i * WIDTH},0)">{_panel(title, curves, x_title, y_title)}</g>'
        for i, (title, curves) in enumerate(panels.items())
    )
    rows = max((len(curves) for curves in panels.values()), default=0)
    height = HEIGHT + 16 * rows + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{body}</svg>\n"
    )


def _panel(title: str, curves: Mapping[str, Curve], x_title: str, y_title: str) -> str:
    xs = [x for curve in curves.values() for x in curve.x]
    ys = [y for curve in curves.values() for y in curve.y]
    left, right = min(0.0, *xs), max(xs) or 1.0
    pad = 0.08 * (max(ys) - min(ys)) or 0.05
    bottom, top = min(ys) - pad, max(ys) + pad

    def at(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 16)
        down = 28 + (top - y) / (top - bottom) * (HEIGHT - 28 - MARGIN)
        return round(across, 1), round(down, 1)

    parts = [_text(WIDTH / 2, 16, title, "middle", bold=True)]
    (x0, floor), (x1, _) = at(left, bottom), at(right, bottom)
    for y in _round_values(bottom, top):
        across = at(left, y)[1]
        parts.append(f'<path d="M{x0} {across}H{x1}" stroke="#e5e7eb"/>')
        parts.append(_text(x0 - 6, across + 4, f"{y:.3g}", "end"))
    for x in _round_values(left, right):
        parts.append(_text(at(x, bottom)[0], floor + 16, f"{x:.3g}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - MARGIN + 34, x_title, "middle"))
    parts.append(
        f'<g transform="translate(12,{HEIGHT / 2}) rotate(-90)">'
        f"{_text(0, 0, y_title, 'middle')}</g>"
    )
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        spots = [at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        line = "L".join(f"{x} {y}" for x, y in spots)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in spots]
        down = HEIGHT + 16 * i
        parts.append(f'<circle cx="{MARGIN}" cy="{down - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(MARGIN + 12, down, name, "start"))
    return "".join(parts)


def _round_values(low: float, high: float) -> list[float]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(factor * power for factor in (1, 2, 5) if 3 * factor * power <= high - low)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
