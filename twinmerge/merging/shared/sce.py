"""SCE: select the entries on which experts differ, weigh experts by energy, erase minorities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import Change, Largest, add, changes, largest, total
from .dropped import majority
from .registry import shared_expert, weighted_sum

NEGLIGIBLE = 1e-6
"""Below this sum of mean squares all experts weigh the same; no divisor is smaller (mergekit's)."""


@shared_expert("sce", paper="https://arxiv.org/abs/2408.07990")
@torch.no_grad()
def sce(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    select_topk: float = 1.0,
    int8_mask: bool = False,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + erased(w_t · select(W_t - W_0))`.

    *Select*: of the entries that vary between the experts, the fraction `select_topk` with the
    highest variance is kept; 1 keeps everything. *Calculate*: `w_t` is the mean square of what was
    kept, divided by the sum over experts; if that sum is below 1e-6, as fine-tuning may leave it,
    all experts weigh the same. *Erase*: entry by entry, the changes whose sign is that of their
    plain sum are averaged with these weights. `int8_mask` is accepted because mergekit's recipes
    carry it; it changes no number (there it only saves memory).

    Source: Wan et al., FuseChat, arXiv:2408.07990; semantics of mergekit 0.1.5. Of entries of equal
    variance, we keep the first; mergekit keeps any.
    """
    vectors = changes(base, experts)
    selected = _Selected(vectors, _most_varied(vectors, select_topk) if select_topk < 1 else None)
    energy = torch.zeros(len(experts), dtype=torch.float64)
    for deltas in selected:
        energy += torch.tensor(
            [total(delta.double().square()) for delta in deltas], dtype=torch.float64
        )
    energy /= max(1, base.numel())
    weight = energy / energy.sum() if energy.sum() >= NEGLIGIBLE else torch.ones_like(energy)
    weight = (weight / weight.sum()).to(experts)
    return add(base, (erased(deltas, weight) for deltas in selected))


def erased(
    deltas: Sequence[Float[Tensor, " block"]], weight: Float[Tensor, " expert"]
) -> Float[Tensor, " block"]:
    """The weighted average of the changes whose sign is that of their plain sum (0 is positive)."""
    sign = majority(weighted_sum(torch.ones_like(weight), deltas))
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, delta in zip(weight, deltas, strict=True):
        agrees = delta.sign() == sign
        merged += w * delta * agrees
        divisor += w * agrees
    return merged / divisor.clamp(min=NEGLIGIBLE)


@dataclass(frozen=True)
class _Variance:
    """Of every entry, between the experts: iterating gives it block by block."""

    vectors: Sequence[Change]

    def __iter__(self) -> Iterator[Float[Tensor, " block"]]:
        for first, *others in zip(*self.vectors, strict=True):
            # of the differences from the first: where all agree, it is exactly 0
            apart = [torch.zeros_like(first), *(delta - first for delta in others)]
            even = torch.full((len(apart),), 1 / len(apart)).to(first)
            mean = weighted_sum(even, apart)
            yield weighted_sum(even, [(x - mean).square() for x in apart])


@dataclass(frozen=True)
class _Selected:
    """All task vectors' blocks side by side, 0 where an entry is not selected."""

    vectors: Sequence[Change]
    keep: Largest | None

    def __iter__(self) -> Iterator[Sequence[Float[Tensor, " block"]]]:
        if self.keep is None:
            yield from zip(*self.vectors, strict=True)
            return
        start = 0
        for *deltas, variance in zip(*self.vectors, _Variance(self.vectors), strict=True):
            mask = self.keep(variance, start)
            yield [delta * mask for delta in deltas]
            start += len(variance)


def _most_varied(vectors: Sequence[Change], share: float) -> Largest:
    variance = _Variance(vectors)
    varying = sum(int(block.count_nonzero()) for block in variance)
    return largest(variance, vectors[0].size, int(varying * share) if share > 0 else 0)
