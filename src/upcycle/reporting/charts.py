"""Small charts as SVG text, drawn for a page that may be light or dark: lines and words take the page's own colours."""

from collections.abc import Sequence
from html import escape

Bar = tuple[str, float, float]
"""(label, value, standard error)"""


def bar_chart(bars: Sequence[Bar], pattern: str, best: int) -> str:
    """Horizontal bars with error bars; the best one stands out."""
    width, row, label = 640, 24, 200
    most = max(value + error for _, value, error in bars) or 1.0
    scale = (width - label - 90) / most
    parts = [_open(width, row * len(bars) + 8, "; ".join(f"{n}: {pattern.format(v)}" for n, v, _ in bars))]
    for number, (name, value, error) in enumerate(bars):
        y, colour = number * row + 4, "var(--best)" if number == best else "var(--bar)"
        end = label + value * scale
        parts.append(f'<text x="{label - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{label}" y="{y}" width="{max(1, value * scale):.1f}" height="16" fill="{colour}"/>')
        if error > 0:
            low, high = end - error * scale, end + error * scale
            parts.append(
                f'<path d="M{low:.1f} {y + 8}H{high:.1f}M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8" {_STROKE}/>'
            )
        where = end + error * scale + 6
        spread = f" ± {pattern.format(error)}" if error > 0 else ""
        parts.append(f'<text x="{where:.1f}" y="{y + 13}">{pattern.format(value)}{spread}</text>')
    return "".join([*parts, "</svg>"])


def line_chart(lines: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """Values over steps 1, 2, ...; each line in its own colour, with a key."""
    width, height, left, bottom = 640, 220, 48, 36
    values = [value for _, line in lines for value in line]
    low, high = min(values), max(values)
    span, longest = (high - low) or 1.0, max(len(line) for _, line in lines)
    parts = [_open(width, height, f"{', '.join(name for name, _ in lines)} from {low:.3g} to {high:.3g}")]
    for place, value in ((height - bottom, low), (10, high)):
        parts.append(f'<text x="{left - 6}" y="{place + 4}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<path d="M{left} {place}H{width - 10}" stroke="var(--line)" fill="none"/>')
    for number, (name, line) in enumerate(lines):
        points = (
            f"{left + (width - left - 10) * i / max(1, longest - 1):.1f},"
            f"{height - bottom - (height - bottom - 10) * (value - low) / span:.1f}"
            for i, value in enumerate(line)
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x = left + number * (width - left) / max(1, len(lines))
        parts.append(f'<text x="{x:.0f}" y="{height - 4}" style="fill:{colour}">{escape(name)}</text>')
    parts.append(
        f'<text x="{width - 10}" y="{height - bottom + 14}" text-anchor="end">{escape(x_label)} {longest}</text>'
    )
    return "".join([*parts, "</svg>"])


COLOURS = ("var(--bar)", "var(--best)", "#009e73", "#cc79a7")
_STROKE = 'stroke="var(--ink)" stroke-width="1.5" fill="none"'


def _open(width: int, height: int, description: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(description, quote=True)}">'
    )
