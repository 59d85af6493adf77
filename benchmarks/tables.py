#!/usr/bin/env python3
"""Fill the tables of the READMEs from the JSON files in `results/` and beside the adapters.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`. With `--check` nothing is written,
and the exit code is 1 if the README differs from what the results say; a test runs it so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twinmerge.evaluation.study import STATIC, TWIN

ROOT = Path(__file__).parent.parent
LORA = ROOT / "examples" / "glue-lora"


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def made_with(provenance: dict[str, Any]) -> str:
    versions, hardware = provenance["versions"], provenance["hardware"]
    return (
        f"{hardware['processor']}, {hardware['threads']} of {hardware['cores']} cores; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; commit "
        f"{provenance['commit']}"
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def quality() -> str | None:
    """Normalised scores of all methods under the three protocols."""
    data = read("glue-minilm")
    if data is None:
        return None
    settings, noisy = data["settings"], ", ".join(data["settings"]["noisy"])
    lines = [
        "| | routed | known head | oracle | oracle without "
        f"{noisy} | extra bytes, % of base | build, s | time of a routed row, × plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| the eight experts themselves | | | 100.0 | 100.0 | 700.0 | | 1.00 |",
    ]
    order = [name for name in (*STATIC, *TWIN) if name in data["rows"]]
    for name in order:
        row = data["rows"][name]
        by = row["protocols"]
        size = row["bytes"]
        extra = (size["experts"] + size["router"]) / size["base"]
        routed = by["routed"]
        seconds = row["seconds_per_1000_rows"]
        slower = seconds["routed"] / seconds["plain"]
        lines.append(
            f"| {name} | {percent(routed['normalised'])} | "
            f"{percent(by['known-head']['normalised'])} | {percent(by['oracle']['normalised'])} | "
            f"{percent(by['oracle']['normalised_without_noisy'])} | {percent(extra)} | "
            f"{row['build_seconds']:.1f} | {slower:.2f} |"
        )
    rows = sum(expert["test"]["rows"] for expert in data["experts"].values())
    accuracy = {
        name: row["protocols"]["routed"]["routing_accuracy"] for name, row in data["rows"].items()
    }
    layer = {name: row["router"]["layer"] for name, row in data["rows"].items()}
    main = "Twin-Merging, rank 16"
    plain = data["rows"][main]["seconds_per_1000_rows"]["plain"]
    lines += [
        "",
        f"Normalised score (mean over eight tasks of score / the expert's own score, in %), "
        f"{rows:,} test rows, {settings['title']}. Routing accuracy of the averaged shared expert "
        f"{percent(accuracy[main])} % (layer {layer[main]}). A plain model takes {plain:.1f} s per "
        f"1,000 rows. Seeds 0. {made_with(data['provenance'])}. "
        "From [`results/glue-minilm.json`](results/glue-minilm.json).",
    ]
    return "\n".join(lines)


def per_task() -> str | None:
    """Scores by task: experts, averaging, and Twin-Merging at rank 16."""
    data = read("glue-minilm")
    if data is None:
        return None
    tasks = data["settings"]["experts"]
    lines = ["| | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
    experts = [f"{100 * data['experts'][task]['test']['score']:.1f}" for task in tasks]
    lines.append("| experts | " + " | ".join(experts) + " |")
    for name, protocol in (
        ("averaging", "oracle"),
        ("Twin-Merging, rank 16", "oracle"),
        ("Twin-Merging, rank 16", "known-head"),
        ("Twin-Merging, rank 16", "routed"),
    ):
        found = data["rows"][name]["protocols"][protocol]["tasks"]
        cells = [f"{100 * found[task]['score']:.1f}" for task in tasks]
        shown = "true head" if name == "averaging" else protocol
        lines.append(f"| {name}, {shown} | " + " | ".join(cells) + " |")
    right = data["rows"]["Twin-Merging, rank 16"]["protocols"]["routed"]["tasks"]
    cells = [f"{100 * right[task]['routing_accuracy']:.1f}" for task in tasks]
    lines.append("| rows routed to their own expert, % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed() -> str | None:
    """A mixed batch beside one plain forward."""
    data = read("mixed_batch")
    if data is None:
        return None
    lines = [
        "| rank | forward, weights given | routed: route + forward | row by row, dense | "
        "faster than row by row | largest difference |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in data["runs"]:
        ratio = run["ratio_to_plain"]
        lines.append(
            f"| {run['rank']} | {ratio['forward']:.2f}× | {ratio['routed']:.2f}× | "
            f"{ratio['row by row']:.1f}× | {run['times_faster_than_row_by_row']:.1f}× | "
            f"{run['largest_difference']:.0e} |"
        )
    run = data["runs"][0]
    layers = " or ".join(dict.fromkeys(str(r["router_layer"]) for r in data["runs"]))
    lines += [
        "",
        f"{run['rows']} rows of {run['experts']} experts, {run['tokens']} tokens, all with soft "
        f"weights; × one plain forward of the same batch ({run['milliseconds']['plain']:.0f} ms), "
        f"medians of one run. The router reads layer {layers} of {run['layers']}. "
        f"{made_with(data['provenance'])}. From "
        "[`results/mixed_batch.json`](results/mixed_batch.json).",
    ]
    return "\n".join(lines)


def building() -> str | None:
    """Time and memory of builds beside their bounds, mergekit's, and what a budget gains."""
    data = read("build")
    if data is None or "linear" not in data:
        return None
    parts = [make(data[key]["rows"]) for key, make in _BUILDING.items() if key in data]
    commits = sorted({data[key]["commit"] for key in _BUILDING if key in data})
    made = made_with({**data["provenance"], "commit": ", ".join(commits)})
    return "\n".join([*parts, "", f"{made}. From [`results/build.json`](results/build.json)."])


def megabytes(amount: float) -> str:
    return f"{amount / 1e6:.0f}"


def _merges(rows: list[dict[str, Any]], title: str) -> str:
    """Families of any size, merged without factors."""
    lines = [
        "| merge of three experts | base, GB | read + write, s | twinmerge, s | × read + write "
        "| mergekit, s | peak, MB | (T + 2) × largest, MB | mergekit's peak, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        runs = row["runs"]
        theirs = runs.get("mergekit")
        lines.append(
            f"| {row['method']}, {row['dtype']} | {row['model_bytes'] / 1e9:.2f} | "
            f"{runs['read and write']['seconds']:.2f} | {runs['twinmerge']['seconds']:.2f} | "
            f"{row['ratio_to_read_and_write']:.2f} | "
            f"{theirs['seconds'] if theirs else float('nan'):.2f} | "
            f"{megabytes(runs['twinmerge']['peak_memory_bytes'])} | "
            f"{megabytes(row['memory_bound_bytes'])} | "
            f"{megabytes(theirs['peak_memory_bytes']) if theirs else ''} |"
        )
    most = max(row["beyond_memory_bound_bytes"] for row in rows)
    beside = (
        f"up to {megabytes(most)} MB above" if most > 0 else f"at least {megabytes(-most)} MB below"
    )
    differ = [row["largest_difference"] for row in rows if "largest_difference" in row]
    note = [
        f"{title} Medians of {len(rows[0]['runs']['twinmerge']['all_seconds'])} runs in turn, "
        f"sources in memory; the peak of what no file backs lies {beside} (T + 2) × the largest "
        "tensor."
    ]
    if differ:
        note.append(f"The largest difference to mergekit's weights is {max(differ):.0e}.")
    cold = [row["runs"] for row in rows if "twinmerge cold" in row["runs"]]
    if cold:
        last = cold[-1] if len(cold) < 4 else cold[3]
        spent = [
            f"{last[name]['seconds']:.1f} s ({name.removesuffix(' cold')})"
            for name in ("read and write cold", "twinmerge cold", "mergekit cold")
            if name in last
        ]
        index = rows.index(next(row for row in rows if row["runs"] is last))
        note.append(
            f"From the disk, {rows[index]['model_bytes'] / 1e9:.2f} GB: {', '.join(spent)}."
        )
    return "\n".join([*lines, "", " ".join(note), ""])


def _real(row: dict[str, Any]) -> str:
    """Factors of real experts."""
    runs = row["runs"]
    return (
        f"Rank {row['rank']} factors of {row['experts']} real experts "
        f"({row['bytes_read']:,} bytes read, {row['bytes_written']:,} written) take "
        f"{runs['twinmerge']['seconds']:.2f} s, without factors "
        f"{runs['without factors']['seconds']:.2f} s; only reading and writing as many bytes takes "
        f"{runs['read and write']['seconds']:.2f} s. Peak memory "
        f"{megabytes(runs['twinmerge']['peak_memory_bytes'])} MB; (T + 2) × the largest tensor is "
        f"{megabytes(row['memory_bound_bytes'])} MB.\n"
    )


def _budgets(rows: list[dict[str, Any]]) -> str:
    """What spending a budget where it buys most gains over one rank for all matrices."""
    amounts = list(dict.fromkeys(row["budget"] for row in rows))
    lines = [
        "| relative error: budget spent / one rank for all | " + " | ".join(amounts) + " |",
        "| --- |" + " ---: |" * len(amounts),
    ]
    for storage in dict.fromkeys(row["dtype"] for row in rows):
        mine = {row["budget"]: row for row in rows if row["dtype"] == storage}
        cells = [
            f"{mine[a]['error']:.3f} / {mine[a]['even_error']:.3f}" if a in mine else ""
            for a in amounts
        ]
        lines.append(f"| factors as {storage} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", "The same experts, budgets in % of the shared expert's bytes, each.", ""]
    )


_BUILDING = {
    "linear": lambda rows: _merges(rows, "A linear merge without factors."),
    "methods": lambda rows: _merges(rows, "Other methods."),
    "experts": _real,
    "budget": _budgets,
}


def lora() -> str:
    """Scores of the bundled adapters."""
    scores = [json.loads(p.read_text()) for p in sorted(LORA.glob("experts/*/score.json"))]
    lines = [
        "| task | validation | test | test rows | train rows | epochs | learning rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {s['task']} | {s['validation_score']:.4f} | {s['test_score']:.4f} | "
        f"{s['test_rows']:,} | {s['train_rows']:,} | {s['epochs']} | {s['learning_rate']} |"
        for s in scores
    ]
    return "\n".join(lines)


def svd() -> str | None:
    """The truncated SVD beside the exact one."""
    data = read("svd")
    if data is None:
        return None
    rows = [row for row in data["svd"] if row["rank"] == 16 and row["threads"] == 1]
    lines = [
        "| rank 16 of | exact, ms | truncated, ms | times faster | excess error, most "
        "| its own bound, most |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        mine = [row for row in rows if tuple(row["shape"]) == shape]
        faster = sorted(row["ratio"] for row in mine)
        excess = max(row["excess_error"] or 0.0 for row in mine)
        bounds = [row["excess_bound"] for row in mine if row["excess_error"] is not None]
        lines.append(
            f"| {shape[0]} × {shape[1]}, {len(mine)} spectra "
            f"| {_span(1e3 * row['exact_seconds']['wall'] for row in mine)} "
            f"| {_span(1e3 * row['seconds']['wall'] for row in mine)} "
            f"| {faster[0]:.0f} to {faster[-1]:.0f} | {100 * excess:.2f} % "
            f"| {100 * max(bounds):.2f} % |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "From Gaussian noise to steep spectra, and differences of real experts; the error is "
            "that of the product, relative to the Eckart-Young optimum. Spectra whose remainder is "
            f"float32 rounding have no excess to speak of. {made_with(data['provenance'])}. From "
            "[`results/svd.json`](results/svd.json).",
        ]
    )


def _span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.1f} to {ordered[-1]:.1f}"


TABLES = {
    "quality": quality,
    "per-task": per_task,
    "speed": speed,
    "building": building,
    "svd": svd,
    "lora": lora,
}


def filled(text: str) -> str:
    for name, make in TABLES.items():
        table = make()
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if table is not None:
            text = pattern.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def main() -> int:
    stale = 0
    for page in (ROOT / "README.md", LORA / "README.md"):
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if before != after:
            stale = 1
            if "--check" in sys.argv[1:]:
                print(f"{page.name} differs from the results: run python benchmarks/tables.py")
            else:
                page.write_text(after, encoding="utf-8")
    return stale if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    raise SystemExit(main())
