"""Model Stock: from the average towards the base, by the angles between the task vectors."""

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import add, block_of_rows, changes, total
from .registry import shared_expert, weighted_sum

NEGLIGIBLE = 1e-6
"""No smaller product of norms is divided by, and no smaller denominator (mergekit's limits)."""


@shared_expert("model_stock", paper="https://arxiv.org/abs/2403.19522", experts=(2, None))
@torch.no_grad()
def model_stock(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    filter_wise: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + r · mean_t (W_t - W_0)`, with `r = T cos θ / (1 + (T - 1) cos θ)`.

    `cos θ` is the mean, over all pairs of experts, of the cosine between their task vectors, tensor
    by tensor. With `filter_wise`, every row has an angle of its own; a row is what mergekit takes
    for one, the entries along the last axis. Where the denominator is 0, as with two opposite task
    vectors, the base stays. A negative mean cosine makes r negative, so that `W_s` lies beyond the
    base, without bound as the cosine nears `-1 / (T - 1)`. Products of norms below `NEGLIGIBLE`
    count as that: task vectors shorter than 1e-3 seem less alike, and `W_s` stays near the base.

    Source: Jang et al., Model Stock, arXiv:2403.19522; semantics of mergekit 0.1.5, which asks for
    two experts or more beside the base.
    """
    count, row = len(experts), base.shape[-1] if filter_wise and base.ndim else base.numel()
    mean = torch.full((count,), 1 / count, dtype=base.dtype, device=base.device)
    if row == base.numel():
        gram = torch.zeros(count * (count + 1) // 2, 1, dtype=torch.float64)
        for deltas in zip(*changes(base, experts), strict=True):
            gram += inner_products(deltas)
        r = float(interpolation(gram, count))
        vectors = zip(*changes(base, experts), strict=True)
        return add(base, (r * weighted_sum(mean, deltas) for deltas in vectors))

    def rows(deltas: Sequence[Tensor]) -> Tensor:
        r = interpolation(inner_products(deltas, row), count).to(base)
        return (r[:, None] * weighted_sum(mean, deltas).view(-1, row)).flatten()

    vectors = zip(*changes(base, experts, block_of_rows(row)), strict=True)
    return add(base, map(rows, vectors))


def inner_products(
    deltas: Sequence[Float[Tensor, " block"]], row: int | None = None
) -> Float[Tensor, "pair rows"]:
    """`⟨δ_i, δ_j⟩` in float64, for all i ≤ j in order: of every row, or of all as one row."""
    pairs = [a * b for a, b in combinations_with_replacement(deltas, 2)]
    if row is None or len(deltas[0]) == row:  # torch may share out one long sum among its threads
        return torch.tensor([[total(pair)] for pair in pairs], dtype=torch.float64)
    return torch.stack([pair.view(-1, row).sum(dim=1, dtype=torch.float64) for pair in pairs])


def interpolation(gram: Float[Tensor, "pair rows"], experts: int) -> Float[Tensor, " rows"]:
    """How far from the base to the average, for every row, from its inner products."""
    product = dict(zip(combinations_with_replacement(range(experts), 2), gram, strict=True))
    norm = [product[i, i].sqrt() for i in range(experts)]
    cosines = [
        (product[i, j] / (norm[i] * norm[j]).clamp(min=NEGLIGIBLE)).clamp(-1, 1)
        for i, j in combinations(range(experts), 2)
    ]
    cosine = torch.stack(cosines).mean(dim=0)
    denominator = 1 + (experts - 1) * cosine
    ratio = experts * cosine / denominator
    return ratio.where(denominator.abs() >= NEGLIGIBLE, 0)
