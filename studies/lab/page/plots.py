"""A study's records as pictures, PNG and SVG; the same records give the same bytes.

Hollow markers need the task id (or the true expert, under `oracle`), half-filled ones its head
alone; full ones need nothing but the row.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from twinmerge.artifact.writer import explained
from twinmerge.plots import check_extra

from ..records import Record
from ..twin import MAIN
from .shown import NEEDS, PROTOCOLS, ROUTED, Study, Twin, needs, share_of
from .tables_further import TWIN, all_bytes, main_routing, task_sets

# Okabe and Ito's palette, told apart by the colour-blind too; without its yellow, pale on white.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
SKY, RED, PINK, GREY = "#56B4E9", "#D55E00", "#CC79A7", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, GREY)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
"""One more than colours: the two together repeat late."""
OF_PROTOCOL = {"oracle": BLUE, "known-head": ORANGE, "routed": GREEN}

SHARE = "bytes of one expert, % of a float16 base model"
NORMALISED = "normalised score, %"
DPI = 130
PAPER = {"fc": "white", "ec": "none", "pad": 0.5}
"""Behind text that a line would cross."""
HOLLOW = "hollow: the task id is needed; half: its head"
FILL = {"yes": "none", "its head": "left", "no": "full"}
"""Of a marker, by what an answer needs (`NEEDS`)."""


@dataclass(frozen=True)
class Picture:
    """section: of the page, by its id; title: what is seen, in a sentence"""

    name: str
    section: str
    title: str
    svg: bytes
    png: bytes


def plots(folder: Path) -> list[Path]:
    """Draw what a study's folder holds to its `plots/`; gives the files' paths.

    Raises `InputError` for a folder that is none, `MissingExtra` without matplotlib, `OutputError`.
    """
    return save(drawn(Study.of_folder(folder)), folder)


def save(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    written = []
    with explained(folder / "plots"):
        for picture in pictures:
            for suffix, content in (("png", picture.png), ("svg", picture.svg)):
                path = folder / "plots" / f"{picture.name}.{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                written.append(path)
    return written


def drawn(study: Study) -> list[Picture]:
    """What there are records of."""
    check_extra()
    from matplotlib import rc_context

    pictures: list[tuple[str, str, str, Callable[[Study], Any]]] = [
        ("static", "merges", "Normalised scores of static merges and Twin-Merging", static),
        ("ranks", "merges", f"Normalised score by rank and protocol ({HOLLOW})", ranks),
        ("compression", "compression", f"Normalised score by what is kept ({HOLLOW})", compression),
        (
            "bytes",
            "merges",
            f"Normalised score against bytes, beside rivals ({HOLLOW})",
            score_by_bytes,
        ),
        ("tasks", "more", f"Normalised score and bytes by number of tasks ({HOLLOW})", more_tasks),
        ("weights", "routing", "Mean weights of each task's rows", weights),
        ("few-experts", "routing", "Mean weights where some experts are there", few_experts),
    ]
    found = []
    with rc_context({"svg.hashsalt": "twinmerge", "font.size": 9, "axes.titlesize": 9}):
        for name, section, title, draw in pictures:
            if (figure := draw(study)) is not None:
                svg = _bytes(figure, "svg", metadata={"Date": None})
                found.append(Picture(name, section, title, svg, _bytes(figure, "png", dpi=DPI)))
    return found


def _bytes(figure: Any, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
    return figure, panels


# ---------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, Sequence[float]]]
    """(x, y of every seed)"""
    needs: str = NEEDS["routed"]
    style: str = "-"


def _lines(axes: Any, lines: Sequence[Line], colours: Mapping[str, str] | None = None) -> None:
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


def _experts_line(axes: Any) -> None:
    axes.axhline(100, color=GREY, lw=0.9, ls="--", zorder=1)


def _log(axes: Any, ticks: Sequence[float] = (1, 2, 5)) -> None:
    """A logarithmic x; `ticks` of each decade have numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Below all panels, where it hides nothing."""
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )


def ranks(study: Study) -> Any:
    """One panel for each shared expert."""
    shared = list(dict.fromkeys(twin.shared for twin in study.twins))
    if not shared:
        return None
    figure, panels = _figure(1.6 + 3.4 * len(shared), 4.2, len(shared), sharey=True)
    for axes, name in zip(panels, shared, strict=True):
        mine = [twin for twin in study.twins if twin.shared == name]
        lines = [Line(p, _by_rank(mine, p), NEEDS[p]) for p in PROTOCOLS]
        lines = [line for line in lines if line.points]
        _experts_line(axes)
        _lines(axes, lines, OF_PROTOCOL)
        places = sorted({twin.rank for twin in mine})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_xlabel("rank")
        axes.set_title(f"shared expert: {name}")
    panels[0].set_ylabel(NORMALISED)
    handles, labels = _all_labels(panels)
    _legend(figure, handles, labels, 3)
    return figure


def _by_rank(twins: Sequence[Twin], protocol: str) -> list[tuple[float, list[float]]]:
    return [
        (twin.rank, [result["normalised"] for result in results])
        for twin in twins
        if (results := twin.results(protocol))
    ]


def _all_labels(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each label once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _by_bytes(records: Sequence[Record]) -> list[tuple[float, list[float]]]:
    return [
        (100 * place, [record["normalised"]])
        for record in records
        if (place := share_of(record)) is not None and place > 0
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
    figure, panels = _figure(10.5, 4.8, 2, sharey=True)
    for axes, groups, title in (
        (panels[0], stored, "SVD: even ranks and budgets, by how they are stored"),
        (panels[1], kept, "float16: by what is kept"),
    ):
        _experts_line(axes)
        lines = [
            Line(
                label,
                _by_bytes(records),
                NEEDS["oracle"],
                "--" if label.startswith("budget") else "-",
            )
            for label, records in groups.items()
        ]
        _lines(axes, [line for line in lines if line.points])
        _log(axes)
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
    figure, (axes,) = _figure(10, 5)
    _experts_line(axes)
    _lines(axes, lines)
    _log(axes)
    axes.set_xlabel(f"{SHARE}\n(known-head and routed: with its part of the router)")
    axes.set_ylabel(NORMALISED)
    axes.set_title(f"{HOLLOW}; dashed line: the experts themselves")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    return figure


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
    figure, (left, right) = _figure(11, 4.8, 2, sharey=True)
    _experts_line(left)
    _lines(left, lines)
    places = sorted({len(names) for names in sets})
    left.set_xticks(places)
    left.set_xlabel("number of tasks")
    left.set_ylabel(NORMALISED)
    left.set_title("static merges under known-head")
    _stored(right, study, lines)
    handles, labels = _all_labels([left, right])
    _legend(figure, handles, labels, 4)
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
    _lines(axes, moved, {"the experts themselves": GREY})
    if stored:
        _log(axes, (1, 1.5, 2, 3, 4, 6, 8))
    axes.set_xlabel("all bytes stored, MB")
    axes.set_title("one point for each number of tasks")


# --------------------------------------------------------------------------------- bars and maps


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
    figure, (axes,) = _figure(8.5, 0.9 + 0.26 * len(bars))
    means = [100 * fmean(values) for _, values, _ in bars]
    drawn = axes.barh([n for n, _, _ in bars], means, color=[c for _, _, c in bars], height=0.72)
    axes.bar_label(drawn, [f"{mean:.1f}" for mean in means], padding=3, size=8, bbox=PAPER)
    axes.axvline(100, color=GREY, lw=0.9, ls="--")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(min(0.0, *means), 1.1 * max(100.0, *means))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(f"{NORMALISED} (static merges: known-head; routed: mean of the seeds)")
    return figure


def weights(study: Study) -> Any:
    """Left: mean weights, right: the expert found likeliest (share of rows)."""
    record = main_routing(study)
    if record is None:
        return None
    tasks = record["routing"]["tasks"]
    names = list(tasks)
    chosen = [[n / sum(each["chosen"]) for n in each["chosen"]] for each in tasks.values()]
    size = 1.6 + 0.42 * len(names)
    figure, (left, right) = _figure(2 * size + 0.8, size + 0.3, 2)
    _heat(left, [each["weights"] for each in tasks.values()], names, names)
    _heat(right, chosen, names, names)
    left.set_title("mean weight of each expert")
    right.set_title("share of rows for which it is likeliest")
    left.set_ylabel("task")
    figure.suptitle(
        f"router of seed {record['settings']['seed']}, shared expert: {record['name']}", size=9
    )
    return figure


def few_experts(study: Study) -> Any:
    """The paper's Figure 5a: who answers a task while the number of experts grows."""
    records = study.of("routing")
    if not records:
        return None
    names = list(dict.fromkeys(n for record in records for n in record["settings"]["names"]))
    cells = [[record["weights"].get(name) for name in names] for record in records]
    labels = [f"{r['name']}: {len(r['settings']['names'])} experts" for r in records]
    figure, (axes,) = _figure(2.4 + 0.5 * len(names), 1.3 + 0.36 * len(records))
    _heat(axes, cells, labels, names)
    axes.set_title("mean weight of each expert that is there")
    return figure


def _heat(
    axes: Any, cells: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Numbers in coloured fields; None: an empty field."""
    missing = float("nan")
    axes.imshow(
        [[missing if value is None else value for value in row] for row in cells],
        cmap="Blues", vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    for y, x, value in _fields(cells):
        if value >= 0.005:
            axes.text(
                x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", size=7,
                color="white" if value > 0.55 else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _fields(cells: Sequence[Sequence[float | None]]) -> Iterator[tuple[int, int, float]]:
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value is not None:
                yield y, x, value
