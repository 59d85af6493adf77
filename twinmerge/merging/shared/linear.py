"""The weighted average of the experts (model soups)."""

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import add, blocks, changes, joined
from .registry import NEGLIGIBLE_WEIGHT, PerExpert, shared_expert, spread, weighted_sum

SUMS_TO_ONE = 1e-6
"""How near to 1 the sum of weights must be for an average: 1/3 in float32 is not a third."""


def linear_coefficients(
    weight: Float[Tensor, " expert"], *, normalize: bool = True
) -> Float[Tensor, " expert"] | None:
    """`c_t = w_t / Σ w`; the weights themselves if they sum to 1; None otherwise.

    Without normalising, a part `Σ w - 1` of the base would be added as well, and no choice of
    `c_t` says that. Raises `ValueError` if the weights sum to 0 and are to be normalised.
    """
    total = weight.sum()
    if normalize:
        if total.abs() < NEGLIGIBLE_WEIGHT:
            raise ValueError(
                f"the weights {weight.tolist()} sum to 0, so they cannot be normalised. "
                "Give other weights, or normalize=False."
            )
        return weight / total
    return weight if (total - 1).abs() < SUMS_TO_ONE else None


@shared_expert(
    "linear",
    paper="https://arxiv.org/abs/2203.05482",
    coefficients=linear_coefficients,
    blockwise=True,
)
@torch.no_grad()
def linear(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    weight: PerExpert = 1.0,
    normalize: bool = True,
) -> Float[Tensor, " *shape"]:
    """`W_s = Σ_t w_t W_t / Σ_t w_t`, or `Σ_t w_t W_t` with `normalize=False`.

    The average is computed as `W_0 + Σ_t c_t (W_t - W_0)` with `c_t = w_t / Σ w`: the same
    number, but a tensor that no expert changed stays exactly the base's. The base is never one of
    the models averaged; mergekit averages it in as soon as a `base_model` is given.

    Source: Wortsman et al., Model soups, arXiv:2203.05482; semantics of mergekit 0.1.5, where
    `weight` is required. Raises `ValueError` if the weights sum to 0 and are to be normalised.
    """
    weight = spread(weight, experts)
    if not normalize:
        flat = zip(*(blocks(expert) for expert in experts), strict=True)
        return joined(base, (weighted_sum(weight, own) for own in flat))
    coefficients = linear_coefficients(weight)
    assert coefficients is not None, "normalised weights always have coefficients"
    vectors = zip(*changes(base, experts), strict=True)
    return add(base, (weighted_sum(coefficients, deltas) for deltas in vectors))
