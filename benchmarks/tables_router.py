"""The tables of docs/router.md, from results/router.json."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

Rows = list[dict[str, Any]]
SIZES = (16, 100, 400, 1000)


def router_tables(data: dict[str, Any], made_with: str) -> str:
    settings = data["settings"]
    parts = [
        f"Eight full fine-tunes of all-MiniLM-L6-v2 on GLUE, rank {settings['rank']}, "
        f"{settings['rows']} test rows of each task at most, {settings['max_tokens']} tokens. "
        f"{made_with}."
    ]
    if earlier := data.get("earlier"):
        parts[0] += f" At commit {earlier['commit']}: {earlier['rows']}."
    parts += [accuracy(data["grid"])] if data.get("grid") else []
    parts += [top(data["grid"])] if any("top" in row for row in data.get("grid", ())) else []
    parts += [scores(data["scores"])] if data.get("scores") else []
    parts += [unseen(data["grid"], settings)] if data.get("grid") else []
    parts += [odd(data["odd"], settings["coverage"])] if data.get("odd") else []
    parts += [seconds(data["time"][0])] if data.get("time") else []
    return "\n\n".join(parts)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def accuracy(grid: Rows) -> str:
    """By kind and what it reads, against rows per task."""
    lines = [
        "**Routing accuracy** on test rows, %, and expected calibration error in brackets, by rows "
        "per task; the mean of the seeds where there are several:",
        "",
        "| router | " + " | ".join(map(str, SIZES)) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for name in dict.fromkeys(row["name"] for row in grid):
        own = [row for row in grid if row["name"] == name]
        if {row["rows"] for row in own} & set(SIZES):
            cells = [_cell([r for r in own if r["rows"] == size]) for size in SIZES]
        else:
            cells = [_cell(own), "", "", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Rows) -> str:
    if not rows:
        return ""
    right, error = (fmean(row[key] for row in rows) for key in ("accuracy", "calibration_error"))
    return f"{percent(right)} ({error:.3f})"


def top(grid: Rows) -> str:
    """Normalised scores by kind and what it reads, against rows per task."""
    lines = [
        "**Normalised score** with all weight on the likeliest expert, known head / routed, %, by "
        "rows per task; the mean of the seeds where there are several. What the router's own "
        "weights and its fallback make of it is in the next table:",
        "",
        "| router | " + " | ".join(map(str, SIZES)) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    scored = [row for row in grid if "top" in row]
    for name in dict.fromkeys(row["name"] for row in scored):
        own = [row for row in scored if row["name"] == name]
        if {row["rows"] for row in own} & set(SIZES):
            cells = [_both([r for r in own if r["rows"] == size]) for size in SIZES]
        else:
            cells = [_both(own), "", "", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _both(rows: Rows) -> str:
    if not rows:
        return ""
    return " / ".join(
        percent(fmean(row["top"][protocol]["normalised"] for row in rows))
        for protocol in ("known-head", "routed")
    )


def scores(rows: Rows) -> str:
    """Normalised scores of what each router's weights answer."""
    by_name = {row["name"]: row for row in rows}
    oracle, shared = by_name["oracle"], by_name["shared"]
    apart = ("cola", "qnli", "qqp", "sst2")
    own = {task: each["score"] / each["expert"] for task, each in oracle["tasks"].items()}
    lines = [
        "**Normalised score**, %: the mean over tasks of score / the expert's own score. The four "
        "tasks whose inputs can be told from all others' are cola, qnli, qqp and sst2; the other "
        "four share sources.",
        "",
        "| router | known head | known head, those four | routed | taken for new, % | sharpness |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| oracle: the true expert | {percent(oracle['normalised'])} | "
        f"{percent(fmean(own[t] for t in apart))} | | | |",
        f"| the shared expert alone | {percent(shared['normalised'])} | | | | |",
    ]
    for row in rows:
        if "known-head" in row:
            known, routed = row["known-head"], row["routed"]
            lines.append(
                f"| {row['name']} | {percent(known['normalised'])} | "
                f"{percent(known['normalised_apart'])} | {percent(routed['normalised'])} | "
                f"{percent(row['new'])} | {row['sharpness']} |"
            )
    return "\n".join(lines)


def unseen(grid: Rows, settings: dict[str, Any]) -> str:
    """What is noticed of tasks that no expert saw."""
    chosen = [
        row
        for row in grid
        if row["name"] == "prototype, auto" and row["rows"] == 1000 and row.get("unseen")
    ]
    if not chosen:
        return ""
    lines = [
        f"**Unseen tasks**: rows that are noticed, %, where {settings['coverage']:.0%} of the "
        "calibration rows are not (1,000 rows a task, mean of the seeds). Of the seen tasks' test "
        f"rows {percent(fmean(row['coverage'] for row in chosen))} % pass.",
        "",
    ]
    for tasks in settings["unseen"].values():
        found = [fmean(row["unseen"][task] for row in chosen) for task in tasks]
        lines += [
            "| " + " | ".join(tasks) + " | mean |",
            "|" + " ---: |" * (len(tasks) + 1),
            "| " + " | ".join(map(percent, [*found, fmean(found)])) + " |",
            "",
        ]
    lines += [
        "Accuracy of the routed expert on the share of seen test rows that is kept, by what is "
        "dropped first:",
        "",
        "| kept, % | " + " | ".join(f"{100 * p['kept']:.0f}" for p in chosen[0]["curve"]) + " |",
        "| --- |" + " ---: |" * len(chosen[0]["curve"]),
    ]
    for how, key in (("the newest", "by_novelty"), ("the least confident", "by_confidence")):
        points = zip(*(row["curve"] for row in chosen), strict=True)
        cells = [percent(fmean(p[key] for p in each)) for each in points]
        lines.append(f"| {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def odd(rows: Rows, coverage: float) -> str:
    lines = [
        f"**Odd input** (prototype, 1,000 rows a task, {coverage:.0%} coverage):",
        "",
        "| input | rows | routed right, % | mean confidence | taken for new, % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        right = "" if row["right"] is None else percent(row["right"])
        lines.append(
            f"| {row['name']} | {row['rows']} | {right} | {row['confidence']:.2f} | "
            f"{percent(row['new'])} |"
        )
    return "\n".join(lines)


def seconds(row: dict[str, Any]) -> str:
    lines = [
        f"**Cost to route** a batch of {row['rows']} rows of {row['tokens']} tokens, × a plain "
        "forward of it (the bound of a router that reads layer k of 6 is k / 6):",
        "",
        "| router | × plain |",
        "| --- | ---: |",
    ]
    lines += [f"| {name} | {ratio:.2f} |" for name, ratio in _ratios(row) if name != "plain"]
    return "\n".join(lines)


def _ratios(row: dict[str, Any]) -> Iterable[tuple[str, float]]:
    return row["ratio"].items()
