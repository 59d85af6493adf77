"""TIES: trim small changes, elect a sign for every entry, merge what agrees with it."""

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import Change, Largest, changes, largest
from .dropped import Dropped, elect, rescaled
from .registry import PerExpert, fractions, shared_expert, spread


@shared_expert("ties", paper="https://arxiv.org/abs/2306.01708")
@torch.no_grad()
def ties(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ · elected(w_t · trim(W_t - W_0, density_t))`.

    `density` is the fraction of entries kept, the largest ones of each tensor; `rescale` then
    brings the L1 norm back to what it was. With `normalize` every entry is divided by the
    weights of the experts that agree with its elected sign. `int8_mask` is accepted because
    mergekit's recipes carry it; it changes no number (there it only saves memory).

    Source: Yadav et al., TIES-Merging, arXiv:2306.01708; semantics of mergekit 0.1.5, where
    `weight` is required. Of entries equally large, we keep the first; mergekit keeps any.
    """
    trimmed = [
        Dropped(change, top(change, kept)) if kept < 1 else Dropped(change)
        for change, kept in zip(
            changes(base, experts), fractions(density, len(experts)), strict=True
        )
    ]
    trimmed = rescaled(trimmed) if rescale else trimmed
    return elect(base, trimmed, spread(weight, experts), normalize=normalize, lambda_=lambda_)


def top(change: Change, density: float) -> Largest:
    """The `density` largest entries; at least one, unless `density` is 0."""
    count = max(1, int(density * change.size)) if density > 0 else 0
    return largest(change, change.size, count)
