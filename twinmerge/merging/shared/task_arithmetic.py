"""Task arithmetic: the base plus a weighted sum of task vectors."""

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import add, changes
from .registry import NEGLIGIBLE_WEIGHT, PerExpert, shared_expert, spread, weighted_sum


def task_arithmetic_coefficients(
    weight: Float[Tensor, " expert"],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " expert"]:
    """`c_t = λ w_t`, divided by `Σ w` with `normalize`.

    As in mergekit, weights that sum to 0 are left as they are (recipes refuse them earlier).
    """
    total = weight.sum()
    if normalize and total.abs() >= NEGLIGIBLE_WEIGHT:
        weight = weight / total
    return lambda_ * weight


@shared_expert(
    "task_arithmetic",
    paper="https://arxiv.org/abs/2212.04089",
    coefficients=task_arithmetic_coefficients,
    blockwise=True,
)
@torch.no_grad()
def task_arithmetic(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    weight: PerExpert = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ Σ_t w_t (W_t - W_0)`, with `normalize` divided by `Σ w`.

    `int8_mask` is accepted because mergekit's recipes carry it; it changes no number (there it
    only saves memory). mergekit also accepts `density` and `rescale` here and ignores them: we
    have neither.

    Source: Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089; semantics of
    mergekit 0.1.5, where `weight` is required.
    """
    coefficients = task_arithmetic_coefficients(
        spread(weight, experts), normalize=normalize, lambda_=lambda_
    )
    vectors = zip(*changes(base, experts), strict=True)
    return add(base, (weighted_sum(coefficients, deltas) for deltas in vectors))
