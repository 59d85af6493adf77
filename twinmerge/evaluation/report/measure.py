"""What rows that went through a router tell of it: curves and tables, from probabilities alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...runtime.router.calibration import BINS

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Of the rows kept, at which a coverage curve is told in words."""


@dataclass(frozen=True)
class Bin:
    """Rows of about the same confidence."""

    low: float
    high: float
    rows: int
    confidence: float
    """Mean."""
    right: float
    """Share of the rows that the likeliest expert is the right one of."""


def reliability(
    probabilities: Float[Tensor, "row expert"], truth: Int[Tensor, " row"]
) -> list[Bin]:
    """Bins of equal width that hold rows: the expected calibration error's."""
    confidence, guess = probabilities.double().max(dim=1)
    right = (guess == truth).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for index in range(BINS):
        here = place == index
        if count := int(here.sum()):
            means = float(confidence[here].mean()), float(right[here].mean())
            found.append(Bin(index / BINS, (index + 1) / BINS, count, *means))
    return found


def heated(
    probabilities: Float[Tensor, "row expert"], temperature: float
) -> Float[Tensor, "row expert"]:
    """Probabilities as they were before a temperature: softmax(temperature · log p)."""
    return (temperature * probabilities.double().log()).softmax(dim=1)


def entropy(weights: Float[Tensor, "row expert"]) -> float:
    """Of the shares in a row's sum (new rows have less than 1), mean over rows, in nats.

    Rows that are zero are left out; 0 without others.
    """
    kept = weights[weights.sum(dim=1) > 0].double()
    kept = kept / kept.sum(dim=1, keepdim=True)
    return float(torch.special.entr(kept).sum(dim=1).mean()) if len(kept) else 0.0


def coverage_curve(
    odd: Float[Tensor, " row"], right: Bool[Tensor, " row"], points: int = 60
) -> list[tuple[float, float]]:
    """(share kept, accuracy among these), the least odd rows kept first.

    Rows that are equally odd are kept or left together: no order of the file's.
    """
    order = odd.argsort(stable=True)
    sorted_, hits = odd[order], right[order].double().cumsum(0)
    last = torch.ones(len(odd), dtype=torch.bool)
    last[:-1] = sorted_[1:] > sorted_[:-1]
    ends = last.nonzero()[:, 0]
    if len(ends) > points:
        ends = ends[torch.linspace(0, len(ends) - 1, points).round().long()]
    return [((int(i) + 1) / len(odd), float(hits[i]) / (int(i) + 1)) for i in ends]


def at_share(curve: Sequence[tuple[float, float]], share: float) -> tuple[float, float]:
    """The first point of a coverage curve that keeps at least that share."""
    return next((p for p in curve if p[0] >= share - 1e-9), curve[-1])


def noticed_at(
    seen: Float[Tensor, " row"], unseen: Float[Tensor, " other"], coverage: float
) -> float:
    """Share of the unseen that is odder than `coverage` of the seen."""
    limit = torch.quantile(seen.double(), coverage)
    return float((unseen.double() > limit).double().mean())
