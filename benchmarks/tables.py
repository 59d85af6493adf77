#!/usr/bin/env python3
"""Fill the tables of READMEs and docs from the JSON files in `results/` and beside the adapters.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`. With `--check` nothing is written,
and the exit code is 1 if a page differs from what the results say; a test runs it so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tables_router import router_tables

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "results" / "glue-minilm"
LORA = ROOT / "examples" / "glue-lora"
sys.path.append(str(ROOT / "studies"))


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
    from lab.page import readme

    return readme.quality(STUDY, made_with) if STUDY.is_dir() else None


def per_task() -> str | None:
    """Scores by task: experts, averaging, and Twin-Merging at rank 16."""
    from lab.page import readme

    return readme.per_task(STUDY) if STUDY.is_dir() else None


def speed() -> str | None:
    """Mixed batches beside one plain forward, and beside what others do."""
    data = read("runtime")
    if data is None or not {"grid", "rivals", "routing"} <= set(data):
        return None
    headline = data["grid"]["settings"]["headline"]
    lines = [
        "| experts | every row all experts | bound | every row one expert | bound "
        "| one weighting | kept merged | largest difference |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    others = {key: value for key, value in headline.items() if key != "experts"}
    line = [row for row in data["grid"]["rows"] if others.items() <= row.items()]
    for row in sorted(line, key=lambda row: row["experts"]):
        ratio, bound = row["ratio"], row["bound"]
        lines.append(
            f"| {row['experts']} | {ratio['soft']:.2f}× | {bound['soft']:.2f}× "
            f"| {ratio['top-1']:.2f}× | {bound['top-1']:.2f}× | {ratio['uniform']:.2f}× "
            f"| {ratio['merged']:.2f}× | {max(row['largest_difference'].values()):.0e} |"
        )
    plain = next(row for row in line if row["experts"] == headline["experts"])
    by = {row["experts_are"]: row["ratio"] for row in data["rivals"]["rows"]}
    full, lora = by["full fine-tunes"], by["LoRA adapters"]
    fitted = next(row for row in data["routing"]["rows"] if row["fitted"])
    lines += [
        "",
        f"× one plain forward of the same batch ({headline['batch']} rows, {headline['tokens']} "
        f"tokens, {plain['milliseconds']['plain']:.0f} ms), rank {headline['rank']}, medians of "
        f"calls in turn. Beside it, {headline['experts']} experts: a dense model rebuilt for every "
        f"row, as the reference code does, {full['dense rebuild row by row, soft']:.1f}×; each row "
        f"sent to its own plain expert, all held in memory, "
        f"{full['own plain experts, top-1']:.2f}×; of LoRA adapters, peft's mixed batch "
        f"{lora['peft adapter_names, top-1']:.2f}×, ours {lora['twin, top-1']:.2f}×. Routing at "
        f"layer {fitted['layer']} of {fitted['layers']} adds {fitted['added']:.2f}×; routed with "
        f"`top_k=1` in all {fitted['ratio']['routed, top_k=1']:.2f}×. "
        f"{_made_by_parts(data, 'grid', 'rivals', 'routing')}",
    ]
    return "\n".join(lines)


def _made_by_parts(data: dict[str, Any], *parts: str, folder: str = "") -> str:
    """Of `results/runtime.json`, whose parts may be of several commits."""
    commits = sorted({data[part]["commit"] for part in parts})
    made = made_with({**data["provenance"], "commit": ", ".join(commits)})
    return f"{made}. From [`results/runtime.json`]({folder}results/runtime.json)."


def plans() -> str | None:
    """Each way to run a batch over its number of tokens: where one becomes cheaper."""
    data = read("runtime")
    return None if data is None or not data.get("plans", {}).get("rows") else plans_table(data)


def plans_table(data: dict[str, Any]) -> str:
    columns = {
        "all experts: stacked": ("soft", "stacked"),
        "one expert: stacked": ("top-1", "stacked"),
        "one expert: selected": ("top-1", "selected"),
        "one expert: split": ("top-1", "split"),
        "one weighting: factors": ("uniform", "stacked"),
        "one weighting: uniform": ("uniform", "uniform"),
        "one weighting: merged anew": ("uniform", "merged"),
    }
    rows = data["plans"]["rows"]
    ratio = {(row["weights"], row["tokens"]): row["ratio"] for row in rows}
    tokens = sorted({row["tokens"] for row in rows})
    batch, experts = rows[0]["batch"], rows[0]["experts"]
    lines = [
        "| tokens in a row | " + " | ".join(columns) + " |",
        "| ---: |" + " ---: |" * len(columns),
    ]
    for each in tokens:
        found = (ratio.get((weights, each), {}).get(way) for weights, way in columns.values())
        cells = ["" if value is None else f"{value:.2f}×" for value in found]
        lines.append(f"| {each} | " + " | ".join(cells) + " |")

    def since(kind: str, way: str, times: int) -> str:
        """From how many tokens on `way` costs less than stacked factors."""
        mine = {t: ratio[kind, t] for t in tokens if way in ratio.get((kind, t), {})}
        won = [times * t for t, found in mine.items() if found[way] < found["stacked"]]
        lost = [times * t for t in mine if times * t not in won]
        if not won or not lost:
            return "everywhere here" if won else "nowhere here"
        return (
            f"from {max(lost)} to {min(won)} tokens on"
            if max(lost) < min(won)
            else "here and there"
        )

    merging = rows[0]["predicted_break_even"]
    rank = data["plans"]["settings"]["headline"]["rank"]
    lines += [
        "",
        f"× one plain forward of the same batch: {batch} rows, {experts} experts, rank {rank}. "
        f"Merging anew for one batch costs less than its factors "
        f"{since('uniform', 'merged', batch)}, counted over its rows (arithmetic: {merging:.0f}); "
        f"selecting less than stacking "
        f"{since('top-1', 'selected', 1)}, in each row. "
        f"{_made_by_parts(data, 'plans', folder='../')}",
    ]
    return "\n".join(lines)


def grouped() -> str | None:
    """The paper's grouped variant beside the exact mixed batch."""
    data = read("grouped")
    return None if data is None else grouped_table(data)


def grouped_table(data: dict[str, Any]) -> str:
    exact = data["ways"][0]
    lines = [
        "| | dense merges | routed | known head | same class as exact, % | weight error, mean "
        "| weight error, most | s per 1,000 rows | × exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def seconds(total: float) -> str:
        return f"{1000 * total / data['rows']:.1f} | {total / exact['seconds']['total']:.2f}"

    plain = data["experts"]["seconds"]
    lines.append(f"| own plain expert, told which | 0 | | 100.0 | | | | {seconds(plain)} |")
    for way in data["ways"]:
        by = way["protocols"]
        lost = way["loss"]
        name, merges, error = "exact: each row its own weights", "0", "100.0 | 0 | 0"
        if lost is not None:
            what = " by logits" if way["by"] == "logits" else ""
            name, merges = f"grouped{what}, {way['groups']} in a bin", str(lost["merges"])
            error = (
                f"{percent(lost['agreement'])} | {lost['weight_error_mean']:.4f} | "
                f"{lost['weight_error_largest']:.3f}"
            )
        lines.append(
            f"| {name} | {merges} | {percent(by['routed']['normalised'])} | "
            f"{percent(by['known-head']['normalised'])} | {error} | "
            f"{seconds(way['seconds']['total'])} |"
        )
    settings = data["settings"]
    of = settings["title"] or f"{len(settings['experts'])} experts"
    lines += [
        "",
        f"Normalised scores in %, {data['rows']:,} {settings['split']} rows of all tasks as one "
        f"mixed set, {of}, rank {settings['rank']}, seed {settings['seed']}, one run of each way. "
        "The error is the distance between a row's weights and its group's. "
        f"{made_with(data['provenance'])}. From "
        "[`results/grouped.json`](../results/grouped.json).",
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


def router() -> str | None:
    data = read("router")
    return None if data is None else router_tables(data, made_with(data["provenance"]))


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
    "plans": plans,
    "grouped": grouped,
    "building": building,
    "svd": svd,
    "lora": lora,
    "router": router,
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
    pages = ("README.md", "docs/running.md", "docs/grouped.md", "docs/router.md")
    pages += ("examples/glue-lora/README.md",)
    for page in (ROOT / name for name in pages):
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
