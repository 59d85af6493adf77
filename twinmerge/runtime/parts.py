r"""Exclusive parts of one matrix as they run: `Σ_t w_t D_t` without ever adding it up.

`D_t` is what expert t knows of one (out, in) matrix, and every row of a batch has its own w. A
part holds the D_t of some experts, as the artifact stores them:

    Factors    D_t = B_t A_t in floats, all experts stacked along the rank
    Packed     the same with A and B quantised, and kept so
    Scattered  one expert's D_t, few of whose entries are not zero, kept as values and positions

A matrix whose experts are stored in several ways has several parts, and what they give is added.
Each part serves every kind of layer by the operations of `Part`, and is exact for each row. No
dense copy of a quantised or sparse part is kept: within an operation, at most `BLOCK` entries of
it (never less than a row) are dequantised or written out at a time. Only `dense`, for bare
parameters and dense merges, gives a whole matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

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
from .routing import current

BLOCK = 1 << 20
"""Entries of a quantised or sparse part that are floats at one time: 4 MiB in float32."""

Convolve = Callable[[Tensor, Tensor, None], Tensor]
"""x, kernels and no bias -> y, with stride and padding of the layer."""


def aligned(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, n) as (batch, 1, ..., 1, n) with `ndim` axes."""
    return mixed.view(mixed.shape[0], *[1] * (ndim - 2), mixed.shape[-1])


class Part(nn.Module, ABC):
    """What some experts know of one matrix. `weights` is always (batch, expert).

    Axes of x and y but the first and last are free; a first axis of 1 in x serves the whole batch.
    Results have the dtype of x or y, or the one asked for.
    """

    owner: Tensor
    """(rank,): to whom each component of `look` belongs."""
    out: int

    @abstractmethod
    def linear(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """y + Σ_t w_t D_t x, x: (batch, ..., in), y: (batch, ..., out). May overwrite `y`."""

    @abstractmethod
    def conv(
        self, y: Tensor, x: Tensor, weights: Tensor, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        """y + Σ_t w_t D_t * x, where a row of D_t is a kernel of that shape."""

    @abstractmethod
    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What `back` makes rows `ids` of D_t from, of all experts: (..., rank)."""

    @abstractmethod
    def back(self, y: Tensor, found: Tensor) -> Tensor:
        """y + the rows of D that `found` (of `look`, scaled per expert) stands for: (..., in)."""

    @abstractmethod
    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_t w_t D_t for each row of weights: (batch, out, in)."""

    @abstractmethod
    def turned(self) -> Part:
        """The part of the transposed matrix."""

    @abstractmethod
    def one_channel(self) -> Part:
        """The part of the matrix laid out as one row: (1, out · in). Packed ones give float32."""

    def scaled(self, found: Tensor, weights: Tensor) -> Tensor:
        """Each component of `found` (batch, ..., rank) by its owner's weight."""
        return found * aligned(weights[:, self.owner].to(found.dtype), found.ndim)

    def _put(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            kept = None if tensor is None else tensor.contiguous()
            self.register_buffer(name, kept, persistent=False)


class Factors(Part):
    """Float factors; `owner` says whose each rank is.

    With `offset`, component r of the rank is A_r x + offset_r: how a bias rides along.
    """

    a: Tensor
    b: Tensor
    offset: Tensor | None

    def __init__(
        self,
        a: Float[Tensor, "stacked in"],
        b: Float[Tensor, "out stacked"],
        owner: Int[Tensor, " stacked"],
        offset: Float[Tensor, " stacked"] | None = None,
    ) -> None:
        super().__init__()
        self.out = len(b)
        self._put(a=a, b=b, owner=owner, offset=offset)

    def with_bias(self, delta: Float[Tensor, "expert out"]) -> Factors:
        """Σ w_t Δb_t = Δb @ w: columns Δb, reached by rows of A that are 0 with an offset of 1."""
        experts, a, b = len(delta), self.a, self.b
        return Factors(
            torch.cat([a, a.new_zeros(experts, a.shape[1])]),
            torch.cat([b, delta.T.to(b.dtype)], dim=1),
            torch.cat([self.owner, torch.arange(experts)]),
            torch.cat([a.new_zeros(len(a)), a.new_ones(experts)]),
        )

    def linear(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        return _linear(self.a, self.b, self.owner, self.offset, y, x, weights)

    def conv(
        self, y: Tensor, x: Tensor, weights: Tensor, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        return _conv(self.a, self.b, self.owner, y, x, weights, kernel, convolve)

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.b)

    def back(self, y: Tensor, found: Tensor) -> Tensor:
        return y + found @ self.a

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        return _dense(self.a.to(dtype), self.b.to(dtype), self.owner, weights)

    def turned(self) -> Factors:
        return Factors(self.b.T, self.a.T, self.owner)

    def one_channel(self) -> Factors:
        # One row of the matrix per rank: each is a kernel of its own.
        rows = torch.einsum("or,ri->roi", self.b, self.a).flatten(1)
        return Factors(rows, rows.new_ones(1, len(rows)), self.owner)


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

    def __init__(self, a: Quantised, b: Quantised, owner: Int[Tensor, " stacked"]) -> None:
        super().__init__()
        self.bits, self.in_, self.out = a.bits, a.n, b.n
        self._put(a_q=a.q, a_scale=a.scale.view(torch.int16), owner=owner)
        self._put(b_q=b.q, b_scale=b.scale.view(torch.int16))

    def _a(self, rows: slice = slice(None)) -> Quantised:
        scale = self.a_scale[rows].view(torch.bfloat16)
        return Quantised(self.a_q[rows], scale, self.bits, self.in_)

    def _b(self, rows: slice = slice(None)) -> Quantised:
        scale = self.b_scale[rows].view(torch.bfloat16)
        return Quantised(self.b_q[rows], scale, self.bits, self.out)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """a, b and owner of some ranks after the other, in floats."""
        for rows in _slices(len(self.owner), self.in_ + self.out):
            a, b = dequantise(self._a(rows), dtype), dequantise(self._b(rows), dtype)
            yield a, b.T, self.owner[rows]

    def linear(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        for a, b, owner in self._blocks(y.dtype):
            y = _linear(a, b, owner, None, y, x, weights)
        return y

    def conv(
        self, y: Tensor, x: Tensor, weights: Tensor, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        for a, b, owner in self._blocks(x.dtype):
            y = _conv(a, b, owner, y, x, weights, kernel, convolve)
        return y

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        found = dequantise_columns(self._b(), ids.flatten(), dtype)
        return found.T.reshape(*ids.shape, -1)

    def back(self, y: Tensor, found: Tensor) -> Tensor:
        for rows in _slices(len(self.owner), self.in_):
            y = y + found[..., rows] @ dequantise(self._a(rows), found.dtype)
        return y

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(len(weights), self.out, self.in_, dtype=dtype, device=weights.device)
        for a, b, owner in self._blocks(dtype):
            total += _dense(a, b, owner, weights)
        return total

    def turned(self) -> Packed:
        return Packed(self._b(), self._a(), self.owner)

    def one_channel(self) -> Factors:
        # As the float factors: rows that are products of two quantised ones are not quantised.
        whole = Factors(dequantise(self._a()), dequantise(self._b()).T, self.owner)
        return whole.one_channel()


class Scattered(Part):
    """One expert's sparse matrix, row by row: values, their columns, where each row begins.

    That takes 2 bytes for a column (4 where `in` is above 32,767) beside each value, and 8 for each
    row: more than a file with a mask, but rows are found without counting bits. An operation
    writes out `BLOCK` entries of the matrix at a time, in whole rows; a lookup, the rows asked for.
    An expert whose weight is zero in the whole batch costs nothing, see `PartList.wanted`.
    """

    values: Tensor
    column: Tensor
    start: Tensor

    def __init__(self, sparse: Sparse, owner: int) -> None:
        super().__init__()
        self.expert = owner
        self.out, self.in_ = sparse.shape
        small = self.in_ <= torch.iinfo(torch.int16).max
        start = torch.searchsorted(sparse.index, torch.arange(self.out + 1) * self.in_)
        self._put(
            values=sparse.values,
            column=(sparse.index % self.in_).to(torch.int16 if small else torch.int32),
            start=start,
            owner=torch.tensor([owner]),
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

    def linear(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        z = self.scaled(x.to(y.dtype), weights)
        if y.shape[0] != z.shape[0] or y.requires_grad:
            y = y.expand(len(z), *y.shape[1:]).clone(memory_format=torch.contiguous_format)
        flat, z = y.view(-1, self.out), z.flatten(0, -2)
        for (rows, _), block in zip(self._slices, self._blocks(y.dtype), strict=True):
            flat[:, rows].addmm_(z, block.T)
        return y

    def conv(
        self, y: Tensor, x: Tensor, weights: Tensor, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        blocks = self._blocks(x.dtype)
        more = torch.cat([convolve(x, each.view(-1, *kernel), None) for each in blocks], dim=1)
        return y + more * _over_channels(weights[:, self.owner].to(more.dtype), more.ndim)

    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        unique, inverse = ids.unique(return_inverse=True)
        return self._rows(unique, dtype)[inverse]

    def back(self, y: Tensor, found: Tensor) -> Tensor:
        return y + found

    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        whole = torch.cat(list(self._blocks(dtype)))
        return weights[:, self.owner, None].to(dtype) * whole

    def turned(self) -> Scattered:
        sparse = self.sparse()
        row, column = sparse.index // self.in_, sparse.index % self.in_
        index, order = (column * self.out + row).sort()
        turned = Sparse(sparse.values[order], index, (self.in_, self.out))
        return Scattered(turned, self.expert)

    def one_channel(self) -> Scattered:
        sparse = self.sparse()
        row = Sparse(sparse.values, sparse.index, (1, self.out * self.in_))
        return Scattered(row, self.expert)


def stacked(parts: list[Part]) -> tuple[Part, ...]:
    """The same in as few parts as can be: factors of one storage along the rank; floats first."""
    few: list[Part] = []
    floats = [part for part in parts if isinstance(part, Factors)]
    if floats:
        a, b = torch.cat([f.a for f in floats]), torch.cat([f.b for f in floats], dim=1)
        few.append(Factors(a, b, torch.cat([f.owner for f in floats])))
    for bits in (8, 4):
        packed = [part for part in parts if isinstance(part, Packed) and part.bits == bits]
        if packed:
            a, b = (_joined([side(part) for part in packed]) for side in (Packed._a, Packed._b))
            few.append(Packed(a, b, torch.cat([part.owner for part in packed])))
    return (*few, *(part for part in parts if isinstance(part, Scattered)))


def _joined(rows: list[Quantised]) -> Quantised:
    q, scale = torch.cat([x.q for x in rows]), torch.cat([x.scale for x in rows])
    return Quantised(q, scale, rows[0].bits, rows[0].n)


class PartList(nn.ModuleList):
    """Parts of one matrix, whose results are added."""

    def __iter__(self) -> Iterator[Part]:
        return super().__iter__()  # type: ignore[return-value]

    def wanted(self) -> Iterator[Part]:
        """Without the sparse parts of experts to whom the running batch gives no weight."""
        routing = current()
        for part in self:
            if routing is None or not isinstance(part, Scattered) or routing.wanted[part.expert]:
                yield part


def _slices(count: int, entries: int) -> Iterator[slice]:
    """Slices of `count` rows of that many entries, `BLOCK` entries in each, or one row."""
    step = max(1, BLOCK // max(entries, 1))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _linear(
    a: Float[Tensor, "stacked in"],
    b: Float[Tensor, "out stacked"],
    owner: Int[Tensor, " stacked"],
    offset: Float[Tensor, " stacked"] | None,
    y: Tensor,
    x: Tensor,
    weights: Tensor,
) -> Tensor:
    z = F.linear(x, a, offset)
    z = z * aligned(weights[:, owner].to(z.dtype), z.ndim)
    # Autocast leaves factors in another type than y, and operations in place alone.
    z, b = z.to(y.dtype), b.to(y.dtype)
    if y.shape[0] != z.shape[0]:  # one row of x served the whole batch
        return y + F.linear(z, b)
    if y.requires_grad:
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), b.T).view(y.shape)
    # y is ours and fresh: adding in place saves a pass over the activations.
    y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), b.T)
    return y


def _conv(
    a: Float[Tensor, "stacked in"],
    b: Float[Tensor, "out stacked"],
    owner: Int[Tensor, " stacked"],
    y: Tensor,
    x: Tensor,
    weights: Tensor,
    kernel: torch.Size,
    convolve: Convolve,
) -> Tensor:
    """The kernels of A, scaled, then B as a 1×1 convolution."""
    z = convolve(x, a.view(-1, *kernel), None)
    z = z * _over_channels(weights[:, owner].to(z.dtype), z.ndim)
    return y + (b @ z.flatten(2)).unflatten(2, z.shape[2:])


def _dense(
    a: Float[Tensor, "stacked in"],
    b: Float[Tensor, "out stacked"],
    owner: Int[Tensor, " stacked"],
    weights: Float[Tensor, "batch expert"],
) -> Float[Tensor, "batch out in"]:
    return (b * weights[:, owner].to(b.dtype)[:, None, :]) @ a


def _over_channels(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, channel) as (batch, channel, 1, ..., 1) with `ndim` axes."""
    return mixed.view(*mixed.shape, *[1] * (ndim - 2))
