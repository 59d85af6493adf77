#!/usr/bin/env python3
"""The runtime's speed: mixed batches, rivals, routing and generation beside one plain forward.

    python benchmarks/runtime.py EXPERTS DATA --base BASE [--part grid --part decode ...]

grid     batch x tokens x experts x rank: soft (every row all experts), top-1 (every row one expert,
         other rows others), uniform (one weighting for the batch), merged (the same one again and
         again, kept merged). By default lines through the headline cell and some corners; `--full`
         for the whole grid, `--cells "experts=2,8 tokens=32"` for some of it
rivals   the headline cell beside a dense rebuild for each row (the reference code's way), each row
         sent to its own plain expert, and peft's mixed batches (`adapter_names`)
routing  route, forward, and both at every layer that a router can read; in all with top_k=1
plans    each way to run a batch, asked for by name, over the number of tokens: the break-even
decode   generation with a key-value cache: a Llama of the shape of SmolLM2-135M, random weights
wide     the headline cell, and routing at layers 0 and 2, on a model of the shape of BERT-base with
         random weights; minutes on a CPU, so not by default

Calls are timed in turn (a b c a b c ...) after one of each, and compared with one plain forward of
the same base on the same batch in the same run. Weights are new in every call but where it says
otherwise, so that no cache of merged models answers. Beside a ratio stand the bound that arithmetic
sets and the largest difference from densely merged models.

EXPERTS are real full fine-tunes. More than there are of them are copies of their files, each with
factors, biases, norms and a head of its own. Adapters are random, and so are the bases of decode
and wide.

Each part has its section in `results/runtime.json`. A run goes on where one of the same commit and
settings left off; rows say how many rounds they had. `--work FOLDER` keeps what is built of these
EXPERTS (artifacts, the router), and `--prepare` builds it and measures nothing. Pictures stand
beside the JSON file.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import plots_runtime
import torch
import typer
from runtime_bench import Bench
from runtime_cells import Cell, chosen_cells
from runtime_decode import decode
from runtime_grid import grid
from runtime_plans import plans
from runtime_results import Results
from runtime_rivals import rivals
from runtime_routing import routing
from runtime_wide import wide
from subjects import BERT_BASE, SEED, SMOL, folders
from timing import Limits


class Part(str, Enum):
    """In the order in which they run."""

    grid = "grid"
    rivals = "rivals"
    routing = "routing"
    plans = "plans"
    decode = "decode"
    wide = "wide"


def main(
    experts: Annotated[Path, typer.Argument(help="One full checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,validation}.jsonl.gz`.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    out: Annotated[Path, typer.Option()] = Path("results/runtime.json"),
    part: Annotated[list[Part] | None, typer.Option(help="Default: all but wide.")] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help='"experts=2,8 tokens=32": these instead.')
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All 144 cells of the grid.")] = False,
    headline: Annotated[str, typer.Option(help="The cell that lines run through.")] = "",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seconds: Annotated[float, typer.Option(help="For each cell, beyond 3 rounds.")] = 8.0,
    router_rows: Annotated[int, typer.Option(help="Rows per task that fit the router.")] = 300,
    work: Annotated[Path | None, typer.Option(help="Keep what is built here.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Build, do not measure.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cells, tiny decoder, 1 round.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw PNG and SVG files beside the JSON.")] = True,
) -> None:
    """Time the runtime beside a plain forward."""
    (cell,) = Cell.product(headline, Cell())
    chosen = chosen_cells(cells or [], cell, full, quick)
    parts = part or [each for each in Part if each is not Part.wide]
    limits = Limits(least=1, most=2, seconds=0.0) if quick else Limits(3, 15, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            experts,
            data,
            base,
            work or Path(scratch),
            torch.device(device),
            getattr(torch, dtype),
            cell,
            limits,
            quick,
            router_rows,
        )
        build_all(bench, parts, chosen)
        if prepare:
            return
        settings = {
            "device": device,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "seed": SEED,
            "headline": asdict(cell),
            "real_experts": [path.name for path in folders(experts)],
            "router_rows_per_task": router_rows,
        }
        results = Results(out, settings)
        run = {
            Part.grid: lambda: grid(bench, results, chosen),
            Part.plans: lambda: plans(bench, results),
            Part.rivals: lambda: rivals(bench, results),
            Part.routing: lambda: routing(bench, results),
            Part.decode: lambda: decode(bench, results),
            Part.wide: lambda: wide(bench, results),
        }
        for each in parts:
            results.begin(each.value)
            with torch.inference_mode():
                run[each]()
    if plots:
        plots_runtime.write(json.loads(out.read_text(encoding="utf-8")), out)


def build_all(bench: Bench, parts: list[Part], cells: list[Cell]) -> None:
    """Everything that the parts load, under `bench.work`."""
    if Part.grid in parts:
        for cell in cells:
            bench.artifact(cell.rank, cell.experts)
    if Part.plans in parts or Part.rivals in parts:
        bench.artifact(bench.headline.rank, bench.headline.experts)
    if Part.rivals in parts:
        bench.adapters()
    if Part.routing in parts:
        bench.routed()
    if Part.decode in parts:
        bench.adapters(SMOL)
    if Part.wide in parts:
        bench.adapters(BERT_BASE)


if __name__ == "__main__":
    typer.run(main)
