"""Noticing inputs that are unlike all experts' data.

The score of a layer is the relative Mahalanobis distance (Ren et al., A Simple Fix to Mahalanobis
Distance for Improving Near-OOD Detection, 2021, arXiv:2106.09022): how far a row's features are
from the nearest expert's mean, less how far they are from the mean of all. Early layers notice
other words and formats, later ones other tasks, so several are looked at, each score in units of
its spread over calibration rows, and added up as exponentials: what stands out in one layer counts.
A row above the threshold is new; the threshold is set on the calibration rows, which the means
were not made of. Layers, and what is taken over tokens, are those that would notice most of
each expert's rows if it were unknown.

What is far from everything (another script, noise) is far from the mean of all as well, and its
relative distance small. So is new, too, what is further from every expert than any calibration row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import InputError
from .features import Features, Key, Pooling, keys
from .statistics import Statistics, Sums, precision

JUDGED = 0.95
"""Coverage at which looks are compared: a higher one would rest on a handful of rows."""
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
        scale = Scale.of(distances, coverage)
        for place, layer in enumerate(self.layers):
            self.at(layer).usual.copy_(scale.usual[place])
            self.at(layer).spread.copy_(scale.spread[place])
        self.threshold = scale.threshold
        self.offset.fill_(scale.offset)

    def judged(self, distances: Float[Tensor, "row layer 2"]) -> Float[Tensor, " row"]:
        """Scores from distances."""
        parts = [self.at(layer) for layer in self.layers]
        usual, spread = (torch.stack([getattr(p, n) for p in parts]) for n in ("usual", "spread"))
        relative, plain = _scores(distances, usual, spread)
        return torch.maximum(relative, plain - self.offset)

    def forward(self, features: Features) -> Float[Tensor, " batch"]:
        return self.judged(self.distances_of(features))

    def is_new(self, score: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return score > self.threshold


@dataclass(frozen=True)
class Scale:
    """From distances to scores, set on rows that are not new."""

    usual: Float[Tensor, "layer 2"]
    spread: Float[Tensor, "layer 2"]
    offset: float
    threshold: float

    @staticmethod
    def of(distances: Float[Tensor, "row layer 2"], coverage: float) -> Scale:
        """Raises `InputError` without rows, or for distances that are not finite."""
        found = distances.double()
        if len(found) == 0 or not bool(found.isfinite().all()):
            raise InputError(
                "router: expected finite features of at least one row to tell new inputs by. Give "
                "more rows, or switch it off (coverage 1)."
            )
        spread = found.std(dim=0) if len(found) > 1 else torch.zeros_like(found[0])
        usual, spread = found.mean(dim=0), torch.where(spread > 0, spread, 1.0)
        relative, plain = _scores(found, usual, spread)
        threshold = limit(relative, coverage)
        furthest = max(float(plain.max()), limit(plain, coverage))
        return Scale(usual, spread, furthest - threshold, threshold)

    def new(self, distances: Float[Tensor, "row layer 2"]) -> Bool[Tensor, " row"]:
        relative, plain = _scores(distances.double(), self.usual, self.spread)
        return torch.maximum(relative, plain - self.offset) > self.threshold


def _scores(
    distances: Float[Tensor, "row layer 2"],
    usual: Float[Tensor, "layer 2"],
    spread: Float[Tensor, "layer 2"],
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Of the relative and of the plain distances."""
    scaled = (distances - usual) / spread
    return scaled[..., 0].logsumexp(dim=1), scaled[..., 1].mean(dim=1)


def limit(scores: Float[Tensor, " row"], coverage: float) -> float:
    """What another row of the same kind stays below with this probability.

    The k-th smallest of n scores, k = ⌈(n + 1) coverage⌉ (split conformal prediction). Of too few
    rows for that, n < coverage / (1 - coverage), no score is enough: then the bound of a prediction
    interval for normal scores, mean + t · spread · √(1 + 1 / n), if it is higher than all.
    """
    from scipy.stats import t

    count = len(scores)
    place = math.ceil((count + 1) * coverage)
    if place <= count:
        return float(scores.sort().values[place - 1])
    if count < 2:
        return float(scores.max())
    beyond = float(t.ppf(coverage, count - 1)) * (1 + 1 / count) ** 0.5
    return max(float(scores.max()), float(scores.mean() + beyond * scores.std()))


def learnt(
    features: Features,
    truth: Int[Tensor, " row"],
    check: Others,
    check_truth: Int[Tensor, " check"],
    experts: int,
    coverage: float,
    looks: Sequence[Sequence[Key]],
) -> tuple[Novelty, dict[int, float]]:
    """What notices new inputs, and the share of each expert's rows that it would if unknown.

    features: of the rows that distances are made of. check: of others, for scale and threshold.
    looks: features to look at, each with one pooling. The first is taken, unless another notices
    more by over one standard error of the difference among experts, where `JUDGED` of the rows of
    the other experts stay below the threshold. The shares are those at `coverage`: all that can be
    known of unseen tasks without rows of them. With two experts there are none, and the first look
    is taken; nor are there of experts without rows in `check`.
    """
    own: dict[Key, Distance] = {}
    without: dict[Key, list[Tensor | None]] = {}
    for key in {key for look in looks for key in look}:
        sums = Sums(features[key], truth, experts)
        own[key] = Distance.of(sums.statistics())
        without[key] = [
            Distance.of(sums.statistics(out))(check[key]) if sums.varies(out) else None
            for out in range(experts if experts > 2 else 0)
        ]

    def shares(look: Sequence[Key], coverage: float) -> dict[int, float]:
        found = {}
        for out in range(experts if experts > 2 else 0):
            layers = [each for key in look if (each := without[key][out]) is not None]
            known = check_truth != out
            if layers and bool(known.any()) and not bool(known.all()):
                distances = torch.stack(layers, dim=1)
                new = Scale.of(distances[known], coverage).new(distances[~known])
                found[out] = float(new.double().mean())
        return found

    look, best = looks[0], shares(looks[0], JUDGED)
    for each in looks[1:]:
        found = shares(each, JUDGED)
        more = torch.tensor([found[t] - best[t] for t in found if t in best])
        if len(more) > 1 and float(more.mean()) > float(more.std()) / len(more) ** 0.5:
            look, best = each, found
    novelty = Novelty.of({key: own[key] for key in look})
    novelty.set(novelty.distances_of(check), coverage)
    return novelty, shares(look, coverage)
