"""Noticing inputs that are unlike all experts' data.

The score is the relative Mahalanobis distance (Ren et al., A Simple Fix to Mahalanobis Distance for
Improving Near-OOD Detection, 2021, arXiv:2106.09022): how far a row's features are from the nearest
expert's mean, less how far they are from the mean of all. A row above the threshold is new. The
threshold is a quantile of rows that the means were not made of.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .statistics import Statistics, precision, statistics


class Novelty(nn.Module):
    """Features of one layer (batch, width) -> score (batch,), float32."""

    means: Tensor
    mean: Tensor
    near: Tensor
    far: Tensor

    def __init__(self, width: int, experts: int, layer: int, threshold: float) -> None:
        super().__init__()
        self.layer, self.threshold = layer, threshold
        self.register_buffer("means", torch.zeros(experts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("near", torch.zeros(width, width))
        self.register_buffer("far", torch.zeros(width, width))

    @staticmethod
    def of(found: Statistics, layer: int, threshold: float = float("inf")) -> Novelty:
        """`near` and `far` are the inverse covariances around the experts' means and the mean."""
        novelty = Novelty(found.means.shape[1], len(found.means), layer, threshold)
        novelty.means.copy_(found.means)
        novelty.mean.copy_(found.mean)
        novelty.near.copy_(precision(found.within))
        novelty.far.copy_(precision(found.total))
        return novelty

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
        x, means = features - self.mean, self.means - self.mean
        near = x @ self.near
        cross = near @ means.T
        own = ((means @ self.near) * means).sum(dim=1)
        nearest = ((near * x).sum(dim=1, keepdim=True) - 2 * cross + own).amin(dim=1)
        return nearest - ((x @ self.far) * x).sum(dim=1)

    def is_new(self, score: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return score > self.threshold


def noticed_when_left_out(
    features: Float[Tensor, "row width"],
    truth: Int[Tensor, " row"],
    held: Float[Tensor, "held width"],
    held_truth: Int[Tensor, " held"],
    experts: int,
    coverage: float,
) -> list[float]:
    """For each expert, the share of its held-out rows that would be noticed if it were unknown.

    At a threshold that `coverage` of the others' held-out rows stay below. This is all that can be
    known of unseen tasks without rows of them.
    """
    shares = []
    for out in range(experts):
        rest, others = truth != out, held_truth != out
        index = torch.cumsum(torch.arange(experts) != out, 0) - 1
        found = statistics(features[rest], index[truth[rest]], experts - 1)
        novelty = Novelty.of(found, 0)
        score = novelty(held.float())
        if not bool(others.any()) or bool(others.all()):
            shares.append(0.0)
            continue
        limit = torch.quantile(score[others].double(), coverage)
        shares.append(float((score[~others] > limit).double().mean()))
    return shares
