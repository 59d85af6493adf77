"""A report as sections of text, tables and charts; these as HTML and as markdown.

Both say the same: of a chart markdown has the table of numbers that HTML folds below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifact.format import layers_said
from ...errors import OutputError
from . import draw
from .gather import Found, Routing
from .measure import SHARES, Bin, at_share

PROTOCOLS_SAID = (
    "*routed*: nothing is known about a row, weights and head both come from the router. "
    "*known-head*: the true task's head, routed weights. *oracle*: the true expert chosen, the "
    "ceiling of the compression. *shared*: no expert at all, the true task's head."
)


@dataclass(frozen=True)
class Cell:
    text: str
    sort: float | int | None = None
    """What it is sorted by; None: its text."""
    heat: float | int | None = None
    """From 0 to 1: how strongly it is coloured."""
    tip: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()
    """A last row that stays last."""
    tips: Mapping[str, str] = field(default_factory=dict)
    """By column: what it is."""


@dataclass(frozen=True)
class Chart:
    caption: str
    svg: str
    legend: Sequence[str]
    numbers: Table


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    text: Sequence[str]
    """Paragraphs; `code` and *emphasis* are marked as in markdown."""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


def html(found: Found) -> str:
    """One page that needs nothing else: style, script and pictures are in it."""
    import jinja2
    from markupsafe import Markup

    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pages.filters["marked"] = lambda text: Markup(_marked(text))
    pages.filters["svg"] = Markup
    return pages.get_template("page.html.j2").render(
        title=_title(found), lead=_lead(found), tiles=_tiles(found), found=found,
        sections=sections(found), colours=draw.COLOURS,
    )  # fmt: skip


def markdown(found: Found) -> str:
    """The same for readers of text."""
    parts = [f"# {_plain(_title(found))}", _paragraph(_lead(found))]
    parts.append("\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in _tiles(found)))
    parts.append("## Failure signatures")
    if not found.signatures:
        parts.append("None was seen.")
    for each in found.signatures:
        kind = "" if each.serious else " (a remark)"
        parts.append(f"**{each.title}**{kind}. {_paragraph(each.said)}")
        parts.append(f"What to do: {_paragraph(each.do)}")
    for section in sections(found):
        parts.append(f"## {_plain(section.title)}")
        parts += [_paragraph(text) for text in section.text]
        for table in (*section.tables, *(chart.numbers for chart in section.charts)):
            parts += [f"{_plain(table.caption)}:", _text_table(table)]
    return "\n\n".join(parts) + "\n"


def write(found: Found, path: Path) -> tuple[Path, Path]:
    """Write the HTML to `path` and the markdown beside it; gives both paths.

    Raises `OutputError` if they cannot be written.
    """
    files = path, path.with_suffix(".md")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in zip(files, (html(found), markdown(found)), strict=True):
            file.write_text(text, encoding="utf-8")
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise OutputError(f"{path}: the report cannot be written: {reason}.") from problem
    return files


# ------------------------------------------------------------------------------------- content


def sections(found: Found) -> list[Section]:
    """All that follows the signatures."""
    parts = [_scores(found)]
    if (routing := found.routing) is not None:
        parts += [_choices(routing), _calibration(routing), _coverage(routing)]
    else:
        parts.append(Section("routing", "Routing", [f"Nothing was routed: {found.no_router}"]))
    parts += [_sizes(found), _router(found)]
    return parts


def _title(found: Found) -> str:
    return f"{Path(found.artifact).name}: what its experts and its router do"


def _lead(found: Found) -> str:
    summary, rows = found.summary, sum(found.rows.values())
    split = f" ({found.split})" if found.split else ""
    unseen = sum(found.unseen_rows.values())
    return (
        f"{len(summary['experts'])} experts of {summary['base']}, shared expert by "
        f"{summary['merge_method']}, on {rows:,} rows of {len(found.rows)} tasks"
        + (f" from {found.data}{split}" if found.data else "")
        + (f", beside {unseen:,} rows of {len(found.unseen_rows)} unseen tasks" if unseen else "")
        + "."
    )


def _tiles(found: Found) -> list[tuple[str, str]]:
    """A few numbers for the top of the page."""
    tiles = []
    for protocol, report in found.reports.items():
        normalised = report.normalised()
        if normalised is not None:
            tiles.append((f"{protocol}, normalised", f"{100 * normalised:.1f}"))
        else:
            tiles.append((f"{protocol}, mean score", f"{report.mean:.3f}"))
    if (routing := found.routing) is not None:
        tiles.append(("rows routed right", _percent(routing.accuracy)))
        tiles.append(("calibration error", f"{routing.calibration_error:.3f}"))
    size = found.summary["bytes"]
    extra = (size["experts"] + size["router"]) / max(size["shared"], 1)
    tiles.append(("experts and router, of base", _percent(extra)))
    return tiles


def _scores(found: Found) -> Section:
    if not found.reports:
        text = "This model generates: it has no heads whose answers could be scored."
        return Section("scores", "Scores", [text])
    beside = {
        "base": (found.base, "the base model under the expert's head"),
        "commonest": (found.majority, "always the commonest label"),
        "expert": (found.reference, "the expert's own checkpoint on these rows"),
    }
    given = {name: scores for name, (scores, _) in beside.items() if scores}
    columns = ["task", "metric", "rows", *found.reports, *given]
    rows = []
    for task in found.rows:
        scored = {name: report.tasks[task] for name, report in found.reports.items()}
        first = next(iter(scored.values()))
        cells = [Cell(task), Cell(first.metric), Cell(f"{first.rows:,}", first.rows)]
        for name, score in scored.items():
            own = (found.reference or {}).get(task, 0)
            tip = f"{name}: {_percent(score.score / own)} of the expert's own" if own > 0 else ""
            cells.append(Cell(f"{score.score:.3f}", score.score, tip=tip))
        cells += [Cell(f"{scores[task]:.3f}", scores[task]) for scores in given.values()]
        rows.append(cells)
    foot = [Cell("mean"), Cell(""), Cell(f"{sum(found.rows.values()):,}")]
    foot += [Cell(f"{report.mean:.3f}") for report in found.reports.values()]
    foot += [Cell(f"{sum(s.values()) / len(s):.3f}") for s in given.values()]
    tips = {name: said for name, (_, said) in beside.items()}
    tables = [Table("Scores by task and protocol", columns, rows, foot, tips)]
    if found.reference is not None:
        tables.append(_normalised(found))
    return Section("scores", "Scores", [PROTOCOLS_SAID], tables)


def _normalised(found: Found) -> Table:
    assert found.reference is not None
    rows = []
    for task, own in found.reference.items():
        cells = [Cell(task)]
        for report in found.reports.values():
            share = report.tasks[task].score / own if own > 0 else None
            cells.append(Cell("-") if share is None else Cell(f"{100 * share:.1f}", share))
        rows.append(cells)
    means = [report.normalised() for report in found.reports.values()]
    foot = [Cell("mean"), *(Cell("-" if m is None else f"{100 * m:.1f}") for m in means)]
    return Table("Normalised: % of the expert's own score", ["task", *found.reports], rows, foot)


def _choices(routing: Routing) -> Section:
    experts = routing.experts
    confusion = []
    for task, chosen in routing.confusion.items():
        total = sum(chosen.values())
        if not total:
            continue
        cells = [Cell(task)]
        for name in experts:
            count = chosen.get(name, 0)
            tip = f"{task} given to {name}: {count:,} of {total:,} rows ({count / total:.1%})"
            cells.append(Cell(f"{count:,}" if count else "·", count, count / total, tip))
        cells.append(Cell(_percent(routing.accuracies[task]), routing.accuracies[task]))
        confusion.append(cells)
    weights = []
    for task, of in routing.weights.items():
        name_said = f"{task} (unseen)" if task in routing.unseen else task
        cells = [Cell(name_said)]
        for name in experts:
            tip = f"{name_said}: mean weight of {name} {of[name]:.3f}"
            cells.append(Cell(f"{of[name]:.2f}", of[name], of[name], tip))
        total = sum(of.values())
        cells.append(Cell(f"{max(1 - total, 0.0):.2f}", 1 - total))
        weights.append(cells)
    text = [
        f"{_percent(routing.accuracy)} of the rows go to their own expert. The weights of a row "
        f"have an entropy of {routing.entropy:.2f} nats on average (0: one expert alone).",
    ]
    tables = [
        Table(
            "Confusion: task (row) and the expert found likeliest (column), in rows",
            ["task", *experts, "right"],
            confusion,
        ),
        Table(
            "Mean weights: task (row) and expert (column)",
            ["task", *experts, "left out"],
            weights,
            tips={"left out": "1 less the sum: what inputs taken for new leave to the shared"},
        ),
    ]
    return Section("routing", "Routing", text, tables)


def _calibration(routing: Routing) -> Section:
    before, after = routing.uncalibrated, routing.reliability
    named = {"as given": after, "at temperature 1": before}
    lines = {name: [(b.confidence, b.right) for b in bins] for name, bins in named.items()}
    tips = {
        name: [
            f"{name}: {b.rows:,} rows, confidence {b.confidence:.1%}, right {b.right:.1%}"
            for b in bins
        ]
        for name, bins in named.items()
    }
    rows = sum(b.rows for b in after)
    svg = draw.chart(
        lines,
        title="Reliability: share of right choices over confidence; the diagonal is calibrated",
        x="confidence",
        y="share right",
        diagonal=True,
        sizes={name: [b.rows / rows for b in bins] for name, bins in named.items()},
        tips=tips,
    )
    numbers = Table(
        "Reliability: rows by confidence, as the router gives it and at temperature 1",
        ["", "confidence", "rows", "mean confidence", "right"],
        [row for name, bins in named.items() for row in _bin_rows(name, bins)],
    )
    text = (
        f"Expected calibration error {routing.calibration_error:.3f} as given (temperature "
        f"{routing.temperature:.3g}), {routing.uncalibrated_error:.3f} at temperature 1. Of rows "
        "with a confidence of 80%, 80% should be right. A dot's size is its share of the rows."
    )
    chart = Chart("Reliability", svg, list(named), numbers)
    return Section("calibration", "Calibration", [text], charts=[chart])


def _bin_rows(name: str, bins: Iterable[Bin]) -> list[list[Cell]]:
    return [
        [
            Cell(name),
            Cell(f"{b.low:.0%} to {b.high:.0%}", b.low),
            Cell(f"{b.rows:,}", b.rows),
            Cell(_percent(b.confidence), b.confidence),
            Cell(_percent(b.right), b.right),
        ]
        for b in bins
    ]


def _coverage(routing: Routing) -> Section:
    low = min(y for points in routing.curves.values() for _, y in points)
    svg = draw.chart(
        {f"by {name}": points for name, points in routing.curves.items()},
        title="Coverage: share of rows that reach their expert over the share of rows kept",
        x="rows kept",
        y="of these, routed right",
        y_range=(min(0.9, int(10 * low) / 10), 1.0),
    )
    rows = []
    for share in SHARES:
        found = [at_share(points, share) for points in routing.curves.values()]
        rows.append([Cell(_percent(share), share), *(Cell(_percent(y), y) for _, y in found)])
    numbers = Table(
        "Coverage: rows routed right among the rows kept",
        ["rows kept", *(f"by {name}" for name in routing.curves)],
        rows,
    )
    text = ["Which rows to answer? The oddest are left out first: by confidence the least certain, "
            "by novelty those most unlike the experts' own data."]  # fmt: skip
    if routing.coverage is None:
        text.append("The router takes no input for new (`--coverage 1`, or a kind that learns "
                    "nothing).")  # fmt: skip
    tables = [_taken_for_new(routing)] if routing.coverage is not None else []
    for told in routing.told:
        whole = [Cell("all"), *(Cell(_percent(v), v) for v in told.at.values())]
        tables.append(
            Table(
                f"Unseen rows noticed by {told.by}, where this share of the seen is kept",
                ["unseen task", *(_percent(share) for share in told.at)],
                [
                    [Cell(name), *(Cell(_percent(v), v, v) for v in at.values())]
                    for name, at in told.tasks.items()
                ],
                whole,
            )
        )
    chart = Chart("Accuracy over coverage", svg, [f"by {n}" for n in routing.curves], numbers)
    return Section("coverage", "Coverage and new inputs", text, tables, [chart])


def _taken_for_new(routing: Routing) -> Table:
    shares = [(name, share, "an expert's") for name, share in routing.new.items()]
    shares += [(name, share, "unseen") for name, share in routing.noticed.items()]
    return Table(
        f"Rows taken for new at the router's own threshold ({routing.coverage:.0%} coverage)",
        ["task", "", "taken for new"],
        [[Cell(n), Cell(kind), Cell(_percent(share), share, share)] for n, share, kind in shares],
    )


def _sizes(found: Found) -> Section:
    size = found.summary["bytes"]
    most = max((e["bytes"] for e in found.summary["experts"]), default=1) or 1
    rows = [
        [
            Cell(e["name"]),
            Cell(f"{e['bytes']:,}", e["bytes"], e["bytes"] / most / 2),
            Cell(_percent(e["share_of_base"]), e["share_of_base"]),
            Cell(str(e["max_rank"] or "-"), e["max_rank"]),
            *(_number(e[k]) for k in ("mean_relative_error", "mean_bound", "drift")),
        ]
        for e in found.summary["experts"]
    ]
    tips = {
        "error": "mean over matrices of |D - kept| / |D|; D: expert minus shared",
        "bound": "the least error that the rank allows",
        "drift": "how far the expert moved from the base",
    }
    columns = ["expert", "bytes", "of base", "largest rank", "error", "bound", "drift"]
    text = (
        f"Shared expert {size['shared']:,} bytes, experts {size['experts']:,}, router "
        f"{size['router']:,}; the whole folder {size['all']:,}."
    )
    return Section(
        "sizes", "Experts: bytes, ranks, errors", [text],
        [Table("What each expert keeps", columns, rows, tips=tips)],
        [_spectrum_chart(each.name, each.shape, each.values) for each in found.spectra],
    )  # fmt: skip


def _spectrum_chart(name: str, shape: tuple[int, int], values: Mapping[str, list[float]]) -> Chart:
    longest = max(len(v) for v in values.values())
    highest = max(v[0] for v in values.values())
    svg = draw.chart(
        {e: [(i + 1.0, s) for i, s in enumerate(v)] for e, v in values.items()},
        title=f"Singular values of what each expert keeps of {name}",
        x="place",
        y="singular value",
        x_range=(1.0, float(longest)),
        y_range=(0.0, 1.05 * highest or 1.0),
        percent=False,
        tips={e: [f"{e}: value {i + 1} is {s:.3g}" for i, s in enumerate(v)] for e, v in
              values.items()},
    )  # fmt: skip
    rows = [
        [
            Cell(e),
            Cell(str(len(v)), len(v)),
            *(_number(s) for s in (v[0], v[len(v) // 2], v[-1])),
        ]
        for e, v in values.items()
    ]
    caption = f"Spectrum of {name}, {shape[0]} × {shape[1]}"
    numbers = Table(caption, ["expert", "rank", "largest", "middle", "smallest"], rows)
    return Chart(caption, svg, list(values), numbers)


def _router(found: Found) -> Section:
    record = found.router
    if record is None:
        return Section("router", "The router", ["None is stored."])
    layers = tuple(record["layers"])
    facts: dict[str, Any] = {
        "kind": record["kind"],
        "reads": record["encoder"] or (layers_said(layers) if layers else "nothing"),
        "pooling": record["pooling"],
        "fitted on": f"{sum(record['rows'].values()):,} rows",
        "held out": f"{record['held_out_rows']:,} rows",
        "held out, routed right": _percent(record["held_out_accuracy"]),
        "temperature": f"{record['temperature']:.3g}",
        "sharpness": record["sharpness"],
        "seed": record["seed"],
        "bytes": f"{record['bytes']:,}",
    }
    if (novelty := record["novelty"]) is not None:
        facts["new inputs told by"] = layers_said(novelty["layers"])
        facts["coverage asked for"] = _percent(novelty["coverage"])
    text = [f"{record['said'][:1].upper()}{record['said'][1:]}."]
    if record["reason"]:
        text.append(f"Why this one: {record['reason']}.")
    text += [f"Warning: {warning}" for warning in record["warnings"]]
    tables = [Table("Facts", ["", "value"], [[Cell(k), Cell(str(v))] for k, v in facts.items()])]
    if record["tried"]:
        rows = [
            [
                Cell(each["kind"]),
                Cell(", ".join(map(str, each["layers"]))),
                Cell(each["pooling"]),
                Cell(_percent(each["accuracy"]), each["accuracy"]),
                _number(each["loss"]),
            ]
            for each in record["tried"]
        ]
        columns = ["kind", "layers", "pooling", "right", "loss"]
        tables.append(Table("Routers that were tried, on rows held out", columns, rows))
    return Section("router", "The router", text, tables)


def _number(value: float | int | None, spec: str = ".3f") -> Cell:
    return Cell("-") if value is None else Cell(format(value, spec), value)


def _percent(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.1%}".replace(".0%", "%")


# ------------------------------------------------------------------------------------ markings


def _marked(text: str) -> str:
    """HTML of a paragraph: all is escaped but our own `code` and *emphasis*."""
    from html import escape

    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([\w-]+)\*", r"<em>\1</em>", text)


def _paragraph(text: str) -> str:
    """Markdown of a paragraph: no HTML, no links."""
    text = " ".join(text.split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def _plain(text: str) -> str:
    """Markdown of text that others wrote: no marks at all."""
    return re.sub(r"([\\`*|])", r"\\\1", _paragraph(text))


def _text_table(table: Table) -> str:
    rows = [[cell.text for cell in row] for row in table.rows]
    rows += [[cell.text for cell in table.foot]] if table.foot else []
    lines = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    lines[0] = [_plain(name) for name in lines[0]]
    lines += [[_plain(text) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
