"""Means and a shared covariance of features, for prototypes and for noticing what is new.

The covariance is that of the rows around their own expert's mean, shrunk towards a multiple of the
identity by as much as Ledoit and Wolf (A well-conditioned estimator for large-dimensional
covariance matrices, 2004) find best: features are often wider than there are rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Of features (row, width) of T experts, in float64."""

    means: Float[Tensor, "expert width"]
    mean: Float[Tensor, " width"]
    """Over all rows."""
    within: Float[Tensor, "width width"]
    """Shrunk covariance of rows around their expert's mean."""
    total: Float[Tensor, "width width"]
    """The same around the mean of all."""
    counts: Int[Tensor, " expert"]
    """Rows of each expert."""


def statistics(
    features: Float[Tensor, "row width"], truth: Int[Tensor, " row"], experts: int
) -> Statistics:
    """Raises `InputError` for features that are not finite, or the same in all rows."""
    return Sums(features, truth, experts).statistics()


class Sums:
    """What the statistics of rows are made of, so that an expert can be left out of them.

    Raises `InputError` for features that are not finite, or the same in all rows.
    """

    def __init__(
        self, features: Float[Tensor, "row width"], truth: Int[Tensor, " row"], experts: int
    ) -> None:
        check(features)
        self.x, self.truth = features.double(), truth
        self.counts = torch.bincount(truth, minlength=experts)
        self.means = torch.stack([self.x[truth == t].mean(dim=0) for t in range(experts)])
        self.around = self.x - self.means[truth]
        self.scatter = self.around.T @ self.around

    def varies(self, out: int) -> bool:
        """Whether the rows of the others than the expert `out` differ."""
        rows = self.x[self.truth != out]
        return bool((rows != rows[0]).any())

    def statistics(self, out: int | None = None) -> Statistics:
        """Of all rows, or of all but those of the expert `out`."""
        kept = torch.arange(len(self.counts)) != (-1 if out is None else out)
        x, around, scatter = self.x, self.around, self.scatter
        if out is not None:
            rows = self.truth != out
            own = around[~rows]
            x, around, scatter = x[rows], around[rows], scatter - own.T @ own
        means, counts = self.means[kept], self.counts[kept]
        mean = x.mean(dim=0)
        apart = means - mean
        total = shrunk(scatter + (apart.T * counts) @ apart, x - mean)
        if not bool((around != 0).any()):  # a row each: nothing varies around them
            return Statistics(means, mean, total, total, counts)
        return Statistics(means, mean, shrunk(scatter, around), total, counts)


def check(features: Float[Tensor, "row width"]) -> None:
    """Raises `InputError` for features that are not finite, or the same in all rows."""
    finite(features)
    if len(features) > 1 and bool((features == features[0]).all()):
        raise InputError(
            "router features: all rows give the same features, so nothing can be told apart. Are "
            "the texts empty, or is this layer's output constant? Read another layer (layer=)."
        )


def finite(features: Float[Tensor, "row width"]) -> None:
    """Raises `InputError` for NaN or infinity."""
    if not bool(features.isfinite().all()):
        raise InputError(
            "router features: NaN or infinity in the shared expert's hidden states. Load the model "
            "in float32, or read an earlier layer (layer=)."
        )


def shrunk(
    scatter: Float[Tensor, "width width"], centred: Float[Tensor, "row width"]
) -> Float[Tensor, "width width"]:
    """Ledoit and Wolf's covariance of rows whose mean is zero; scatter: `centredᵀ centred`.

    Their equations 14 and following, from a scatter that is known: what they sum over entries of
    the rows' outer products needs the rows' lengths alone.
    """
    rows, width = centred.shape
    found = scatter / rows
    level = found.diagonal().mean()
    if level <= 0:  # nothing varies: any scale does
        return torch.eye(width, dtype=found.dtype)
    apart = found.square().sum() - width * level**2  # width times their d²
    noise = (centred.square().sum(dim=1).square().sum() / rows - found.square().sum()) / rows
    share = (noise / apart).clamp(0, 1) if apart > 0 else torch.ones((), dtype=found.dtype)
    eye = torch.eye(width, dtype=found.dtype)
    # Rows that are all alike, one for each expert, leave nothing to shrink.
    return (1 - share) * found + (share + 1e-6) * level * eye


def precision(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """The inverse of a covariance."""
    return torch.cholesky_inverse(torch.linalg.cholesky(covariance))
