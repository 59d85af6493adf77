"""Fused experts of mixtures: each token gets what its row's densely merged module gives it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import randn
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
)

from twinmerge.artifact.codec import Sparse, dequantise, quantise
from twinmerge.errors import UnsupportedModel
from twinmerge.runtime.experts import TwinExperts, TwinGate, in_rows
from twinmerge.runtime.layers import Whole
from twinmerge.runtime.parts import Factors, Packed, Part, Scattered
from twinmerge.runtime.per_row import NotRowWise
from twinmerge.runtime.routing import Mix, Routing, Store, routed

T, E, WIDTH, INNER = 3, 4, 16, 12
"""Experts of the merge; experts of the mixture; sizes."""
ROWS, LENGTH = 4, 5
STORAGES = ("float", "int8", "int4", "sparse", "several")
TEXT = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
MIXTRAL = tf.MixtralConfig(
    **TEXT, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=2
)
QWEN = tf.Qwen3MoeConfig(
    **TEXT, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=3, hidden_act="gelu"
)
DEEPSEEK = tf.DeepseekV3Config(
    **TEXT, moe_intermediate_size=INNER, n_routed_experts=E, num_experts_per_tok=2, n_group=2,
    topk_group=1, n_shared_experts=1,
)  # fmt: skip
MODULES: dict[str, Any] = {
    "mixtral": lambda: MixtralExperts(MIXTRAL),
    "qwen3 moe": lambda: Qwen3MoeExperts(QWEN),
}


def random_(module: nn.Module, seed: int = 0) -> Any:
    """The module with random tensors, buffers too."""
    with torch.no_grad():
        for index, tensor in enumerate([*module.parameters(), *module.buffers()]):
            tensor.copy_(0.5 * randn(*tensor.shape, seed=seed + index))
    return module.eval()


def matrix(out: int, in_: int, seed: int, storage: str) -> tuple[tuple[Part, ...], Tensor]:
    """What T experts know of one matrix, in parts and dense: (expert, out, in)."""
    ranks = [2, 0, 3] if storage == "float" else [3, 2, 1]
    dense = torch.zeros(T, out, in_)
    if storage == "sparse":
        parts: list[Part] = [_sparse(dense, t, seed) for t in range(T)]
    elif storage == "several":
        low, own = matrix(out, in_, seed, "float"), matrix(out, in_, seed + 1, "int8")
        dense += low[1] + own[1]
        parts = [*low[0], *own[0], _sparse(dense, 1, seed)]
    else:
        a = 0.3 * randn(sum(ranks), in_, seed=seed)
        bt = 0.3 * randn(sum(ranks), out, seed=seed + 1)
        if storage == "float":
            parts = [Factors(a, bt.T, ranks)]
        else:
            bits = {"int8": 8, "int4": 4}[storage]
            qa, qb = quantise(a, bits), quantise(bt, bits)
            parts, a, bt = [Packed(qa, qb, ranks)], dequantise(qa), dequantise(qb)
        start = 0
        for t, rank in enumerate(ranks):
            dense[t] += bt[start : start + rank].T @ a[start : start + rank]
            start += rank
    return tuple(parts), dense


def _sparse(dense: Tensor, expert: int, seed: int) -> Scattered:
    """A few entries of that expert, which are added to `dense`, too."""
    _, out, in_ = dense.shape
    index = torch.arange(expert, out * in_, 7)
    values = 0.5 * randn(len(index), seed=seed + expert)
    dense[expert].view(-1)[index] += values
    return Scattered(Sparse(values, index, (out, in_)), expert, T)


def blocks(inner: Any, storage: str, most: int = E) -> tuple[dict, list[tuple[str, Any, Tensor]]]:
    """Parts of all matrices but one of the first experts, and [(attribute, index, dense)]."""
    given: dict[str, list] = {"gate_up_proj": [], "down_proj": []}
    dense = []
    width = inner.down_proj.shape[2]
    for expert in range(most):
        for place, (name, index, out, in_) in enumerate((
            ("gate_up_proj", (expert, slice(0, width)), width, WIDTH),
            ("gate_up_proj", (expert, slice(width, 2 * width)), width, WIDTH),
            ("down_proj", (expert, slice(0, WIDTH)), WIDTH, width),
        )):  # fmt: skip
            if (expert, place) == (1, 1):
                continue  # in this one, nobody differs
            parts, whole = matrix(out, in_, 100 * expert + 10 * place, storage)
            given[name].append((index, parts))
            dense.append((name, index, whole))
    return given, dense


def merged(module: Any, dense: list[tuple[str, Any, Tensor]], weights: Tensor) -> Any:
    """The module with `Σ_t w_t D_t` added to its tensors."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, index, whole in dense:
            tensor = module.get_parameter(name) if name in dict(module.named_parameters()) else (
                module.get_buffer(name)
            )  # fmt: skip
            tensor[index] += torch.einsum("t,t...->...", weights.to(whole), whole)
    return module


def asked(rows: int = ROWS, length: int = LENGTH, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of the mixture that they chose, and their weights."""
    tokens = rows * length
    index = torch.rand(tokens, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :k]
    return randn(tokens, WIDTH, seed=3), index, randn(tokens, k, seed=4).abs()


def weightings(rows: int = ROWS) -> Tensor:
    """One row of zeros, one with a negative weight; an expert that nobody asks for."""
    weights = randn(rows, T, seed=5).softmax(dim=1)
    weights[0] = 0
    weights[-1, 0] = -0.5
    weights[:, 1] = 0
    return weights


def rows_of(weights: Tensor) -> Routing:
    """The routing of a batch with these weights."""
    active = tuple(t for t in range(T) if weights[:, t].any())
    return Routing(Mix(weights, active) if active else None, None, len(weights))


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", sorted(MODULES))
def test_each_token_gets_what_its_rows_merged_module_gives_it(name, storage, length):
    inner = random_(MODULES[name]())
    given, dense = blocks(inner, storage)
    twin = TwinExperts(inner, given, "experts")
    x, index, weights = asked(length=length)
    w = weightings()
    with torch.no_grad(), routed(rows_of(w)):
        y = twin(x, index, weights)
    for row in range(ROWS):
        mine = slice(row * length, (row + 1) * length)
        with torch.no_grad():
            want = merged(inner, dense, w[row])(x[mine], index[mine], weights[mine])
        assert_close(y[mine], want)
    assert (y[length:] - inner(x, index, weights)[length:]).abs().amax() > 0.1


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_with_few_experts_of_their_own_get_the_same(storage):
    inner = random_(MODULES["mixtral"]())
    given, dense = blocks(inner, storage)
    twin = TwinExperts(inner, given, "experts")
    x, index, weights = asked(length=1)
    chosen = torch.tensor([[0], [1], [2], [1]])
    w = torch.zeros(ROWS, T).scatter(1, chosen, torch.tensor([[1.0], [0.5], [0.25], [2.0]]))
    routing = Routing(Mix(w, (0, 1, 2), chosen), None, ROWS)
    with torch.no_grad(), routed(routing):
        y = twin(x, index, weights)
        for row in range(ROWS):
            own = (each[row : row + 1] for each in (x, index, weights))
            assert_close(y[row : row + 1], merged(inner, dense, w[row])(*own))


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_one_weighting_serves_all_tokens(storage, store):
    inner = random_(MODULES["qwen3 moe"]())
    given, dense = blocks(inner, storage, most=2)
    twin = TwinExperts(inner, given, "experts")
    args, w = asked(k=3), torch.tensor([[0.2, 0.5, 0.3]])
    kept = Store() if store else None
    with torch.no_grad(), routed(Routing(Mix(w, (0, 1, 2), store=kept), None, ROWS)):
        assert_close(twin(*args), merged(inner, dense, w[0])(*args))
        assert_close(twin(*args), merged(inner, dense, w[0])(*args))
    assert kept is None or len(kept) == 2


def test_without_weights_it_is_the_shared_expert_exactly():
    inner = random_(MODULES["mixtral"]())
    twin = TwinExperts(inner, blocks(inner, "float")[0], "experts")
    args = asked()
    want = inner(*args)
    assert torch.equal(twin(*args), want)
    with routed(rows_of(torch.zeros(ROWS, T))):
        assert torch.equal(twin(*args), want)


def test_an_index_beyond_the_experts_is_none_of_them():
    inner = random_(MODULES["mixtral"]())
    given, dense = blocks(inner, "float")
    twin = TwinExperts(inner, given, "experts")
    x, index, weights = asked()
    index[3], index[7, 0] = E, E
    w = weightings()[1:2]
    with torch.no_grad(), routed(rows_of(w.expand(ROWS, T))):
        y = twin(x, index, weights)
    assert_close(y, merged(inner, dense, w[0])(x, index, weights).detach())
    assert not y[3].any()


def test_gradients_reach_the_tokens():
    inner = random_(MODULES["mixtral"]())
    given, dense = blocks(inner, "several")
    twin = TwinExperts(inner, given, "experts")
    x, index, weights = asked(rows=1)
    w, x = torch.tensor([[0.2, 0.5, 0.3]]), x.requires_grad_()
    with routed(rows_of(w)):
        (ours,) = torch.autograd.grad(twin(x, index, weights).square().sum(), x)
    plain = merged(inner, dense, w[0])
    (theirs,) = torch.autograd.grad(plain(x, index, weights).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_comes_as_near_as_the_module_itself():
    inner = random_(MODULES["mixtral"]())
    given, dense = blocks(inner, "int8")
    args, w = asked(), weightings()[1:2]
    want = merged(inner, dense, w[0])(*args)
    twin = TwinExperts(inner, given, "experts").bfloat16()
    x, index, weights = args
    with torch.no_grad(), routed(rows_of(w.expand(ROWS, T))):
        y = twin(x.bfloat16(), index, weights)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 0.02 * want.norm()


# ----------------------------------------------------------------------------- what is refused


def test_tokens_that_rows_cannot_have_alike_are_refused():
    inner = random_(MODULES["mixtral"]())
    twin = TwinExperts(inner, blocks(inner, "float")[0], "mlp.experts")
    with routed(rows_of(weightings(3))), pytest.raises(NotRowWise, match="mlp.experts: 20 tok"):
        twin(*asked())


class Interleaved(MixtralExperts):
    """Gate and up in turns."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        plain = copy.deepcopy(self)
        turned = self.gate_up_proj.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        plain.gate_up_proj = nn.Parameter(turned)
        return MixtralExperts.forward(plain, hidden_states, top_k_index, top_k_weights)


class Clamped(MixtralExperts):
    """Large values alone are not the product of the matrices."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states.clamp(-10, 10), top_k_index, top_k_weights)


@pytest.mark.parametrize("cls", [Interleaved, Clamped])
def test_a_module_that_does_something_else_is_refused(cls):
    inner = random_(cls(MIXTRAL))
    with pytest.raises(UnsupportedModel, match=f"mlp.experts: {cls.__name__} does not .* else"):
        TwinExperts(inner, blocks(inner, "float")[0], "mlp.experts")


def test_biases_and_other_tensors_are_refused():
    config = tf.GptOssConfig(**TEXT, intermediate_size=INNER, num_local_experts=E)
    inner = random_(GptOssExperts(config))
    with pytest.raises(UnsupportedModel, match="down_proj_bias"):
        TwinExperts(inner, {}, "experts")
    inner = random_(MODULES["mixtral"]())
    vectors = Whole(torch.zeros(T, E, WIDTH, INNER))
    with pytest.raises(UnsupportedModel, match="no matrix of an expert"):
        TwinExperts(inner, {"down_proj": [((), vectors)]}, "experts")


# ------------------------------------------------------------------------------ a whole block


BLOCKS: dict[str, Any] = {
    "mixtral": lambda: MixtralSparseMoeBlock(MIXTRAL),
    "qwen3 moe": lambda: Qwen3MoeSparseMoeBlock(QWEN),
    "deepseek": lambda: DeepseekV3MoE(DEEPSEEK),
}


@pytest.mark.parametrize("storage", ["float", "int4", "sparse"])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_block_whose_router_differs_too_is_exact_for_every_row(name, storage):
    plain = random_(BLOCKS[name]())
    block = copy.deepcopy(plain)
    assert in_rows(block, block.experts, WIDTH)
    given, dense = blocks(plain.experts, storage)
    dense = [(f"experts.{name}", *rest) for name, *rest in dense]
    parts, whole = matrix(E, WIDTH, 9, storage)
    patches: dict[str, Any] = {"weight": parts}
    dense.append(("gate.weight", (), whole))
    if name == "deepseek":
        vectors = randn(T, E, seed=8)
        patches["e_score_correction_bias"] = Whole(vectors)
        dense.append(("gate.e_score_correction_bias", (), vectors))
    block.experts = TwinExperts(block.experts, given, "experts")
    block.gate = TwinGate(block.gate, patches, "gate")
    x, w = randn(ROWS, LENGTH, WIDTH, seed=6), weightings()
    with torch.no_grad():
        with routed(rows_of(w)):
            y = block(x)
        for row in range(ROWS):
            assert_close(y[row], merged(plain, dense, w[row])(x[row : row + 1])[0])
        with routed(rows_of(w[1:2])):
            assert_close(block(x), merged(plain, dense, w[1])(x))
        assert torch.equal(block(x), plain(x))


class Mixed(nn.Module):
    """A router's matrix used otherwise than by `F.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(E, WIDTH, seed=0))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_router_that_does_more_than_multiply_is_refused():
    gate = TwinGate(Mixed(), {"weight": matrix(E, WIDTH, 0, "float")[0]}, "mlp.gate")
    x = randn(ROWS * LENGTH, WIDTH, seed=1)
    with routed(rows_of(weightings())), pytest.raises(NotRowWise, match="mlp.gate: "):
        gate(x)
    with torch.no_grad(), routed(rows_of(weightings()[1:2])):
        gate(x)  # one weighting is no matter


class Block(nn.Module):
    """Hands its tokens on in some order, or not all of them."""

    def __init__(self, order) -> None:
        super().__init__()
        self.experts, self.order = nn.Linear(WIDTH, WIDTH), order

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.order(x))


@pytest.mark.parametrize(
    ("order", "right"),
    [
        (lambda x: x.reshape(-1, WIDTH), True),
        (lambda x: 2 * x.flatten(0, 1).relu(), True),
        (lambda x: x.transpose(0, 1).reshape(-1, WIDTH), False),
        (lambda x: x[:, 1:].reshape(-1, WIDTH), False),
        (lambda x: x.cumsum(1).reshape(-1, WIDTH), False),
        (lambda x: x.flatten(0, 1).flip(0), False),
        (lambda x: x.no_such_method(), False),
    ],
)
def test_a_block_is_asked_whether_it_keeps_tokens_in_rows(order, right):
    block = Block(order).train()
    assert in_rows(block, block.experts, WIDTH) is right
    assert block.training and not block.experts._forward_pre_hooks
