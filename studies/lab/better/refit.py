r"""The shared expert refitted with the factors, so that both together miss least.

    W_s ← mean_t (W_t - B_t A_t)        B_t A_t ← SVD_r(W_t - W_s)

Each of the two is the best for the other, so the total error `Σ_t ‖W_t - W_s - B_t A_t‖²` never
rises. It starts at the average of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.merging.linalg import SVD, svd

ROUNDING = 1e-6
"""Of float32, as a share of the error: an error that stays the same may seem to rise so far."""


@dataclass(frozen=True)
class Fit:
    """One matrix of all experts."""

    shared: Float[Tensor, "out in"]
    factors: list[SVD]
    """Of each expert."""
    error: float
    """The total squared error."""


def start(experts: Sequence[Float[Tensor, "out in"]], factors: list[SVD]) -> Fit:
    """The average, with factors of what each expert differs from it."""
    shared = torch.stack(list(experts)).mean(dim=0)
    return Fit(shared, factors, total(experts, shared, factors))


def refit(experts: Sequence[Float[Tensor, "out in"]], fit: Fit) -> Fit:
    """One more round, at the ranks of `fit`."""
    rests = [x - _product(f) for x, f in zip(experts, fit.factors, strict=True)]
    shared = torch.stack(rests).mean(dim=0)
    between = total(experts, shared, fit.factors)
    after = settled(experts, fit, shared)
    energy = sum(float((x - shared).double().square().sum()) for x in experts)
    slack = ROUNDING * energy
    errors = fit.error, between, after.error
    assert after.error <= between + slack and between <= fit.error + slack, errors
    return after


def settled(experts: Sequence[Float[Tensor, "out in"]], fit: Fit, shared: Tensor) -> Fit:
    """The best factors beside another shared expert, at the ranks of `fit`."""
    factors = [svd(x - shared).cut(len(f.s)) for x, f in zip(experts, fit.factors, strict=True)]
    return Fit(shared, factors, total(experts, shared, factors))


def total(experts: Sequence[Tensor], shared: Tensor, factors: Sequence[SVD]) -> float:
    return sum(
        float((x - shared - _product(f)).double().square().sum())
        for x, f in zip(experts, factors, strict=True)
    )


def _product(f: SVD) -> Float[Tensor, "out in"]:
    return f.u * f.s @ f.vh
