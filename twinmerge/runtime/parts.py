r"""Exclusive parts of one matrix as they run: `Σ_t w_t D_t` without ever adding it up.

`D_t` is what expert t knows of one (out, in) matrix, and every row of a batch has its own w. A
part holds the D_t of some experts, as the artifact stores them:

    Factors    D_t = B_t A_t in floats, all experts stacked along the rank
    Packed     the same with A and B quantised, and kept so
    Scattered  one expert's D_t, few of whose entries are not zero, kept as values and positions

A matrix whose experts are stored in several ways has several parts, and what they give is added.
Each part serves every kind of layer by the operations of `Part`, and is exact for each row.
Experts without a weight in the batch cost nothing; where each row has few experts of its own
(`Mix.chosen`), only these are multiplied, in float factors by products of one row each, in the
other parts expert by expert.

No dense copy of a quantised or sparse part is kept: within an operation, at most `BLOCK` entries of
it (never less than a row) are dequantised or written out at a time. Only `dense`, for bare
parameters and dense merges, gives a whole matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..artifact.codec import (
    Quantised,
    Sparse,
    dequantise,
    dequantise_columns,
)
from .routing import Mix

BLOCK = 1 << 20
"""Entries of a quantised or sparse part that are floats at one time: 4 MiB in float32."""

Convolve = Callable[[Tensor, Tensor, None], Tensor]
"""x, kernels and no bias -> y, with stride and padding of the layer."""


def aligned(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, n) as (batch, 1, ..., 1, n) with `ndim` axes."""
    return mixed.view(mixed.shape[0], *[1] * (ndim - 2), mixed.shape[-1])


class Part(nn.Module, ABC):
    """What some experts know of one matrix. `mix` has weights for each row, or one for all.

    Axes of x and y but the first and last are free. Results have the dtype of x or y, or the one
    asked for.
    """

    out: int
    in_: int
    ranks: tuple[int, ...]
    """Of every expert of the artifact: how much one row of its weights costs, about."""

    @abstractmethod
    def linear(self, y: Tensor, x: Tensor, mix: Mix) -> Tensor:
        """y + Σ_t w_t D_t x, x: (batch, ..., in), y: (batch, ..., out). May overwrite `y`."""

    @abstractmethod
    def conv(
        self, y: Tensor, x: Tensor, mix: Mix, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        """y + Σ_t w_t D_t * x, where a row of D_t is a kernel of that shape."""

    @abstractmethod
    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        """y + Σ_t w_t D_t[ids], ids: (batch, ...) or (1, ...), y: (batch or 1, ..., in)."""

    @abstractmethod
    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What `back` makes rows `ids` of D_t from, of all experts: (..., stacked)."""

    @abstractmethod
    def back(self, y: Tensor, found: Tensor, mix: Mix) -> Tensor:
        """y + the rows of Σ_t w_t D_t that `found` (of `look`) stands for: (..., in)."""

    @abstractmethod
    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_t w_t D_t for each row of weights (batch, expert): (batch, out, in)."""

    @abstractmethod
    def turned(self) -> Part:
        """The part of the transposed matrix."""

    @abstractmethod
    def one_channel(self) -> Part:
        """The part of the matrix laid out as one row: (1, out · in). Packed ones give float32."""

    def active(self, mix: Mix) -> bool:
        """Whether it adds anything."""
        return any(self.ranks[t] for t in mix.active)

    def _put(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            kept = None if tensor is None else tensor.contiguous()
            self.register_buffer(name, kept, persistent=False)

    def _span(self, expert: int) -> list[slice]:
        """The components of one expert; none if it has no rank here."""
        begin = sum(self.ranks[:expert])
        return [slice(begin, begin + self.ranks[expert])] if self.ranks[expert] else []


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
        return _back_to(
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
            return _conv(
                self._of(self.a, mix), self._of(self.bt, mix), y, x, weights, kernel, convolve
            )
        for t in mix.active:
            for span in self._span(t):
                rows = mix.rows_of(t)
                weights = mix.like(x)[rows, t, None].expand(-1, self.ranks[t])
                add = _conv(self.a[span], self.bt[span], None, x[rows], weights, kernel, convolve)
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


class Packed(Part):
    """Quantised factors, int8 or int4, B transposed: rows of both are components of the rank.

    The buffers are integers, so that `.to(dtype)` of a model leaves them alone: the scales, which
    are bfloat16, are kept as the int16 of the same bits. An operation dequantises `BLOCK` entries
    of A and B at a time to the dtype that it runs in; a lookup, of B only the columns asked for.
    """

    a_q: Tensor
    a_scale: Tensor
    b_q: Tensor
    b_scale: Tensor

    def __init__(self, a: Quantised, b: Quantised, ranks: Sequence[int]) -> None:
        super().__init__()
        self.bits, self.in_, self.out, self.ranks = a.bits, a.n, b.n, tuple(ranks)
        self._put(a_q=a.q, a_scale=a.scale.view(torch.int16))
        self._put(b_q=b.q, b_scale=b.scale.view(torch.int16))

    def _a(self, rows: slice = slice(None)) -> Quantised:
        scale = self.a_scale[rows].view(torch.bfloat16)
        return Quantised(self.a_q[rows], scale, self.bits, self.in_)

    def _b(self, rows: slice = slice(None)) -> Quantised:
        scale = self.b_scale[rows].view(torch.bfloat16)
        return Quantised(self.b_q[rows], scale, self.bits, self.out)

    def _pieces(self, spans: Sequence[slice]) -> Iterator[slice]:
        """Components in these spans, `BLOCK` entries of both factors at a time."""
        for span in spans:
            for piece in _slices(span.stop - span.start, self.in_ + self.out):
                yield slice(span.start + piece.start, span.start + piece.stop)

    def _floats(self, span: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return dequantise(self._a(span), dtype), dequantise(self._b(span), dtype)

    def _weighted(self, mix: Mix, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pieces in the spans of the mix, with the weights of their components: (row, piece)."""
        weights, start = mix.of_components(self.ranks, x), 0
        for piece in self._pieces(mix.spans(self.ranks)):
            size = piece.stop - piece.start
            yield piece, weights[:, start : start + size]
            start += size

    def linear(self, y: Tensor, x: Tensor, mix: Mix) -> Tensor:
        if len(x) != len(y) or not mix.gathers(x):
            for piece, weights in self._weighted(mix, y):
                a, bt = self._floats(piece, y.dtype)
                z = F.linear(x.to(y.dtype), a)
                y = _back_to(y, z * aligned(weights, z.ndim), bt)
            return y
        for t in mix.active:
            rows = mix.rows_of(t)
            for piece in self._pieces(self._span(t)):
                a, bt = self._floats(piece, y.dtype)
                z = F.linear(x[rows].to(y.dtype), a)
                z = z * aligned(mix.like(y)[rows, t, None], z.ndim)
                y = y.index_add(0, rows, z @ bt)
        return y

    def conv(
        self, y: Tensor, x: Tensor, mix: Mix, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        for piece, weights in self._weighted(mix, x):
            a, bt = self._floats(piece, x.dtype)
            y = _conv(a, bt, y, x, weights, kernel, convolve)
        return y

    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        return self.back(y, self.look(ids, y.dtype), mix)

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        found = dequantise_columns(self._b(), ids.flatten(), dtype)
        return found.T.reshape(*ids.shape, -1)

    def back(self, y: Tensor, found: Tensor, mix: Mix) -> Tensor:
        for piece, weights in self._weighted(mix, found):
            a = dequantise(self._a(piece), found.dtype)
            y = y + (found[..., piece] * aligned(weights, found.ndim)) @ a
        return y

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(len(weights), self.out, self.in_, dtype=dtype, device=weights.device)
        for t in range(len(self.ranks)):
            for piece in self._pieces(self._span(t)):
                a, bt = self._floats(piece, dtype)
                total += weights[:, t, None, None].to(dtype) * (bt.T @ a)
        return total

    def turned(self) -> Packed:
        return Packed(self._b(), self._a(), self.ranks)

    def one_channel(self) -> Factors:
        # As the float factors: rows that are products of two quantised ones are not quantised.
        whole = Factors(dequantise(self._a()), dequantise(self._b()).T, self.ranks)
        return whole.one_channel()


class Scattered(Part):
    """One expert's sparse matrix, row by row: values, their columns, where each row begins.

    That takes 2 bytes for a column (4 where `in` is above 32,767) beside each value, and 8 for each
    row: more than a file with a mask, but rows are found without counting bits. An operation
    writes out `BLOCK` entries of the matrix at a time, in whole rows; a lookup, the rows asked for.
    """

    values: Tensor
    column: Tensor
    start: Tensor

    def __init__(self, sparse: Sparse, expert: int, experts: int) -> None:
        super().__init__()
        self.expert = expert
        self.out, self.in_ = sparse.shape
        self.ranks = tuple(int(t == expert) for t in range(experts))
        small = self.in_ <= torch.iinfo(torch.int16).max
        start = torch.searchsorted(sparse.index, torch.arange(self.out + 1) * self.in_)
        self._put(
            values=sparse.values,
            column=(sparse.index % self.in_).to(torch.int16 if small else torch.int32),
            start=start,
        )
        # As numbers, so that running on a GPU does not wait for them.
        self._slices = [
            (rows, slice(*start[[rows.start, rows.stop]].tolist()))
            for rows in _slices(self.out, self.in_)
        ]

    def sparse(self) -> Sparse:
        ids = torch.arange(self.out, device=self.start.device)
        row = torch.repeat_interleave(ids, self.start.diff())
        return Sparse(self.values, row * self.in_ + self.column, (self.out, self.in_))

    def _written(self, row: Tensor, which: Tensor | slice, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, in) with these of the values in these rows of it, and zeros."""
        values = self.values[which].to(dtype)
        at = row * self.in_ + self.column[which]
        return values.new_zeros(rows * self.in_).scatter_(0, at, values).view(rows, self.in_)

    def _rows(self, ids: Int[Tensor, " row"], dtype: torch.dtype) -> Float[Tensor, "row in"]:
        """These rows of the matrix, written out."""
        start = self.start[ids]
        count = self.start[ids + 1] - start
        row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), count)
        shift = start - (count.cumsum(dim=0) - count)
        which = torch.arange(len(row), device=ids.device) + shift[row]
        return self._written(row, which, len(ids), dtype)

    def _blocks(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "row in"]]:
        """Some rows of the matrix after the other, written out."""
        for rows, which in self._slices:
            count = self.start[rows.start : rows.stop + 1].diff()
            ids = torch.arange(len(count), device=count.device)
            row = torch.repeat_interleave(ids, count, output_size=which.stop - which.start)
            yield self._written(row, which, len(count), dtype)

    def _own(self, mix: Mix, like: Tensor) -> Float[Tensor, "row 1"]:
        """The expert's weight in each row."""
        return mix.like(like)[:, self.expert, None]

    def linear(self, y: Tensor, x: Tensor, mix: Mix) -> Tensor:
        rows = None
        if len(x) == len(y) and mix.gathers(x):
            rows = mix.rows_of(self.expert)
        weights = self._own(mix, y)
        if rows is not None:
            z = x[rows].to(y.dtype) * aligned(weights[rows], x.ndim)
            add = [z.flatten(0, -2) @ block.T for block in self._blocks(y.dtype)]
            return y.index_add(0, rows, torch.cat(add, dim=-1).view(*z.shape[:-1], self.out))
        z = x.to(y.dtype) * aligned(weights, x.ndim)
        if y.shape[0] != z.shape[0] or y.requires_grad:
            y = y.expand(len(z), *y.shape[1:]).clone(memory_format=torch.contiguous_format)
        flat, z = y.view(-1, self.out), z.flatten(0, -2)
        for (out, _), block in zip(self._slices, self._blocks(y.dtype), strict=True):
            flat[:, out].addmm_(z, block.T)
        return y

    def conv(
        self, y: Tensor, x: Tensor, mix: Mix, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        blocks = self._blocks(x.dtype)
        more = torch.cat([convolve(x, each.view(-1, *kernel), None) for each in blocks], dim=1)
        return y + more * _over_channels(self._own(mix, more), more.ndim)

    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        return self.back(y, self.look(ids, y.dtype), mix)

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        unique, inverse = ids.unique(return_inverse=True)
        return self._rows(unique, dtype)[inverse]

    def back(self, y: Tensor, found: Tensor, mix: Mix) -> Tensor:
        return y + found * aligned(self._own(mix, found), found.ndim)

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        whole = torch.cat(list(self._blocks(dtype)))
        return weights[:, self.expert, None, None].to(dtype) * whole

    def turned(self) -> Scattered:
        sparse = self.sparse()
        row, column = sparse.index // self.in_, sparse.index % self.in_
        index, order = (column * self.out + row).sort()
        turned = Sparse(sparse.values[order], index, (self.in_, self.out))
        return Scattered(turned, self.expert, len(self.ranks))

    def one_channel(self) -> Scattered:
        sparse = self.sparse()
        row = Sparse(sparse.values, sparse.index, (1, self.out * self.in_))
        return Scattered(row, self.expert, len(self.ranks))


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


def _slices(count: int, entries: int) -> Iterator[slice]:
    """Slices of `count` rows of that many entries, `BLOCK` entries in each, or one row."""
    step = max(1, BLOCK // max(entries, 1))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _back_to(
    y: Tensor, z: Float[Tensor, "*rows stacked"], bt: Float[Tensor, "stacked out"]
) -> Tensor:
    """y + z Bᵀ."""
    # Autocast leaves factors in another type than y, and operations in place alone.
    z, bt = z.to(y.dtype), bt.to(y.dtype)
    if y.shape[0] != z.shape[0]:  # one row of x served the whole batch
        return y + z @ bt
    if y.requires_grad:
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), bt).view(y.shape)
    # y is ours and fresh: adding in place saves a pass over the activations.
    y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), bt)
    return y


def _conv(
    a: Float[Tensor, "stacked in"],
    bt: Float[Tensor, "stacked out"],
    y: Tensor | None,
    x: Tensor,
    weights: Float[Tensor, "row stacked"],
    kernel: torch.Size,
    convolve: Convolve,
) -> Tensor:
    """The kernels of A, scaled, then B as a 1×1 convolution; added to y if there is one."""
    z = convolve(x, a.view(-1, *kernel), None)
    z = z * _over_channels(weights.to(z.dtype), z.ndim)
    more = (bt.T @ z.flatten(2)).unflatten(2, z.shape[2:])
    return more if y is None else y + more


def _over_channels(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, channel) as (batch, channel, 1, ..., 1) with `ndim` axes."""
    return mixed.view(*mixed.shape, *[1] * (ndim - 2))
