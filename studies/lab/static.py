"""Static merges, their coefficients chosen on validation rows (the paper's Tables 2 and 8)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from .lab import Lab, opened

Say = Callable[[str], None]
Parameters = dict[str, Any]

STATIC: dict[str, tuple[str, Mapping[str, list[Any]]]] = {
    "averaging": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"weight": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]}),
    "TIES": ("ties", {"density": [0.2, 0.5, 0.8], "lambda": [0.5, 1.0, 1.5]}),
    "DARE + task arithmetic": ("dare_linear", {"density": [0.3, 0.8], "weight": [0.2, 0.3, 0.4]}),
    "DARE + TIES": ("dare_ties", {"density": [0.3, 0.8], "weight": [0.2, 0.3, 0.4]}),
    "Breadcrumbs": (
        "breadcrumbs",
        {"density": [0.5, 0.9], "gamma": [0.01], "weight": [0.2, 0.3, 0.4]},
    ),
    "Breadcrumbs + TIES": (
        "breadcrumbs_ties",
        {"density": [0.5, 0.9], "gamma": [0.01], "weight": [0.2, 0.3, 0.4]},
    ),
    "DELLA": (
        "della",
        {"density": [0.5, 0.8], "epsilon": [0.1], "weight": [0.2, 0.3, 0.4]},
    ),
    "DELLA, linear": (
        "della_linear",
        {"density": [0.5, 0.8], "epsilon": [0.1], "weight": [0.2, 0.3, 0.4]},
    ),
    "Model Stock": ("model_stock", {}),
    "SCE": ("sce", {"select_topk": [0.3, 1.0]}),
    "TSV-M": ("tsv_m", {"lambda": [1.0, 1.4, 2.0]}),
    "Iso-C": ("iso_c", {"lambda": [1.4, 2.0, 3.0, 4.0]}),
    "Iso-CTS": ("iso_cts", {"lambda": [1.4, 2.0, 3.0, 4.0]}),
}
"""Name -> method, and the values of its parameters that are tried. `slerp` takes two models, and
is no merge of eight."""


def chosen(lab: Lab, name: str, say: Say) -> Parameters:
    """The coefficients of a method with the best normalised score on validation rows."""
    method, grid = STATIC[name]
    if not grid:
        return {}
    best: tuple[float, Parameters] | None = None
    for values in itertools.product(*grid.values()):
        parameters = dict(zip(grid, values, strict=True))

        def tried(parameters: Parameters = parameters) -> dict[str, Any]:
            recipe = lab.recipe(method, parameters)
            model = opened(lab.built(recipe))
            found = lab.dense(model, "validation", oracle=False)
            lab.drop(recipe)
            return found

        record = lab.records.once("choice", name, {"method": method} | parameters, tried)
        say(f"{name} {parameters}: {record['normalised']:.4f} on validation rows")
        if best is None or record["normalised"] > best[0]:
            best = record["normalised"], parameters
    assert best is not None
    return best[1]


def static(lab: Lab, say: Say) -> None:
    """One record for each static merge, true heads; `pretrained` is the base itself."""
    for name in ("pretrained", *STATIC):
        method = "task_arithmetic" if name == "pretrained" else STATIC[name][0]
        parameters = {"weight": 0.0} if name == "pretrained" else chosen(lab, name, say)

        def scored(method: str = method, parameters: Parameters = parameters) -> dict[str, Any]:
            recipe = lab.recipe(method, parameters)
            model = opened(lab.built(recipe))
            return {"protocol": "known-head"} | lab.dense(model, "test", oracle=False)

        settings = {"method": method, "parameters": parameters}
        record = lab.records.once("static", name, settings, scored)
        say(f"{name}: {record['normalised']:.4f}")
