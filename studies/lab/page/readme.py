"""The README's two tables of quality, from the records of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from ..records import Record
from ..twin import MAIN
from .shown import PROTOCOLS, Study, Twin, share_of
from .tables_quality import MAIN_RANK

RANKS = (1, 4, 16, 64)
"""Of the main shared expert; of the others `MAIN_RANK`."""

ORDER = tuple(reversed(PROTOCOLS))
"""What users get first."""

KEPT = "kept: "
"""What the names of the records of what is better begin with that was kept."""


def quality(folder: Path, made_with: Callable[[Record], str]) -> str | None:
    """Normalised scores under the three protocols, and what an expert costs.

    made_with: provenance -> how it is said
    """
    study = Study.of_folder(folder)
    if not study.own:
        return None
    used = [*study.of("experts"), *study.static]
    without = study.noisy and f" oracle without {study.noisy} |"
    lines = [
        f"| | routed | known head | oracle |{without} an expert's bytes, % of base |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * (1 + bool(without)),
        _line("the experts themselves", "", "", "100.0", *(["100.0"] if without else []), "100"),
    ]

    def extra(records: list[Record]) -> list[str]:
        return [_percent([r["normalised_without_noisy"] for r in records])] if without else []

    for record in sorted(study.static, key=lambda each: each["normalised"]):
        cells = ["", _percent([record["normalised"]]), "", *([""] if without else []), ""]
        lines.append(_line(record["name"], *cells))
    for twin in study.twins:
        if twin.rank not in (RANKS if twin.shared == MAIN else (MAIN_RANK,)):
            continue
        used += [*twin.results("oracle"), *twin.routed]
        scores = [_percent([r["normalised"] for r in twin.results(name)]) for name in ORDER]
        share = "" if twin.oracle is None else f"{100 * twin.oracle['bytes']['share']:.2g}"
        lines.append(_line(twin.name, *scores, *extra(twin.results("oracle")), share))
    for record in study.of("better"):
        if record["name"].startswith(KEPT) and "test" in record:
            used.append(record)
            most, way = record["settings"]["budget"], record["name"].removeprefix(KEPT)
            name = f"best found at {100 * most:.2g} %: {way}"
            cells = [_percent([record["test"]["normalised"]]), *extra([record["test"]])]
            lines.append(_line(name, "", "", *cells, f"{100 * (share_of(record) or 0):.2g}"))
    rows = sum(record["test"]["rows"] for record in study.of("experts"))
    seeds = sorted({len(twin.routed) for twin in study.twins if twin.routed})
    commits = sorted({record["commit"] for record in used})
    place = f"results/{folder.name}"
    said = (
        f"Normalised score (mean over {len(study.own)} tasks of score / the expert's own, in %), "
        f"{rows:,} test rows, {study.settings['title']}. Static merges have nothing to route: "
        "their score is with the true head. ± is the standard deviation over routers of "
        f"{' or '.join(map(str, seeds))} seeds. Bytes beside those of one float16 base, without "
        f"the router's. {made_with({**study.provenance, 'commit': ', '.join(commits)})}. By rank, "
        f"and all else that has been measured: [`{place}/tables.md`]({place}/tables.md), made by "
        "[`studies/glue.py`](studies/README.md)."
    )
    return "\n".join([*lines, "", said])


def per_task(folder: Path) -> str | None:
    """Scores by task: experts, averaging, and Twin-Merging."""
    study = Study.of_folder(folder)
    twin = _main(study)
    if twin is None or not study.own or not all(twin.results(name) for name in PROTOCOLS):
        return None
    lines = [_line("", *study.tasks), "| --- |" + " ---: |" * len(study.tasks)]

    def add(name: str, by_task: Sequence[dict[str, float]]) -> None:
        cells = [f"{100 * fmean(each[task] for each in by_task):.1f}" for task in study.tasks]
        lines.append(_line(name, *cells))

    add("experts", [study.own])
    for record in study.static:
        if record["name"] == MAIN:
            add(f"{MAIN}, true head", [record["scores"]])
    for protocol in PROTOCOLS:
        add(f"{twin.name}, {protocol}", [result["scores"] for result in twin.results(protocol)])
    chosen = [
        {
            name: task["chosen"][study.tasks.index(name)] / sum(task["chosen"])
            for name, task in record["routing"]["tasks"].items()
        }
        for record in twin.routed
    ]
    add("rows routed to their own expert, %", chosen)
    return "\n".join(lines)


def _main(study: Study) -> Twin | None:
    found = [each for each in study.twins if (each.shared, each.rank) == (MAIN, MAIN_RANK)]
    return found[0] if found else None


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(values: Sequence[float]) -> str:
    """Empty for none; ± the standard deviation of several."""
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"
