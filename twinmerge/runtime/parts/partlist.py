"""Several parts of one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...artifact.codec import (
    Quantised,
)
from ..routing import Mix
from .factors import Factors
from .packed import Packed
from .part import Part
from .scattered import Scattered


def stacked(parts: list[Part]) -> tuple[Part, ...]:
    """The same in as few parts as can be: factors of one storage along the rank; floats first.

    The parts of one storage must come in the experts' order.
    """
    few: list[Part] = []
    floats = [part for part in parts if isinstance(part, Factors)]
    if floats:
        a, bt = torch.cat([f.a for f in floats]), torch.cat([f.bt for f in floats])
        few.append(Factors(a, bt.T, _added(floats)))
    for bits in (8, 4):
        packed = [part for part in parts if isinstance(part, Packed) and part.bits == bits]
        if packed:
            a, b = (_joined([side(part) for part in packed]) for side in (Packed._a, Packed._b))
            few.append(Packed(a, b, _added(packed)))
    return (*few, *(part for part in parts if isinstance(part, Scattered)))


def _added(parts: Sequence[Part]) -> list[int]:
    return [sum(ranks) for ranks in zip(*(part.ranks for part in parts), strict=True)]


def _joined(rows: list[Quantised]) -> Quantised:
    q, scale = torch.cat([x.q for x in rows]), torch.cat([x.scale for x in rows])
    return Quantised(q, scale, rows[0].bits, rows[0].n)


class PartList(nn.ModuleList):
    """Parts of one matrix, whose results are added.

    With `turned`, they are parts of the transpose of the tensor that `dense` is asked for.
    """

    def __init__(self, parts: Iterable[Part] = (), *, turned: bool = False) -> None:
        super().__init__(parts)
        self.turned = turned

    def __iter__(self) -> Iterator[Part]:
        return super().__iter__()  # type: ignore[return-value]

    def wanted(self, mix: Mix) -> Iterator[Part]:
        """Without the parts of experts to whom the running batch gives no weight."""
        return (part for part in self if part.active(mix))

    def dense(self, weights: Float[Tensor, "row expert"], like: Tensor) -> Tensor:
        """like + Σ_t w_t D_t for each row of weights: (row, *like.shape)."""
        like = like.mT if self.turned else like
        mixed = like.expand(len(weights), *like.shape)
        for part in self:
            mixed = mixed + part.dense(weights.to(like), like.dtype).view(mixed.shape)
        return mixed.mT if self.turned else mixed

    def merged(self, like: Tensor, mix: Mix) -> Tensor:
        """like + Σ_t w_t D_t for the one weighting of `mix`."""
        wanted = list(self.wanted(mix))
        if len(wanted) == 1 and isinstance(wanted[0], Factors):
            # Of the active experts alone, added in the product itself.
            shape = like.mT.shape if self.turned else like.shape
            flat = like.mT if self.turned else like.reshape(wanted[0].out, wanted[0].in_)
            mixed = wanted[0].merged(flat, mix).view(shape)
            return mixed.mT if self.turned else mixed
        return self.dense(mix.like(like), like)[0]

    def rank(self, experts: Sequence[int]) -> int:
        """Components of these experts, all parts together (one for a sparse matrix)."""
        return sum(part.ranks[t] for part in self for t in experts)
