"""Quantised factors, kept so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...artifact.codec import (
    Quantised,
    dequantise,
    dequantise_columns,
)
from ..routing import Mix
from .factors import Factors
from .part import Convolve, Part, aligned, back_to, convolved, slices


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
            for piece in slices(span.stop - span.start, self.in_ + self.out):
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
                y = back_to(y, z * aligned(weights, z.ndim), bt)
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
            y = convolved(a, bt, y, x, weights, kernel, convolve)
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
