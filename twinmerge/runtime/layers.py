r"""Shared weight plus weighted factors, for every kind of layer that is linear in its weights.

A row x with weights w gets exactly what the densely merged weight would give it,

    (W_s + Σ_t w_t B_t A_t) x  =  W_s x + Σ_t w_t B_t (A_t x),

without forming one (out, in) matrix per row of the batch. The factors of all experts are stacked
along the rank, so two matrix products serve them all, whatever their number and ranks; a row's
weights scale the product in between. The cost is Σ_t r_t · (in + out) per token.

Outside a routing (`routing.routed`) every layer is the shared expert's own.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from inspect import Parameter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel
from .routing import current

STATIC_INSTEAD = "Build a static merge instead (exclusive: {rank: none})."


@dataclass(frozen=True)
class Stacked:
    """The factors of one matrix, all experts along the rank; `owner` says whose each row is."""

    a: Float[Tensor, "stacked in"]
    b: Float[Tensor, "out stacked"]
    owner: Int[Tensor, " stacked"]


@dataclass(frozen=True)
class Whole:
    """The differences of one tensor that is kept whole, one per expert (zeros where none)."""

    delta: Float[Tensor, " expert *shape"]


Patch = Stacked | Whole


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


def _aligned(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, n) as (batch, 1, ..., 1, n) with `ndim` axes."""
    return mixed.view(mixed.shape[0], *[1] * (ndim - 2), mixed.shape[-1])


class _Affine(_Mixing):
    """A weight in factors, a bias kept whole. The bias rides along as one more rank per expert."""

    a: Tensor
    b: Tensor
    owner: Tensor
    one: Tensor | None

    def _put_factors(self, weight: Stacked | None, bias: Whole | None, in_: int, out: int) -> None:
        template = weight.a if weight else bias.delta  # type: ignore[union-attr]
        a = weight.a if weight else template.new_zeros(0, in_)
        b = weight.b if weight else template.new_zeros(out, 0)
        owner = weight.owner if weight else torch.zeros(0, dtype=torch.long)
        one = None
        if bias is not None:
            # Σ w_t Δb_t = Δb @ w: columns Δb, reached by rows of A that are 0 with an offset of 1.
            experts = bias.delta.shape[0]
            one = torch.cat([a.new_zeros(len(a)), a.new_ones(experts)])
            a = torch.cat([a, a.new_zeros(experts, in_)])
            b = torch.cat([b, bias.delta.T.to(b.dtype)], dim=1)
            owner = torch.cat([owner, torch.arange(experts)])
        self._put(a=a.contiguous(), b=b.contiguous(), owner=owner, one=one)

    def _add(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """y + Σ_t w_t (B_t A_t x + Δb_t), x: (batch, ..., in), y: (batch, ..., out)."""
        z = F.linear(x, self.a, self.one)
        z = z * _aligned(weights[:, self.owner].to(z.dtype), z.ndim)
        if y.shape[0] != z.shape[0]:  # one row of x served the whole batch
            return y + F.linear(z, self.b)
        if y.requires_grad:
            return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), self.b.T).view(y.shape)
        # y is ours and fresh: adding in place saves a pass over the activations.
        y.flatten(0, -2).addmm_(z.flatten(0, -2), self.b.T)
        return y


class TwinLinear(_Affine, nn.Linear):
    """`nn.Linear` with a weight per row of the batch. x: (batch, ..., in)."""

    def __init__(self, inner: nn.Linear, weight: Stacked | None, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.weight, self.bias, self.where = inner.weight, inner.bias, where
        self._put_factors(weight, bias, inner.in_features, inner.out_features)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        weights = self._weights(input)
        return y if weights is None else self._add(y, input, weights)


class TwinConv1D(_Affine, Conv1D):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored (in, out)."""

    def __init__(self, inner: Conv1D, weight: Stacked | None, bias: Whole | None, where: str):
        nn.Module.__init__(self)
        self.nf, self.nx = inner.nf, inner.nx
        self.weight, self.bias, self.where = inner.weight, inner.bias, where
        turned = None if weight is None else Stacked(weight.b.T, weight.a.T, weight.owner)
        self._put_factors(turned, bias, *inner.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        weights = self._weights(x)
        return y if weights is None else self._add(y, x, weights)


class TwinEmbedding(_Mixing, nn.Embedding):
    """`nn.Embedding`: rows of the stacked B, scaled, then A. ids: (batch, ...) or (1, ...)."""

    a: Tensor
    b: Tensor
    owner: Tensor

    def __init__(self, inner: nn.Embedding, weight: Stacked, where: str):
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
        self._put(a=weight.a.contiguous(), b=weight.b.contiguous(), owner=weight.owner)

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        weights = self._weights(input)
        if weights is None:
            return y
        _check_ids(self.where, input)
        z = F.embedding(input, self.b)
        z = z * _aligned(weights[:, self.owner].to(z.dtype), z.ndim)
        return y + z @ self.a


def _check_ids(where: str, ids: Tensor) -> None:
    if ids.ndim < 2:
        raise UnsupportedModel(
            f"{where}: expected ids of shape (batch, ...), got {tuple(ids.shape)}: "
            "whose rows these are cannot be told. Use model.merged(weights)."
        )


class TwinLookup(_Wrapping):
    """An `nn.Embedding` of another class, such as Gemma's, which scales what it looks up.

    The same lookup is done in the stacked B by a copy of the module, with whatever else it is
    called with (BART's position tables take offsets). `__init__` checks that it is called with one
    tensor, and on random tables that it is linear in its table; else it raises `UnsupportedModel`.
    """

    a: Tensor
    owner: Tensor

    def __init__(self, inner: nn.Embedding, weight: Stacked, where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self.takes = self._first(inner)
        self.lookup = _looking_up(inner, weight.b)
        self._put(a=weight.a.contiguous(), owner=weight.owner)
        self._probe(inner)

    def forward(self, *args, **kwargs) -> Tensor:
        y = self.inner(*args, **kwargs)
        ids = args[0] if args else kwargs[self.takes]
        weights = self._weights(ids)
        if weights is None:
            return y
        _check_ids(self.where, ids)
        z = self.lookup(*args, **kwargs)
        if z.ndim != ids.ndim + 1 or z.shape[0] not in (1, len(weights)):
            raise UnsupportedModel(
                f"{self.where}: expected {type(self.inner).__name__} to give (batch, ..., out) for "
                f"ids {tuple(ids.shape)}, got {tuple(y.shape)}: whose rows these are cannot be "
                "told. Use model.merged(weights)."
            )
        z = z * _aligned(weights[:, self.owner].to(z.dtype), z.ndim)
        return y + z @ self.a

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

    @torch.no_grad()
    def _probe(self, inner: nn.Embedding) -> None:
        draw = torch.Generator().manual_seed(0)
        rows, width = inner.weight.shape
        b, a = torch.randn(rows, 3, generator=draw), torch.randn(3, width, generator=draw)
        ids = torch.arange(min(rows, 8)).expand(2, -1)
        try:
            want, got = _looking_up(inner, b @ a)(ids), _looking_up(inner, b)(ids) @ a
            exact = torch.allclose(got, want, atol=1e-4, rtol=1e-4)
        except Exception:  # any module at all may stand here, so any error at all may come
            exact = False
        if not exact:
            raise UnsupportedModel(
                f"{self.where}: {type(inner).__name__} is not linear in its table, so its rows "
                "cannot have weights of their own. " + STATIC_INSTEAD
            )


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
            gain = _aligned(mixed, input.ndim)
        if self.shift is not None:
            mixed = torch.addmm(shift.expand(len(weights), -1), weights.to(gain.dtype), self.shift)
            shift = _aligned(mixed, input.ndim)
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
            y = y + direction * _aligned(mixed, x.ndim)
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

    a: Tensor
    b: Tensor
    owner: Tensor
    shift: Tensor

    def __init__(
        self, inner: nn.modules.conv._ConvNd, weight: Stacked | None, bias: Whole | None, where: str
    ):
        super().__init__()
        self.inner, self.where = inner, where
        if inner.groups != 1:
            raise UnsupportedModel(
                f"{where}: a grouped convolution (groups={inner.groups}) cannot be run exactly "
                "from the factors of its whole kernel. " + STATIC_INSTEAD
            )
        self.factored, self.shifted = weight is not None, bias is not None
        if weight is not None:
            a, b = weight.a, weight.b
            if inner.out_channels != len(b):
                # One channel out: the matrix was (in, kernel). Each rank is a kernel of its own.
                a, b = torch.einsum("or,ri->roi", b, a), a.new_ones(1, len(a))
            kernels = a.reshape(-1, *inner.weight.shape[1:])
            self._put(a=kernels.contiguous(), b=b.contiguous(), owner=weight.owner)
        if bias is not None:
            self._put(shift=bias.delta)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights = self._weights(x)
        if weights is None:
            return y
        spatial = [1] * (y.ndim - 2)
        if self.factored:
            z = self.inner._conv_forward(x, self.a, None)  # type: ignore[operator]
            z = z * weights[:, self.owner].to(z.dtype).view(len(weights), -1, *spatial)
            y = y + (self.b @ z.flatten(2)).unflatten(2, y.shape[2:])
        if self.shifted:
            y = y + (weights.to(y.dtype) @ self.shift).view(len(weights), -1, *spatial)
        return y


class TwinParameter(nn.Module):
    """A bare parameter with a leading axis of 1 (class token, positions): one per row.

    Used as a parametrisation: reading the attribute gives (batch, ...) under a routing.
    """

    a: Tensor
    b: Tensor
    owner: Tensor
    delta: Tensor

    def __init__(self, shape: torch.Size, patch: Patch, where: str):
        super().__init__()
        if len(shape) < 2 or shape[0] != 1:
            raise UnsupportedModel(
                f"{where}: a bare parameter of shape {tuple(shape)} has no leading axis of 1 along "
                "which rows could differ. " + STATIC_INSTEAD
            )
        if isinstance(patch, Stacked):
            self.register_buffer("a", patch.a, persistent=False)
            self.register_buffer("b", patch.b, persistent=False)
            self.register_buffer("owner", patch.owner, persistent=False)
        else:
            self.register_buffer("delta", patch.delta, persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        routing = current()
        if routing is None or routing.weights is None:
            return original
        weights = routing.weights.to(original.dtype)
        if hasattr(self, "delta"):
            mixed = weights @ self.delta.flatten(1)
        else:
            scaled = self.b[None] * weights[:, self.owner][:, None, :]
            mixed = scaled @ self.a
        return original + mixed.view(len(weights), *original.shape[1:])
