"""BatchNorm, in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import InputError, UnsupportedModel
from ..per_row import NotRowWise, PerRow
from ..routing import Mix
from .mixing import (
    Whole,
    Wrapping,
)


class TwinBatchNorm(Wrapping):
    """A BatchNorm in evaluation mode: affine per channel, statistics mixed as its vectors are.

        y = (x - m) / √(v + ε) · g + b        m, v, g, b: each row's own

    The variance of a row may come out negative for weights below 0 or of a sum above 1: an error.
    In training mode it is refused, as statistics of rows of several models mean nothing.
    """

    def __init__(self, inner: nn.Module, patches: dict[str, Whole], where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers(patches)

    def forward(self, x: Tensor) -> Tensor:
        mix = self._mix(x)
        if mix is None:
            return self.inner(x)
        if self.training or self.inner.running_mean is None:
            raise UnsupportedModel(
                f"{self.where}: a BatchNorm of several experts runs in evaluation mode alone, with "
                "running statistics. Call model.eval() first."
            )
        if isinstance(x, PerRow):
            raise NotRowWise(f"{self.where}: called with a value that serves the whole batch")
        scale, shift = self._affine(mix)
        axes = (*scale.shape, *[1] * (x.ndim - 2))
        run = lambda x: torch.addcmul(shift.view(axes), x, scale.view(axes))  # noqa: E731
        return self._each(x, mix, run)

    def _affine(self, mix: Mix) -> tuple[Tensor, Tensor]:
        """(row, channel) each: y = x · scale + shift."""
        if self.where not in mix.memo:
            mean, variance = self._rows(mix, "running_mean"), self._rows(mix, "running_var")
            assert mean is not None and variance is not None
            if mix.convex:
                variance = variance.clamp(min=0)  # rounding in 16 bits
            # Means of the experts' own are positive; asking for it would wait for a GPU.
            if not mix.convex and bool(variance.min() + self.inner.eps <= 0):
                raise InputError(
                    f"{self.where}: with these weights a mixed running variance is "
                    f"{float(variance.min())}, expected positive ones. Use weights from 0 to 1 "
                    "that sum to 1 at most."
                )
            scale = torch.rsqrt(variance + self.inner.eps)
            gain, bias = self._rows(mix, "weight"), self._rows(mix, "bias")
            scale = scale if gain is None else scale * gain
            shift = -mean * scale if bias is None else bias - mean * scale
            mix.memo[self.where] = scale, shift
        return mix.memo[self.where]

    def _rows(self, mix: Mix, name: str) -> Tensor | None:
        inner = self.inner
        own = inner._parameters.get(name, inner._buffers.get(name))
        if own is None:
            return None
        if name not in self.twin_mixers:
            return own[None]
        each = self.twin_mixers[name]
        assert isinstance(each, Whole)
        return each.dense(mix.like(own), own)
