"""Forwards of cells, soft, top-1, uniform and merged, in turn with one plain forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from runtime_bench import Bench
from runtime_cells import Cell
from runtime_results import Results, progress, shown
from subjects import Batch, answer, difference, row
from timing import bounds, in_turn

from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.model import TwinModel


def grid(bench: Bench, results: Results, cells: list[Cell]) -> None:
    cells = [Cell(**key) for key in results.missing("grid", map(asdict, cells))]
    if not cells:
        return
    plain = bench.plain(bench.load(bench.artifact(cells[0].rank)))
    with progress("grid", len(cells)) as advance:
        for (experts, rank), group in groupby(cells, key=lambda cell: (cell.experts, cell.rank)):
            twin = bench.load(bench.artifact(rank, experts))
            dense = DenseMerge(twin)
            for cell in group:
                batch = bench.batch(twin, cell)
                found = forward_cell(bench, twin, dense, plain, batch)
                results.add("grid", asdict(cell) | found)
                advance(f"{cell}: {shown(found['ratio'])}")
            del twin, dense  # before the next is read


def forward_cell(
    bench: Bench, twin: TwinModel, dense: DenseMerge, plain: Any, batch: Batch
) -> dict[str, Any]:
    """All modes on one batch: times, bounds, differences."""
    rows = len(batch["input_ids"])
    modes = bench.weightings(rows, len(twin.experts)).modes()
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
    calls |= {name: mode.calls(twin, batch) for name, mode in modes.items()}
    found = in_turn(calls, bench.limits, bench.device)
    differences, plans = {}, {}
    for name, mode in modes.items():
        weights = mode.weights[0]
        output = twin(**batch, weights=weights, plan=mode.plan)
        plans[name] = output.plan
        differences[name] = 0.0
        for index in sorted({0, rows - 1}):
            own = weights if weights.ndim == 1 else weights[index]
            alone = answer(dense.at(own)(**row(batch, index)))[0]
            each = difference(answer(output)[index], alone)
            differences[name] = max(differences[name], each)
    return found | {
        "plan": plans,
        "bound": bounds(plain, batch, twin.manifest),
        "largest_difference": differences,
    }
