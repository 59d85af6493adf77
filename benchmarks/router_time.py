"""Seconds to route, beside a plain forward of the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from router_bench import Bench
from router_results import Results
from subjects import real_batch
from timing import Limits, in_turn

from twinmerge.recipe import Router
from twinmerge.runtime.router.router import Router as RouterModule


def timed(bench: Bench, results: Results, seconds: float) -> None:
    """Routing beside a plain forward of the same batch, in turn."""
    if results.has("time", {"name": "route"}):
        return
    model, device = bench.model, torch.device("cpu")
    batch = real_batch(model.tokenizer, results.data_folder, list(model.experts), 32, 128)
    plain = model.merged([0.0] * len(model.experts), head=model.experts[0])
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
    for kind in ("prototype", "linear", "mlp", "projection"):
        given = {"kind": kind, "sharpness": 1.0, "coverage": 1.0 if kind != "prototype" else 0.99}
        if kind == "projection":
            given["rows_per_task"] = 1
        router, record, _ = bench.fitted(Router.model_validate(given))

        def call(router: RouterModule = router) -> Any:
            model.router = router.eval()
            return model.routing(allowed=None, **batch)

        calls[f"{kind}: {record.said}"] = call
    found = in_turn(calls, Limits(3, 200, seconds), device)
    results.add("time", {"name": "route", "rows": 32, "tokens": 128} | found)
