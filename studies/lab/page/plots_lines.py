"""Scores of a study as lines: against rank, bytes, and the number of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..records import Record
from ..twin import MAIN
from .drawing import (
    GREY,
    HOLLOW,
    NORMALISED,
    OF_PROTOCOL,
    SHARE,
    Line,
    all_labels,
    draw_lines,
    experts_line,
    legend_below,
    log_axis,
    new_figure,
)
from .shown import NEEDS, PROTOCOLS, Study, Twin, needs, share_of
from .tables_further import TWIN, all_bytes, task_sets


def ranks(study: Study) -> Any:
    """One panel for each shared expert."""
    shared = list(dict.fromkeys(twin.shared for twin in study.twins))
    if not shared:
        return None
    figure, panels = new_figure(1.6 + 3.4 * len(shared), 4.2, len(shared), sharey=True)
    for axes, name in zip(panels, shared, strict=True):
        mine = [twin for twin in study.twins if twin.shared == name]
        lines = [Line(p, _by_rank(mine, p), NEEDS[p]) for p in PROTOCOLS]
        lines = [line for line in lines if line.points]
        experts_line(axes)
        draw_lines(axes, lines, OF_PROTOCOL)
        places = sorted({twin.rank for twin in mine})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_xlabel("rank")
        axes.set_title(f"shared expert: {name}")
    panels[0].set_ylabel(NORMALISED)
    handles, labels = all_labels(panels)
    legend_below(figure, handles, labels, 3)
    return figure


def _by_rank(twins: Sequence[Twin], protocol: str) -> list[tuple[float, list[float]]]:
    return [
        (twin.rank, [result["normalised"] for result in results])
        for twin in twins
        if (results := twin.results(protocol))
    ]


def compression(study: Study) -> Any:
    """Left: how numbers are stored; right: what is kept. All under `oracle`."""
    if not study.compressed:
        return None
    stored: dict[str, list[Record]] = {}
    kept: dict[str, list[Record]] = {}
    for record in study.compressed:
        exclusive = record["settings"]["exclusive"]
        form, dtype = _form(exclusive), exclusive.get("dtype", "")
        if form in ("rank", "budget"):
            stored.setdefault(f"{form}, {dtype}", []).append(record)
        if dtype == "float16":
            kept.setdefault(form, []).append(record)
    figure, panels = new_figure(10.5, 4.8, 2, sharey=True)
    for axes, groups, title in (
        (panels[0], stored, "SVD: even ranks and budgets, by how they are stored"),
        (panels[1], kept, "float16: by what is kept"),
    ):
        experts_line(axes)
        lines = [
            Line(
                label,
                _by_bytes(records),
                NEEDS["oracle"],
                "--" if label.startswith("budget") else "-",
            )
            for label, records in groups.items()
        ]
        draw_lines(axes, [line for line in lines if line.points])
        log_axis(axes)
        axes.set_xlabel(SHARE)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:  # a panel may have nothing to show
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
            axes.legend(**place, ncols=3, frameon=False, fontsize=8.5)
    panels[0].set_ylabel(f"{NORMALISED}, oracle")
    return figure


def _form(exclusive: Mapping[str, Any]) -> str:
    """What is kept, without how much and without how it is stored."""
    if "form" in exclusive:
        scope = f", of each {exclusive['scope']}" if exclusive.get("scope") == "tensor" else ""
        scope = ", of all" if exclusive.get("scope") == "all" else scope
        return f"{exclusive['form']}{scope}"
    return next(name for name in exclusive if name != "dtype")


def score_by_bytes(study: Study) -> Any:
    """Ours, by rank and by how numbers are stored, and rivals."""
    lines: list[Line] = []
    for protocol in PROTOCOLS:
        points = [
            (100 * place, [result["normalised"] for result in twin.results(protocol)])
            for twin in study.twins
            if twin.shared == MAIN and (place := twin.share(protocol)) is not None
        ]
        lines.append(Line(f"Twin-Merging, {protocol}", points, NEEDS[protocol]))
    quantised: dict[str, list[Record]] = {}
    for record in study.compressed:
        exclusive = record["settings"]["exclusive"]
        if exclusive.keys() == {"rank", "dtype"} and exclusive["dtype"].startswith("int"):
            quantised.setdefault(exclusive["dtype"], []).append(record)
    for dtype, records in quantised.items():
        lines.append(Line(f"Twin-Merging, {dtype}, oracle", _by_bytes(records), NEEDS["oracle"]))
    rivals: dict[tuple[str, str], list[Record]] = {}
    for record in study.of("rival"):
        rivals.setdefault((record["name"], needs(record)), []).append(record)
    for (name, needed), records in rivals.items():
        lines.append(Line(f"{name} (our implementation)", _by_bytes(records), needed, ":"))
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    figure, (axes,) = new_figure(10, 5)
    experts_line(axes)
    draw_lines(axes, lines)
    log_axis(axes)
    axes.set_xlabel(f"{SHARE}\n(known-head and routed: with its part of the router)")
    axes.set_ylabel(NORMALISED)
    axes.set_title(f"{HOLLOW}; dashed line: the experts themselves")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    return figure


def _by_bytes(records: Sequence[Record]) -> list[tuple[float, list[float]]]:
    return [
        (100 * place, [record["normalised"]])
        for record in records
        if (place := share_of(record)) is not None and place > 0
    ]


def more_tasks(study: Study) -> Any:
    """Left: score by number of tasks; right: score against all bytes stored."""
    records = study.of("tasks")
    if not records:
        return None
    sets = task_sets(study)
    lines = []
    for name in dict.fromkeys(record["name"] for record in records):
        for protocol in PROTOCOLS if name == TWIN else ("known-head",):
            points = [
                (float(len(names)), values)
                for names in sets
                if (
                    values := [
                        record[protocol]["normalised"]
                        for record in records
                        if record["name"] == name
                        and record["settings"]["names"] == names
                        and protocol in record
                    ]
                )
            ]
            label = f"{name}, {protocol}" if name == TWIN else name
            lines.append(Line(label, points, NEEDS[protocol]))
    lines = [line for line in lines if line.points]
    figure, (left, right) = new_figure(11, 4.8, 2, sharey=True)
    experts_line(left)
    draw_lines(left, lines)
    places = sorted({len(names) for names in sets})
    left.set_xticks(places)
    left.set_xlabel("number of tasks")
    left.set_ylabel(NORMALISED)
    left.set_title("static merges under known-head")
    _stored(right, study, lines)
    handles, labels = all_labels([left, right])
    legend_below(figure, handles, labels, 4)
    return figure


def _stored(axes: Any, study: Study, lines: Sequence[Line]) -> None:
    """The same lines against bytes; the experts themselves are T models as large as the shared."""
    mega = 1e6
    stored: dict[tuple[str, int], Record] = {
        (record["name"], len(record["settings"]["names"])): record
        for record in study.of("tasks")
        if "bytes" in record
    }
    moved = []
    for line in lines:
        name = line.label.split(",")[0]
        points = [
            (all_bytes(record, router=line.needs != NEEDS["oracle"]) / mega, values)
            for count, values in line.points
            if (record := stored.get((name, int(count)))) is not None
        ]
        moved.append(Line(line.label, points, line.needs, "-" if name == TWIN else "none"))
    alone = [
        (count * record["bytes"]["shared"] / mega, [1.0])
        for (name, count), record in stored.items()
        if name == TWIN
    ]
    moved.append(Line("the experts themselves", alone, NEEDS["oracle"], ":"))
    draw_lines(axes, moved, {"the experts themselves": GREY})
    if stored:
        log_axis(axes, (1, 1.5, 2, 3, 4, 6, 8))
    axes.set_xlabel("all bytes stored, MB")
    axes.set_title("one point for each number of tasks")
