r"""Shared weight plus weighted factors, for every kind of layer that is linear in its weights.

A row x with weights w gets exactly what the densely merged weight would give it,

    (W_s + Σ_t w_t B_t A_t) x  =  W_s x + Σ_t w_t B_t (A_t x),

without forming one (out, in) matrix per row of the batch. The factors of all experts are stacked
along the rank, so two matrix products serve them all, whatever their number and ranks; a row's
weights scale the product in between. The cost is Σ_t r_t · (in + out) per token. `parts` says how
quantised factors and sparse differences do the same; a layer takes any of them.

Outside a routing (`routing.routed`) every layer is the shared expert's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel
from .parts import Factors, Part, PartList, aligned
from .routing import current

STATIC_INSTEAD = "Build a static merge instead (exclusive: {rank: none})."


@dataclass(frozen=True)
class Whole:
    """The differences of one tensor that is kept whole, one per expert (zeros where none)."""

    delta: Float[Tensor, " expert *shape"]


Parts = tuple[Part, ...]
"""What all experts know of one matrix. At most one of the parts is `Factors`, the first."""

Patch = Parts | Whole


class _Mixing(nn.Module):
    """What all layers share: where their name is, and how rows find their weights."""

    where: str

    def _weights(self, x: Tensor) -> Tensor | None:
        """This batch's weights in the dtype of `x`, or None: the shared expert alone.

        Raises `UnsupportedModel` where the first axis of `x` is not the batch, rather than giving
        one row another row's weights.
        """
        routing = current()
        if routing is None or routing.weights is None:
            return None
        weights = routing.weights
        if x.shape[0] not in (1, weights.shape[0]):
            raise UnsupportedModel(
                f"{self.where}: expected a first axis of {weights.shape[0]} rows (the batch), got "
                f"{tuple(x.shape)}. This layer mixes rows before it; run it with one weighting "
                "for all rows, or use model.merged(weights)."
            )
        return weights

    def _put(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class _Wrapping(_Mixing):
    """A layer around the module that it stands for: whatever else is asked of it, that one knows.

    Models read attributes of their layers (ViT its projection's `weight.dtype`).
    """

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)


class _Affine(_Mixing):
    """A weight in parts, a bias kept whole. The bias rides along with the float factors."""

    parts: PartList

    def _put_parts(self, weight: Parts, bias: Whole | None, in_: int, out: int) -> None:
        if bias is not None:
            delta, owner = bias.delta, torch.zeros(0, dtype=torch.long)
            none = Factors(delta.new_zeros(0, in_), delta.new_zeros(out, 0), owner)
            floats = [part for part in weight if isinstance(part, Factors)] or [none]
            others = (part for part in weight if not isinstance(part, Factors))
            weight = (floats[0].with_bias(delta), *others)
        self.parts = PartList(weight)

    def _add(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """y + Σ_t w_t (D_t x + Δb_t), x: (batch, ..., in), y: (batch, ..., out)."""
        for part in self.parts.wanted():
            y = part.linear(y, x, weights)
        return y


class TwinLinear(_Affine, nn.Linear):
    """`nn.Linear` with a weight per row of the batch. x: (batch, ..., in)."""

    def __init__(self, inner: nn.Linear, weight: Parts, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.weight, self.bias, self.where = inner.weight, inner.bias, where
        self._put_parts(weight, bias, inner.in_features, inner.out_features)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        weights = self._weights(input)
        return y if weights is None else self._add(y, input, weights)


class TwinConv1D(_Affine, Conv1D):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored (in, out)."""

    def __init__(self, inner: Conv1D, weight: Parts, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.nf, self.nx = inner.nf, inner.nx
        self.weight, self.bias, self.where = inner.weight, inner.bias, where
        self._put_parts(tuple(part.turned() for part in weight), bias, *inner.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        weights = self._weights(x)
        return y if weights is None else self._add(y, x, weights)


class TwinEmbedding(_Mixing, nn.Embedding):
    """`nn.Embedding`: rows of the stacked B, scaled, then A. ids: (batch, ...) or (1, ...)."""

    def __init__(self, inner: nn.Embedding, weight: Parts, where: str):
        nn.Module.__init__(self)
        for name in (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        ):
            setattr(self, name, getattr(inner, name))
        self.weight, self.where = inner.weight, where
        self.parts = PartList(weight)

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        weights = self._weights(input)
        if weights is None:
            return y
        _check_ids(self.where, input)
        for part in self.parts.wanted():
            y = part.back(y, part.scaled(part.look(input, y.dtype), weights))
        return y


def _check_ids(where: str, ids: Tensor) -> None:
    if ids.ndim < 2:
        raise UnsupportedModel(
            f"{where}: expected ids of shape (batch, ...), got {tuple(ids.shape)}: "
            "whose rows these are cannot be told. Use model.merged(weights)."
        )


class TwinLookup(_Wrapping):
    """An `nn.Embedding` of another class, such as Gemma's, which scales what it looks up.

    The same lookup is done in the stacked B by a copy of the module, with whatever else it is
    called with (BART's position tables take offsets). Quantised and sparse parts have no such
    table: there the module itself runs, and the rows that it asks its table for come from the
    part. `__init__` checks that it is called with one tensor, and on random tables that it is
    linear in its table; else it raises `UnsupportedModel`.
    """

    def __init__(self, inner: nn.Embedding, weight: Parts, where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self.takes = self._first(inner)
        first, *rest = weight
        self.lookup = None
        if isinstance(first, Factors):
            self.lookup = _looking_up(inner, first.b)
            first = Factors(first.a, first.b[:0], first.owner)  # the table is not held twice
        self.parts = PartList([first, *rest])
        self._probe(inner, answered=self.lookup is None or bool(rest))

    def forward(self, *args, **kwargs) -> Tensor:
        y = self.inner(*args, **kwargs)
        ids = args[0] if args else kwargs[self.takes]
        weights = self._weights(ids)
        if weights is None:
            return y
        _check_ids(self.where, ids)
        for part in self.parts.wanted():
            z = self._look(part, y.dtype, args, kwargs)
            if z.ndim != ids.ndim + 1 or z.shape[0] not in (1, len(weights)):
                raise UnsupportedModel(
                    f"{self.where}: expected {type(self.inner).__name__} to give (batch, ..., out) "
                    f"for ids {tuple(ids.shape)}, got {tuple(y.shape)}: whose rows these are "
                    "cannot be told. Use model.merged(weights)."
                )
            y = part.back(y, part.scaled(z, weights))
        return y

    def _first(self, inner: nn.Embedding) -> str:
        """The name of the one argument that `inner` needs."""
        parameters = inspect.signature(inner.forward).parameters.values()
        rest = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        needed = [p for p in parameters if p.default is Parameter.empty and p.kind not in rest]
        if len(needed) != 1 or needed[0].kind is Parameter.KEYWORD_ONLY:
            raise UnsupportedModel(
                f"{self.where}: expected an embedding called with one tensor, but "
                f"{type(inner).__name__}.forward takes "
                f"({', '.join(map(str, parameters))}). " + STATIC_INSTEAD
            )
        return needed[0].name

    def _look(self, part: Part, dtype: torch.dtype, args: tuple, kwargs: dict) -> Tensor:
        if isinstance(part, Factors):
            assert self.lookup is not None
            return self.lookup(*args, **kwargs)
        with _Answering(self.inner.weight, lambda ids: part.look(ids, dtype)):
            return self.inner(*args, **kwargs)

    @torch.no_grad()
    def _probe(self, inner: nn.Embedding, answered: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        rows, width = inner.weight.shape
        b, a = torch.randn(rows, 3, generator=draw), torch.randn(3, width, generator=draw)
        ids = torch.arange(min(rows, 8)).expand(2, -1)
        try:
            whole = _looking_up(inner, b @ a)
            want, ways = whole(ids), [_looking_up(inner, b)(ids)]
            if answered:
                with _Answering(whole.weight, lambda ids: F.embedding(ids, b)):
                    ways.append(whole(ids))
            exact = all(torch.allclose(z @ a, want, atol=1e-4, rtol=1e-4) for z in ways)
        except Exception:  # any module at all may stand here, so any error at all may come
            exact = False
        if not exact:
            raise UnsupportedModel(
                f"{self.where}: {type(inner).__name__} is not linear in its table, so its rows "
                "cannot have weights of their own. " + STATIC_INSTEAD
            )


class _Answering(TorchFunctionMode):
    """Within it, a lookup in `table` finds what `rows` gives for the ids."""

    def __init__(self, table: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.rows = table, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding and args[1] is self.table:
            return self.rows(args[0])
        return func(*args, **(kwargs or {}))


def _looking_up(module: nn.Embedding, table: Tensor) -> nn.Embedding:
    """A copy of `module` with another table."""
    # Shallow, so that the table that is replaced is not copied first.
    new = copy.copy(module)
    new._parameters = {"weight": nn.Parameter(table.contiguous(), requires_grad=False)}
    new._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    new.embedding_dim = table.shape[1]
    return new


class TwinLayerNorm(_Mixing, nn.LayerNorm):
    """`nn.LayerNorm` with a gain and a bias per row of the batch."""

    gain: Tensor | None
    shift: Tensor | None

    def __init__(self, inner: nn.LayerNorm, gain: Whole | None, shift: Whole | None, where: str):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = inner.normalized_shape, inner.eps
        self.elementwise_affine = inner.elementwise_affine
        self.weight, self.bias, self.where = inner.weight, inner.bias, where
        self._put(
            gain=None if gain is None else gain.delta, shift=None if shift is None else shift.delta
        )

    def forward(self, input: Tensor) -> Tensor:
        weights = self._weights(input)
        if weights is None:
            return super().forward(input)
        normal = F.layer_norm(input, self.normalized_shape, None, None, self.eps)
        gain, shift = self.weight, self.bias
        if self.gain is not None:
            mixed = torch.addmm(gain.expand(len(weights), -1), weights.to(gain.dtype), self.gain)
            gain = aligned(mixed, input.ndim)
        if self.shift is not None:
            mixed = torch.addmm(shift.expand(len(weights), -1), weights.to(gain.dtype), self.shift)
            shift = aligned(mixed, input.ndim)
        return normal * gain if shift is None else torch.addcmul(shift, normal, gain)


class TwinElementwise(_Wrapping):
    """A module whose output is affine in its own vectors, entry by entry along the last axis.

    RMS norms (`g ⊙ x̂` or `(1 + g) ⊙ x̂`) and layer scales are such modules, under many class names.
    The direction of each vector is found by calling copies of the module with that vector set to
    one and to zero; `__init__` checks on random input that this reproduces the module, and raises
    `UnsupportedModel` if it does not.
    """

    def __init__(self, inner: nn.Module, patches: dict[str, Whole], where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self.attributes = list(patches)
        self.directions = nn.ModuleDict({name: _filled(inner, name) for name in patches})
        self.origin = _filled(inner, None)
        for name, patch in patches.items():
            self._put(**{f"delta_{name}": patch.delta})
        self._probe()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.inner(x, *args, **kwargs)
        weights = self._weights(x)
        if weights is None:
            return y
        origin = self.origin(x, *args, **kwargs)
        for name in self.attributes:
            mixed = weights.to(y.dtype) @ getattr(self, f"delta_{name}")
            direction = self.directions[name](x, *args, **kwargs) - origin
            y = y + direction * aligned(mixed, x.ndim)
        return y

    @torch.no_grad()
    def _probe(self) -> None:
        vectors = dict(self.inner.named_parameters(recurse=False))
        dtype = next(iter(vectors.values())).dtype
        draw = torch.Generator().manual_seed(0)
        size = vectors[self.attributes[0]].shape[-1]
        probe = copy.deepcopy(self.inner).float()
        x = torch.randn(2, 3, size, generator=draw)
        try:
            expected = probe(x)
            for name in self.attributes:
                step = torch.randn(vectors[name].shape, generator=draw)
                mine = self.directions[name].float()(x) - self.origin.float()(x)
                expected = expected + mine * step
                getattr(probe, name).add_(step)
            exact = torch.allclose(probe(x), expected, atol=1e-5, rtol=1e-4)
        except Exception:  # any module at all may stand here, so any error at all may come
            exact = False
        self.directions.to(dtype)
        self.origin.to(dtype)
        if not exact:
            raise UnsupportedModel(
                f"{self.where}: {type(self.inner).__name__} is not affine in its vectors "
                f"{self.attributes} entry by entry, so its rows cannot have weights of their own. "
                + STATIC_INSTEAD
            )


def _filled(module: nn.Module, name: str | None) -> nn.Module:
    """A copy of `module` whose vector `name` is one and whose other parameters are zero."""
    filled = copy.deepcopy(module)
    for attribute, parameter in filled.named_parameters(recurse=False):
        parameter.requires_grad_(False).fill_(1.0 if attribute == name else 0.0)
    return filled


class TwinConv(_Wrapping):
    """A convolution: the kernels of A, scaled, then B as a 1×1 convolution. x: (batch, in, ...)."""

    shift: Tensor | None

    def __init__(
        self, inner: nn.modules.conv._ConvNd, weight: Parts, bias: Whole | None, where: str
    ):
        super().__init__()
        self.inner, self.where = inner, where
        if inner.groups != 1:
            raise UnsupportedModel(
                f"{where}: a grouped convolution (groups={inner.groups}) cannot be run exactly "
                "from the factors of its whole kernel. " + STATIC_INSTEAD
            )
        # One channel out: the matrix was (in, kernel).
        out = inner.out_channels
        one = (p if p.out == out else p.one_channel() for p in weight)
        self.parts = PartList(p.to(inner.weight.dtype) for p in one)
        self._put(shift=None if bias is None else bias.delta)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights = self._weights(x)
        if weights is None:
            return y
        convolve, kernel = self.inner._conv_forward, self.inner.weight.shape[1:]
        for part in self.parts.wanted():
            y = part.conv(y, x, weights, kernel, convolve)
        if self.shift is not None:
            shift = weights.to(y.dtype) @ self.shift
            y = y + shift.view(*shift.shape, *[1] * (y.ndim - 2))
        return y


class TwinParameter(nn.Module):
    """A bare parameter with a leading axis of 1 (class token, positions): one per row.

    Used as a parametrisation: reading the attribute gives (batch, ...) under a routing.
    """

    delta: Tensor

    def __init__(self, shape: torch.Size, patch: Patch, where: str):
        super().__init__()
        if len(shape) < 2 or shape[0] != 1:
            raise UnsupportedModel(
                f"{where}: a bare parameter of shape {tuple(shape)} has no leading axis of 1 along "
                "which rows could differ. " + STATIC_INSTEAD
            )
        self.parts = PartList(() if isinstance(patch, Whole) else patch)
        if isinstance(patch, Whole):
            self.register_buffer("delta", patch.delta, persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        routing = current()
        if routing is None or routing.weights is None:
            return original
        weights = routing.weights.to(original.dtype)
        mixed = original
        for part in self.parts.wanted():
            delta = part.dense(weights, original.dtype)
            mixed = mixed + delta.view(len(weights), *original.shape[1:])
        if hasattr(self, "delta"):
            delta = weights @ self.delta.flatten(1)
            mixed = mixed + delta.view(len(weights), *original.shape[1:])
        return mixed
