"""Noticing inputs that are unlike all experts' data.

The score of a layer is the relative Mahalanobis distance (Ren et al., A Simple Fix to Mahalanobis
Distance for Improving Near-OOD Detection, 2021, arXiv:2106.09022): how far a row's features are
from the nearest expert's mean, less how far they are from the mean of all. Early layers notice
other words and formats, later ones other tasks, so several are looked at, each score in units of
its spread over calibration rows, and added up as exponentials: what stands out in one layer counts.
A row above the threshold is new; the threshold is a quantile of the calibration rows, which the
means were not made of. Layers, and what is taken over tokens, are those that would notice most of
each expert's rows if it were unknown.

What is far from everything (another script, noise) is far from the mean of all as well, and its
relative distance small. So is new, too, what is further from every expert than any calibration row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .features import Features, Key, Pooling, keys
from .statistics import Statistics, Sums, precision

JUDGED = 0.95
Others = dict[Key, Float[Tensor, "check width"]]
"""Features of other rows."""


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
    """Features -> score (batch,), float32.

    Log-sum-exp over layers of the scaled relative distances; or the mean of the plain ones less
    `offset`, if it is higher.
    """

    offset: Tensor

    def __init__(
        self,
        widths: Mapping[int, int],
        experts: int,
        threshold: float,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        self.layers, self.threshold = tuple(widths), threshold
        self.pooling: Pooling = pooling
        self.register_buffer("offset", torch.zeros(()))
        self.distances = nn.ModuleDict(
            {str(layer): Distance(width, experts) for layer, width in widths.items()}
        )

    @staticmethod
    def of(found: Mapping[Key, Distance]) -> Novelty:
        """All with one pooling; nothing is new before `set`."""
        _, pooling = next(iter(found))
        novelty = Novelty({}, 0, float("inf"), pooling)
        novelty.layers = tuple(layer for layer, _ in found)
        novelty.distances.update({str(layer): each for (layer, _), each in found.items()})
        return novelty

    @property
    def keys(self) -> tuple[Key, ...]:
        """The features that are looked at."""
        return keys(self.layers, self.pooling)

    def at(self, layer: int) -> Distance:
        found = self.distances[str(layer)]
        assert isinstance(found, Distance)
        return found

    def distances_of(self, features: Features) -> Float[Tensor, "row layer 2"]:
        """Of every layer, as they are."""
        found = [self.at(layer)(features[layer, self.pooling]) for layer in self.layers]
        return torch.stack(found, dim=1)

    def set(self, distances: Float[Tensor, "row layer 2"], coverage: float) -> None:
        """Scale and threshold from the distances of rows that are not new."""
        for place, layer in enumerate(self.layers):
            found, distance = distances[:, place].double(), self.at(layer)
            spread = found.std(dim=0) if len(found) > 1 else torch.zeros(2)
            distance.usual.copy_(found.mean(dim=0))
            distance.spread.copy_(torch.where(spread > 0, spread, 1.0))
        relative, plain = (found.double() for found in self._scores(distances))
        self.threshold = float(torch.quantile(relative, coverage, interpolation="higher"))
        self.offset.fill_(float(plain.max()) - self.threshold)

    def _scores(
        self, distances: Float[Tensor, "row layer 2"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        parts = [self.at(layer) for layer in self.layers]
        usual, spread = (torch.stack([getattr(p, n) for p in parts]) for n in ("usual", "spread"))
        scaled = (distances - usual) / spread
        return scaled[..., 0].logsumexp(dim=1), scaled[..., 1].mean(dim=1)

    def judged(self, distances: Float[Tensor, "row layer 2"]) -> Float[Tensor, " row"]:
        """Scores from distances."""
        relative, plain = self._scores(distances)
        return torch.maximum(relative, plain - self.offset)

    def forward(self, features: Features) -> Float[Tensor, " batch"]:
        return self.judged(self.distances_of(features))

    def is_new(self, score: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return score > self.threshold


def learnt(
    features: Features,
    truth: Int[Tensor, " row"],
    check: Others,
    check_truth: Int[Tensor, " check"],
    experts: int,
    coverage: float,
    looks: Sequence[Sequence[Key]],
) -> tuple[Novelty, list[float]]:
    """What notices new inputs, and the share of each expert's rows that it would if unknown.

    features: of the rows that distances are made of. check: of others, for scale and threshold.
    looks: features to look at, each with one pooling. The first is taken, unless another notices
    more by over one standard error of the difference among experts. The shares are at the threshold
    that `coverage` of the other experts' rows stay below: all that can be known of unseen tasks
    without rows of them. With two experts there are none, and the first look is taken.
    """
    sums = {key: Sums(features[key], truth, experts) for look in looks for key in look}
    look, best = looks[0], torch.zeros(0)
    if experts > 2:
        without = [
            {key: Distance.of(each.statistics(out)) for key, each in sums.items()}
            for out in range(experts)
        ]
        for each in looks:
            found = [
                _noticed({key: one[key] for key in each}, check, check_truth != out, JUDGED)
                for out, one in enumerate(without)
            ]
            shares = torch.tensor(found, dtype=torch.float64)
            more = shares - best if len(best) else shares
            if not len(best) or float(more.mean()) > float(more.std()) / experts**0.5:
                look, best = each, shares
    novelty = Novelty.of({key: Distance.of(sums[key].statistics()) for key in look})
    novelty.set(novelty.distances_of(check), coverage)
    return novelty, best.tolist()


def _noticed(
    distances: Mapping[Key, Distance], check: Others, known: Tensor, coverage: float
) -> float:
    """The share of the rows in `check` that are not `known` which is new to these distances."""
    if not bool(known.any()) or bool(known.all()):
        return 0.0
    novelty = Novelty.of(distances)
    found = novelty.distances_of(check)
    novelty.set(found[known], coverage)
    return float(novelty.is_new(novelty.judged(found[~known])).double().mean())
