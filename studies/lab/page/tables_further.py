"""Tables beyond the main one: more and unseen tasks, the router, groups, cost, what we tried.

Each function makes one section; it has no tables where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from twinmerge.evaluation.report.page import Cell

from ..records import Record
from ..twin import MAIN
from .shown import (
    LEFT_OUT,
    NOTHING,
    PROTOCOLS,
    ROUTED,
    Section,
    Study,
    Table,
    at_most,
    grouped_said,
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
from .tables_quality import SHARE, SHARE_TIP, TIPS, WITH_ROUTER

TWIN = "Twin-Merging"

HEAD = ("part", "name", "settings", "commit")
"""Of every record."""


def more_tasks(study: Study) -> Section:
    """The paper's Figure 4: one line for each set of tasks."""
    records = study.of("tasks")
    static = [n for n in dict.fromkeys(record["name"] for record in records) if n != TWIN]
    columns = ["tasks", "added", *(f"{name}, known-head" for name in static)]
    columns += [*(f"{TWIN}, {name}" for name in PROTOCOLS), "routed right", SHARE]
    columns += [WITH_ROUTER, "all bytes"]
    rows, before = [], list[str]()
    for names in task_sets(study):
        mine = [record for record in records if record["settings"]["names"] == names]
        twins = [record for record in mine if record["name"] == TWIN]
        added = [name for name in names if name not in before]
        before = names
        cells = [Cell(str(len(names)), len(names)), Cell(", ".join(added))]
        for name in static:
            cells.append(spread([r["known-head"]["normalised"] for r in mine if r["name"] == name]))
        for name in PROTOCOLS:
            cells.append(spread([r[name]["normalised"] for r in twins if name in r]))
        cells.append(spread([record.get("routing accuracy") for record in twins]))
        with_bytes = next((record for record in twins if "bytes" in record), None)
        everything = NOTHING if with_bytes is None else number(all_bytes(with_bytes))
        cells += [share(share_of(with_bytes)), share(share_with_router(with_bytes, len(names)))]
        rows.append([*cells, everything])
    results = [r[name] for r in records for name in PROTOCOLS if name in r]
    twin = study.of("tasks", TWIN)
    caption = (
        f"Normalised scores, %, by number of tasks, {rows_said(results)} of the test split. "
        f"All bytes: shared expert, experts and router of Twin-Merging, in {stored(twin)}"
        if rows else ""
    )  # fmt: skip
    tables = [Table(caption, columns, rows, tips=TIPS)] if rows else []
    if rows:
        methods = [*static, *([TWIN] if study.of("tasks", TWIN) else [])]
        made = []
        for names in task_sets(study):
            mine = [record for record in records if record["settings"]["names"] == names]
            cells = [Cell(str(len(names)), len(names))]
            for method in methods:
                kinds = dict.fromkeys(
                    settings_said(r, "names", "method") for r in mine if r["name"] == method
                )
                cells.append(Cell(" or ".join(kinds)) if kinds else NOTHING)
            made.append(cells)
        caption = "Settings of these; coefficients chosen anew on validation rows of the tasks"
        tables.append(Table(caption, ["tasks", *methods], made))
    return Section("more", "More tasks", [], tables)


def task_sets(study: Study) -> list[list[str]]:
    """The sets of tasks that were merged, from few to many."""
    found: list[list[str]] = []
    for record in study.of("tasks"):
        if record["settings"]["names"] not in found:
            found.append(record["settings"]["names"])
    return sorted(found, key=len)


def all_bytes(record: Record, *, router: bool = True) -> int:
    parts = ("shared", "experts", *(["router"] if router else []))
    return sum(record["bytes"][name] for name in parts)


def unseen(study: Study) -> Section:
    """The paper's Table 5."""
    records = study.of("unseen")
    sets = _different(record["settings"]["left_out"] for record in records)
    methods = list(dict.fromkeys(record["name"] for record in records))

    def of(method: str, left_out: list[str]) -> list[Record]:
        return [r for r in records if (r["name"], r["settings"]["left_out"]) == (method, left_out)]

    columns = ["method", *(" + ".join(left_out) for left_out in sets)]
    rows = [
        [Cell(method), *(spread([r["mean"] for r in of(method, each)]) for each in sets)]
        for method in methods
    ]
    tables = []
    if rows:
        caption = (
            "Mean score (not normalised, × 100) on test rows of tasks whose experts were left out "
            "of the merge, under these tasks' own heads; coefficients chosen on validation rows of "
            "the tasks that remain"
        )
        tables.append(Table(caption, columns, rows))
    for left_out in sets:
        if len(left_out) > 1:
            by_task = [
                [Cell(m), *(score(fmean(r["scores"][t] for r in found)) for t in left_out)]
                for m in methods
                if (found := of(m, left_out))
            ]
            title = f"Scores by task where {' + '.join(left_out)} are left out, test rows"
            tables.append(Table(title, ["method", *left_out], by_task))
    routed = [record for record in records if "weights" in record]
    if routed:
        found = {
            f"{task} ({record['name']}, without {' + '.join(record['settings']['left_out'])})": (
                weights,
                record.get("new"),
            )
            for record in routed
            for task, weights in record["weights"].items()
        }
        tables.append(_weights("Mean weights on tasks left out", found, study.tasks))
    return Section("unseen", "Unseen tasks", [], tables)


def _different(sets: Iterable[list[str]]) -> list[list[str]]:
    found: list[list[str]] = []
    for each in sets:
        if each not in found:
            found.append(each)
    return found


def routing(study: Study) -> Section:
    """The paper's Figure 5, who is taken for whom, and what is said of each router."""
    tables = _routers(study)
    if (record := main_routing(study)) is not None:
        names, seed = list(record["routing"]["tasks"]), record["settings"]["seed"]
        on = f"router of seed {seed}, shared expert by {record['name']}, test rows"
        found = {
            task: (dict(zip(names, each["weights"], strict=True)), each["new"])
            for task, each in record["routing"]["tasks"].items()
        }
        caption = f"Mean weights by task (rows) and expert (columns); {on}"
        tables.append(_weights(caption, found, names))
        rows = []
        for place, (task, each) in enumerate(record["routing"]["tasks"].items()):
            total = sum(each["chosen"])
            cells = [Cell(f"{n:,}", n, n / total) for n in each["chosen"]]
            rows.append([Cell(task), *cells, percent(each["chosen"][place] / total)])
        caption = f"Rows by task and the expert found likeliest; {on}"
        tables.append(Table(caption, ["task", *names, "right, %"], rows))
    few = study.of("routing")
    if few:
        found = {
            f"{r['name']}, of {' + '.join(r['settings']['names'])}": (r["weights"], r["new"])
            for r in few
        }
        caption = "Mean weights of a task's test rows where only some experts are there"
        tables.append(_weights(caption, found, study.tasks))
    return Section("routing", "The router", [], tables)


def main_routing(study: Study) -> Record | None:
    """The first record that says what the router did, of the main shared expert if there is one."""
    records = study.of("twin routed", MAIN) or study.of("twin routed")
    return min(records, key=lambda record: record["settings"]["seed"], default=None)


def _routers(study: Study) -> list[Table]:
    rows, seen = [], set[tuple[str, int]]()
    for record in study.of("twin routed"):
        key = record["name"], record["settings"]["seed"]
        if key in seen:  # another rank has the same router
            continue
        seen.add(key)
        router = record["router"]
        cells = [Cell(record["name"]), number(key[1]), Cell(router["kind"])]
        cells += [Cell(said(router["layers"])), percent(record["routing"]["accuracy"])]
        cells += [percent(router["held_out_accuracy"]), number(router["calibration_error"])]
        rows.append([*cells, *(number(router[n]) for n in ("temperature", "sharpness", "bytes"))])
    columns = ["shared expert", "seed", "kind", "layers", "right on test, %", "right held out, %"]
    columns += ["calibration error", "temperature", "sharpness", "bytes"]
    caption = (
        "Routers, learned from train rows; held out are rows of the train split, and what else "
        "is said was settled on them"
    )
    return [Table(caption, columns, rows)] if rows else []


def _weights(
    caption: str, found: Mapping[str, tuple[Mapping[str, float], float | None]], names: list[str]
) -> Table:
    """found: line -> weights by expert, share of rows taken for new"""
    rows = []
    for line, (weights, new) in found.items():
        cells = [
            Cell(f"{weights[n]:.2f}", weights[n], weights[n]) if n in weights else NOTHING
            for n in names
        ]
        rows.append([Cell(line), *cells, percent(new)])
    return Table(caption, ["task", *names, "taken for new, %"], rows)


def grouped(study: Study) -> Section:
    """The paper's Table 12."""
    rows = []
    for record in study.of("grouped"):
        reports, loss = record["protocols"], record["loss"]
        cells = [Cell(grouped_said(record)), *(percent(reports[n]["normalised"]) for n in ROUTED)]
        cells += [number(record["seconds"]["total"])]
        if loss is None:
            rows.append([*cells, *[NOTHING] * 4])
            continue
        cells += [number(loss["merges"]), number(loss["weight_error_mean"])]
        cells += [percent(loss["agreement"]), number(loss["value_difference_mean"])]
        rows.append(cells)
    columns = ["way", *ROUTED, "seconds", "merges", "weights off by", "same class, %"]
    columns += ["values off by"]
    tips = {
        "seconds": "wall time for all rows under routed",
        "weights off by": "distance between a row's weights and its group's, mean",
        "same class, %": "rows of classifiers with the class that they get exactly",
        "values off by": "of regressions, from the exact value, mean",
    }
    reports = [report for r in study.of("grouped") for report in r["protocols"].values()]
    counts = [{"rows": {n: t["rows"] for n, t in r["tasks"].items()}} for r in reports]
    caption = (
        f"Normalised scores, %, and time, {rows_said(counts)} of the test split as one mixed set; "
        "nothing is chosen" if rows else ""
    )  # fmt: skip
    tables = [Table(caption, columns, rows, tips=tips)] if rows else []
    return Section("grouped", "The grouped variant", [], tables)


def cost(study: Study) -> Section:
    """The paper's Tables 7 and 12 and its Appendix E: numbers by name, as recorded.

    An entry `said` of a record tells what its other entries are.
    """
    tables, text = [], ["Numbers as recorded; times are of the machine named above."]
    for record in study.of("cost"):
        entries = {k: v for k, v in record.items() if k not in (*HEAD, "said")}
        single = {k: v for k, v in entries.items() if not isinstance(v, Mapping)}
        parts = {k: v for k, v in entries.items() if k not in single}
        title = ": ".join(filter(None, (record["name"], settings_said(record))))
        text.append(f"{title}.")
        for name, values in (parts | ({title: single} if single else {})).items():
            caption = ". ".join(
                filter(None, (name, record.get("said", {}).get(name, "").rstrip(".")))
            )
            rows = [[Cell(each), number(value)] for each, value in _flat(values)]
            tables.append(Table(caption, ["what", "value"], rows))
    return Section("cost", "Cost", text, tables)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} / ")
        else:
            yield f"{before}{name}", value


def paths(study: Study) -> Section:
    """Appendix A: adapters, and the full checkpoints that they make, give one merge."""
    tables = []
    for record in study.of("paths"):
        columns = ["task", *next(iter(record["logits"].values()))]
        rows = [
            [Cell(task), *(number(each[name]) for name in columns[1:])]
            for task, each in record["logits"].items()
        ]
        caption = (
            "Largest differences of logits between a merge of adapters and one of the full "
            f"checkpoints that they make, on validation rows; {settings_said(record)}. The shared "
            f"experts differ by {record['shared']:.2g} of their norm at most"
        )
        tables.append(Table(caption, columns, rows))
    return Section("paths", "Adapters and full checkpoints", [], tables)


def better(study: Study) -> Section:
    """What was tried beyond the paper, and what was kept, beside the paper's own cut.

    Records with test rows are named `<why>: <way>`; the way's own record has no test rows.
    """
    records = study.of("better")
    tried = [record for record in records if "test" not in record]
    scored = [record for record in records if "test" in record]
    larger = any("largest" in record["bytes"] for record in records)

    def sizes(record: Record) -> list[Cell]:
        largest = [number(record["bytes"].get("largest"))] if larger else []
        return [share(share_of(record)), *largest]

    sized = [SHARE, *(["largest expert, bytes"] if larger else [])]
    tables = []
    if tried:
        rows = [
            [*_way(record, record["name"]), *sizes(record),
             percent(record["validation"]["normalised"])]
            for record in tried
        ]  # fmt: skip
        where = rows_said([record["validation"] for record in tried])
        limit = at_most(study.settings.get("better_rows"))
        caption = (
            f"Normalised scores, %, oracle: all that was tried, {where}: "
            f"{limit} validation rows of each, which choose. "
            f"Factors and vectors are stored as said, the shared expert in {stored(tried)}"
        )
        columns = ["what was tried", "budget, % of base", "settings", *sized, "validation"]
        tables.append(Table(caption, columns, rows, tips={SHARE: SHARE_TIP}))
    if scored:
        rows = []
        for record in scored:
            why, _, name = record["name"].partition(": ")
            what, budget, settings = _way(record, name)
            cells = [Cell(why), budget, what, settings, *sizes(record)]
            cells += [percent(record[split]["normalised"]) for split in ("validation", "test")]
            rows.append(cells)
        caption = (
            "Normalised scores, %, oracle: what validation rows kept at each budget, and the "
            f"paper's own cut, {rows_said([r['test'] for r in scored])} of the test split"
        )
        columns = ["", "budget, % of base", "way", "settings", *sized, "validation", "test"]
        tables.append(Table(caption, columns, rows, tips={SHARE: SHARE_TIP}))
    if left := study.left_out("better"):
        rows = [[*_way(record, record["name"]), Cell(record[LEFT_OUT])] for record in left]
        columns = ["what was left out", "budget, % of base", "settings", "why"]
        tables.append(Table("Ways left out, and why", columns, rows))
    return Section("better", "Better than the paper", [], tables)


def _way(record: Record, name: str) -> list[Cell]:
    budget = record["settings"]["budget"]
    return [Cell(name), Cell(f"{100 * budget:.3g}", budget), Cell(settings_said(record, "budget"))]
