"""How all pictures of a study look: colours, marks, axes, and lines with the spread of the seeds.

Hollow markers need the task id (or the true expert, under `oracle`), half-filled ones its head
alone; full ones need nothing but the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean, stdev
from typing import Any

from .shown import NEEDS

# Okabe and Ito's palette, told apart by the colour-blind too; without its yellow, pale on white.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
SKY, RED, PINK, GREY = "#56B4E9", "#D55E00", "#CC79A7", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, GREY)

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
"""One more than colours: the two together repeat late."""

OF_PROTOCOL = {"oracle": BLUE, "known-head": ORANGE, "routed": GREEN}
SHARE = "bytes of one expert, % of a float16 base model"
NORMALISED = "normalised score, %"

PAPER = {"fc": "white", "ec": "none", "pad": 0.5}
"""Behind text that a line would cross."""

HOLLOW = "hollow: the task id is needed; half: its head"

FILL = {"yes": "none", "its head": "left", "no": "full"}
"""Of a marker, by what an answer needs (`NEEDS`)."""


def new_figure(
    width: float, height: float, columns: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
    return figure, panels


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, Sequence[float]]]
    """(x, y of every seed)"""
    needs: str = NEEDS["routed"]
    style: str = "-"


def draw_lines(axes: Any, lines: Sequence[Line], colours: Mapping[str, str] | None = None) -> None:
    """Means, with bars of one standard deviation where there are several seeds."""
    looks = zip(cycle(COLOURS), cycle(MARKS))
    for line, (colour, mark) in zip(lines, looks, strict=False):
        colour = (colours or {}).get(line.label, colour)
        points = sorted(line.points)
        means = [100 * fmean(values) for _, values in points]
        bars = [100 * stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar(
            [x for x, _ in points], means, bars if any(bars) else None, label=line.label,
            color=colour, marker=mark, fillstyle=FILL[line.needs], mfcalt="white", ms=6, lw=1.3,
            ls=line.style if len(points) > 1 else "none", capsize=2,
        )  # fmt: skip


def experts_line(axes: Any) -> None:
    axes.axhline(100, color=GREY, lw=0.9, ls="--", zorder=1)


def log_axis(axes: Any, ticks: Sequence[float] = (1, 2, 5)) -> None:
    """A logarithmic x; `ticks` of each decade have numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Below all panels, where it hides nothing."""
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )


def all_labels(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each label once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
