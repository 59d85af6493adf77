"""Twin-Merging on three shared experts, by rank, under three protocols (Tables 2, 8, 11 and 6)."""

from __future__ import annotations

from typing import Any

import torch

from twinmerge.errors import RecipeError
from twinmerge.runtime.model import TwinModel

from .lab import STORED, Lab, bytes_of, opened
from .static import STATIC, Parameters, Say, chosen

SHARED = ("averaging", "task arithmetic", "TIES")
"""The paper's Table 11."""

MAIN = "averaging"
"""The shared expert that is routed at all ranks; the others at `OTHER_RANKS`."""

OTHER_RANKS = (1, 16, 64)

FITTED_RANK = 16
"""The router of all ranks is fitted beside this one: they have one shared expert. What it reads is
the same beside any, its sharpness is not."""


def twin(lab: Lab, say: Say) -> None:
    """`oracle` at every rank; `known-head` and `routed` with a router of each seed."""
    for shared in SHARED:
        method = STATIC[shared].method
        parameters = chosen(lab, shared, say)
        for rank in lab.settings.ranks:
            oracle(lab, say, shared, method, parameters, {"rank": rank})
        for seed in lab.settings.seeds:
            ranks = lab.settings.ranks
            if shared != MAIN:
                ranks = tuple(rank for rank in ranks if rank in OTHER_RANKS)
            routed(lab, say, shared, method, parameters, ranks, seed)


def oracle(
    lab: Lab,
    say: Say,
    shared: str,
    method: str,
    parameters: Parameters,
    exclusive: dict[str, Any],
    *,
    keep: bool = True,
) -> None:
    """keep: whether the artifact is needed again. A budget that does not pay for what is kept whole
    is recorded as left out."""

    def scored() -> dict[str, Any]:
        recipe = lab.recipe(method, parameters, stored=STORED, **exclusive)
        try:
            artifact = lab.built(recipe)
        except RecipeError as problem:
            return {"left out": str(problem)}
        found = lab.dense(opened(artifact), "test", oracle=True)
        record = {"protocol": "oracle", "bytes": bytes_of(artifact)} | found
        if not keep:
            lab.drop(recipe)
        return record

    settings = {"method": method, "parameters": parameters, "exclusive": exclusive}
    record = lab.records.once("twin oracle", shared, settings, scored)
    result = record.get("left out") or f"oracle {record['normalised']:.4f}"
    say(f"on {shared}, {exclusive}: {result}")


def routed(
    lab: Lab,
    say: Say,
    shared: str,
    method: str,
    parameters: Parameters,
    ranks: tuple[int, ...],
    seed: int,
) -> None:
    """All ranks have one shared expert, so one router says the same of all of them."""
    routes: dict[str, Any] = {}
    fitted = lab.recipe(method, parameters, stored=STORED, rank=FITTED_RANK)
    for rank in ranks:
        recipe = lab.recipe(method, parameters, stored=STORED, rank=rank)

        def scored(recipe: Any = recipe) -> dict[str, Any]:
            model = lab.route(lab.built(recipe), seed, fitted_on=lab.built(fitted))
            if not routes:
                routes.update({name: lab.routed(model, name, "test") for name in model.experts})
            both = lab.protocols(model, routes, "test")
            return both | {"router": said(model), "routing": routing_of(model.experts, routes)}

        settings = {
            "method": method,
            "parameters": parameters,
            "exclusive": {"rank": rank},
            "seed": seed,
        }
        record = lab.records.once("twin routed", shared, settings, scored)
        say(
            f"on {shared}, rank {rank}, seed {seed}: "
            f"known head {record['known-head']['normalised']:.4f}, "
            f"routed {record['routed']['normalised']:.4f}"
        )


def said(model: TwinModel) -> dict[str, Any]:
    """What the manifest says of the router."""
    record = model.manifest.router
    assert record is not None
    kept = ("kind", "layers", "held_out_accuracy", "calibration_error", "temperature", "sharpness")
    return {name: getattr(record, name) for name in kept} | {"bytes": record.bytes}


def routing_of(experts: tuple[str, ...], routes: dict[str, Any]) -> dict[str, Any]:
    """Mean weights and choices by task: the paper's Figure 5."""
    right, rows = 0, 0
    found: dict[str, Any] = {}
    for index, name in enumerate(experts):
        route = routes[name]
        choice = route.probabilities.argmax(dim=1)
        right, rows = right + int((choice == index).sum()), rows + len(choice)
        found[name] = {
            "weights": route.weights.mean(dim=0).tolist(),
            "chosen": torch.bincount(choice, minlength=len(experts)).tolist(),
            "new": float(route.new.double().mean()),
        }
    return {"accuracy": right / rows, "tasks": found}


def ablation(lab: Lab, say: Say) -> None:
    """The paper's Table 6: what the shared expert and the exclusive knowledge each are worth.

    shared:               no exclusive knowledge
    dynamic:              the exclusive knowledge of every expert beside one expert, not the shared
    pretrained + dynamic: what differs from the pretrained model
    shared + dynamic:     Twin-Merging
    """
    rank = 16
    ways: dict[str, tuple[str, Parameters, dict[str, Any]]] = {
        "pretrained": ("task_arithmetic", {"weight": 0.0}, {}),
        "shared": ("linear", {}, {}),
        "pretrained + dynamic": ("task_arithmetic", {"weight": 0.0}, {"rank": rank}),
        "shared + dynamic": ("linear", {}, {"rank": rank}),
    }
    for name, (method, parameters, exclusive) in ways.items():
        _ablated(lab, say, name, method, parameters, exclusive, {})
    for one in lab.names[::3]:
        each = {name: {"weight": float(name == one)} for name in lab.names}
        _ablated(lab, say, f"dynamic on {one}", "task_arithmetic", {}, {"rank": rank}, each)


def _ablated(
    lab: Lab,
    say: Say,
    name: str,
    method: str,
    parameters: Parameters,
    exclusive: dict[str, Any],
    each: dict[str, Any],
) -> None:
    def scored() -> dict[str, Any]:
        recipe = lab.recipe(method, parameters, each=each, stored=STORED, **exclusive)
        artifact = lab.built(recipe)
        if not exclusive:
            return {"shared": lab.dense(opened(artifact), "test", oracle=False)}
        model = lab.route(artifact)
        routes = {task: lab.routed(model, task, "test") for task in model.experts}
        return {
            "oracle": lab.dense(model, "test", oracle=True),
            "bytes": bytes_of(model),
        } | lab.protocols(model, routes, "test")

    settings = {"method": method, "parameters": parameters, "exclusive": exclusive, "each": each}
    record = lab.records.once("ablation", name, settings, scored)
    main = record.get("known-head") or record["shared"]
    say(f"ablation, {name}: {main['normalised']:.4f}")
