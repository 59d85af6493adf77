"""Tasks whose expert is missing (the paper's Table 5).

Experts are left out one by one, and the three of natural language inference together. What remains
answers the rows of the left-out task, with that task's own head: a head is no part of a merge, and
without it there is no answer to score. Coefficients are chosen among the remaining tasks. The
left-out task's train and validation rows are not read; its scores are not normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from twinmerge.artifact.reader import Artifact
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load
from twinmerge.runtime.router.router import Routed

from .lab import Lab, Scores
from .static import STATIC, Parameters, Say
from .tasks import RANK, SEED, among, best
from .twin import MAIN

INFERENCE = ("qnli", "mnli", "rte")
"""Left out together, as in the paper."""

STATICS = ("averaging", "task arithmetic", "TIES")

COVERAGE = {"Twin-Merging": {}, "Twin-Merging, no fallback": {"coverage": 1.0}}
"""Of the router: rows unlike all known ones fall back on the shared expert, or none does."""

SAME = 1e-5
"""Relative distance up to which two shared experts in float32 are equal."""


def unseen(lab: Lab, say: Say) -> None:
    for left in groups(lab.names):
        rest = [name for name in lab.names if name not in left]
        with among(lab, rest) as some:
            _static(lab, some, left, "pretrained", "task_arithmetic", {"weight": 0.0}, say)
            for name in STATICS:
                _static(lab, some, left, name, STATIC[name][0], best(some, name, say), say)
            for name, settings in COVERAGE.items():
                _twin(lab, some, left, name, settings, say)


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """What is left out; at least two experts remain."""
    found: list[tuple[str, ...]] = [(name,) for name in names]
    if set(INFERENCE) <= set(names):
        found.append(INFERENCE)
    return [left for left in found if len(names) - len(left) >= 2]


def merged_without(
    lab: Lab,
    some: Lab,
    left: Sequence[str],
    method: str,
    parameters: Parameters,
    **exclusive: Any,
) -> tuple[Artifact, Artifact]:
    """The merge of `some`, and one more that has the left-out heads beside it.

    The other is of all experts, of which the left-out ones have no weight in the shared expert.
    Raises `RuntimeError` unless both shared experts are equal.
    """
    known = some.built(some.recipe(method, parameters, **exclusive))
    each = {name: {"weight": 0.0} for name in left}
    whole = replace(lab, work=some.work)
    answering = whole.built(lab.recipe(method, parameters, each=each, **exclusive))
    one, other = shared_tensors(known), shared_tensors(answering)
    apart = {
        name: relative(one[name], other[name]) if name in one else float("inf") for name in other
    }
    worst = max(apart, key=lambda name: apart[name])
    if apart[worst] > SAME:
        raise RuntimeError(
            f"{method} without {', '.join(left)}: {worst} of the shared expert differs by "
            f"{apart[worst]:.2g} from one that no left-out expert was at hand for."
        )
    return known, answering


def shared_tensors(artifact: Artifact) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in artifact.manifest.shared_files():
        found |= load_file(artifact.folder / file)
    return found


def relative(one: Tensor, other: Tensor) -> float:
    """‖a - b‖ / ‖b‖; 0 where both are 0."""
    distance = float((one.double() - other.double()).norm())
    return distance / float(other.double().norm()) if distance else 0.0


def _static(
    lab: Lab,
    some: Lab,
    left: Sequence[str],
    name: str,
    method: str,
    parameters: Parameters,
    say: Say,
) -> None:
    def scored() -> dict[str, Any]:
        _, answering = merged_without(lab, some, left, method, parameters)
        merge = DenseMerge(load(answering.folder, check=False))
        none = torch.zeros(len(lab.names))
        return _mean({task: lab.alone(task, merge.at(none, task), "test") for task in left})

    settings = {"left_out": list(left), "names": some.names}
    settings |= {"method": method, "parameters": parameters}
    record = lab.records.once("unseen", name, settings, scored)
    say(f"without {', '.join(left)}, {name}: {record['mean']:.4f}")


def _twin(
    lab: Lab, some: Lab, left: Sequence[str], name: str, router: dict[str, Any], say: Say
) -> None:
    method = STATIC[MAIN][0]
    exclusive: dict[str, Any] = {"rank": RANK}

    def scored() -> dict[str, Any]:
        known, answering = merged_without(lab, some, left, method, {}, **exclusive)
        routing = some.route(known, SEED, **router)
        model = load(answering.folder, check=False)
        routes = {task: lab.routed(routing, task, "test") for task in left}
        scores: Scores = {}
        for task, route in routes.items():
            weights = spread(route.weights, routing.experts, model.experts)
            guesses = lab.weighted(model, task, weights, "test", head=task)
            scores[task] = lab.scored(task, guesses, "test")
        return _mean(scores) | {
            "new": float(torch.cat([route.new for route in routes.values()]).double().mean()),
            "weights": {
                task: mean_weights(routing.experts, route) for task, route in routes.items()
            },
        }

    settings = {"left_out": list(left), "names": some.names}
    settings |= {"method": method, "exclusive": exclusive, "seed": SEED, "router": router}
    record = lab.records.once("unseen", name, settings, scored)
    say(f"without {', '.join(left)}, {name}: {record['mean']:.4f}, {record['new']:.2f} new")


def spread(weights: Tensor, names: Sequence[str], into: Sequence[str]) -> Tensor:
    """(row, name) to (row, into); 0 for those that `names` lacks."""
    wide = weights.new_zeros(len(weights), len(into))
    wide[:, [list(into).index(name) for name in names]] = weights
    return wide


def mean_weights(names: Sequence[str], route: Routed) -> Scores:
    """Expert -> mean over rows."""
    return dict(zip(names, route.weights.mean(dim=0).tolist(), strict=True))


def _mean(scores: Scores) -> dict[str, Any]:
    return {"scores": scores, "mean": sum(scores.values()) / len(scores)}
