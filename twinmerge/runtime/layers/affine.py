"""Layers that multiply by a matrix: `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..parts import Factors, PartList, aligned
from ..routing import Mix
from .mixing import (
    Mixing,
    Parts,
    Reads,
    Whole,
    stored,
)


class Affine(Mixing):
    """y = x Wᵀ + b, the weight in parts, the bias kept whole."""

    weight: Any = Reads("weight")
    bias: Any = Reads("bias")

    def _matrix(self, weight: Tensor) -> Float[Tensor, "in out"]:
        """`weight` as x is multiplied by it."""
        raise NotImplementedError

    def _put_parts(self, parts: PartList, bias: Whole | None) -> None:
        """`parts` of the weight as (out, in), whichever way the layer stores it."""
        self.parts = parts
        self.twin_mixers = nn.ModuleDict({"weight": parts})
        if bias is not None:
            self.twin_mixers["bias"] = bias

    def forward(self, input: Tensor) -> Tensor:
        mix = self._mix(input)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if mix is None:
            return self._plain(input, weight, bias)
        return self._each(input, mix, lambda x: self._run(x, mix, weight, bias))

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, mix: Mix, weight: Tensor, bias: Tensor | None) -> Tensor:
        if "bias" in self.twin_mixers and bias is not None:
            bias = self._bias(mix, bias)
        if mix.one:
            if bias is not None and bias.ndim == 2:
                bias = bias[0]
            if mix.store is not None or self._denser(x, mix):
                merged = stored(weight, self.twin_mixers["weight"], mix, self, "weight")
                return self._plain(x, merged, bias)
        parts = list(self.parts.wanted(mix))
        apart = x.requires_grad or torch.is_autocast_enabled(x.device.type)
        if parts and isinstance(parts[0], Factors) and not apart and mix.gathers(x):
            y = parts.pop(0).before(bias, x, mix)  # type: ignore[operator]
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), self._matrix(weight))
        elif bias is None or bias.ndim == 1:
            y = self._plain(x, weight, bias)
        elif apart:
            y = self._plain(x, weight, None)
            y = y + aligned(bias, x.ndim).to(y.dtype)
        else:
            # The bias is laid out first and the product added, as one bias for all would be.
            # A copy also where one token needs none: the rows' biases are kept for the next step.
            y = aligned(bias, x.ndim).expand(*x.shape[:-1], -1)
            y = y.clone(memory_format=torch.contiguous_format)
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), self._matrix(weight))
        for part in parts:
            y = part.linear(y, x, mix)
        return y

    def _bias(self, mix: Mix, bias: Tensor) -> Tensor:
        """Each row's own bias: (row, out)."""
        key = self.where, "bias"
        if key not in mix.memo:
            each = self.twin_mixers["bias"]
            assert isinstance(each, Whole)
            mix.memo[key] = each.dense(mix.like(bias), bias)
        return mix.memo[key]

    def _denser(self, x: Tensor, mix: Mix) -> bool:
        """Whether one weighting is cheaper merged densely, for the tokens of `x`.

        Factors cost tokens · rank · (in + out), merging rank · in · out: break-even at
        in · out / (in + out) tokens, whatever the rank.
        """
        weight = self._parameters["weight"]
        assert weight is not None
        out, in_ = weight.shape
        return x.numel() // x.shape[-1] * (in_ + out) > in_ * out


class TwinLinear(Affine, nn.Linear):
    """`nn.Linear` with a weight per row of the batch. x: (batch, ..., in)."""

    def __init__(self, inner: nn.Linear, weight: Parts, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.where = where
        self.register_parameter("weight", inner._parameters["weight"])
        self.register_parameter("bias", inner._parameters["bias"])
        self._put_parts(PartList(weight), bias)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class TwinConv1D(Affine, Conv1D):  # type: ignore[misc]
    """GPT-2's `Conv1D`: a linear layer whose weight is stored (in, out)."""

    def __init__(self, inner: Conv1D, weight: Parts, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.nf, self.nx, self.where = inner.nf, inner.nx, where
        self.register_parameter("weight", inner._parameters["weight"])
        self.register_parameter("bias", inner._parameters["bias"])
        self._put_parts(PartList((part.turned() for part in weight), turned=True), bias)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x @ weight
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
