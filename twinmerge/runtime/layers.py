r"""Shared weight plus weighted factors, for every kind of layer that is linear in its weights.

A row x with weights w gets exactly what the densely merged weight would give it,

    (W_s + Σ_t w_t B_t A_t) x  =  W_s x + Σ_t w_t B_t (A_t x),

without forming one (out, in) matrix per row of the batch. `parts` says how; a layer takes any of
them. Outside a routing (`routing.routed`) every layer is the shared expert's own.

Where one weighting serves all rows (`Mix.one`), the layer may add its tensors up densely instead:
it does where that is cheaper (`denser`), and layers of other kinds (`TwinAny`) always do. Whoever
reads a tensor of a layer under a routing, without calling the layer, finds it mixed too (`Reads`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, UnsupportedModel
from .parts import Factors, Part, PartList, aligned
from .per_row import LIMIT, NotRowWise, PerRow, per_row
from .routing import Mix, cell, current

STATIC_INSTEAD = "Build a static merge instead (exclusive: {rank: none})."


class Whole(nn.Module):
    """The differences of one tensor that is kept whole, one per expert (zeros where none)."""

    delta: Float[Tensor, " expert *shape"]

    def __init__(self, delta: Float[Tensor, " expert *shape"]) -> None:
        super().__init__()
        self.register_buffer("delta", delta.contiguous(), persistent=False)

    def dense(self, weights: Float[Tensor, "row expert"], like: Tensor) -> Tensor:
        """like + Σ_t w_t Δ_t for each row of weights: (row, *like.shape)."""
        flat = weights.to(like) @ self.delta.to(like).reshape(len(self.delta), -1)
        return like + flat.view(len(weights), *like.shape)

    def merged(self, like: Tensor, mix: Mix) -> Tensor:
        """like + Σ_t w_t Δ_t for the one weighting of `mix`."""
        return self.dense(mix.like(like), like)[0]


Parts = tuple[Part, ...]
"""What all experts know of one matrix. At most one of the parts is `Factors`, the first."""

Patch = Parts | Whole


def mixer(patch: Patch | nn.Module) -> nn.Module:
    """What mixes a tensor with this patch."""
    return PartList(patch) if isinstance(patch, tuple) else patch


class Reads:
    """A tensor of a layer as others read it: as it is, or mixed under a routing.

    What asks only for its dtype or shape costs nothing. `mixers` maps a module's attributes to
    their mixers; they lie in its `twin_mixers`.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        own = module._parameters if self.attribute in module._parameters else module._buffers
        if self.attribute not in own:
            raise AttributeError(f"no attribute '{self.attribute}'")
        tensor = own[self.attribute]
        mixers = module._modules.get("twin_mixers")
        routing = current()
        if tensor is None or mixers is None or self.attribute not in mixers._modules:
            return tensor
        if routing is None or routing.mix is None:
            return tensor
        mixer = mixers._modules[self.attribute]
        return read(tensor, mixer, routing.mix, module, self.attribute)  # type: ignore[call-arg]


@torch.compiler.disable
def read(tensor: Tensor, mixer: Any, mix: Mix, module: nn.Module, attribute: str) -> PerRow:
    """One tensor mixed for every row of a batch, as soon as more is asked than its shape."""
    where = getattr(module, "where", attribute)
    found = cell()
    if found is not None:
        found.count()  # now: what is read here may be used only after the router

    def make() -> Tensor:
        if mix.one:
            return stored(tensor, mixer, mix, module, attribute)[None]
        fused = tensor.ndim > 2 and tensor.shape[0] != 1
        if fused or type(module).__module__.startswith("torch."):
            # Experts of a mixture, kernels, nn.MultiheadAttention: tokens or channels stand where
            # rows should.
            raise NotRowWise(f"{where}: {tuple(tensor.shape)} cannot be another for every row")
        if mix.rows * tensor.nbytes > LIMIT:
            raise NotRowWise(f"{where}: {mix.rows} rows of {tuple(tensor.shape)} are too large")
        return mixer.dense(mix.like(tensor), tensor)

    return PerRow(tensor, make, where)


def stored(tensor: Tensor, mixer: Any, mix: Mix, module: Any, attribute: str) -> Tensor:
    """The tensor mixed by the one weighting of `mix`; kept where that lasts.

    Not kept where gradients are asked for, and made again once the tensor was changed.
    """
    store = mix.store
    learnt = torch.is_grad_enabled() and (tensor.requires_grad or mix.weights.requires_grad)
    with torch.autocast(tensor.device.type, enabled=False):
        if store is None or learnt:
            return mixer.merged(tensor, mix)
        with torch.inference_mode(False), torch.no_grad():  # what is kept outlives this call
            key = module.where, attribute
            return store.kept(key, tensor, lambda: mixer.merged(tensor, mix))


def called_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Any:
    """What a leaf module gives with other tensors of its own.

    A copy of it is called: another thread may be running the module itself.
    """
    if "forward" in vars(module):  # a hook of accelerate's, which knows that one module alone
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    new = copy.copy(module)
    for own in ("_parameters", "_buffers"):
        mine = vars(module)[own]
        vars(new)[own] = mine | {name: t for name, t in tensors.items() if name in mine}
    return new(*args, **kwargs)


class Mixing(nn.Module):
    """What all layers share: their name, their mixers, and how rows find their weights."""

    where: str
    twin_mixers: nn.ModuleDict
    flattened = False
    """Whether (token, in) is called with all tokens of all rows, row by row, as in a mixture."""

    def _put_mixers(self, patches: Mapping[str, Patch]) -> None:
        self.twin_mixers = nn.ModuleDict({name: mixer(patch) for name, patch in patches.items()})

    def _mix(self, x: Tensor) -> Mix | None:
        """The weights of the rows of `x`, or None: the shared expert alone.

        Raises `NotRowWise` where the first axis of `x` is not the batch, rather than giving one
        row another row's weights.
        """
        found = cell()
        if found is None or found.routing is None or found.routing.mix is None:
            return None
        found.count()
        routing = found.routing
        assert routing.mix is not None
        if isinstance(x, PerRow):
            return routing.mix
        if self.flattened and x.ndim == 2:
            return routing.mix.of_tokens(x.shape[0], self.where)
        mix = routing.sized(x.shape[0])
        if mix is None and x.shape[0] == 1:
            return routing.mix
        if mix is None:
            raise NotRowWise(
                f"{self.where}: expected a first axis of {routing.batch} rows (the batch), got "
                f"{tuple(x.shape)}"
            )
        return mix

    def _each(self, x: Tensor, mix: Mix, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run`, which keeps the first axis, on rows of `x`.

        What serves the whole batch, by a first axis of 1 or by having none, comes out per row.
        """
        if isinstance(x, PerRow):
            return per_row(run(x.per_row), self.where)
        if x.shape[0] == 1 and not mix.one:
            return per_row(run(x.expand(mix.rows, *x.shape[1:])).unsqueeze(1), self.where)
        return run(x)


class Wrapping(Mixing):
    """A layer around the module that it stands for: whatever else is asked of it, that one knows.

    Models read attributes of their layers (ViT its projection's `weight.dtype`).
    """

    inner: Any

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("inner", "twin_mixers"):
                raise
            mixers = self._modules["twin_mixers"]
            found = getattr(self._modules["inner"], name)
            routing = current()
            if name not in mixers._modules or routing is None or routing.mix is None:  # type: ignore[union-attr]
                return found
            return read(found, mixers._modules[name], routing.mix, self, name)  # type: ignore[union-attr]

    def _own(self, name: str) -> Tensor:
        """A tensor of the wrapped module as it is."""
        inner = self._modules["inner"]
        assert inner is not None
        found = inner._parameters[name] if name in inner._parameters else inner._buffers[name]
        assert found is not None
        return found

    def _merged(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        """The wrapped module with its tensors mixed by one weighting."""
        tensors = {
            name: stored(self._own(name), each, mix, self, name)
            for name, each in self.twin_mixers.items()
        }
        return called_with(self.inner, tensors, args, kwargs)


class _Affine(Mixing):
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

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
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


class TwinLinear(_Affine, nn.Linear):
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


class TwinConv1D(_Affine, Conv1D):  # type: ignore[misc]
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
        out = None if normal.requires_grad else normal
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
            groups,  # type: ignore[arg-type]
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


class TwinAny(Wrapping):
    """Any module at all: exact for one weighting, by mixing its tensors densely."""

    def __init__(self, inner: nn.Module, patches: dict[str, Patch], where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers(patches)

    def forward(self, *args, **kwargs):
        found = cell()
        if found is None or found.routing is None or found.routing.mix is None:
            return self.inner(*args, **kwargs)
        found.count()
        if not found.routing.mix.one:
            raise NotRowWise(f"{self.where}: a {type(self.inner).__name__} has no row-wise form")
        return self._merged(found.routing.mix, args, kwargs)
