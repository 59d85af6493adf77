"""Scores of static merges and Twin-Merging as bars."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..twin import MAIN
from .drawing import GREY, NORMALISED, OF_PROTOCOL, PAPER, new_figure
from .shown import ROUTED, Study


def static(study: Study) -> Any:
    """Static merges from worst to best, then Twin-Merging by rank on the main shared expert."""
    found = sorted((record["normalised"], record["name"]) for record in study.static)
    bars = [(name, [value], GREY) for value, name in found]
    for twin in (twin for twin in study.twins if twin.shared == MAIN):
        for protocol in ROUTED:
            if results := twin.results(protocol):
                values = [result["normalised"] for result in results]
                name = f"{twin.name}, {protocol}"
                bars.append((name, values, OF_PROTOCOL[protocol]))
    if not found:
        return None
    bars = bars[::-1]
    figure, (axes,) = new_figure(8.5, 0.9 + 0.26 * len(bars))
    means = [100 * fmean(values) for _, values, _ in bars]
    drawn = axes.barh([n for n, _, _ in bars], means, color=[c for _, _, c in bars], height=0.72)
    axes.bar_label(drawn, [f"{mean:.1f}" for mean in means], padding=3, size=8, bbox=PAPER)
    axes.axvline(100, color=GREY, lw=0.9, ls="--")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(min(0.0, *means), 1.1 * max(100.0, *means))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(f"{NORMALISED} (static merges: known-head; routed: mean of the seeds)")
    return figure
