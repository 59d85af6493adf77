"""The headline cell and routing on a model of the shape of BERT-base with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runtime_bench import Bench
from runtime_grid import forward_cell
from runtime_results import Results, progress, shown
from runtime_routing import at_layer
from subjects import BERT_BASE, moved, random_batch
from timing import in_turn

from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.router.mlp import RouterMLP
from twinmerge.runtime.router.router import Router


def wide(bench: Bench, results: Results) -> None:
    """The headline cell on a twelve-layer model of width 768."""
    cell = bench.headline
    if not results.missing("wide", [asdict(cell)]):
        return
    with progress("wide", 1) as advance:
        twin = bench.load(bench.adapters(BERT_BASE).artifact)
        plain, dense = bench.plain(twin), DenseMerge(twin)
        vocabulary = plain.config.vocab_size
        batch = moved(random_batch(vocabulary, cell.batch, cell.tokens), bench.device)
        found = forward_cell(bench, twin, dense, plain, batch)
        # What a router chooses does not matter here, that it chooses one expert for each row does.
        width = plain.config.hidden_size
        twin.router = Router(RouterMLP(width, width, cell.experts), (0,)).to(bench.device).eval()
        calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
        for layer in (0, 2):
            calls[f"route {layer}"] = at_layer(
                twin, layer, lambda: twin.route(allowed=None, **batch)
            )
            calls[f"routed {layer}, top_k=1"] = at_layer(
                twin, layer, lambda: twin(**batch, top_k=1)
            )
        in_all = in_turn(calls, bench.limits, bench.device)
        sizes = {"layers": twin.features.layers, "width": width}
        results.add("wide", asdict(cell) | sizes | found | {"routing": in_all})
        advance(f"{cell}: {shown(found['ratio'])}")
