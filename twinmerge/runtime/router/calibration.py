"""From logits to probabilities that mean what they say, and from these to routing weights.

A temperature is fitted on rows that no scorer was trained on (Guo et al., On Calibration of Modern
Neural Networks, 2017, arXiv:1706.04599). Targets are smoothed as Platt (1999) does, so that rows
which are all right do not ask for an infinite certainty.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Sharpness = float | Literal["top"]
"""Power to which probabilities are raised; `top`: all weight on the highest."""

BINS = 15
_TEMPERATURES = (1e-3, 1e3)


def fit_temperature(logits: Float[Tensor, "row expert"], truth: Int[Tensor, " row"]) -> float:
    """T > 0 that makes softmax(logits / T) most likely. 1 without rows."""
    from scipy.optimize import minimize_scalar

    rows, experts = logits.shape
    if rows == 0 or experts == 1:
        return 1.0
    logits = logits.double()
    wrong = 1 / (rows + 2)  # all experts but the own one together
    aim = torch.full_like(logits, wrong / (experts - 1))
    aim[torch.arange(rows), truth] = 1 - wrong

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / torch.tensor(log_temperature).double().exp(), aim))

    bounds = torch.tensor(_TEMPERATURES).log().tolist()
    found = minimize_scalar(loss, bounds=bounds, method="bounded")
    return float(torch.tensor(found.x).double().exp())


def calibration_error(
    probabilities: Float[Tensor, "row expert"], truth: Int[Tensor, " row"]
) -> float:
    """Expected calibration error: |share right - mean confidence| over bins, weighted by rows.

    Of the highest probability, in `BINS` bins of equal width (Guo et al., equation 3).
    """
    if len(truth) == 0:
        return 0.0
    confidence, guess = probabilities.double().max(dim=1)
    right = (guess == truth).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right - confidence)
    return float(gap.abs().sum() / len(truth))


def sharpened(
    probabilities: Float[Tensor, "row expert"], sharpness: Sharpness
) -> Float[Tensor, "row expert"]:
    """Probabilities to the power of `sharpness`, scaled so that rows sum to 1."""
    if sharpness == "top":
        return F.one_hot(probabilities.argmax(dim=-1), probabilities.shape[-1]).to(probabilities)
    if sharpness == 1:
        return probabilities
    # Of the highest first: a small probability to a large power is zero.
    raised = (probabilities / probabilities.amax(dim=-1, keepdim=True)) ** sharpness
    return raised / raised.sum(dim=-1, keepdim=True)
