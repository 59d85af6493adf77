"""Layers whose output is affine in vectors, entry by entry: norms and scales."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..parts import aligned
from ..per_row import NotRowWise
from ..routing import Mix
from .mixing import (
    Mixing,
    Reads,
    Whole,
    Wrapping,
)


class TwinLayerNorm(Mixing, nn.LayerNorm):
    """`nn.LayerNorm` with a gain and a bias per row of the batch."""

    weight: Any = Reads("weight")
    bias: Any = Reads("bias")

    def __init__(self, inner: nn.LayerNorm, gain: Whole | None, shift: Whole | None, where: str):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = inner.normalized_shape, inner.eps
        self.elementwise_affine, self.where = inner.elementwise_affine, where
        self.register_parameter("weight", inner._parameters["weight"])
        self.register_parameter("bias", inner._parameters["bias"])
        given = {"weight": gain, "bias": shift}
        self._put_mixers({name: each for name, each in given.items() if each is not None})

    def forward(self, input: Tensor) -> Tensor:
        mix = self._mix(input)
        gain, shift = self._parameters["weight"], self._parameters["bias"]
        shape, eps = self.normalized_shape, self.eps
        if mix is None:
            return F.layer_norm(input, shape, gain, shift, eps)
        return self._each(input, mix, lambda x: self._run(x, mix, gain, shift))

    def _run(self, x: Tensor, mix: Mix, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        gain, shift = self._rows(mix, "weight", gain), self._rows(mix, "bias", shift)
        if mix.one:
            gain, shift = (None if v is None else v.flatten() for v in (gain, shift))
            return F.layer_norm(x, self.normalized_shape, gain, shift, self.eps)
        normal = F.layer_norm(x, self.normalized_shape, None, None, self.eps)
        # In place saves a pass over fresh memory; autograd wants none of it.
        learnt = any(v is not None and v.requires_grad for v in (normal, gain, shift))
        out = None if learnt and torch.is_grad_enabled() else normal
        if gain is not None and shift is not None:
            shift, gain = aligned(shift, x.ndim), aligned(gain, x.ndim)
            return torch.addcmul(shift, normal, gain, out=out)
        if gain is not None:
            return torch.mul(normal, aligned(gain, x.ndim), out=out)
        return normal if shift is None else torch.add(normal, aligned(shift, x.ndim), out=out)

    def _rows(self, mix: Mix, name: str, vector: Tensor | None) -> Tensor | None:
        """(row or 1, width)."""
        if vector is None or name not in self.twin_mixers:
            return None if vector is None else vector[None]
        key = self.where, name
        if key not in mix.memo:
            each = self.twin_mixers[name]
            assert isinstance(each, Whole)
            mix.memo[key] = each.dense(mix.like(vector), vector)
        return mix.memo[key]


class TwinElementwise(Wrapping):
    """A module whose output is affine in its own vectors, entry by entry along the last axis.

    RMS norms (`g ⊙ x̂` or `(1 + g) ⊙ x̂`) and layer scales are such modules, under many class names.
    The direction of each vector is found by calling copies of the module with that vector set to
    one and to zero; `__init__` checks on random input that this reproduces the module, and raises
    `NotRowWise` if it does not.
    """

    def __init__(self, inner: nn.Module, patches: dict[str, Whole], where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers(patches)
        self.directions = nn.ModuleDict({name: _filled(inner, name) for name in patches})
        self.origin = _filled(inner, None)
        self._probe()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        mix = self._mix(x)
        if mix is None:
            return self.inner(x, *args, **kwargs)
        return self._each(x, mix, lambda x: self._run(x, mix, args, kwargs))

    def _run(self, x: Tensor, mix: Mix, args: tuple, kwargs: dict) -> Tensor:
        if self.gain is not None:
            # g ⊙ x̂ or (1 + g) ⊙ x̂: one call, and the product as the module itself rounds it.
            name, plus = self.gain
            module = self.origin if plus else self.directions[name]
            return module(x, *args, **kwargs) * self._gain(mix, name, plus, x.ndim)
        y, origin = self.inner(x, *args, **kwargs), self.origin(x, *args, **kwargs)
        for name, direction in self.directions.items():
            each = self.twin_mixers[name]
            assert isinstance(each, Whole)
            mixed = mix.like(y) @ each.delta.to(y)
            step = direction(x, *args, **kwargs) - origin
            y = y + step * aligned(mixed, x.ndim)
        return y

    def _gain(self, mix: Mix, name: str, plus: bool, ndim: int) -> Tensor:
        key = self.where, name
        if key not in mix.memo:
            each, own = self.twin_mixers[name], self._own(name)
            assert isinstance(each, Whole)
            mixed = each.dense(mix.like(own), own)
            mix.memo[key] = 1 + mixed if plus else mixed
        return aligned(mix.memo[key], ndim)

    @torch.no_grad()
    def _probe(self) -> None:
        vectors = dict(self.inner.named_parameters(recurse=False))
        names, dtype = list(self.directions), next(iter(vectors.values())).dtype
        draw = torch.Generator().manual_seed(0)
        size = vectors[names[0]].shape[-1]
        probe = copy.deepcopy(self.inner).float()
        x = torch.randn(2, 3, size, generator=draw)
        self.gain: tuple[str, bool] | None = None
        try:
            expected, origin = probe(x), self.origin.float()(x)
            for name in names:
                step = torch.randn(vectors[name].shape, generator=draw)
                mine = self.directions[name].float()(x) - origin
                expected = expected + mine * step
                getattr(probe, name).add_(step)
            exact = torch.allclose(probe(x), expected, atol=1e-5, rtol=1e-4)
            if exact and len(vectors) == 1:
                one = self.directions[names[0]](x)
                if not origin.any():
                    self.gain = names[0], False
                elif torch.allclose(one, 2 * origin, atol=1e-6, rtol=1e-6):
                    self.gain = names[0], True
        except Exception:  # any module at all may stand here, so any error at all may come
            exact = False
        self.directions.to(dtype)
        self.origin.to(dtype)
        if not exact:
            raise NotRowWise(
                f"{self.where}: {type(self.inner).__name__} is not affine in its vectors "
                f"{names} entry by entry"
            )


def _filled(module: nn.Module, name: str | None) -> nn.Module:
    """A copy of `module` whose vector `name` is one and whose other parameters are zero."""
    filled = copy.deepcopy(module)
    for attribute, parameter in filled.named_parameters(recurse=False):
        parameter.requires_grad_(False).fill_(1.0 if attribute == name else 0.0)
    return filled
