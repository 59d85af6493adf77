"""One expert's sparse matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...artifact.codec import (
    Sparse,
)
from ..routing import Mix
from .part import Convolve, Part, aligned, over_channels, slices


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
            for rows in slices(self.out, self.in_)
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
        return y + more * over_channels(self._own(mix, more), more.ndim)

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
