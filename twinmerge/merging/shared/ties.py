"""TIES: trim small changes, elect a sign for every entry, merge what agrees with it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .registry import PerExpert, fractions, shared_expert, spread

TOO_SMALL_TO_RESCALE = 1e-7
"""Below this L1 norm a change is left as it is, as in mergekit: the ratio would be noise."""

BLOCK = 4096
"""Entries summed by one thread; torch shares out sums of more than 32768."""


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
        masked(expert - base, largest(expert - base, kept), rescale)
        for expert, kept in zip(experts, fractions(density, len(experts)), strict=True)
    ]
    weight = spread(weight, experts)
    return base + lambda_ * elected(torch.stack(trimmed), weight, normalize)


def largest(delta: Float[Tensor, " *shape"], density: float) -> Bool[Tensor, " *shape"]:
    """Where the `density` largest entries are; at least one, unless `density` is 0."""
    if density >= 1 or delta.numel() == 0:
        return torch.ones_like(delta, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    size = delta.abs().flatten()
    count = max(1, int(density * len(size)))
    # Selecting the threshold is linear in the size, where sorting is not; entries equal to it
    # are filled up from the front, so that the result is the same on every machine.
    threshold = size.kthvalue(len(size) - count + 1).values
    mask = size > threshold
    equal = (size == threshold).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view(delta.shape)


def masked(
    delta: Float[Tensor, " *shape"], mask: Bool[Tensor, " *shape"], rescale: bool
) -> Float[Tensor, " *shape"]:
    """`m ⊙ δ`, with `rescale` times `‖δ‖₁ / ‖m ⊙ δ‖₁`."""
    kept = delta * mask
    if not rescale:
        return kept
    before, after = l1_norm(delta), l1_norm(kept)
    if min(before, after) < TOO_SMALL_TO_RESCALE:
        return kept
    return kept * (before / after)


def l1_norm(delta: Float[Tensor, " *shape"]) -> float:
    """`‖δ‖₁`, summed in float64."""
    # Block by block: torch splits one long sum among its threads, and the last bits, and with
    # them the bytes of an artifact, would depend on how many there are.
    sums = delta.abs().flatten()
    while len(sums) > BLOCK:
        blocks, rest = sums.split([len(sums) // BLOCK * BLOCK, len(sums) % BLOCK])
        blocks = blocks.view(-1, BLOCK).sum(dim=1, dtype=torch.float64)
        sums = torch.cat([blocks, rest.sum(dtype=torch.float64)[None]])
    return sums.sum(dtype=torch.float64).item()


def elected(
    deltas: Float[Tensor, " expert *shape"], weight: Float[Tensor, " expert"], normalize: bool
) -> Float[Tensor, " *shape"]:
    """Sum of the weighted deltas whose sign is the sign of that sum over all experts.

    A sum of exactly 0 counts as positive. `normalize` divides by the weights of those that
    agreed, entry by entry; where nobody did, the result is 0.
    """
    weight = weight.view(-1, *[1] * (deltas.ndim - 1))
    weighted = weight * deltas
    positive = weighted.sum(dim=0) >= 0
    agrees = torch.where(positive, weighted > 0, weighted < 0)
    merged = (weighted * agrees).sum(dim=0)
    if not normalize:
        return merged
    divisor = (weight * agrees).sum(dim=0)
    return merged / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
