"""Deciding what a call runs with: every row's weights, whose head answers, and which way.

Weights are given, follow from a task, or are what the router says of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError, RouterError
from .arguments import (
    Allowed,
    Given,
    Weights,
    allowed_experts,
    batch_size,
    check_images,
    expert_indices,
    highest,
    tokens_of,
)
from .output import Decided
from .plan import Way, drop
from .router.features import Features
from .router.router import Routed

if TYPE_CHECKING:
    from .model import TwinModel


def decide(
    twin: TwinModel,
    inputs: Mapping[str, Any],
    *,
    weights: Given,
    task: str | Sequence[str] | None,
    head: str | Sequence[str] | None,
    allowed: Allowed,
    top_k: int | None,
    threshold: float | None,
    plan: Way,
    lasts: bool,
    whole: bool,
    said: Routed | None,
) -> Decided:
    """See `TwinModel.decide`."""
    batch = batch_size(inputs)
    if allowed is not None and (task is not None or weights is not None):
        raise InputError(
            "allowed=: restricts what the router may choose, and task= or weights= leave it "
            "nothing to choose. Give one of them."
        )
    if task is not None:
        if weights is not None:
            raise InputError("give task= or weights=, not both: each sets the weights")
        chosen = _indices(twin, task, batch, "task")
        resolved = torch.eye(len(twin.experts), device=twin.device)[chosen]
        head = task if head is None else head
    elif weights is not None:
        resolved = twin.as_weights(weights, batch)
    else:
        said = twin.routing(allowed=allowed, **inputs) if said is None else said
        resolved = said.weights
    kept = drop(resolved, top_k, threshold)
    index = _heads(twin, resolved, kept.weights, head, batch, said)
    check_images(inputs, batch, kept.weights)
    tokens = 0.0
    whole = whole or inputs.get("labels") is not None  # one loss
    if not (whole or lasts or twin.can_generate()):  # what generates may be asked for a cache
        tokens = tokens_of(inputs) / twin.break_even
    routing, way = twin.planner.plan(kept.weights, index, way=plan, lasts=lasts, tokens=tokens)
    return Decided(routing, kept.weights, index, kept.dropped, way, said)


def _heads(
    twin: TwinModel,
    weights: Weights,
    kept: Weights,
    head: str | Sequence[str] | None,
    batch: int,
    said: Routed | None,
) -> Int[Tensor, " batch"]:
    """Whose head answers each row: the highest of the weights that it runs with.

    Of all its weights where none is kept; what the router finds likeliest where it gives none.
    A weight of zero is none.
    """
    if head is not None:
        return _indices(twin, head, batch, "head")
    if said is not None:
        weights = torch.where(said.new[:, None], said.probabilities, weights)
    empty = (weights == 0).all(dim=-1)
    if twin.has_heads and bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        raise InputError(
            f"weights: row {row} is all zero (the shared expert), so no expert's head "
            f"follows from it. Say whose head answers: head= one of {list(twin.experts)}."
        )
    return highest(torch.where((kept == 0).all(dim=-1, keepdim=True), weights, kept))


def _indices(twin: TwinModel, names: Any, batch: int, what: str) -> Int[Tensor, " batch"]:
    return expert_indices(names, twin.experts, batch, what, twin.device)


def routed_from(twin: TwinModel, features: Features, allowed: Allowed) -> Routed:
    """See `TwinModel.routed_from`."""
    assert twin.router is not None
    features = {key: found.to(twin.device) for key, found in features.items()}
    batch = len(next(iter(features.values())))
    said = twin.router(features, allowed_experts(allowed, twin.experts, batch, twin.device))
    finite = torch.isfinite(said.probabilities).all(dim=-1) & torch.isfinite(said.novelty)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        well = all(bool(torch.isfinite(found[row]).all()) for found in features.values())
        raise RouterError(
            f"router: expected finite weights, got NaN in row {row}, from features "
            f"({twin.router.said}) that are {'finite' if well else 'NaN or infinity'}. Load "
            "the model with dtype=torch.float32 if its hidden states overflow, fit the router "
            "again (twinmerge fit-router), or give weights= or task=."
        )
    return said
