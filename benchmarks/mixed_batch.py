#!/usr/bin/env python3
"""A mixed batch against one plain forward, and against merging densely row by row.

    python benchmarks/mixed_batch.py EXPERTS DATA --base BASE

Builds the experts at a rank, fits the router, then times in turn, on the same batch (by default 32
rows of 8 tasks, 64 tokens each):

- plain:       one forward of the base's task model, no routing: the bound
- forward:     the twin model with weights given
- routed:      route, then forward: what a user calls
- row by row:  route, then merge each row's own model densely and run the row alone, as the
               reference code does: W_s + Σ_t w_t v_t over dense v_t that are held in memory
- row by row, factors: the same, but with the sums made from factors, which is cheaper

Writes medians, ratios to plain and the largest difference to `results/mixed_batch.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from twinmerge.data import encode, read_tasks, text_of
from twinmerge.evaluation.provenance import provenance
from twinmerge.evaluation.tasks import task_for
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load
from twinmerge.runtime.router.fit import fit_router


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn (a b c a b c ...), after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def full_batch(model, data: Path, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """`rows` rows of all tasks in turn, each exactly `tokens` long (texts of one task joined)."""
    found, _ = read_tasks(data, model.experts, "validation")
    per_task = -(-rows // len(model.experts))
    texts = []
    for number in range(per_task):
        for name in model.experts:
            columns = task_for(name, None).columns
            parts = [text_of(row, columns) for row in found[name][number * 40 : number * 40 + 40]]
            texts.append((" ".join(" ".join(part) for part in parts),))
    encoded = encode(model.tokenizer, texts[:rows], tokens)
    lengths = {len(row["input_ids"]) for row in encoded.rows}
    assert lengths == {tokens}, f"rows of {lengths} tokens"
    return {k: torch.tensor([row[k] for row in encoded.rows]) for k in encoded.rows[0]}


class DenseSums:
    """The reference code's way: every expert's dense difference in memory, summed for each row."""

    def __init__(self, model) -> None:
        self._merge = DenseMerge(model)
        experts = len(model.experts)
        vectors: list[dict[str, torch.Tensor]] = []
        for one in torch.eye(experts):
            self._merge.at(one)
            now = {name: p.clone() for name, p in self._merge.targets.items()}
            vectors.append({name: p - self._merge.shared[name] for name, p in now.items()})
        self._vectors = vectors

    def at(self, weights: torch.Tensor):
        for name, target in self._merge.targets.items():
            total = self._merge.shared[name].clone()
            for weight, vector in zip(weights.tolist(), self._vectors, strict=True):
                total += weight * vector[name]
            target.copy_(total)
        return self._merge.with_head(weights)


@torch.inference_mode()
def measure(model, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    plain_merge, dense = DenseMerge(model), DenseMerge(model)
    reference = DenseSums(model)
    plain = plain_merge.at(torch.zeros(len(model.experts)), head=model.experts[0])
    weights = model.route(**batch)
    rows = len(weights)

    def row_by_row(dense: DenseMerge | DenseSums) -> list[torch.Tensor]:
        out = []
        for row, own in enumerate(model.route(**batch)):
            single = {key: value[row : row + 1] for key, value in batch.items()}
            out.append(dense.at(own)(**single).logits[0])
        return out

    seconds = timed(
        {
            "plain": lambda: plain(**batch),
            "forward": lambda: model(**batch, weights=weights),
            "routed": lambda: model(**batch),
            "row by row": lambda: row_by_row(reference),
            "row by row, factors": lambda: row_by_row(dense),
        },
        repeats,
    )
    mixed = model(**batch)
    difference = max(
        float((mixed.logits[row, : len(alone)] - alone).abs().max())
        for row, alone in enumerate(row_by_row(dense))
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": rows,
        "tokens": batch["input_ids"].shape[1],
        "experts": len(model.experts),
        "tasks_in_batch": len(set(mixed.expert.tolist())),
        "largest_weight_mean": float(weights.max(dim=-1).values.mean()),
        "router_layer": model.router_layer,
        "layers": model.features.layers,
        "milliseconds": {name: 1000 * value for name, value in middle.items()},
        "ratio_to_plain": {name: value / middle["plain"] for name, value in middle.items()},
        "times_faster_than_row_by_row": middle["row by row"] / middle["routed"],
        "largest_difference": difference,
        "all_milliseconds": {name: [1000 * v for v in vs] for name, vs in seconds.items()},
    }


def main(
    experts: Annotated[Path, typer.Argument(help="One checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,validation}.jsonl.gz`.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    out: Annotated[Path, typer.Option()] = Path("results/mixed_batch.json"),
    rank: Annotated[list[int] | None, typer.Option(help="Default: 1, 8 and 16.")] = None,
    rows: Annotated[int, typer.Option()] = 32,
    tokens: Annotated[int, typer.Option()] = 64,
    repeats: Annotated[int, typer.Option()] = 15,
    router_rows: Annotated[int, typer.Option(help="Rows per task that fit the router.")] = 300,
) -> None:
    """Time a mixed batch against one plain forward of the same model."""
    names = sorted(p.name for p in experts.iterdir() if p.is_dir())
    results: dict[str, Any] = {"provenance": provenance(), "runs": []}
    for each in rank or [1, 8, 16]:
        recipe = Recipe.model_validate(
            {
                "base_model": base,
                "models": [{"model": str(experts / name), "name": name} for name in names],
                "exclusive": {"rank": each},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "artifact"
            build(recipe, target)
            found, _ = read_tasks(data, names, "train")
            texts = {
                name: [text_of(row, task_for(name, None).columns) for row in table]
                for name, table in found.items()
            }
            fit_router(target, texts, Router(rows_per_task=router_rows), max_tokens=96)
            model = load(target)
            run = measure(model, full_batch(model, data, rows, tokens), repeats)
        results["runs"].append({"rank": each} | run)
        shown = {name: f"{value:.2f}×" for name, value in run["ratio_to_plain"].items()}
        typer.echo(f"rank {each}: {shown}, difference {run['largest_difference']:.1e}")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
