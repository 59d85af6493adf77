#!/usr/bin/env python3
"""Every router on the same rows: how often right, how sure, what its answers are worth, its cost.

    python benchmarks/router.py EXPERTS DATA --base BASE --unseen OTHER --unseen MORE [--quick]

Builds the experts at a rank, reads every feature of train, test and unseen rows once, and fits each
kind of router on 16, 100, 400 and 1,000 train rows of each task, as `fit-router` does it. Then

- grid:   routing accuracy, calibration error and loss on test rows; normalised scores with all
          weight on the likeliest expert; rows of unseen tasks that are noticed where 95 % of the
          calibration rows are not
- scores: normalised scores under the three protocols with the weights that the router gives
- odd:    shuffled, empty, very long, foreign, mixed and adversarial input
- time:   seconds to fit, and to route, beside a plain forward

Results go to `results/router.json` as they come; a second run goes on. Test rows and unseen rows
choose nothing: what a router reads, its temperature, sharpness and threshold come from train rows.
"""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from router_bench import COVERAGE, Bench
from router_grid import grid
from router_odd import odd
from router_results import Results
from router_scores import scores
from router_time import timed
from subjects import folders


class Part(str, Enum):
    grid = "grid"
    scores = "scores"
    odd = "odd"
    time = "time"


def main(
    experts: Annotated[Path, typer.Argument(help="One checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,test}.jsonl.gz`.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    unseen: Annotated[
        list[Path] | None,
        typer.Option(help="`<task>/test.jsonl.gz` of tasks that no expert saw; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option()] = Path("results/router.json"),
    work: Annotated[Path | None, typer.Option(help="Where the artifact goes.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Default: all.")] = None,
    rows: Annotated[int, typer.Option(help="Test rows of each task, at most.")] = 1001,
    train_rows: Annotated[int, typer.Option(help="Train rows of each task.")] = 1000,
    rank: Annotated[int, typer.Option()] = 16,
    max_tokens: Annotated[int, typer.Option()] = 96,
    seconds: Annotated[float, typer.Option(help="Of timing.")] = 30.0,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few settings.")] = False,
) -> None:
    settings = {
        "rows": rows,
        "drawn_with_seed": 0,
        "train_rows": train_rows,
        "rank": rank,
        "max_tokens": max_tokens,
        "coverage": COVERAGE,
        "unseen": {each.name: [task.name for task in folders(each)] for each in unseen or ()},
    }
    results = Results(out, settings, data)
    parts = part or list(Part)
    with tempfile.TemporaryDirectory() as temporary:
        place = work or Path(temporary)
        bench = Bench(experts, data, unseen or (), base, place, rows, train_rows, settings)
        if Part.grid in parts:
            grid(bench, results, quick)
        if Part.scores in parts:
            scores(bench, results)
        if Part.odd in parts:
            odd(bench, results)
        if Part.time in parts:
            timed(bench, results, seconds)


if __name__ == "__main__":
    typer.run(main)
