"""Every kind of router on test rows, by what it reads and how many train rows fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router_bench import COVERAGE, Bench
from router_read import note
from router_results import Results
from router_scores import experts_scores, normalised
from torch import Tensor

from twinmerge.recipe import Router
from twinmerge.runtime.router.calibration import calibration_error
from twinmerge.runtime.router.router import Routed
from twinmerge.runtime.router.router import Router as RouterModule

SIZES = (16, 100, 400, 1000)
MORE_SEEDS = (1, 2)
KINDS = ("prototype", "linear", "mlp")


def configurations(quick: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name -> settings: every kind, and what it may read."""
    layers: list[Any] = [0, 1, 2, 3, 4, 5, 6]
    found: list[tuple[str, dict[str, Any]]] = [
        ("none", {"kind": "none"}),
        ("projection, no data", {"kind": "projection", "rows_per_task": 1}),
    ]
    found += [(f"prompts, {n} lines", {"kind": "prompts", "rows_per_task": n}) for n in (2, 4, 8)]
    for size in SIZES[:2] if quick else SIZES:
        for seed in (0,) if quick else (0, *MORE_SEEDS):
            more = {"rows_per_task": size, "seed": seed}
            found.append(("projection", {"kind": "projection", **more}))
            for kind in KINDS:
                if kind == "mlp" and seed:
                    continue  # a dozen networks each
                found.append((f"{kind}, auto", {"kind": kind, "layer": "auto", **more}))
                if seed or quick:
                    continue
                for layer in [3, 6, [0, 2, 4]] if kind == "mlp" else [*layers, [0, 2, 4]]:
                    name = f"{kind}, {said(layer)}"
                    found.append((name, {"kind": kind, "layer": layer, **more}))
                if kind == "mlp":
                    continue  # minutes each
                for pooling in ("first", "last"):
                    name = f"{kind}, layers 0, 2, 4, {pooling} token"
                    given = {"kind": kind, "layer": [0, 2, 4], "pooling": pooling, **more}
                    found.append((name, given))
                found.append((f"{kind}, encoder", {"kind": kind, "encoder": "base", **more}))
            if not seed and size <= 400:
                found.append(("auto", {"kind": "auto", **more}))
    return found


def said(layer: Any) -> str:
    return f"layers {', '.join(map(str, layer))}" if isinstance(layer, list) else f"layer {layer}"


def grid(bench: Bench, results: Results, quick: bool) -> None:
    """One row for each router, its scores with all weight on the likeliest expert.

    So the sharpness does not matter here, and is not looked for.
    """
    own = experts_scores(bench, results)
    for name, given in configurations(quick):
        key = {"name": name, "rows": given.get("rows_per_task"), "seed": given.get("seed", 0)}
        if results.has("grid", key):
            continue
        settings = Router.model_validate({**given, "sharpness": 1.0, "coverage": COVERAGE})
        router, record, seconds = bench.fitted(settings)
        row = key | measured(bench, router, settings) | {"fit_seconds": seconds}
        if router.kind != "none":
            row["top"] = top(bench, router, settings, own)
        row |= {
            "kind": record.kind,
            "layers": record.layers,
            "temperature": record.temperature,
            "held_out_accuracy": record.held_out_accuracy,
            "bytes": sum(tensor.nbytes for tensor in router.tensors().values()),
            "left_out": None if record.novelty is None else record.novelty.noticed,
            "novelty_layers": None if record.novelty is None else record.novelty.layers,
            "novelty_pooling": None if record.novelty is None else record.novelty.pooling,
        }
        results.add("grid", row)
        note(f"{name}, {key['rows']} rows, seed {key['seed']}: {row['accuracy']:.3f}")


def measured(bench: Bench, router: RouterModule, settings: Router) -> dict[str, Any]:
    """On test rows, and on rows of tasks that no expert saw."""
    texts = [text for name in bench.model.experts for text in bench.tests[name]]
    found = bench.routed(router, settings, texts)
    right = found.probabilities.argmax(dim=1) == bench.truth
    sure = found.probabilities.gather(1, bench.truth[:, None])[:, 0]
    row: dict[str, Any] = {
        "accuracy": float(right.double().mean()),
        "accuracy_by_task": {
            name: float(right[bench.truth == i].double().mean())
            for i, name in enumerate(bench.model.experts)
        },
        "calibration_error": calibration_error(found.probabilities, bench.truth),
        "loss": float(-sure.clamp(min=1e-12).log().mean()),
        "coverage": float((~found.new).double().mean()),
        "unseen": None,
    }
    if router.novelty is not None:
        row["unseen"] = {
            name: float(bench.routed(router, settings, unseen).new.double().mean())
            for name, unseen in bench.unseen.items()
        }
        row["curve"] = curve(found, right)
    return row


def top(
    bench: Bench, router: RouterModule, settings: Router, own: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Normalised scores with all weight on the likeliest expert, also where the input is new."""
    found: dict[str, dict[str, float]] = {"known-head": {}, "routed": {}}
    for name in bench.model.experts:
        chosen = bench.routed(router, settings, bench.tests[name]).probabilities.argmax(dim=1)
        for protocol, score in bench.alone.scores(name, chosen.tolist()).items():
            found[protocol][name] = score
    return {protocol: normalised(scores, own) for protocol, scores in found.items()}


def curve(found: Routed, right: Tensor) -> list[dict[str, float]]:
    """Accuracy on the share of rows that are least new, and on the share that are surest."""
    rows = []
    for kept in (1.0, 0.99, 0.95, 0.9, 0.8, 0.5):
        count = max(1, round(kept * len(right)))
        least, surest = found.novelty.argsort()[:count], (-found.confidence).argsort()[:count]
        rows.append(
            {
                "kept": kept,
                "by_novelty": float(right[least].double().mean()),
                "by_confidence": float(right[surest].double().mean()),
            }
        )
    return rows
