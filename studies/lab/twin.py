"""Twin-Merging on three shared experts, by rank, under three protocols (Tables 2, 8, 11 and 6)."""

from __future__ import annotations

from typing import Any

import torch

from twinmerge.artifact.reader import Artifact

from .lab import STORED, Lab, bytes_of, opened
from .static import STATIC, Parameters, Say, chosen

SHARED = ("averaging", "task arithmetic", "TIES")
"""The paper's Table 11."""

MAIN = "averaging"
"""The shared expert that is routed at `ROUTED_RANKS`; the others at `OTHER_RANKS`."""

ROUTED_RANKS = (1, 4, 16, 64)
OTHER_RANKS = (16,)


def twin(lab: Lab, say: Say) -> None:
    """`oracle` at every rank; `known-head` and `routed` with a router of each seed."""
    for shared in SHARED:
        method, _ = STATIC[shared]
        parameters = chosen(lab, shared, say)
        for rank in lab.settings.ranks:
            oracle(lab, say, shared, method, parameters, {"rank": rank})
        for seed in lab.settings.seeds:
            wanted = ROUTED_RANKS if shared == MAIN else OTHER_RANKS
            ranks = tuple(rank for rank in lab.settings.ranks if rank in wanted)
            routed(lab, say, shared, method, parameters, ranks, seed)


def oracle(
    lab: Lab, say: Say, shared: str, method: str, parameters: Parameters, exclusive: dict[str, Any]
) -> dict[str, Any]:
    def scored() -> dict[str, Any]:
        artifact = lab.built(lab.recipe(method, parameters, stored=STORED, **exclusive))
        model = opened(artifact)
        found = lab.dense(model, "test", oracle=True)
        return {"protocol": "oracle", "bytes": bytes_of(artifact)} | found

    settings = {"method": method, "parameters": parameters, "exclusive": exclusive}
    record = lab.records.once("twin oracle", shared, settings, scored)
    say(f"on {shared}, {exclusive}: oracle {record['normalised']:.4f}")
    return record


def routed(
    lab: Lab,
    say: Say,
    shared: str,
    method: str,
    parameters: Parameters,
    ranks: tuple[int, ...],
    seed: int,
) -> None:
    """All ranks have one shared expert, so one router says the same of all of them.

    Its sharpness is chosen at the first of `ranks` that is asked; it is said in the record.
    """
    routes: dict[str, Any] = {}
    for rank in sorted(ranks, key=lambda rank: rank != 16):
        recipe = lab.recipe(method, parameters, stored=STORED, rank=rank)

        def scored(recipe: Any = recipe) -> dict[str, Any]:
            artifact = lab.built(recipe)
            model = lab.route(artifact, seed)
            if not routes:
                routes.update({name: lab.routed(model, name, "test") for name in model.experts})
            both = lab.protocols(model, routes, "test")
            return both | {"router": said(artifact), "routing": routing_of(model.experts, routes)}

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


def said(artifact: Artifact) -> dict[str, Any]:
    """What the artifact says of its router."""
    record = Artifact(artifact.folder, check=False).manifest.router
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
            model = opened(artifact)
            return {"shared": lab.dense(model, "test", oracle=False)}
        model = lab.route(artifact)
        routes = {task: lab.routed(model, task, "test") for task in model.experts}
        return {
            "oracle": lab.dense(model, "test", oracle=True),
            "bytes": bytes_of(artifact),
        } | lab.protocols(model, routes, "test")

    settings = {"method": method, "parameters": parameters, "exclusive": exclusive, "each": each}
    record = lab.records.once("ablation", name, settings, scored)
    main = record.get("known-head") or record["shared"]
    say(f"ablation, {name}: {main['normalised']:.4f}")
