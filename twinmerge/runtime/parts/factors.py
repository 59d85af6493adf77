"""Float factors of all experts, stacked along the rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..routing import Mix
from .part import Convolve, Part, aligned, back_to, convolved


class Factors(Part):
    """Float factors, stacked: A (stacked, in) and Bᵀ (stacked, out).

    `ranks` says how many components each expert has; they lie in the experts' order.
    """

    a: Tensor
    bt: Tensor

    def __init__(
        self,
        a: Float[Tensor, "stacked in"],
        b: Float[Tensor, "out stacked"],
        ranks: Sequence[int],
    ) -> None:
        super().__init__()
        assert sum(ranks) == len(a) == b.shape[1]
        self.out, self.in_, self.ranks = len(b), a.shape[1], tuple(ranks)
        self._put(a=a, bt=b.T)

    def _of(self, stacked: Tensor, mix: Mix) -> Tensor:
        """The components in the spans of the mix."""
        spans = mix.spans(self.ranks)
        if len(spans) == 1:
            return stacked[spans[0]]
        return torch.cat([stacked[span] for span in spans])

    def linear(self, y: Tensor, x: Tensor, mix: Mix) -> Tensor:
        if len(x) == len(y) and mix.gathers(x):
            z, bt = self._gathered(x, mix)
            z, bt = z.to(y.dtype), bt.to(y.dtype)
            flat = y.view(len(y), -1, y.shape[-1])
            if y.requires_grad:
                return torch.baddbmm(flat, z, bt).view(y.shape)
            flat.baddbmm_(z, bt)
            return y
        z = F.linear(x, self._of(self.a, mix))
        return back_to(
            y, z * aligned(mix.of_components(self.ranks, z), z.ndim), self._of(self.bt, mix)
        )

    def _gathered(self, x: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
        """(row, token, n) and (row, n, out), whose product is what each row's own experts add."""
        ids, weights = mix.of_chosen(self.ranks, x)
        # Whole rows of the factors at a time: faster than indexing with the table of ids.
        a, bt = (t.index_select(0, ids.flatten()).view(*ids.shape, -1) for t in (self.a, self.bt))
        z = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a.transpose(1, 2))
        return (z * weights if z.requires_grad else z.mul_(weights)), bt

    def before(self, bias: Tensor | None, x: Tensor, mix: Mix) -> Tensor:
        """bias + Σ_t w_t D_t x where rows gather: (row, ..., out), to which W_s x is then added.

        In this order each output is written twice, not three times. The bias is one more component,
        of weight 1, where there are tokens enough to pay for laying it beside the others.
        """
        z, bt = self._gathered(x, mix)
        if bias is None:
            y = torch.bmm(z, bt)
        else:
            bias = bias.view(-1, 1, bias.shape[-1])
            if z.shape[1] > 2 * z.shape[2]:
                z = torch.cat([z, z.new_ones(1, 1, 1).expand(*z.shape[:2], 1)], dim=2)
                y = torch.bmm(z, torch.cat([bt, bias.expand(len(bt), 1, -1)], dim=1))
            else:
                y = torch.baddbmm(bias, z, bt)
        return y.view(*x.shape[:-1], -1)

    def conv(
        self, y: Tensor, x: Tensor, mix: Mix, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        if mix.chosen is None:
            weights = mix.of_components(self.ranks, x)
            return convolved(
                self._of(self.a, mix), self._of(self.bt, mix), y, x, weights, kernel, convolve
            )
        for t in mix.active:
            for span in self._span(t):
                rows = mix.rows_of(t)
                weights = mix.like(x)[rows, t, None].expand(-1, self.ranks[t])
                add = convolved(
                    self.a[span], self.bt[span], None, x[rows], weights, kernel, convolve
                )
                y = y.index_add(0, rows, add)
        return y

    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        return self.back(y, self.look(ids, y.dtype), mix)

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.bt.T)

    def back(self, y: Tensor, found: Tensor, mix: Mix) -> Tensor:
        spans = mix.spans(self.ranks)
        if len(spans) == 1:
            found = found[..., spans[0]]
        else:
            found = torch.cat([found[..., span] for span in spans], dim=-1)
        return y + (found * aligned(mix.of_components(self.ranks, found), found.ndim)) @ self._of(
            self.a, mix
        )

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        owner = self._owner(weights.device)
        bt = self.bt.to(dtype) * weights.to(dtype)[:, owner, None]
        return bt.transpose(1, 2) @ self.a.to(dtype)

    def merged(self, weight: Float[Tensor, "out in"], mix: Mix) -> Float[Tensor, "out in"]:
        """weight + Σ_t w_t D_t for the one weighting of `mix`, of the active experts alone."""
        bt = self._of(self.bt, mix)
        scaled = bt * mix.of_components(self.ranks, bt)[0, :, None]
        return torch.addmm(
            weight, scaled.T.to(weight.dtype), self._of(self.a, mix).to(weight.dtype)
        )

    def turned(self) -> Factors:
        return Factors(self.bt, self.a.T, self.ranks)

    def one_channel(self) -> Factors:
        # One row of the matrix per rank: each is a kernel of its own.
        rows = torch.einsum("ro,ri->roi", self.bt, self.a).flatten(1)
        return Factors(rows, rows.new_ones(1, len(rows)), self.ranks)

    def _owner(self, device: torch.device) -> Tensor:
        owner = [t for t, rank in enumerate(self.ranks) for _ in range(rank)]
        return torch.tensor(owner, dtype=torch.long, device=device)


class TableFactors(Factors):
    """The factors of an embedding table: B lies row by row, as it is looked up.

    A lookup where each row has few experts of its own takes only their columns of B.
    """

    b: Tensor

    def __init__(self, factors: Factors) -> None:
        Part.__init__(self)
        self.out, self.in_, self.ranks = factors.out, factors.in_, factors.ranks
        self._put(a=factors.a, b=factors.bt.T)

    @property
    def bt(self) -> Tensor:  # type: ignore[override]
        return self.b.T

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.b)

    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        if not mix.gathers(ids[..., None]):
            return super().lookup(y, ids, mix)
        columns, weights = mix.of_chosen(self.ranks, y)
        flat = ids.reshape(len(ids), -1, 1)
        found = self.b.view(-1)[flat * self.b.shape[1] + columns[:, None]] * weights
        return y + torch.bmm(found, self.a[columns]).view(y.shape)
