"""The README's tables of quality, from the records of a study (`studies/glue.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, Any]

SHARED = ("averaging", "task arithmetic", "TIES")
RANKS = {"averaging": (1, 4, 16, 64), "task arithmetic": (16,), "TIES": (16,)}
MAIN = ("averaging", 16)
PROTOCOLS = ("routed", "known-head", "oracle")


class Study:
    """records: part -> records"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "study.json").read_text())
        self.settings, self.provenance = about["settings"], about["provenance"]
        self.records: dict[str, list[Record]] = {}
        for line in (folder / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            self.records.setdefault(record["part"], []).append(record)
        self.own = {r["name"]: r["test"] for r in self.of("experts")}
        self.used: set[str] = set()

    def of(self, part: str) -> list[Record]:
        return [r for r in self.records.get(part, []) if "left out" not in r]

    def twin(self, shared: str, rank: int) -> dict[str, list[Record]]:
        """Protocol -> results, of every seed; only those that have been measured."""
        mine = {
            part: [
                r
                for r in self.of(part)
                if r["name"] == shared and r["settings"]["exclusive"] == {"rank": rank}
            ]
            for part in ("twin oracle", "twin routed")
        }
        self.note(*mine["twin oracle"], *mine["twin routed"])
        found = {name: [r[name] for r in mine["twin routed"]] for name in PROTOCOLS[:2]}
        return found | {"oracle": mine["twin oracle"]}

    def note(self, *records: Record) -> None:
        self.used |= {record["commit"] for record in records}


def quality(study: Study, made_with: Callable[[Record], str]) -> str | None:
    """Normalised scores under the three protocols, and what an expert costs."""
    if not study.own:
        return None
    noisy = ", ".join(study.settings["noisy"])
    lines = [
        f"| | routed | known head | oracle | oracle without {noisy} "
        "| an expert's bytes, % of base |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| the {len(study.own)} experts themselves | | | 100.0 | 100.0 | 100 |",
    ]
    static = [r for r in study.of("static") if r["name"] == "pretrained"]
    static += sorted(
        (r for r in study.of("static") if r["name"] != "pretrained"), key=lambda r: r["normalised"]
    )
    for record in static:
        study.note(record)
        lines.append(f"| {record['name']} | | {percent([record['normalised']])} | | | |")
    for shared in SHARED:
        for rank in RANKS[shared]:
            found = study.twin(shared, rank)
            if not found["oracle"]:
                continue
            scores = (percent([r["normalised"] for r in found[name]]) for name in PROTOCOLS)
            without = percent([r["normalised_without_noisy"] for r in found["oracle"]])
            share = f"{100 * found['oracle'][0]['bytes']['share']:.2g}"
            on = "" if shared == SHARED[0] else f" on {shared}"
            lines.append(
                f"| Twin-Merging{on}, rank {rank} | {' | '.join(scores)} | {without} | {share} |"
            )
    for record in study.of("better"):
        if not record["name"].startswith("kept: ") or "test" not in record:
            continue
        study.note(record)
        name, test = record["name"].removeprefix("kept: "), record["test"]
        lines.append(
            f"| Twin-Merging, {name} | | | {percent([test['normalised']])} | "
            f"{percent([test['normalised_without_noisy']])} | "
            f"{100 * record['bytes']['share']:.2g} |"
        )
    made = made_with({**study.provenance, "commit": ", ".join(sorted(study.used))})
    rows = sum(test["rows"] for test in study.own.values())
    return "\n".join(
        [
            *lines,
            "",
            f"Normalised score (mean over {len(study.own)} tasks of score / the expert's own, in %)"
            f", {rows:,} test rows, {study.settings['title']}; mean over routers of "
            "two or three seeds, ± their standard deviation. Bytes beside those "
            "of one float16 base, without the router's share. "
            f"{made}. All of it, by rank and task, with rivals at equal bytes: "
            f"[`{_place(study)}/tables.md`]({_place(study)}/tables.md), made by "
            "[`studies/glue.py`](studies/README.md).",
        ]
    )


def per_task(study: Study) -> str | None:
    """Scores by task: experts, averaging, and Twin-Merging."""
    shared, rank = MAIN
    found = study.twin(shared, rank)
    if not study.own or not all(found.values()):
        return None
    tasks = study.settings["experts"]
    lines = ["| | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]

    def line(name: str, by_task: list[dict[str, float]]) -> None:
        cells = (f"{100 * fmean(each[task] for each in by_task):.1f}" for task in tasks)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    line("experts", [{name: test["score"] for name, test in study.own.items()}])
    for record in study.of("static"):
        if record["name"] == "averaging":
            line("averaging, true head", [record["scores"]])
    for protocol in reversed(PROTOCOLS):
        name = f"Twin-Merging, rank {rank}, {protocol}"
        line(name, [result["scores"] for result in found[protocol]])
    chosen = [
        {
            name: task["chosen"][tasks.index(name)] / sum(task["chosen"])
            for name, task in record["routing"]["tasks"].items()
        }
        for record in study.of("twin routed")
        if record["name"] == shared and record["settings"]["exclusive"] == {"rank": rank}
    ]
    line("rows routed to their own expert, %", chosen)
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    """Empty for none; ± the standard deviation of several."""
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def _place(study: Study) -> str:
    return f"results/{study.folder.name}"
