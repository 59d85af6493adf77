"""What all layers share: mixers, how a row finds its weights, tensors read from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..parts import Part, PartList
from ..per_row import LIMIT, NotRowWise, PerRow, per_row
from ..routing import Mix, asked, cell, current

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
        routing = asked()
        if routing is None or routing.mix is None:
            return None
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
