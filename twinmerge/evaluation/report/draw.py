"""Line charts as small SVG texts that take their colours from the page (light, dark, print).

Coordinates are in a box of 340 × 240; a chart grows with the page. What a point is, is told by
`data-tip`, which the page's script shows; what the whole says, by `aria-label`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor

Points = Sequence[tuple[float, float]]
"""(x, y) in the chart's units, from left to right."""

WIDTH, HEIGHT = 340, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 38
COLOURS = 10
"""Classes .c0 to .c9 of the page's style; beyond them lines are dashed."""


def chart(
    lines: Mapping[str, Points],
    *,
    title: str,
    x: str,
    y: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    y_range: tuple[float, float] = (0.0, 1.0),
    diagonal: bool = False,
    sizes: Mapping[str, Sequence[float]] | None = None,
    tips: Mapping[str, Sequence[str]] | None = None,
    percent: bool = True,
) -> str:
    """Lines by name, with axes and a grid.

    title: read out where the picture is not seen; tips: for every point, what it says
    sizes: of every point's dot, from 0 to 1; None: no dots until pointed at

    Text is escaped. Ranges are of the axes; `percent` writes ticks as such.
    """
    (x0, x1), (y0, y1) = x_range, y_range

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x0) / ((x1 - x0) or 1)
        up = (point[1] - y0) / ((y1 - y0) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
    ]
    for tick in _ticks(y0, y1):
        _, down = at((x0, tick))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" '
            f'y2="{down:.1f}"/><text class="tick end" x="{LEFT - 6}" y="{down + 4:.1f}">'
            f"{_said(tick, percent)}</text>"
        )
    for tick in _ticks(x0, x1):
        across, _ = at((tick, y0))
        parts.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/><text class="tick middle" x="{across:.1f}" '
            f'y="{HEIGHT - BOTTOM + 16}">{_said(tick, percent)}</text>'
        )
    if diagonal:
        (a, b), (c, d) = at((x0, y0)), at((x1, y1))
        parts.append(f'<line class="rule" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>')
    for index, (name, points) in enumerate(lines.items()):
        placed = [at(point) for point in points]
        style = f"c{index % COLOURS}" + (" dashed" if index >= COLOURS else "")
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        told = (tips or {}).get(name) or [f"{name}: {_pair(point, percent)}" for point in points]
        drawn = "spot" if sizes is None else "dot"
        radii = [5.0] * len(placed) if sizes is None else [1.5 + 7 * s**0.5 for s in sizes[name]]
        for (a, b), tip, radius in zip(placed, told, radii, strict=True):
            parts.append(
                f'<circle class="{drawn} {style}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}" '
                f'data-tip="{escape(tip)}"/>'
            )
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="axis middle" x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 4}">{escape(x)}'
        f'</text><text class="axis middle" transform="translate(11 {middle}) rotate(-90)">'
        f"{escape(y)}</text></svg>"
    )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers within the range."""
    span = (high - low) or 1.0
    steps = (digit * 10.0**power for power in range(-9, 16) for digit in (1, 2, 5))
    step = next(step for step in steps if span / step <= 6)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _said(value: float, percent: bool) -> str:
    return f"{100 * value:g}%" if percent else f"{value:g}"


def _pair(point: tuple[float, float], percent: bool) -> str:
    if percent:
        return f"{point[1]:.1%} at {point[0]:.1%}"
    return f"{point[1]:.3g} at {point[0]:g}"
