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
    check(features)
    x = features.double()
    means = torch.stack([x[truth == t].mean(dim=0) for t in range(experts)])
    mean, counts = x.mean(dim=0), torch.bincount(truth, minlength=experts)
    total, around = shrunk(x - mean), x - means[truth]
    if not bool((around != 0).any()):  # a row each: nothing varies around them
        return Statistics(means, mean, total, total, counts)
    return Statistics(means, mean, shrunk(around), total, counts)


def check(features: Float[Tensor, "row width"]) -> None:
    """Raises `InputError` for features that are not finite, or the same in all rows."""
    if not bool(features.isfinite().all()):
        raise InputError(
            "router features: NaN or infinity in the shared expert's hidden states. Load the model "
            "in float32, or read an earlier layer (layer=)."
        )
    if len(features) > 1 and bool((features == features[0]).all()):
        raise InputError(
            "router features: all rows give the same features, so nothing can be told apart. Are "
            "the texts empty, or is this layer's output constant? Read another layer (layer=)."
        )


def shrunk(centred: Float[Tensor, "row width"]) -> Float[Tensor, "width width"]:
    """Ledoit and Wolf's covariance of rows whose mean is zero."""
    from sklearn.covariance import ledoit_wolf

    found, _ = ledoit_wolf(centred.numpy(), assume_centered=True)
    found = torch.from_numpy(found)
    level = found.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    # Rows that are all alike, one for each expert, leave nothing to shrink.
    return found + 1e-6 * level * torch.eye(len(found), dtype=found.dtype)


def precision(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """The inverse of a covariance."""
    return torch.cholesky_inverse(torch.linalg.cholesky(covariance))
