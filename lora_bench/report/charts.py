"""Small charts as inline SVG: lines with intervals, stacked bars, strips of pairs. Colours are the page's classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lora_bench.bench.ratio import Interval

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 348, 24, 190
"""The plot's edges; outside of them stand the axes' words."""
HUES = 6
"""How many series can be told apart by colour; markers change with every series."""
MARKERS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "M-3,-3h6v6h-6z", "M0,-4L4,3H-4z", "M0,-4L4,0L0,4L-4,0z")
TICKS = 4


class Series(NamedTuple):
    """A line: its name, its number (for colour and marker, the same in every chart) and, by x, medians."""

    name: str
    number: int
    points: Mapping[int, Interval]


def lines(series: Sequence[Series], *, key: str, title: str, x: str, y: str, level: float | None = None) -> Markup:
    """Medians by x on a logarithmic axis, with their intervals; `level` is a line across, for the base.

    `key` must be the chart's own: its title and description are found by it.
    """
    at = sorted({place for each in series for place in each.points})
    ends = [min(point.high, 2 * point.median) for each in series for point in each.points.values()]
    top = nice(max([*ends, level or 0]) * 1.05)
    across = {place: LEFT + 14 + (RIGHT - LEFT - 28) * part for place, part in _spread(at).items()}

    def down(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * max(0.0, min(value, top)) / top

    parts = list(_y_axis(top, down, y))
    parts += [_text(across[place], BOTTOM + 14, str(place), "middle") for place in at]
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 28, x, "middle"))
    if level is not None:
        parts.append(_shape("path", "level", d=f"M{LEFT},{down(level):.1f}H{RIGHT}"))
        parts.append(_text(RIGHT, down(level) + 11, "base", "end"))
    for each in series:
        parts += _line(each, across, down)
    told = "; ".join(
        f"{each.name}: " + ", ".join(f"{point.median:.4g} at {place}" for place, point in sorted(each.points.items()))
        for each in series
    )
    return _svg(parts, key, title, f"{y} by {x}. {told}.", WIDTH, HEIGHT)


def _line(series: Series, across: Mapping[int, float], down: Callable[[float], float]) -> Iterator[Markup]:
    points = [(across[place], point) for place, point in sorted(series.points.items())]
    hue = f"s{series.number % HUES}"
    if len(points) > 1:
        path = "L".join(f"{place:.1f},{down(point.median):.1f}" for place, point in points)
        yield _shape("path", f"line {hue}", d=f"M{path}")
    for place, point in points:
        if math.isfinite(point.low) and math.isfinite(point.high):
            yield _shape("path", f"line {hue}", d=f"M{place:.1f},{down(point.low):.1f}V{down(point.high):.1f}")
        where = f"translate({place:.1f},{down(point.median):.1f})"
        yield _shape("path", f"dot {hue}", d=MARKERS[series.number % len(MARKERS)], transform=where)


def marker(number: int) -> Markup:
    """The sign of the series of that number, for a legend."""
    sign = _shape("path", f"dot s{number % HUES}", d=MARKERS[number % len(MARKERS)])
    return Markup('<svg class="key" viewBox="-5 -5 10 10" aria-hidden="true">{}</svg>').format(sign)


def stack(parts: Mapping[str, float], total: float, mark: float) -> Markup:
    """A bar of parts one after the other, `total` being the full width, and a mark at what was measured.

    It has no words of its own: it stands in a table, beside its figures.
    """
    shapes, begin = [], 0.0
    for name, value in parts.items():
        width = 100 * max(value, 0.0) / total
        shapes.append(_shape("rect", f"p-{name}", x=f"{begin:.2f}", y="2", width=f"{width:.2f}", height="10"))
        begin += width
    shapes.append(
        _shape("rect", "mark", x=f"{min(100 * mark / total, 100) - 0.4:.2f}", y="0", width="0.8", height="14")
    )
    head = Markup('<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true">')
    return head + Markup("").join(shapes) + Markup("</svg>")


class Strip(NamedTuple):
    """A row of dots: its name, the relative changes, and what they estimate with its interval."""

    name: str
    changes: Sequence[float]
    estimate: Interval


def strips(rows: Sequence[Strip], *, key: str, title: str, limits: Sequence[float]) -> Markup:
    """A dot for each relative change, a bar for what they estimate; lines across at none and at the limits."""
    every = [*limits, 0.001, *(value for row in rows for value in row.changes)]
    far = nice(100 * max(map(abs, every)) * 1.05) / 100
    left, right, bottom = 24, WIDTH - 24, 20 + 40 * len(rows)

    def across(value: float) -> float:
        return (left + right) / 2 + (right - left) / 2 * max(-1.0, min(value / far, 1.0))

    parts = [
        _text(across(part * far), bottom + 15, f"{100 * part * far:+.3g} %", "middle") for part in (-1, -0.5, 0.5, 1)
    ]
    parts.append(_text(across(0), bottom + 15, "0", "middle"))
    parts.append(_shape("path", "axis", d=f"M{across(0):.1f},6V{bottom}"))
    parts += [_shape("path", "level", d=f"M{across(limit):.1f},6V{bottom}") for limit in limits]
    for number, row in enumerate(rows):
        hue, middle = f"s{number % HUES}", 34 + 40 * number
        parts.append(_text(left - 20, middle - 18, row.name, "start"))
        ends = f"M{across(row.estimate.low):.1f},{middle + 9}H{across(row.estimate.high):.1f}"
        parts.append(_shape("path", f"line {hue}", d=ends))
        parts.append(_shape("path", f"line {hue}", d=f"M{across(row.estimate.median):.1f},{middle + 5}v8"))
        for place, value in enumerate(row.changes):
            where = f"translate({across(value):.1f},{middle - 6 + 4 * (place % 3)})"
            parts.append(_shape("path", f"dot {hue}", d=MARKERS[number % len(MARKERS)], transform=where))
    told = "; ".join(f"{row.name}: " + ", ".join(f"{100 * value:+.2f} %" for value in row.changes) for row in rows)
    return _svg(parts, key, title, f"Relative change of each pair. {told}.", WIDTH, bottom + 22)


def nice(value: float) -> float:
    """The next number above that an axis ends with well: 1, 2, 4, 5 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))


def _spread(at: Sequence[int]) -> dict[int, float]:
    """Each place's share of the axis, by its logarithm."""
    low, high = math.log2(at[0]), math.log2(at[-1])
    return {place: (math.log2(place) - low) / (high - low) if high > low else 0.5 for place in at}


def _y_axis(top: float, down: Callable[[float], float], label: str) -> Iterator[Markup]:
    for step in range(TICKS + 1):
        value = top * step / TICKS
        yield _shape("path", "grid" if step else "axis", d=f"M{LEFT},{down(value):.1f}H{RIGHT}")
        yield _text(LEFT - 5, down(value) + 4, f"{value:.4g}", "end")
    yield _text(LEFT - 5, 10, label, "end")


def _shape(tag: str, css: str, **attributes: str) -> Markup:
    own = Markup("").join(Markup(' {}="{}"').format(name, value) for name, value in attributes.items())
    return Markup('<{} class="{}"{}/>').format(tag, css, own)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(parts: Sequence[Markup], key: str, title: str, description: str, width: int, height: int) -> Markup:
    head = Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>'
    ).format(w=width, h=height, k=key, t=title, d=description)
    return head + Markup("").join(parts) + Markup("</svg>")
