"""Static merges, their coefficients chosen on validation rows (the paper's Tables 2 and 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .lab import Lab, opened

Say = Callable[[str], None]
Parameters = dict[str, Any]

LADDERS: Mapping[str, tuple[float, ...]] = {
    "weight": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    "lambda": (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0),
    "density": (0.05, 0.1, 0.2, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0),
    "select_topk": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
}
"""Values of a parameter that may be tried, of every method the same."""


class Static(NamedTuple):
    """start: where the search for coefficients begins, on `LADDERS`; fixed: not searched"""

    method: str
    start: Mapping[str, float] = {}
    fixed: Mapping[str, float] = {}


STATIC: dict[str, Static] = {
    "averaging": Static("linear"),
    "task arithmetic": Static("task_arithmetic", {"weight": 0.3}),
    "TIES": Static("ties", {"density": 0.2, "lambda": 1.0}),
    "DARE + task arithmetic": Static("dare_linear", {"density": 0.8, "weight": 0.3}),
    "DARE + TIES": Static("dare_ties", {"density": 0.3, "weight": 0.3}),
    "Breadcrumbs": Static("breadcrumbs", {"density": 0.9, "weight": 0.3}, {"gamma": 0.01}),
    "Breadcrumbs + TIES": Static(
        "breadcrumbs_ties", {"density": 0.9, "weight": 0.3}, {"gamma": 0.01}
    ),
    "DELLA": Static("della", {"density": 0.8, "lambda": 1.0}, {"epsilon": 0.1}),
    "DELLA, linear": Static("della_linear", {"density": 0.8, "weight": 0.3}, {"epsilon": 0.1}),
    "Model Stock": Static("model_stock"),
    "SCE": Static("sce", {"select_topk": 1.0}),
    "TSV-M": Static("tsv_m", {"lambda": 1.0}),
    "Iso-C": Static("iso_c", {"lambda": 1.0}),
    "Iso-CTS": Static("iso_cts", {"lambda": 1.0}),
}
"""By title. `slerp` takes two models, and is no merge of eight."""


def chosen(lab: Lab, name: str, say: Say) -> Parameters:
    """The coefficients of a method that validation rows find better than their neighbours.

    From `start`, to the best of the steps to a neighbour on a ladder, until none is better: the
    best lies inside the ladders, or at an end that they share with all methods (DELLA's densities
    end where `possible` says).
    """
    static = STATIC[name]
    at = dict(static.start)
    tried: dict[tuple[float, ...], float] = {}
    while static.start:
        for parameters in (at, *(near for near in neighbours(at) if possible(static, near))):
            key = tuple(parameters.values())
            if key not in tried:
                tried[key] = score(lab, name, parameters, say)
        best = max(tried, key=lambda key: tried[key])  # of equal ones the first
        if tried[best] == tried[tuple(at.values())]:
            break
        at = dict(zip(at, best, strict=True))
    return at | dict(static.fixed)


def neighbours(at: Mapping[str, float]) -> list[dict[str, float]]:
    """One step on one ladder."""
    found = []
    for name, value in at.items():
        ladder = LADDERS[name]
        place = ladder.index(value)
        found += [
            {**at, name: ladder[other]}
            for other in (place - 1, place + 1)
            if 0 <= other < len(ladder)
        ]
    return found


def possible(static: Static, parameters: Mapping[str, float]) -> bool:
    """DELLA keeps entries with probabilities from density - epsilon to density + epsilon."""
    if "epsilon" not in static.fixed:
        return True
    epsilon, density = static.fixed["epsilon"], parameters["density"]
    return 0 < density - epsilon and density + epsilon < 1


def score(lab: Lab, name: str, parameters: Mapping[str, float], say: Say) -> float:
    """Normalised, on validation rows, heads known."""
    static = STATIC[name]
    whole = {**parameters, **static.fixed}

    def tried() -> dict[str, Any]:
        recipe = lab.recipe(static.method, whole)
        found = lab.dense(opened(lab.built(recipe)), "validation", oracle=False)
        lab.drop(recipe)
        return found

    record = lab.records.once("choice", name, {"method": static.method} | whole, tried)
    say(f"{name} {whole}: {record['normalised']:.4f} on validation rows")
    return record["normalised"]


def static(lab: Lab, say: Say) -> None:
    """One record for each static merge, true heads; `pretrained` is the base itself."""
    for name in ("pretrained", *STATIC):
        method = "task_arithmetic" if name == "pretrained" else STATIC[name].method
        parameters = {"weight": 0.0} if name == "pretrained" else chosen(lab, name, say)

        def scored(method: str = method, parameters: Parameters = parameters) -> dict[str, Any]:
            model = opened(lab.built(lab.recipe(method, parameters)))
            return {"protocol": "known-head"} | lab.dense(model, "test", oracle=False)

        settings = {"method": method, "parameters": parameters}
        record = lab.records.once("static", name, settings, scored)
        say(f"{name}: {record['normalised']:.4f}")
