"""Each way to run a batch, asked for by name, over the number of tokens: the break-even."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runtime_bench import Bench
from runtime_results import Results, progress, shown
from runtime_weightings import Mode
from subjects import moved, random_batch
from timing import in_turn

from twinmerge.runtime.cost import plan_costs

PLAN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


def plans(bench: Bench, results: Results) -> None:
    """One row per number of tokens and kind of weights; each way that is exact for them."""
    cell = bench.headline
    tokens = (4, 8) if bench.quick else PLAN_TOKENS
    kinds = {"soft": ("stacked",), "top-1": ("stacked", "selected", "split")}
    kinds["uniform"] = ("stacked", "uniform", "merged")
    keys = [{"weights": kind, "tokens": each} for kind in kinds for each in tokens]
    todo = results.missing("plans", keys)
    if not todo:
        return
    twin = bench.load(bench.artifact(cell.rank, cell.experts))
    plain = bench.plain(twin)
    modes = bench.weightings(cell.batch, cell.experts).modes()
    with progress("plans", len(todo)) as advance:
        for key in todo:
            texts = random_batch(plain.config.vocab_size, cell.batch, key["tokens"])
            batch, weights = moved(texts, bench.device), modes[key["weights"]].weights
            calls: dict[str, Callable[[], Any]] = {"plain": lambda batch=batch: plain(**batch)}
            calls |= {way: Mode(weights, way).calls(twin, batch) for way in kinds[key["weights"]]}
            found = in_turn(
                calls, replace(bench.limits, seconds=bench.limits.seconds / 5), bench.device
            )
            row = {"chosen": twin(**batch, weights=weights[0]).plan}
            row |= {"predicted_break_even": plan_costs(twin).break_even}
            results.add("plans", key | {"batch": cell.batch, "experts": cell.experts} | row | found)
            advance(f"{key}: {shown(found['ratio'])}")
