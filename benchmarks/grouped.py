#!/usr/bin/env python3
"""The paper's grouped variant, an approximation, beside the exact mixed batch on the same rows.

    python benchmarks/grouped.py EXPERTS DATA --base BASE [--rows N] [--groups 1,5,20,100]

Builds the experts at a rank, fits the router on train rows, then answers test rows of all tasks as
one mixed set:

- experts:  every row by its own plain expert, told which: the bound
- exact:    every row with its own weights, in mixed batches of 32
- grouped:  bins by highest weight, KMeans in each, one dense merge for each cluster; by the
            weights, and for `--logits-groups` by their logarithms

Writes scores under `routed` and `known-head`, seconds, weight errors and agreement to
`results/grouped.json`. Test rows choose nothing: every number of groups is shown.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from tables import grouped_table

from twinmerge.data import drawn, read_tasks, text_of
from twinmerge.errors import InputError
from twinmerge.evaluation.grouped import compare_grouped
from twinmerge.evaluation.provenance import provenance
from twinmerge.evaluation.reference import expert_model, score_plain
from twinmerge.evaluation.score import prepare
from twinmerge.evaluation.tasks import task_for
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.grouped import By
from twinmerge.runtime.load import load
from twinmerge.runtime.router.fit import fit_router


def numbers(text: str) -> list[int]:
    """`1,5,20` as integers."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{text!r}: expected integers with commas between them.") from None


def main(
    experts: Annotated[Path, typer.Argument(help="One checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,test}.jsonl.gz`.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    out: Annotated[Path, typer.Option()] = Path("results/grouped.json"),
    rows: Annotated[int | None, typer.Option(help="Rows per task; default: all.")] = None,
    groups: Annotated[str, typer.Option(help="Groups in each bin.")] = "1,5,20,100",
    logits_groups: Annotated[str, typer.Option(help="The same, clustered by logits.")] = "20",
    split: Annotated[str, typer.Option()] = "test",
    rank: Annotated[int, typer.Option()] = 16,
    router_rows: Annotated[int, typer.Option(help="Train rows per task for the router.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Longer rows are cut.")] = 96,
    title: Annotated[str, typer.Option(help="What the experts are, for the table.")] = "",
) -> None:
    """Exact mixed batches and the paper's grouped variant on the same rows."""
    ways: list[tuple[int, By]] = [(number, "weights") for number in numbers(groups)]
    ways.extend((number, "logits") for number in numbers(logits_groups))
    names = sorted(path.name for path in experts.iterdir() if path.is_dir())
    recipe = Recipe.model_validate(
        {
            "base_model": base,
            "models": [{"model": str(experts / name), "name": name} for name in names],
            "exclusive": {"rank": rank},
        }
    )
    results: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {
            "title": title,
            "experts": names,
            "rank": rank,
            "split": split,
            "rows": rows,
            "router_rows": router_rows,
            "max_tokens": max_tokens,
            "seed": 0,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "artifact"
        build(recipe, target)
        found, _ = read_tasks(data, names, "train")
        texts = {
            name: [text_of(row, task_for(name, None).columns) for row in table]
            for name, table in found.items()
        }
        router = fit_router(target, texts, Router(rows_per_task=router_rows), max_tokens=max_tokens)
        model = load(target)
        found, _ = read_tasks(data, names, split)
        tasks = prepare(
            model,
            {name: drawn(table, rows) for name, table in found.items()},
            max_tokens=max_tokens,
        )
        reference, seconds = {}, 0.0
        for name, task in tasks.items():
            expert = expert_model(model, name, recipe)
            started = time.perf_counter()
            reference[name] = score_plain(model, expert, name, task).score
            seconds += time.perf_counter() - started
        compared = compare_grouped(model, tasks, ways, reference=reference)
    results["router"] = {"reads": router.said, "held_out_accuracy": router.held_out_accuracy}
    results["experts"] = {"seconds": seconds, "scores": reference}
    results["rows"] = sum(len(task.encoded) for task in tasks.values())
    results["ways"] = [way.to_dict() for way in compared]
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(grouped_table(results))


if __name__ == "__main__":
    typer.run(main)
