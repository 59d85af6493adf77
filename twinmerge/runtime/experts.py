r"""Layers of a mixture model whose experts are fused, with other weights for every row of a batch.

transformers keeps the experts of a mixture (Mixtral, Qwen3-MoE, OLMoE, DeepSeek, ...) as two
parameters, `gate_up_proj` (num_experts, 2 · width, hidden) and `down_proj` (num_experts, hidden,
width). It calls the module with tokens, not rows. ("Expert" has two meanings here: of the mixture,
e, and of our merge, t.) For a token x of a row with weights w that chose expert e,

    y = act(G_e x) ⊙ U_e x,  z = V_e y        G_e x = G_se x + Σ_t w_t D_te x, and so U_e and V_e

Tokens must come row by row, all rows of one length: token n of N belongs to row n // (N / rows).
`in_rows` finds out whether a block of a model does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Patch, Whole, Wrapping, called_with
from .names import Index
from .parts import PartList
from .per_row import NotRowWise, PerRow, per_row
from .routing import Mix, asked

Blocks = Sequence[tuple[Index, Patch]]
"""Of one fused parameter: what the files' matrices in it have in parts, and where they lie."""

STACKS = ("gate_up_proj", "down_proj")
NEAR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How near our experts have to come to the module's own, as a share of the norm; else 3 %."""


class Stack(nn.Module):
    """What our experts know of a parameter that several tensors of a file fill."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.index = [index for index, _ in blocks]
        mixers = (each if isinstance(each, Whole) else PartList(each) for _, each in blocks)
        self.mixers = nn.ModuleList(mixers)

    def dense(self, weights: Float[Tensor, "row expert"], like: Tensor) -> Tensor:
        """like + Σ_t w_t D_t for each row of weights: (row, *like.shape)."""
        mixed = like.expand(len(weights), *like.shape).clone()
        for index, each in zip(self.index, self.mixers, strict=True):
            mixed[(slice(None), *index)] = each.dense(weights, like[index])  # type: ignore[operator]
        return mixed

    def merged(self, like: Tensor, mix: Mix) -> Tensor:
        """like + Σ_t w_t D_t for the one weighting of `mix`."""
        mixed = like.clone()
        for index, each in zip(self.index, self.mixers, strict=True):
            mixed[index] = each.merged(like[index], mix)  # type: ignore[operator]
        return mixed


class TwinExperts(Wrapping):
    """Fused experts: every token gets what the experts that were merged for its row would give it.

    Only what tokens chose is computed. Raises `NotRowWise` for a module whose own forward, on
    random tokens, is not what we make of its weights: biases, another layout, a norm at the end.
    """

    def __init__(self, inner: nn.Module, blocks: Mapping[str, Blocks], where: str) -> None:
        super().__init__()
        self.inner, self.where = inner, where
        self.twin_mixers = nn.ModuleDict({name: Stack(each) for name, each in blocks.items()})
        # Attribute and expert of the mixture -> its blocks.
        self.blocks: dict[tuple[str, int], list[tuple[slice, PartList]]] = {}
        for name, stack in self.twin_mixers.items():
            assert isinstance(stack, Stack)
            for index, parts in zip(stack.index, stack.mixers, strict=True):
                if not (isinstance(parts, PartList) and len(index) == 2 and name in STACKS):
                    raise self._other(f"{name}{list(index)} is no matrix of an expert")
                expert, rows = index
                assert isinstance(expert, int) and isinstance(rows, slice)
                self.blocks.setdefault((name, expert), []).append((rows, parts))
        self._probe()

    def forward(
        self,
        hidden_states: Float[Tensor, "token in"],
        top_k_index: Int[Tensor, "token k"],
        top_k_weights: Float[Tensor, "token k"],
    ) -> Float[Tensor, "token in"]:
        mix = _of_tokens(hidden_states, self.where)
        if any(isinstance(x, PerRow) for x in (hidden_states, top_k_index, top_k_weights)):
            raise NotRowWise(f"{self.where}: called with a value that serves the whole batch")
        if mix is None:
            return self.inner(hidden_states, top_k_index, top_k_weights)
        if mix.one and mix.store is not None:
            return self._merged(mix, (hidden_states, top_k_index, top_k_weights), {})
        return self._run(hidden_states, top_k_index, top_k_weights, mix)

    def _run(self, x: Tensor, index: Tensor, weights: Tensor, mix: Mix | None) -> Tensor:
        k, flat = index.shape[1], index.reshape(-1)
        order = flat.argsort(stable=True)
        # An index beyond the last expert is transformers' word for none of them.
        counts = flat.bincount(minlength=self._own("down_proj").shape[0])
        found: list[Tensor] = []
        start = 0
        for expert, count in enumerate(counts[: len(self._own("down_proj"))].tolist()):
            if count:
                token = order[start : start + count] // k
                found.append(self._expert(expert, x[token], _some(mix, token)))
            start += count
        y = torch.cat(found) if found else x[:0]
        y = y * weights.reshape(-1)[order[:start], None]
        out = y.new_zeros(len(flat), x.shape[1]).index_copy(0, order[:start], y)
        return out.view(*index.shape, -1).sum(dim=1).to(x.dtype)

    def _expert(self, expert: int, x: Tensor, mix: Mix | None) -> Float[Tensor, "token in"]:
        y = self._linear("gate_up_proj", expert, x, mix)
        if hasattr(self.inner, "_apply_gate"):
            y = self.inner._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            y = self.inner.act_fn(gate) * up
        return self._linear("down_proj", expert, y, mix)

    def _linear(self, name: str, expert: int, x: Tensor, mix: Mix | None) -> Tensor:
        y = F.linear(x, self._own(name)[expert])
        if mix is None:
            return y
        for rows, parts in self.blocks.get((name, expert), ()):
            part_of_y = y[:, rows].contiguous()
            for part in parts.wanted(mix):
                part_of_y = part.linear(part_of_y, x, mix)
            y[:, rows] = part_of_y
        return y

    @torch.no_grad()
    def _probe(self) -> None:
        own = {n for n, _ in self.inner.named_parameters(recurse=False)}
        own |= {n for n, _ in self.inner.named_buffers(recurse=False)}
        if own != set(STACKS):
            raise self._other(f"it has {sorted(own)}, expected {sorted(STACKS)}")
        down = self._own("down_proj")
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4, down.shape[1], generator=draw)
        x[2:] *= 30  # where a clamp would show
        index = torch.rand(4, len(down), generator=draw).argsort(dim=1)[:, :2]
        weights = torch.rand(index.shape, generator=draw)
        args = x.to(down), index.to(down.device), weights.to(down)
        try:
            ours, theirs = self._run(*args, None).double(), self.inner(*args).double()
        except Exception as problem:  # any module at all may stand here
            raise self._other(str(problem)) from problem
        # The larger tokens must not hide the smaller ones.
        off, size = (ours - theirs).norm(dim=1), theirs.norm(dim=1)
        if not bool((off <= NEAR.get(down.dtype, 0.03) * size).all() and (size > 0).all()):
            raise self._other("its own forward gives something else")

    def _other(self, why: str) -> NotRowWise:
        name = type(self.inner).__name__
        return NotRowWise(f"{self.where}: {name} does not run its experts as we do: {why}")


class TwinGate(Wrapping):
    """A mixture's router: a matrix (num_experts, hidden) that its forward gives to `F.linear`.

    Its vectors (DeepSeek's correction of the scores) are each token's own. Whatever else is done
    with the matrix raises `NotRowWise`.
    """

    def __init__(self, inner: nn.Module, patches: Mapping[str, Patch], where: str) -> None:
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers(patches)

    # What it hands to the gate is no plain tensor, which a compiler could not follow.
    @torch.compiler.disable
    def forward(  # type: ignore[override]
        self, hidden_states: Float[Tensor, "*token in"], *args: Any, **kwargs: Any
    ) -> Any:
        mix = _of_tokens(hidden_states, self.where)
        if mix is None:
            return self.inner(hidden_states, *args, **kwargs)
        args = (hidden_states, *args)
        if mix.one:
            return self._merged(mix, args, kwargs)
        tensors: dict[str, Tensor] = {}
        for name, each in self.twin_mixers.items():
            own = self._own(name)
            if isinstance(each, Whole):
                # (1, num_experts): to `PerRow`, tokens are rows, whose first axis has length 1.
                rows = each.dense(mix.like(own), own).unsqueeze(1)
                tensors[name] = per_row(rows, self.where, leads=True)
            else:
                assert isinstance(each, PartList)
                tensors[name] = _Matrix(own, each, mix, self.where)
        return called_with(self.inner, tensors, args, kwargs)


class _Matrix(Tensor):
    """Stands for a matrix that is another for every token: it can be cast, and multiplied by."""

    _plain: Tensor
    _parts: PartList
    _mix: Mix
    _where: str

    @staticmethod
    def __new__(cls, plain: Tensor, parts: PartList, mix: Mix, where: str) -> _Matrix:
        self = torch.Tensor._make_subclass(cls, plain.detach(), False)
        self._plain, self._parts, self._mix, self._where = plain, parts, mix, where
        return self

    def __init__(self, plain: Tensor, parts: PartList, mix: Mix, where: str) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not isinstance(args[0], _Matrix):
            return _linear(*args, **kwargs)
        found = [x for x in (*args, *kwargs.values()) if isinstance(x, _Matrix)]
        if len(found) == 1 and found[0] is args[0]:
            plain = found[0]._plain
            if func in _CASTS:
                return found[0]._as(func(plain, *args[1:], **kwargs))
            if func in _ASKING:
                return func(plain, *args[1:], **kwargs)
        name = getattr(func, "__name__", repr(func))
        where = found[0]._where if found else "the router of a mixture"
        raise NotRowWise(f"{where}: {name} of a matrix that is another for every token")

    def _as(self, plain: Tensor) -> _Matrix:
        return _Matrix(plain, self._parts, self._mix, self._where)


_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half}
_ASKING = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(getattr(Tensor, name) for name in ("size", "dim", "is_floating_point")),
}


def _linear(input: Tensor, weight: _Matrix, bias: Tensor | None = None) -> Tensor:
    mix = weight._mix
    if bias is not None or input.ndim != 2 or len(input) != mix.rows:
        raise NotRowWise(f"{weight._where}: {mix.rows} tokens, but {tuple(input.shape)} multiplied")
    y = F.linear(input, weight._plain)
    for part in weight._parts.wanted(mix):
        y = part.linear(y, input, mix)
    return y


# --------------------------------------------------------------------------- tokens and rows


def _of_tokens(x: Float[Tensor, "*token in"], where: str) -> Mix | None:
    """The weights of every token of `x`, or None: the shared expert alone.

    Raises `NotRowWise` if the tokens are not so many to each row.
    """
    routing = asked()
    if routing is None or routing.mix is None:
        return None
    return routing.mix.of_tokens(x.numel() // x.shape[-1], where)


def _some(mix: Mix | None, tokens: Int[Tensor, " some"]) -> Mix | None:
    """The weights of these tokens."""
    if mix is None or mix.one:
        return mix
    chosen = None if mix.chosen is None else mix.chosen[tokens]
    return Mix(mix.weights[tokens], mix.active, chosen, convex=mix.convex)


@torch.no_grad()
def in_rows(block: nn.Module, experts: nn.Module, width: int) -> bool:
    """Whether `block`, called with (batch, seq, width), calls `experts` with all tokens in order.

    Tries it: a change of one token must reach the experts as the change of that one.
    """
    seen: list[Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    like = next(experts.parameters())
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(like)
    training = block.training
    try:
        block.eval()
        for changed in (None, 2, 4):
            other = x.clone()
            if changed is not None:
                other.view(6, width)[changed] += 1.0
            block(other)
    except Exception:  # any module at all may stand here, so any error at all may come
        return False
    finally:
        block.train(training)
        hook.remove()
    if len(seen) != 3 or any(len(each) != 6 for each in seen):
        return False
    first, *others = seen
    moved = [(each != first).any(dim=1).nonzero().flatten().tolist() for each in others]
    return moved == [[2], [4]]
