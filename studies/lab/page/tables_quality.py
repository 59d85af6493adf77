"""Tables of how good merges are: experts, static and twin, per task, ablation, bytes, the paper's.

Each function makes one section; it has no tables where nothing was measured.
"""

from __future__ import annotations

from math import sqrt
from statistics import fmean

from twinmerge.evaluation.report.page import Cell

from ..records import Record
from ..twin import MAIN
from .published import PUBLISHED, Published
from .shown import (
    LEFT_OUT,
    NEEDS,
    NOTHING,
    PROTOCOLS,
    Section,
    Study,
    Table,
    Twin,
    grouped_said,
    needs,
    number,
    percent,
    rows_said,
    said,
    score,
    settings_said,
    share,
    share_of,
    share_with_router,
    spread,
    stored,
)

MAIN_RANK = 16
"""Of the rows that stand for Twin-Merging beside its smallest and its largest rank."""

SHARE = "bytes of an expert, % of base"
SHARE_TIP = (
    "mean over experts of all that is stored of one, without a router, in the bytes of one float16 "
    "base model"
)
WITH_ROUTER = "with its part of the router, % of base"
WITH_ROUTER_TIP = "the same, and of the router's bytes one part of as many as there are experts"
TIPS = {SHARE: SHARE_TIP, WITH_ROUTER: WITH_ROUTER_TIP}


def experts(study: Study) -> Section:
    records = study.of("experts")
    rows = []
    for record in records:
        test = record["test"]
        error = NOTHING
        if test["metric"] == "accuracy":
            error = score(sqrt(test["score"] * (1 - test["score"]) / test["rows"]))
        cells = [Cell(record["name"]), Cell(test["metric"])]
        for split in ("validation", "test"):
            cells += [score(record[split]["score"]), number(record[split]["rows"])]
        rows.append([*cells, error])
    columns = ["task", "metric", "validation", "validation rows", "test", "test rows", "± of test"]
    tips = {"± of test": "standard error of an accuracy from its rows: √(score (1 - score) / rows)"}
    caption = (
        "Each expert alone on its own task: the 100 % of all normalised scores. Validation rows "
        "choose, test rows score"
    )
    text = [
        "`± of test` is the standard error of an accuracy that so many rows give. Records hold no "
        "single answers, so of other metrics, and of the normalised mean, none can be told. All "
        "methods are scored on the same rows: differences between them are mostly surer than that."
    ]
    tables = [Table(caption, columns, rows, tips=tips)] if rows else []
    return Section("experts", "Expert quality", text, tables)


def merges(study: Study) -> Section:
    """The paper's Tables 2, 8 (averages) and 11."""
    static, twins = study.static, study.twins
    noisy = [f"{name}, without {study.noisy}" for name in PROTOCOLS] if study.noisy else []
    columns = ["method", *PROTOCOLS, *noisy, "seeds", SHARE, WITH_ROUTER]
    rows = []
    for record in static:
        keys = ["normalised", *(["normalised_without_noisy"] if noisy else [])]
        cells = [Cell(record["name"])]
        for key in keys:
            cells += [NOTHING, percent(record[key]), NOTHING]
        rows.append([*cells, NOTHING, NOTHING, NOTHING])
    for twin in twins:
        cells = [Cell(twin.name)]
        for key in ["normalised", *(["normalised_without_noisy"] if noisy else [])]:
            cells += [spread([r[key] for r in twin.results(name)]) for name in PROTOCOLS]
        seeds = number(len(twin.routed)) if twin.routed else NOTHING
        rows.append([*cells, seeds, share(twin.share("oracle")), share(twin.share("routed"))])
    results = [*static, *(r for t in twins for name in PROTOCOLS for r in t.results(name))]
    text = [
        "*oracle*: all weight on the true expert, its head: the ceiling of the compression. "
        "*known-head*: the true task's head, routed weights; a static merge has no weights to "
        "route, so its true head is all there is to know. *routed*: nothing is known of a row. "
        "The paper's protocol is *known-head* with the true task's biases too.",
        "Under *routed*, a row that another task's head answers counts as no answer. For accuracy "
        "that is a wrong one, for a regression the mean of the answered rows. For Matthews' "
        f"correlation and F1{_third_class(study)} it is a third class, which costs less than the "
        "opposite answer would.",
        "± is the standard deviation over routers of other seeds, on the same rows; it is not "
        "the error that other rows would bring.",
    ]
    tables = []
    if rows:
        caption = (
            f"Normalised scores, % (mean over tasks of score / its expert's), {rows_said(results)}"
            " of the test split. Coefficients chosen on validation rows, routers learned from "
            "train rows, ranks as said"
        )
        if twins:
            kind = stored(study.twin_records)
            caption += f". Bytes are of {kind} storage; known-head and routed need the router's too"
        notes = [study.gaps] if study.gaps else []
        if unscored := study.unscored:
            notes.append(
                "No test record of the coefficients that are best on validation rows: "
                f"{'; '.join(unscored)}."
            )
        tables.append(Table(caption, columns, rows, tips=TIPS, notes=notes))
    tables += _choices(study)
    return Section("merges", "Static merges and Twin-Merging", text, tables)


def _third_class(study: Study) -> str:
    tasks = [
        record["name"]
        for record in study.of("experts")
        if any(kind in record["test"]["metric"] for kind in ("matthews", "f1"))
    ]
    return f" ({', '.join(tasks)})" if tasks else ""


def _choices(study: Study) -> list[Table]:
    """What validation rows chose for static merges."""
    rows, tried = [], study.of("choice")
    for name in dict.fromkeys(record["name"] for record in tried):
        mine = study.of("choice", name)
        if (best := study.chosen(name)) is not None:
            cells = [Cell(name), Cell(settings_said(best, "method"))]
            rows.append([*cells, percent(best["normalised"]), number(len(mine))])
    if not rows:
        return []
    caption = (
        "Coefficients with the best normalised score, %, on validation rows; known-head, "
        f"{rows_said(tried)}"
    )
    return [Table(caption, ["method", "chosen", "normalised, validation", "tried"], rows)]


def per_task(study: Study) -> Section:
    """The paper's Table 8."""
    found: list[tuple[str, list[Record]]] = [(r["name"], [r]) for r in study.static]
    for twin in _main(study):
        for name in PROTOCOLS:
            if results := twin.results(name):
                found.append((f"{twin.name}, {name}", results))
    if not found:
        return Section("tasks", "By task", [])
    tasks = study.tasks
    means = [
        (name, {t: fmean(r["scores"][t] for r in results) for t in tasks})
        for name, results in found
    ]
    where = f"{rows_said([r for _, results in found for r in results])} of the test split"
    chosen = (
        "static merges known-head, their coefficients chosen on validation rows; known-head and "
        "routed are means over the routers' seeds"
    )
    scores = [[Cell(n), *(score(v[t]) for t in tasks), score(fmean(v.values()))] for n, v in means]
    own = study.own
    tables = []
    if own.keys() >= set(tasks):
        mean = score(fmean(own[t] for t in tasks))
        scores.insert(0, [Cell("expert"), *(score(own[t]) for t in tasks), mean])
        shares = [
            [Cell(n), *(percent(v[t] / own[t]) for t in tasks),
             percent(fmean(v[t] / own[t] for t in tasks))] for n, v in means
        ]  # fmt: skip
        caption = f"Share of the expert's own score, %, {where}; {chosen}"
        tables.append(Table(caption, ["method", *tasks, "mean"], shares))
    tables.insert(0, Table(f"Scores, {where}; {chosen}", ["method", *tasks, "mean"], scores))
    return Section("tasks", "By task", [], tables)


def _main(study: Study) -> list[Twin]:
    mine = [twin for twin in study.twins if twin.shared == MAIN]
    ranks = sorted(twin.rank for twin in mine)
    kept = {*ranks[:1], *ranks[-1:], MAIN_RANK}
    return [twin for twin in mine if twin.rank in kept]


def ablation(study: Study) -> Section:
    """The paper's Table 6."""
    protocols = ["shared", *PROTOCOLS]
    records = study.of("ablation")
    rows = [
        [
            Cell(record["name"]),
            *(percent(_normalised(record, name)) for name in protocols),
            share(share_of(record)),
            share(share_with_router(record, len(study.tasks))),
        ]
        for record in records
    ]
    alone = dynamic(study)
    if len(alone) > 1:
        means = [
            percent(fmean(values)) if (values := [v for v in found if v is not None]) else NOTHING
            for found in ([_normalised(record, name) for record in alone] for name in protocols)
        ]
        rows.append([Cell(f"dynamic, mean of these {len(alone)}"), *means, NOTHING, NOTHING])
    results = [record[name] for record in records for name in protocols if name in record]
    text = [
        "*dynamic on* an expert: what the others know beyond it is added to it, instead of to a "
        "shared expert. *shared*: a static merge, true heads."
    ]
    caption = (
        f"Normalised scores, %, {rows_said(results)} of the test split; nothing is chosen: the "
        f"shared expert is the average, and {_ranks(records)}; bytes of {stored(records)} storage"
        if results else ""
    )  # fmt: skip
    columns = ["what is there", *protocols, SHARE, WITH_ROUTER]
    tables = [Table(caption, columns, rows, tips=TIPS)] if rows else []
    return Section("ablation", "Ablation", text, tables)


def dynamic(study: Study) -> list[Record]:
    """Exclusive knowledge on one expert: as many records as experts were tried."""
    return [record for record in study.of("ablation") if record["name"].startswith("dynamic on ")]


def _normalised(record: Record, protocol: str) -> float | None:
    return record[protocol]["normalised"] if protocol in record else None


def _ranks(records: list[Record]) -> str:
    kept = [record["settings"]["exclusive"] for record in records]
    ranks = sorted({each["rank"] for each in kept if each})
    return f"exclusive knowledge has rank {', '.join(map(str, ranks))}" if ranks else "no more"


def compression(study: Study) -> Section:
    """The paper's Figure 6."""
    records = study.compressed
    rows = []
    for record in records:
        exclusive = dict(record["settings"]["exclusive"])
        dtype = exclusive.pop("dtype", "")
        cells = [Cell(said(exclusive)), Cell(dtype), share(share_of(record))]
        cells += [number(record["bytes"]["experts"]), percent(record["normalised"])]
        if study.noisy:
            cells.append(percent(record["normalised_without_noisy"]))
        rows.append(cells)
    columns = ["kept of each expert", "stored as", SHARE, "bytes of all experts", "oracle"]
    columns += [f"oracle, without {study.noisy}"] if study.noisy else []
    on = ", ".join(dict.fromkeys(record["name"] for record in records))
    caption = (
        f"Normalised scores, %, oracle, {rows_said(records)} of the test split; shared expert "
        f"by {on}, in {stored(records)}; nothing is chosen. Bytes are those of experts alone"
        if rows else ""
    )  # fmt: skip
    tables = [Table(caption, columns, rows, tips={SHARE: SHARE_TIP})] if rows else []
    if left := study.left_out("twin oracle"):
        rows = [
            [Cell(f"{r['name']}, {said(r['settings']['exclusive'])}"), Cell(r[LEFT_OUT])]
            for r in left
        ]
        tables.append(Table("Cuts left out, and why", ["shared expert, kept", "why"], rows))
    return Section("compression", "Compression", [], tables)


def rivals(study: Study) -> Section:
    """Other ways to keep what an expert knows, among ours, by bytes."""
    records = study.of("rival")
    if not records:
        return Section("rivals", "Rivals at equal bytes", [])
    lines: list[tuple[float | None, list[Cell]]] = []
    for record in records:
        name = ", ".join(filter(None, (record["name"], settings_said(record))))
        lines.append(
            (
                share_of(record),
                [
                    Cell(f"{name} (our implementation)"),
                    Cell(record["source"]),
                    Cell(needs(record)),
                    Cell(record["protocol"]),
                    *_both(study, [record]),
                ],
            )
        )
    for twin in (twin for twin in study.twins if twin.shared == MAIN and twin.oracle):
        for protocol in PROTOCOLS:
            if results := twin.results(protocol):
                cells = [Cell(twin.name), Cell("this project"), Cell(NEEDS[protocol])]
                cells += [Cell(protocol), *_both(study, results)]
                lines.append((twin.share(protocol), cells))
    for record in study.compressed:
        exclusive = record["settings"]["exclusive"]
        if exclusive.keys() == {"rank", "dtype"} and exclusive["dtype"].startswith("int"):
            cells = [Cell(f"Twin-Merging on {record['name']}, {said(exclusive)}")]
            cells += [Cell("this project"), Cell(NEEDS["oracle"]), Cell("oracle")]
            lines.append((share_of(record), [*cells, *_both(study, [record])]))
    lines.sort(key=lambda line: line[0] or 0.0)
    columns = ["method", "source", "needs the task id", "protocol", "normalised"]
    columns += [f"without {study.noisy}"] if study.noisy else []
    rows = [[*cells, share(place)] for place, cells in lines]
    caption = (
        f"Normalised scores, %, by bytes, {rows_said(records)} of the test split; "
        "± over the routers' seeds. Settings with a choice were chosen on validation rows. Bytes "
        f"of ours are of {stored(study.twin_records)} storage where no other dtype is said"
    )
    text = [
        "Rivals are our implementation from their papers, not their authors' code. The bytes are "
        "those of one expert, with its part of all that its protocol needs beside one model: our "
        "router under known-head and routed, SMILE's gate, a tensor of the base's size. Under "
        "oracle no router is needed, and none is counted."
    ]
    tip = f"{SHARE_TIP}; of known-head and routed rows, with the expert's part of the router"
    tables = [Table(caption, [*columns, SHARE], rows, tips={SHARE: tip})]
    if tried := study.of("rival choice"):
        caption = (
            "What was tried for rivals, normalised scores, %, on validation rows; "
            f"{rows_said(tried)}. What was chosen stands above, with the test score"
        )
        rows = [[Cell(r["name"]), Cell(settings_said(r)), percent(r["normalised"])] for r in tried]
        tables.append(Table(caption, ["method", "tried", "normalised, validation"], rows))
    return Section("rivals", "Rivals at equal bytes", text, tables)


def _both(study: Study, results: list[Record]) -> list[Cell]:
    keys = ["normalised", *(["normalised_without_noisy"] if study.noisy else [])]
    return [spread([result[key] for result in results]) for key in keys]


def paper(study: Study) -> Section:
    """The paper's numbers beside what comes nearest of ours."""
    rows = []
    for line in PUBLISHED:
        name, value = _beside(study, line)
        cells = [Cell(line.method), Cell(line.tables), Cell(f"{line.score:.2f}", line.score)]
        rows.append([*cells, value, Cell(name)])
    text = [
        "Another backbone (RoBERTa-base), other experts, rows and bytes: order and size of gaps "
        "can be compared, numbers cannot. The paper's protocol is the true task's head and, in "
        "its reference code, the true task's biases too; ours is *known-head*: the true head "
        "alone. Its Tables 2 and 8 give two averages the other way round; both are shown."
    ]
    if rank := common_rank(study):
        text.append(
            "Where the paper's row says no rank, ours is the largest at which all of our shared "
            f"experts that were routed were, {rank}."
        )
    columns = ["the paper's row", "its tables", "paper", "ours, known-head", "ours is"]
    caption = "Normalised scores, %: as printed in arXiv:2406.15479, and ours on test rows"
    measured = any(row[3] is not NOTHING for row in rows)
    tables = [Table(caption, columns, rows)] if measured else []
    return Section("paper", "Beside the paper's numbers", text, tables)


def common_rank(study: Study) -> int | None:
    """The largest rank at which all shared experts that have been routed have been."""
    ranks: dict[str, set[int]] = {}
    for twin in study.twins:
        if twin.routed:
            ranks.setdefault(twin.shared, set()).add(twin.rank)
    return max(set.intersection(*ranks.values()), default=None) if ranks else None


def _beside(study: Study, line: Published) -> tuple[str, Cell]:
    """Our name of a published row, and our score."""
    if line.part == "static":
        values = [r["normalised"] for r in study.static if r["name"] == line.name]
        return line.name if values else "", spread(values)
    if line.part == "twin":
        rank = line.rank or common_rank(study)
        for twin in study.twins:
            if (twin.shared, twin.rank) == (line.name, rank) and twin.routed:
                results = twin.results("known-head")
                return twin.name, spread([result["normalised"] for result in results])
        return "", NOTHING
    if line.part == "ablation":
        records = dynamic(study) if line.name == "dynamic" else study.of("ablation", line.name)
        name = f"mean of {len(records)} experts" if line.name == "dynamic" else line.name
        values = [_normalised(record, "known-head") for record in records]
        known = [value for value in values if value is not None]
        return name if known else "", percent(fmean(known)) if known else NOTHING
    for record in study.of("grouped"):
        groups = record["settings"]["groups"]
        if line.name == ("exact" if groups is None else str(groups)):
            value = record["protocols"]["known-head"]["normalised"]
            return f"Twin-Merging, {grouped_said(record)}", percent(value)
    return "", NOTHING
