"""Convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..parts import PartList
from ..per_row import NotRowWise, PerRow
from ..routing import Mix
from .mixing import (
    Parts,
    Whole,
    Wrapping,
)


class TwinConv(Wrapping):
    """A convolution: the kernels of A, scaled, then B as a 1×1 convolution. x: (batch, in, ...).

    A grouped one has no such factors: its kernels, which are small, are mixed for every row.
    """

    def __init__(
        self, inner: nn.modules.conv._ConvNd, weight: Parts, bias: Whole | None, where: str
    ):
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers({"weight": weight} | ({} if bias is None else {"bias": bias}))
        # One channel out: the matrix was (in, kernel).
        out, dtype = inner.out_channels, inner.weight.dtype
        one = (p if p.out == out else p.one_channel().to(dtype) for p in weight)
        self.parts = PartList(one if inner.groups == 1 else ())

    def forward(self, x: Tensor) -> Tensor:
        mix = self._mix(x)
        if mix is None:
            return self.inner(x)
        if mix.one:
            return self._merged(mix, (x,), {})
        if isinstance(x, PerRow):
            raise NotRowWise(f"{self.where}: called with a value that serves the whole batch")
        return self._each(x, mix, lambda x: self._run(x, mix))

    def _run(self, x: Tensor, mix: Mix) -> Tensor:
        if self.inner.groups != 1:
            return self._grouped(x, mix)
        y = self.inner(x)
        convolve, kernel = self.inner._conv_forward, self._own("weight").shape[1:]
        for part in self.parts.wanted(mix):
            y = part.conv(y, x, mix, kernel, convolve)
        if "bias" in self.twin_mixers:
            each = self.twin_mixers["bias"]
            assert isinstance(each, Whole)
            shift = mix.like(y) @ each.delta.to(y)
            y = y + shift.view(*shift.shape, *[1] * (y.ndim - 2))
        return y

    def _grouped(self, x: Tensor, mix: Mix) -> Tensor:
        """Every row's own kernel, as one convolution in which the rows are groups."""
        inner, rows, own = self.inner, len(x), self._own("weight")
        if inner.padding_mode != "zeros":
            raise NotRowWise(f"{self.where}: padding_mode={inner.padding_mode!r}")
        each = self.twin_mixers["weight"]
        assert isinstance(each, PartList)
        kernels = each.dense(mix.like(own), own).flatten(0, 1)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[own.ndim - 3]
        groups = rows * inner.groups
        flat = x.reshape(1, -1, *x.shape[2:])
        y = convolve(
            flat,
            kernels,
            None,
            inner.stride,
            inner.padding,
            inner.dilation,
            groups,
        )
        y = y.view(rows, inner.out_channels, *y.shape[2:])
        if inner.bias is None:
            return y
        bias = self._own("bias")
        shift = bias[None]
        if "bias" in self.twin_mixers:
            vectors = self.twin_mixers["bias"]
            assert isinstance(vectors, Whole)
            shift = vectors.dense(mix.like(bias), bias)
        return y + shift.to(y.dtype).view(*shift.shape, *[1] * (y.ndim - 2))
