"""Noticing inputs that are unlike all experts' data.

The score of a layer is the relative Mahalanobis distance (Ren et al., A Simple Fix to Mahalanobis
Distance for Improving Near-OOD Detection, 2021, arXiv:2106.09022): how far a row's features are
from the nearest expert's mean, less how far they are from the mean of all. Early layers notice
other words and formats, later ones other tasks, so the scores of several are averaged, each in
units of its spread over calibration rows. A row above the threshold is new; the threshold is a
quantile of these rows, which the means were not made of.

What is far from everything (another script, noise) is far from the mean of all as well, and its
relative distance small. So is new, too, what is further from every expert than any calibration row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .features import Features
from .statistics import Statistics, precision, statistics

Others = dict[int, Float[Tensor, "check width"]]
"""Features by layer of other rows."""


class Distance(nn.Module):
    """Features of one layer (batch, width) -> relative and plain distance (batch, 2), float32."""

    means: Tensor
    mean: Tensor
    near: Tensor
    far: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(experts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("near", torch.zeros(width, width))
        self.register_buffer("far", torch.zeros(width, width))
        self.register_buffer("usual", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    @staticmethod
    def of(found: Statistics) -> Distance:
        """`near` and `far` are the inverse covariances around the experts' means and the mean."""
        distance = Distance(found.means.shape[1], len(found.means))
        distance.means.copy_(found.means)
        distance.mean.copy_(found.mean)
        distance.near.copy_(precision(found.within))
        distance.far.copy_(precision(found.total))
        return distance

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch 2"]:
        x, means = features - self.mean, self.means - self.mean
        near = x @ self.near
        own = ((means @ self.near) * means).sum(dim=1)
        squared = (near * x).sum(dim=1, keepdim=True) - 2 * near @ means.T + own
        nearest = squared.amin(dim=1)
        return torch.stack([nearest - ((x @ self.far) * x).sum(dim=1), nearest], dim=1)


class Novelty(nn.Module):
    """Features by layer -> score (batch,), float32.

    The mean over layers of the scaled relative distances; or that of the plain ones less `offset`,
    if it is higher.
    """

    offset: Tensor

    def __init__(self, widths: Mapping[int, int], experts: int, threshold: float) -> None:
        super().__init__()
        self.layers, self.threshold = tuple(widths), threshold
        self.register_buffer("offset", torch.zeros(()))
        self.distances = nn.ModuleDict(
            {str(layer): Distance(width, experts) for layer, width in widths.items()}
        )

    @staticmethod
    def of(found: Mapping[int, Statistics], threshold: float = float("inf")) -> Novelty:
        novelty = Novelty({}, 0, threshold)
        novelty.layers = tuple(found)
        for layer, each in found.items():
            novelty.distances[str(layer)] = Distance.of(each)
        return novelty

    def at(self, layer: int) -> Distance:
        found = self.distances[str(layer)]
        assert isinstance(found, Distance)
        return found

    def distances_of(self, features: Features) -> Float[Tensor, "row layer 2"]:
        """Of every layer, as they are."""
        found = [self.at(layer)(features[layer]) for layer in self.layers]
        return torch.stack(found, dim=1)

    def set(self, distances: Float[Tensor, "row layer 2"], coverage: float) -> None:
        """Scale and threshold from the distances of rows that are not new."""
        for place, layer in enumerate(self.layers):
            found, distance = distances[:, place].double(), self.at(layer)
            spread = found.std(dim=0) if len(found) > 1 else torch.zeros(2)
            distance.usual.copy_(found.mean(dim=0))
            distance.spread.copy_(torch.where(spread > 0, spread, 1.0))
        relative, plain = self._scaled(distances).double().T
        self.threshold = float(torch.quantile(relative, coverage, interpolation="higher"))
        self.offset.fill_(float(plain.max()) - self.threshold)

    def _scaled(self, distances: Float[Tensor, "row layer 2"]) -> Float[Tensor, "row 2"]:
        parts = [self.at(layer) for layer in self.layers]
        usual, spread = (torch.stack([getattr(p, n) for p in parts]) for n in ("usual", "spread"))
        return ((distances - usual) / spread).mean(dim=1)

    def forward(self, features: Features) -> Float[Tensor, " batch"]:
        relative, plain = self._scaled(self.distances_of(features)).T
        return torch.maximum(relative, plain - self.offset)

    def is_new(self, score: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return score > self.threshold


def learnt(
    features: Features,
    truth: Int[Tensor, " row"],
    check: Others,
    experts: int,
    coverage: float,
) -> Novelty:
    """Distances from rows, scale and threshold from others that `check` has the features of."""
    novelty = Novelty.of({layer: statistics(x, truth, experts) for layer, x in features.items()})
    novelty.set(novelty.distances_of(check), coverage)
    return novelty


def noticed_when_left_out(
    features: Features,
    truth: Int[Tensor, " row"],
    check: Others,
    check_truth: Int[Tensor, " check"],
    experts: int,
    coverage: float,
) -> list[float]:
    """For each expert, the share of its rows in `check` that are new to a router without it.

    At the threshold that `coverage` of the others' rows stay below. This is all that can be known
    of unseen tasks without rows of them.
    """
    shares = []
    for out in range(experts):
        rest, others = truth != out, check_truth != out
        if not bool(others.any()) or bool(others.all()):
            shares.append(0.0)
            continue
        number = torch.cumsum(torch.arange(experts) != out, 0) - 1
        novelty = learnt(
            {layer: x[rest] for layer, x in features.items()},
            number[truth[rest]],
            {layer: x[others] for layer, x in check.items()},
            experts - 1,
            coverage,
        )
        own = {layer: x[~others] for layer, x in check.items()}
        shares.append(float(novelty.is_new(novelty(own)).double().mean()))
    return shares
