"""Model Breadcrumbs: drop the largest changes as well as the small ones, then merge."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .blocks import Change, changes, largest
from .dropped import Dropped, Keep, add_up, elect, rescaled
from .registry import PerExpert, fractions, shared_expert, spread


@shared_expert("breadcrumbs", paper="https://arxiv.org/abs/2312.06795")
@torch.no_grad()
def breadcrumbs(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    gamma: PerExpert = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ Σ_t w_t · middle(W_t - W_0)`, with `normalize` divided by `Σ w`.

    Of each tensor, the fraction `gamma` of the largest entries is dropped, and of the rest the
    largest are kept, the fraction `density` of all. Where that leaves too few, less is dropped at
    the top; a density of 1 drops nothing. `rescale` brings the L1 norm back to what it was.
    `int8_mask` is accepted because mergekit's recipes carry it; it changes no number.

    Source: Davari and Belilovsky, Model Breadcrumbs, arXiv:2312.06795; semantics of mergekit
    0.1.5, where `weight` is required. Of entries equally large, the first counts as the largest;
    mergekit takes any.
    """
    kept = _dropped(base, experts, density, gamma, rescale)
    return add_up(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


@shared_expert("breadcrumbs_ties", paper="https://arxiv.org/abs/2312.06795")
@torch.no_grad()
def breadcrumbs_ties(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    gamma: PerExpert = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ · elected(w_t · middle(W_t - W_0))`.

    Drops as `breadcrumbs` does, then elects signs as `ties` does.

    Source: Davari and Belilovsky, Model Breadcrumbs, arXiv:2312.06795, with Yadav et al.,
    arXiv:2306.01708; semantics of mergekit 0.1.5, where `weight` is required.
    """
    kept = _dropped(base, experts, density, gamma, rescale)
    return elect(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


def middle(change: Change, density: float, gamma: float) -> Keep:
    """Which entries stay: the `density` largest after the `gamma` very largest."""
    size = change.size
    kept, above = int(density * size), int(gamma * size)
    above = min(above, size - kept)
    inner = largest(change, size, above + kept)
    outer = largest(change, size, above)

    def keep(block: Float[Tensor, " block"], start: int) -> Bool[Tensor, " block"]:
        return inner(block, start) & ~outer(block, start)

    return keep


def _dropped(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    density: PerExpert,
    gamma: PerExpert,
    rescale: bool,
) -> list[Dropped]:
    count = len(experts)
    kept = [
        Dropped(change, middle(change, share, top)) if share < 1 else Dropped(change)
        for change, share, top in zip(
            changes(base, experts), fractions(density, count), fractions(gamma, count), strict=True
        )
    ]
    return rescaled(kept) if rescale else kept
