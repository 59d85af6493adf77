"""DARE: drop entries of each task vector at random and rescale the rest, then merge."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .registry import PerExpert, fractions, shared_expert, spread, weighted_sum
from .task_arithmetic import task_arithmetic_coefficients
from .ties import elected, masked


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
    deltas = _dropped(base, experts, density, rescale, generators)
    coefficients = task_arithmetic_coefficients(
        spread(weight, experts), normalize=normalize, lambda_=lambda_
    )
    return base + weighted_sum(coefficients, deltas)


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
    deltas = torch.stack(_dropped(base, experts, density, rescale, generators))
    return base + lambda_ * elected(deltas, spread(weight, experts), normalize)


def keep_mask(
    shape: torch.Size, density: float, generator: torch.Generator
) -> Bool[Tensor, " *shape"]:
    """True with probability `density`, entry by entry, on the generator's device.

    Drawn in float32 whatever the maths runs in, so that the dtype of a merge does not change
    which entries survive.
    """
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return draw < density


def _dropped(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    density: PerExpert,
    rescale: bool,
    generators: Sequence[torch.Generator],
) -> list[Tensor]:
    """Every task vector with entries dropped at random; whole where density is 1."""
    deltas = []
    for expert, kept, generator in zip(
        experts, fractions(density, len(experts)), generators, strict=True
    ):
        delta = expert - base
        if kept < 1:
            mask = keep_mask(delta.shape, kept, generator).to(delta.device)
            delta = masked(delta, mask, rescale)
        deltas.append(delta)
    return deltas
