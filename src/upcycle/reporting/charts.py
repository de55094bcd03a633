"""Small charts as SVG text, drawn for a page that may be light or dark: lines and words take the page's own colours."""

from collections.abc import Sequence
from html import escape

Bar = tuple[str, float, float]
"""(label, value, error)"""
Point = tuple[float, float, float]
"""(x, y, error of y)"""
Interval = tuple[str, float, float, float]
"""(label, value, low end, high end)"""
WIDTH = 640
LONGEST_LABEL = 44
LETTER = 7.2
"""Pixels, about, in the font below."""


def bar_chart(bars: Sequence[Bar], pattern: str, best: int) -> str:
    """Horizontal bars with error bars; the best one stands out."""
    row, label = 24, 16 + LETTER * min(LONGEST_LABEL, max(len(name) for name, _, _ in bars))
    most = max(value + error for _, value, error in bars) or 1.0
    room = LETTER * max(len(with_error(pattern, value, error)) for _, value, error in bars) + 12
    scale = (WIDTH - label - room) / most
    parts = [_open(row * len(bars) + 8, "; ".join(f"{n}: {with_error(pattern, v, e)}" for n, v, e in bars))]
    for number, (name, value, error) in enumerate(bars):
        y, colour = number * row + 4, "var(--best)" if number == best else "var(--bar)"
        end = label + value * scale
        parts.append(f'<text x="{label - 8:.0f}" y="{y + 14}" text-anchor="end">{escape(_short(name))}</text>')
        parts.append(f'<rect x="{label:.0f}" y="{y}" width="{max(1, value * scale):.1f}" height="16" fill="{colour}"/>')
        if error > 0:
            low, high = end - error * scale, end + error * scale
            parts.append(
                f'<path d="M{low:.1f} {y + 8}H{high:.1f}M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8" {_STROKE}/>'
            )
        where = end + max(error, 0.0) * scale + 6
        parts.append(f'<text x="{where:.1f}" y="{y + 13}">{with_error(pattern, value, error)}</text>')
    return "".join([*parts, "</svg>"])


def interval_chart(rows: Sequence[Interval], reference: str) -> str:
    """Differences with their intervals, on both sides of a line that stands for the reference."""
    row, top, label = 24, 26, 16 + LETTER * min(LONGEST_LABEL, max(len(name) for name, *_ in rows))
    low, high = min(0.0, *(low for _, _, low, _ in rows)), max(0.0, *(high for *_, high in rows))
    scale = (WIDTH - label - 16) / ((high - low) or 1.0)

    def at(value: float) -> float:
        return label + 8 + (value - low) * scale

    described = "; ".join(f"{name}: {value:+.4f} ({low:+.4f} to {high:+.4f})" for name, value, low, high in rows)
    height = top + row * len(rows) + 4
    parts = [_open(height, f"Against {reference}: {described}")]
    for value in sorted({low, 0.0, high}):
        text = reference if value == 0 else f"{value:+.3g}"
        anchor = "start" if value == low else "end" if value == high else "middle"
        parts.append(f'<text x="{at(value):.1f}" y="14" text-anchor="{anchor}">{escape(_short(text))}</text>')
    parts.append(f'<path d="M{at(0):.1f} {top - 6}V{height}" stroke="var(--line)" fill="none"/>')
    for number, (name, value, begin, end) in enumerate(rows):
        y, certain = top + number * row + 8, begin > 0 or end < 0
        colour = f"var(--{'best' if certain else 'bar'})"
        parts.append(f'<text x="{label - 8:.0f}" y="{y + 5}" text-anchor="end">{escape(_short(name))}</text>')
        ends = f"M{at(begin):.1f} {y}H{at(end):.1f}M{at(begin):.1f} {y - 4}v8M{at(end):.1f} {y - 4}v8"
        parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        parts.append(f'<circle cx="{at(value):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return "".join([*parts, "</svg>"])


def line_chart(lines: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """Values over steps 1, 2, ...; each line in its own colour, with a key."""
    points = [(name, [(float(i), value, 0.0) for i, value in enumerate(line, 1)]) for name, line in lines]
    longest = max(len(line) for _, line in lines)
    return point_chart(points, [(float(longest), f"{x_label} {longest}")])


def point_chart(lines: Sequence[tuple[str, Sequence[Point]]], ticks: Sequence[tuple[float, str]]) -> str:
    """Points with error bars, joined by lines, each in its own colour, with a key below.

    Args:
        ticks: where on the x axis which text stands.
    """
    left, top, bottom, key = 48, 10, 190, 18
    points = [point for _, line in lines for point in line]
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)

    def at(x: float, y: float) -> str:
        across = (x - first) / ((last - first) or 1.0) * (WIDTH - left - 30)
        return f"{left + 10 + across:.1f},{bottom - (y - low) / ((high - low) or 1.0) * (bottom - top):.1f}"

    names = ", ".join(name for name, _ in lines)
    parts = [_open(bottom + 24 + key * len(lines), f"{names}: from {low:.3g} to {high:.3g}")]
    for place, value in ((bottom, low), (top, high)):
        parts.append(f'<text x="{left - 6}" y="{place + 4}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<path d="M{left} {place}H{WIDTH - 10}" stroke="var(--line)" fill="none"/>')
    for x, text in ticks:
        across = at(x, low).split(",")[0]
        anchor = "end" if x == last and len(ticks) == 1 else "middle"
        parts.append(f'<text x="{across}" y="{bottom + 15}" text-anchor="{anchor}">{escape(text)}</text>')
    for number, (name, line) in enumerate(lines):
        stroke = f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.5"'
        parts.append(f'<polyline points="{" ".join(at(x, y) for x, y, _ in line)}" {stroke}/>')
        errors = "".join(f"M{at(x, y - error)}L{at(x, y + error)}" for x, y, error in line if error > 0)
        parts.append(f'<path d="{errors}" {stroke}/>' if errors else "")
        y = bottom + 18 + key * (number + 1)
        parts.append(f'<path d="M{left} {y - 4}h20" {stroke}/><text x="{left + 26}" y="{y}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


COLOURS = ("var(--bar)", "var(--best)", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f5f00", "#7a5bd6", "#b30059")
_STROKE = 'stroke="var(--ink)" stroke-width="1.5" fill="none"'


def with_error(pattern: str, value: float, error: float) -> str:
    """`0.50 ± 0.01`; without an error the value alone."""
    return pattern.format(value) + (f" ± {pattern.format(error)}" if error > 0 else "")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def _open(height: int, description: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(description, quote=True)}">'
    )
