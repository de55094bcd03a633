"""Small charts as SVG and HTML text, for a page of any width, light or dark.

What is drawn stretches with the page (its places are percentages); letters and strokes keep their size, so that a phone
shows them as large as a desk does. Lines and words take the page's own colours.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

Bar = tuple[str, float, float]
"""(label, value, error)"""
Point = tuple[float, float, float]
"""(x, y, error of y)"""
Interval = tuple[str, float, float, float]
"""(label, value, low end, high end)"""
Tick = tuple[float, str]
"""A place on an axis, and the text there."""
ROW = 20
"""Height of an interval, in pixels."""
MOST_POINTS = 90
"""Of a line; more of them are averaged."""
TOP, BOTTOM = 22, 210
"""Of the plot, in pixels."""
LEFT, RIGHT = 13.0, 97.0
"""Of the plot, in percent: numbers stand left of it."""
COLOURS = ("var(--bar)", "var(--best)", *(f"var(--c{n})" for n in range(2, 9)))


def bar_chart(bars: Sequence[Bar], pattern: str, best: int) -> str:
    """Horizontal bars with error bars, each under its name and value; the best one stands out."""
    most = max(value + max(error, 0.0) for _, value, error in bars) or 1.0
    rows = []
    for number, (name, value, error) in enumerate(bars):
        colour = "var(--best)" if number == best else "var(--bar)"
        drawn = f'<rect y="2" width="{max(0.3, 100 * value / most):.2f}%" height="12" fill="{colour}"/>'
        if error > 0:
            drawn += _whiskers(100 * (value - error) / most, 100 * (value + error) / most, 8, "var(--ink)")
        rows.append(Row(name, with_error(pattern, value, error), drawn))
    return _group(rows, 16)


def interval_chart(rows: Sequence[Interval], reference: str, pattern: str = "{:+.4f}") -> str:
    """Differences with their intervals, on both sides of a line that stands for the reference."""
    return _group(_intervals(rows, pattern), ROW, f"Against {reference}: ")


def interval_picture(rows: Sequence[Interval], reference: str, pattern: str = "{:+.4f}") -> str:
    """The same as an image that stands alone."""
    found, parts = _intervals(rows, pattern), []
    for number, row in enumerate(found):
        y = number * 2 * (ROW + 2)
        parts.append(f'<text x="2" y="{y + 15}">{escape(row.name)}</text>')
        parts.append(f'<text x="100%" dx="-2" y="{y + 15}" text-anchor="end">{escape(row.value)}</text>')
        parts.append(f'<svg y="{y + ROW}" width="100%" height="{ROW}">{row.drawn}</svg>')
    height = 2 * (ROW + 2) * len(found) + ROW
    zero = _across(rows, 0.0)
    anchor, shift = ("start", -2) if zero < 50 else ("end", 2)
    parts.append(
        f'<text x="{zero:.2f}%" dx="{shift}" y="{height - 8}" text-anchor="{anchor}">{escape(reference)}</text>'
    )
    return "".join([_open(f"Against {reference}: {_described(found)}", height, "640"), *parts, "</svg>"])


def _across(rows: Sequence[Interval], value: float) -> float:
    """Percent of the width, between the ends of all intervals and zero."""
    low, high = min(0.0, *(low for _, _, low, _ in rows)), max(0.0, *(high for *_, high in rows))
    return 2 + 96 * (value - low) / ((high - low) or 1.0)


def _intervals(rows: Sequence[Interval], pattern: str) -> "list[Row]":
    at, found = partial(_across, rows), []
    for name, value, begin, end in rows:
        colour = f"var(--{'best' if begin > 0 or end < 0 else 'bar'})"
        drawn = _line(at(0), 0, at(0), ROW, "var(--ink)") + _whiskers(at(begin), at(end), ROW // 2, colour)
        drawn += f'<circle cx="{at(value):.2f}%" cy="{ROW // 2}" r="5" fill="{colour}"/>'
        found.append(Row(name, f"{pattern} ({pattern} to {pattern})".format(value, begin, end), drawn))
    return found


def line_chart(lines: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """Values over steps 1, 2, ...; each line in its own colour, with a key."""
    points = [(name, thinned([(float(i), value, 0.0) for i, value in enumerate(line, 1)])) for name, line in lines]
    longest = max(len(line) for _, line in lines)
    return point_chart(points, [(float(longest), f"{x_label} {longest}")])


def point_chart(
    lines: Sequence[tuple[str, Sequence[Point]]],
    ticks: Sequence[Tick],
    dotted: Collection[str] = (),
    mark: Tick | None = None,
) -> str:
    """Points with error bars, joined by lines, each in its own colour, with a key below.

    The y axis is logarithmic where values span more than two of 1, 2, 5, 10, ...

    Args:
        ticks: where on the x axis which text stands.
        dotted: names of the lines whose points are dots.
        mark: an upright line on the x axis, and the word beside it.
    """
    lines = [(name, [point for point in line if math.isfinite(sum(point))]) for name, line in lines]
    points = [point for _, line in lines for point in line] or [(0.0, 0.0, 0.0)]
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    marks, logarithmic = axis(low, high)
    scale = math.log if logarithmic else float
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)

    def across(x: float) -> float:
        return LEFT + (x - first) / ((last - first) or 1.0) * (RIGHT - LEFT)

    def down(y: float) -> float:
        return BOTTOM - (scale(y) - scale(low)) / ((scale(high) - scale(low)) or 1.0) * (BOTTOM - TOP)

    described = f"{', '.join(name for name, _ in lines)}: from {low:.3g} to {high:.3g}"
    parts = [_open(described, BOTTOM + 24)]
    for value in marks:
        parts.append(f'<text y="{down(value) + 4:.1f}">{value:.4g}</text>')
        parts.append(_line(LEFT - 1, down(value), 100, down(value), "var(--line)"))
    parts.extend(_ticks([(across(x), text) for x, text in ticks]))
    parts.append(f'<svg width="100%" height="{BOTTOM}" viewBox="0 0 100 {BOTTOM}" preserveAspectRatio="none">')
    for number, (name, line) in enumerate(lines):
        places = " ".join(f"{across(x):.2f},{down(y):.1f}" for x, y, _ in line)
        stroke = _stroke(_colour(number)) + ' stroke-opacity="0.5"' * (name in dotted)
        parts.append(f'<polyline points="{places}" vector-effect="non-scaling-stroke" {stroke}/>')
    parts.append("</svg>")
    if mark:
        parts.extend(_mark(across(mark[0]), mark[1]))
    for number, (name, line) in enumerate(lines):
        for x, y, error in line:
            if error > 0:
                parts.append(_line(across(x), down(y - error), across(x), down(y + error), _colour(number)))
            if name in dotted:
                parts.append(f'<circle cx="{across(x):.2f}%" cy="{down(y):.1f}" r="4" fill="{_colour(number)}"/>')
    return "".join([*parts, "</svg>", _key([name for name, _ in lines])])


def axis(low: float, high: float) -> tuple[list[float], bool]:
    """Round numbers from low to high, and whether they are for a logarithmic axis."""
    if low > 0:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [round_ for ten in decades for n in (1, 2, 5) if low <= (round_ := n * 10.0**ten) <= high]
        if len(found) > 2:
            return found, True
    span = (high - low) or abs(high) or 1.0
    step = next(step for n in (1, 2, 5, 10) if span / (step := n * 10.0 ** math.floor(math.log10(span / 4))) <= 5)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{number * step:.6g}") for number in numbers] or [low], False


def thinned(line: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, each the mean of as many neighbours."""
    size = per_point(len(line), most)
    groups = [line[i : i + size] for i in range(0, len(line), size)]
    means = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
    return [(x, y, error) for x, y, error in means]


def per_point(count: int, most: int = MOST_POINTS) -> int:
    """How many of so many values `thinned` takes together."""
    return -(-count // most) or 1


def with_error(pattern: str, value: float, error: float) -> str:
    """`0.50 ± 0.01`; without an error the value alone."""
    return pattern.format(value) + (f" ± {pattern.format(error)}" if error > 0 else "")


@dataclass(frozen=True)
class Row:
    """A name and a value, and what is drawn under them across the page."""

    name: str
    value: str
    drawn: str


def _described(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.name}: {row.value}" for row in rows)


def _group(rows: Sequence[Row], height: int, before: str = "") -> str:
    """Names and values as text of the page, which breaks where it is narrow."""
    parts = [f'<div class="bars" role="img" aria-label="{escape(before + _described(rows), quote=True)}">']
    for row in rows:
        parts.append(f'<div class="row"><span>{escape(row.name)}</span> <span>{escape(row.value)}</span></div>')
        parts.append(f'<svg width="100%" height="{height}" aria-hidden="true">{row.drawn}</svg>')
    return "".join([*parts, "</div>"])


def _open(description: str, height: int, width: str = "100%") -> str:
    label = escape(description, quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" aria-label="{label}">'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _stroke(colour: str) -> str:
    return f'stroke="{colour}" stroke-width="2" fill="none"'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """x in percent, y in pixels."""
    places = f'x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"'
    return f'<line {places} stroke="{colour}" stroke-width="1.5"/>'


def _whiskers(low: float, high: float, y: int, colour: str) -> str:
    ends = "".join(_line(x, y - 5, x, y + 5, colour) for x in (low, high))
    return _line(low, y, high, y, colour) + ends


def _ticks(places: Sequence[Tick]) -> list[str]:
    """Texts below the plot; the last one ends where it stands, so that it stays on the page."""
    found = []
    for place, text in places:
        anchor = "end" if place > RIGHT - 8 else "middle"
        found.append(f'<text x="{place:.2f}%" y="{BOTTOM + 18}" text-anchor="{anchor}">{escape(text)}</text>')
    return found


def _mark(place: float, text: str) -> list[str]:
    anchor, shift = ("start", 5) if place < (LEFT + RIGHT) / 2 + 1 else ("end", -5)
    line = f'<line x1="{place:.2f}%" y1="0" x2="{place:.2f}%" y2="{BOTTOM}" {_stroke("var(--ink)")}'
    word = f'<text x="{place:.2f}%" dx="{shift}" y="12" text-anchor="{anchor}">{escape(text)}</text>'
    return [f'{line} stroke-dasharray="5 4"/>', word]


def _key(names: Sequence[str]) -> str:
    items = (
        f'<span style="border-color: {_colour(number)}">{escape(name)}</span>' for number, name in enumerate(names)
    )
    return f'<p class="key">{" ".join(items)}</p>'
