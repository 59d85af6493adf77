"""Routing, forward, and both at every layer that a router can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runtime_bench import Bench
from runtime_results import Results, progress, shown
from timing import flops, in_turn
from torch import Tensor

from twinmerge.runtime.cost import routing_share
from twinmerge.runtime.model import TwinModel


def routing(bench: Bench, results: Results) -> None:
    """One row per layer; the router's net is the fitted one, which costs the same at every layer.

    The weights that it gives at other layers mean nothing, so the forward that "routed" is
    compared with has the same ones.
    """
    cell = bench.headline
    twin = bench.load(bench.routed())
    assert twin.router is not None
    layers, fitted = twin.features.layers, twin.router.last
    if not results.missing("routing", [{"layer": layer} for layer in range(layers + 1)]):
        return
    results.data["routing"]["rows"] = []  # all layers are timed in turn, or none
    plain, batch = bench.plain(twin), bench.batch(twin, cell)
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}

    def given(weights: Tensor) -> Callable[[], Any]:
        return lambda: twin(**batch, weights=weights)

    share = {}
    total = flops(lambda: plain(**batch))
    for layer in range(layers + 1):
        route = at_layer(twin, layer, lambda: twin.route(allowed=None, **batch))
        share[layer] = flops(route) / total
        calls[f"route {layer}"] = route
        calls[f"forward {layer}"] = given(route())
        calls[f"routed {layer}"] = at_layer(twin, layer, lambda: twin(**batch))
        if layer == fitted:
            calls["routed, top_k=1"] = at_layer(twin, layer, lambda: twin(**batch, top_k=1))
    with progress("routing", 1) as advance:
        found = in_turn(calls, bench.limits, bench.device)
        advance(f"fitted at layer {fitted}: {shown(found['ratio'])}")
    for layer in range(layers + 1):
        ratio = {name: found["ratio"][f"{name} {layer}"] for name in ("route", "forward", "routed")}
        if layer == fitted:
            ratio["routed, top_k=1"] = found["ratio"]["routed, top_k=1"]
        results.add(
            "routing",
            {
                "layer": layer,
                "layers": layers,
                "fitted": layer == fitted,
                "share_of_layers": layer / layers,
                "share_of_flops": share[layer],
                "predicted": routing_share(plain, layer, cell.tokens),
                "repeats": found["repeats"],
                "plain_milliseconds": found["milliseconds"]["plain"],
                "ratio": {"plain": 1.0, **ratio},
                "added": ratio["routed"] - ratio["forward"],
            }
            | {k: v for k, v in asdict(cell).items() if k != "experts"}
            | {"experts": len(twin.experts)},
        )


def at_layer(twin: TwinModel, layer: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a router that reads this layer."""

    def work() -> Any:
        assert twin.router is not None
        twin.router.layers = (layer,)
        return call()

    return work
