"""DELLA: drop entries of each task vector at random, small ones rather than large, then merge."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import RecipeError
from .blocks import block_of_rows, changes
from .dare import Drawn
from .dropped import Dropped, add_up, elect, rescaled
from .registry import PerExpert, fractions, shared_expert, spread


@shared_expert("della", paper="https://arxiv.org/abs/2406.11617")
@torch.no_grad()
def della(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    generators: Sequence[torch.Generator],
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    epsilon: PerExpert = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ · elected(w_t · drop(W_t - W_0, density_t, ε_t))`.

    Within each row, an entry is kept with a probability that rises evenly with the rank of its
    size, from `density - ε` for the smallest to `density + ε` for the largest. A row is what
    mergekit takes for one: entries along the second axis; all of a vector. An entry alone in its
    row is kept with probability `density`. What is kept is rescaled to the L1 norm of the whole
    tensor (the paper divides each entry by its probability), then merged as `ties` does it.
    `int8_mask` is accepted because mergekit's recipes carry it; it changes no number.

    `generators` holds one generator for each expert, as for `dare_linear`.

    Source: Deep et al., DELLA-Merging, arXiv:2406.11617; semantics of mergekit 0.1.5 (other random
    numbers, of course), where `weight` is required. Raises `RecipeError` unless `density ± ε` is
    within (0, 1); with a density of 0 or 1 nothing is drawn, and `ε` does not matter.
    """
    kept = _dropped(base, experts, density, epsilon, rescale, generators)
    return elect(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


@shared_expert("della_linear", paper="https://arxiv.org/abs/2406.11617")
@torch.no_grad()
def della_linear(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    generators: Sequence[torch.Generator],
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    epsilon: PerExpert = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ Σ_t w_t · drop(W_t - W_0, density_t, ε_t)`, with `normalize` divided by `Σ w`.

    Drops and rescales as `della` does (its docstring tells how that differs from the paper), and
    elects no signs.

    Source: Deep et al., DELLA-Merging, arXiv:2406.11617; semantics of mergekit 0.1.5, where
    `weight` is required. Raises `RecipeError` as `della` does.
    """
    kept = _dropped(base, experts, density, epsilon, rescale, generators)
    return add_up(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


def chances(
    block: Float[Tensor, " block"], row: int, rest: int, density: float, epsilon: float
) -> Float[Tensor, " block"]:
    """The probability of every entry to be kept, in float32, for rows of `row` entries that stand
    `rest` apart. Of entries equally large, the later counts as the larger."""
    size = block.abs().view(len(block) // max(1, row * rest), row, rest)
    order = size.argsort(dim=1, stable=True)
    place = torch.linspace(0, 1, row, device=block.device) if row > 1 else torch.tensor([0.5])
    place = place.to(block.device)[None, :, None].expand(order.shape)
    rank = torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(1, order, place)
    return (density - epsilon + 2 * epsilon * rank).flatten()


def _dropped(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    density: PerExpert,
    epsilon: PerExpert,
    rescale: bool,
    generators: Sequence[torch.Generator],
) -> list[Dropped]:
    shape = base.shape
    row, rest = (shape[1], prod(shape[2:])) if base.ndim > 1 else (base.numel(), 1)
    kept, count = [], len(experts)
    for change, mean, half, generator in zip(
        changes(base, experts, block_of_rows(row * rest)),
        fractions(density, count),
        fractions(epsilon, count),
        generators,
        strict=True,
    ):
        if mean >= 1:
            kept.append(Dropped(change))
            continue
        kept.append(Dropped(change, Drawn(generator, _chance(mean, half, row, rest))))
    return rescaled(kept) if rescale else kept


def _chance(
    density: float, epsilon: float, row: int, rest: int
) -> Callable[[Tensor], Tensor | float]:
    if density <= 0:
        return lambda block: 0.0
    if not (0 < density - epsilon and density + epsilon < 1):
        raise RecipeError(
            f"parameters.epsilon: expected density - epsilon and density + epsilon between 0 and "
            f"1, got density {density:g} and epsilon {epsilon:g}. Give a smaller epsilon: it is "
            "0.15 if none is given."
        )
    return partial(chances, row=row, rest=rest, density=density, epsilon=epsilon)
