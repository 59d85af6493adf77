"""DARE: drop entries of each task vector at random and rescale the rest, then merge."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .blocks import changes
from .dropped import Dropped, add_up, elect, rescaled
from .registry import PerExpert, fractions, shared_expert, spread


@shared_expert("dare_linear", paper="https://arxiv.org/abs/2311.03099")
@torch.no_grad()
def dare_linear(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    generators: Sequence[torch.Generator],
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ Σ_t w_t · drop(W_t - W_0, density_t)`, with `normalize` divided by `Σ w`.

    Each entry is kept with probability `density`. `rescale` is mergekit's: what is kept is
    multiplied by `‖δ‖₁ / ‖m ⊙ δ‖₁`, so that every tensor keeps its L1 norm exactly; the
    paper multiplies by `1 / density`, which keeps every entry in expectation. The two factors
    agree on large tensors. `int8_mask` is accepted because mergekit's recipes carry it; it
    changes no number (there it only saves memory).

    `generators` holds one generator for each expert. Seed them from what the tensor and the
    expert are called, and the result depends on neither the order of experts nor the workers.

    Source: Yu et al., Language Models are Super Mario, arXiv:2311.03099; semantics of mergekit
    0.1.5 (other random numbers, of course), where `weight` is required.
    """
    kept = _dropped(base, experts, density, rescale, generators)
    return add_up(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


@shared_expert("dare_ties", paper="https://arxiv.org/abs/2311.03099")
@torch.no_grad()
def dare_ties(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    generators: Sequence[torch.Generator],
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ · elected(w_t · drop(W_t - W_0, density_t))`.

    Drops and rescales as `dare_linear` does (its docstring tells how that differs from the
    paper), then elects signs as `ties` does.

    Source: Yu et al., Language Models are Super Mario, arXiv:2311.03099, with Yadav et al.,
    arXiv:2306.01708; semantics of mergekit 0.1.5, where `weight` is required.
    """
    kept = _dropped(base, experts, density, rescale, generators)
    return elect(base, kept, spread(weight, experts), normalize=normalize, lambda_=lambda_)


def uniform(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Numbers in [0, 1), in float32 whatever the maths runs in, so that the dtype of a merge does
    not change which entries survive."""
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float32)


class Drawn:
    """Keeps every entry with a probability of its own; each time round it draws the same.

    `chance` gives the probability for each entry of a block, or one for all.
    """

    def __init__(
        self,
        generator: torch.Generator,
        chance: Callable[[Float[Tensor, " block"]], Float[Tensor, " block"] | float],
    ) -> None:
        self._generator, self._chance = generator, chance
        self._start = generator.get_state()

    def __call__(self, block: Float[Tensor, " block"], start: int) -> Bool[Tensor, " block"]:
        if start == 0:
            # Drawing twice costs less than a mask of the tensor's size for every expert.
            self._generator.set_state(self._start)
        return uniform(len(block), self._generator).to(block.device) < self._chance(block)


def _dropped(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    density: PerExpert,
    rescale: bool,
    generators: Sequence[torch.Generator],
) -> list[Dropped]:
    """Every task vector with entries dropped at random; whole where density is 1."""
    kept = [
        Dropped(change, Drawn(generator, lambda block, chance=chance: chance))
        if chance < 1
        else Dropped(change)
        for change, chance, generator in zip(
            changes(base, experts), fractions(density, len(experts)), generators, strict=True
        )
    ]
    return rescaled(kept) if rescale else kept
