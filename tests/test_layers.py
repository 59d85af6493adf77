"""Every layer gives each row what the densely merged layer would give it."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from twinmerge.artifact.codec import (
    Sparse,
    dequantise,
    quantise,
    row_bytes,
)
from twinmerge.errors import UnsupportedModel
from twinmerge.runtime import parts as parts_module
from twinmerge.runtime.layers import (
    TwinConv,
    TwinConv1D,
    TwinElementwise,
    TwinEmbedding,
    TwinLayerNorm,
    TwinLinear,
    TwinLookup,
    TwinParameter,
    Whole,
)
from twinmerge.runtime.parts import Factors, Packed, Part, Scattered
from twinmerge.runtime.parts import stacked as stack_parts
from twinmerge.runtime.routing import Routing, current, routed

T = 3
"""Experts."""


@dataclass(frozen=True)
class Matrix:
    """What the experts know of one matrix: as a layer takes it, and written out densely."""

    parts: tuple[Part, ...]
    dense: torch.Tensor
    """(expert, out, in)"""


def stacked(out: int, in_: int, seed: int, ranks: tuple[int, ...] = (2, 0, 3)) -> Matrix:
    """Random factors of experts of several ranks; one has none."""
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    a, b = 0.5 * randn(len(owner), in_, seed=seed), 0.5 * randn(out, len(owner), seed=seed + 1)
    each = [b[:, owner == t] @ a[owner == t] for t in range(len(ranks))]
    return Matrix((Factors(a, b, owner),), torch.stack(each))


STORAGES = {
    "float": ("float",) * T,
    "int8": ("int8",) * T,
    "int4": ("int4",) * T,
    "sparse": ("half", "few", "few"),
    "several ways": ("int8", "half", "float"),
    "several other ways": ("few", "int4", "int8"),
}


def stored(matrix: Matrix, storages: tuple[str, ...]) -> Matrix:
    """The same, expert t as `storages[t]`: rounded, or with few of its entries."""
    factors, dense = matrix.parts[0], matrix.dense.clone()
    parts: list[Part] = []
    for t, storage in enumerate(storages):
        mine = factors.owner == t
        if storage == "float":
            parts.append(Factors(factors.a[mine], factors.b[:, mine], factors.owner[mine]))
        elif storage in ("half", "few"):
            full = dense[t] if mine.any() else randn(*dense[t].shape, seed=t)
            few = max(1, full.numel() // 40) if storage == "few" else full.numel() // 2
            index = torch.randperm(full.numel(), generator=torch.Generator().manual_seed(t))
            index = index[:few].sort().values
            sparse = Sparse(full.flatten()[index], index, tuple(full.shape))
            dense[t] = sparse.dense()
            parts.append(Scattered(sparse, t))
        elif mine.any():
            bits = int(storage.removeprefix("int"))
            a, b = quantise(factors.a[mine], bits), quantise(factors.b.T[mine], bits)
            parts.append(Packed(a, b, factors.owner[mine]))
            dense[t] = dequantise(b).T @ dequantise(a)
    return Matrix(stack_parts(parts), dense)


def whole(*shape: int, seed: int) -> Whole:
    return Whole(0.5 * randn(T, *shape, seed=seed))


def mixed(patch: Matrix | Whole, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Σ_t w_t D_t for one row's weights."""
    each = patch.delta if isinstance(patch, Whole) else patch.dense
    return torch.einsum("e,e...->...", weights, each).view(shape)


class Case:
    """A layer, its patches by attribute, and something to call it with."""

    def __init__(self, inner: nn.Module, twin, patches: dict, x: torch.Tensor) -> None:
        self.inner, self.patches, self.x, self.make = randomised(inner), patches, x, twin
        self.store("float")

    def store(self, storage: str) -> Case:
        """Make the layer of matrices stored in another way."""
        if storage != "float":
            self.patches = {
                name: stored(patch, STORAGES[storage]) if isinstance(patch, Matrix) else patch
                for name, patch in self.patches.items()
            }
        plain = {name: getattr(patch, "parts", patch) for name, patch in self.patches.items()}
        self.twin = self.make(self.inner, plain)
        return self

    def dense(self, weights: torch.Tensor) -> nn.Module:
        """The layer with its weights merged for one row."""
        merged = copy.deepcopy(self.inner)
        with torch.no_grad():
            for name, patch in self.patches.items():
                parameter = getattr(merged, name)
                parameter.add_(mixed(patch, weights, parameter.shape))
        return merged


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + index))
    return module.requires_grad_(False)


def affine(kind):
    return lambda m, p: kind(m, p.get("weight", ()), p.get("bias"), "the.layer")


def norm(module, patches):
    return TwinLayerNorm(module, patches.get("weight"), patches.get("bias"), "the.layer")


def table(kind):
    return lambda m, p: kind(m, p["weight"], "the.layer")


def elementwise(module, patches):
    return TwinElementwise(module, patches, "the.layer")


IDS = torch.tensor([[0, 3, 8], [1, 1, 2], [7, 0, 4], [5, 6, 0]])
WEIGHT = {"weight": stacked(5, 6, seed=0)}
BIAS = {"bias": whole(5, seed=2)}
IMAGE = randn(4, 3, 9, 10, seed=9)
KERNEL = {"weight": stacked(5, 3 * 3 * 2, seed=0), "bias": whole(5, seed=2)}


def conv2d(**options):
    return nn.Conv2d(3, 5, (3, 2), **options)


CASES = {
    "linear": lambda: Case(
        nn.Linear(6, 5), affine(TwinLinear), WEIGHT | BIAS, randn(4, 7, 6, seed=9)
    ),
    "linear without bias": lambda: Case(
        nn.Linear(6, 5, bias=False), affine(TwinLinear), WEIGHT, randn(4, 7, 6, seed=9)
    ),
    "linear, weight only": lambda: Case(
        nn.Linear(6, 5), affine(TwinLinear), WEIGHT, randn(4, 7, 6, seed=9)
    ),
    "linear, bias only": lambda: Case(
        nn.Linear(6, 5), affine(TwinLinear), BIAS, randn(4, 7, 6, seed=9)
    ),
    "linear on (batch, in)": lambda: Case(
        nn.Linear(6, 5), affine(TwinLinear), WEIGHT | BIAS, randn(4, 6, seed=9)
    ),
    "linear on four axes": lambda: Case(
        nn.Linear(6, 5), affine(TwinLinear), WEIGHT | BIAS, randn(4, 2, 3, 6, seed=9)
    ),
    "conv1d of gpt2": lambda: Case(
        Conv1D(5, 6),
        affine(TwinConv1D),
        {"weight": stacked(6, 5, seed=0)} | BIAS,
        randn(4, 7, 6, seed=9),
    ),
    "conv1d of gpt2, bias only": lambda: Case(
        Conv1D(5, 6), affine(TwinConv1D), BIAS, randn(4, 7, 6, seed=9)
    ),
    "embedding": lambda: Case(
        nn.Embedding(9, 6), table(TwinEmbedding), {"weight": stacked(9, 6, seed=0)}, IDS
    ),
    "embedding with padding": lambda: Case(
        nn.Embedding(9, 6, padding_idx=0),
        table(TwinEmbedding),
        {"weight": stacked(9, 6, seed=0)},
        IDS,
    ),
    "embedding that scales": lambda: Case(
        GemmaTextScaledWordEmbedding(9, 6, 0, embed_scale=2.5),
        table(TwinLookup),
        {"weight": stacked(9, 6, seed=0)},
        IDS,
    ),
    "embedding of positions": lambda: Case(
        BartLearnedPositionalEmbedding(9, 6),
        table(TwinLookup),
        {"weight": stacked(11, 6, seed=0)},
        IDS,
    ),
    "layer norm": lambda: Case(
        nn.LayerNorm(6, eps=1e-3),
        norm,
        {"weight": whole(6, seed=0), "bias": whole(6, seed=1)},
        randn(4, 7, 6, seed=9),
    ),
    "layer norm, gain only": lambda: Case(
        nn.LayerNorm(6), norm, {"weight": whole(6, seed=0)}, randn(4, 7, 6, seed=9)
    ),
    "layer norm, shift only": lambda: Case(
        nn.LayerNorm(6), norm, {"bias": whole(6, seed=0)}, randn(4, 7, 6, seed=9)
    ),
    "layer norm without bias": lambda: Case(
        nn.LayerNorm(6, bias=False),
        norm,
        {"weight": whole(6, seed=0)},
        randn(4, 6, seed=9),
    ),
    "rms norm of llama": lambda: Case(
        LlamaRMSNorm(6), elementwise, {"weight": whole(6, seed=0)}, randn(4, 7, 6, seed=9)
    ),
    "rms norm of gemma, 1 + gain": lambda: Case(
        GemmaRMSNorm(6), elementwise, {"weight": whole(6, seed=0)}, randn(4, 7, 6, seed=9)
    ),
    "rms norm on heads": lambda: Case(
        LlamaRMSNorm(6), elementwise, {"weight": whole(6, seed=0)}, randn(4, 7, 2, 6, seed=9)
    ),
    "gain and shift": lambda: Case(
        nn.LayerNorm(6),
        elementwise,
        {"weight": whole(6, seed=0), "bias": whole(6, seed=1)},
        randn(4, 7, 6, seed=9),
    ),
    "convolution": lambda: Case(conv2d(), affine(TwinConv), KERNEL, IMAGE),
    "convolution, stride and padding": lambda: Case(
        conv2d(stride=(2, 1), padding=(1, 2), dilation=(1, 2)), affine(TwinConv), KERNEL, IMAGE
    ),
    "convolution, circular padding": lambda: Case(
        conv2d(padding=1, padding_mode="circular"), affine(TwinConv), KERNEL, IMAGE
    ),
    "convolution, bias only": lambda: Case(
        conv2d(), affine(TwinConv), {"bias": KERNEL["bias"]}, IMAGE
    ),
    "convolution, kernel only": lambda: Case(
        conv2d(bias=False), affine(TwinConv), {"weight": KERNEL["weight"]}, IMAGE
    ),
    "convolution, one axis": lambda: Case(
        nn.Conv1d(3, 5, 4, stride=2, padding=1),
        affine(TwinConv),
        {"weight": stacked(5, 12, seed=0), "bias": whole(5, seed=2)},
        randn(4, 3, 11, seed=9),
    ),
    "convolution, one channel out": lambda: Case(
        nn.Conv1d(3, 1, 4), affine(TwinConv), {"weight": stacked(3, 4, seed=0)}, IMAGE[:, :, 0]
    ),
}


MATRICES = [
    name for name in CASES if any(isinstance(p, Matrix) for p in CASES[name]().patches.values())
]


@pytest.fixture(
    params=[
        *((name, "float") for name in CASES),
        *((name, storage) for name in MATRICES for storage in STORAGES if storage != "float"),
    ],
    ids=lambda param: ", ".join(param),
)
def case(request, monkeypatch) -> Case:
    name, storage = request.param
    monkeypatch.setattr(parts_module, "BLOCK", 24)  # so that there are several blocks of each part
    return CASES[name]().store(storage)


def run(case: Case, weights: torch.Tensor | None, x: torch.Tensor | None = None) -> torch.Tensor:
    with routed(Routing(weights, None)):
        return case.twin(case.x if x is None else x)


def rows(case: Case, weights: torch.Tensor) -> torch.Tensor:
    """Every row through its own densely merged layer."""
    inputs = case.x.expand(len(weights), *case.x.shape[1:])
    outputs = [case.dense(w)(x[None]) for w, x in zip(weights, inputs, strict=True)]
    return torch.cat(outputs)


def test_outside_of_a_routing_a_layer_is_exactly_the_shared_one(case):
    want = case.inner(case.x)
    assert torch.equal(case.twin(case.x), want)
    assert torch.equal(run(case, None), want)


def test_zero_weights_give_the_shared_layer(case):
    torch.testing.assert_close(
        run(case, torch.zeros(4, T)), case.inner(case.x), rtol=1e-6, atol=1e-6
    )


def test_every_row_is_as_its_own_densely_merged_layer(case):
    weights = randn(4, T, seed=7).softmax(dim=1)
    torch.testing.assert_close(run(case, weights), rows(case, weights), rtol=1e-5, atol=1e-5)


def test_all_weight_on_one_expert_is_that_experts_layer(case):
    weights = torch.eye(T)[[2, 0, 1, 2]]
    torch.testing.assert_close(run(case, weights), rows(case, weights), rtol=1e-5, atol=1e-5)


def test_rows_do_not_see_each_other(case):
    weights = randn(4, T, seed=7)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        run(case, weights[order], case.x[order]), run(case, weights)[order], rtol=1e-6, atol=1e-6
    )


def test_one_row_of_input_serves_a_batch_of_weights(case):
    # Position embeddings come so: computed once, with a first axis of 1.
    case.x = case.x[:1]
    weights = randn(4, T, seed=7)
    got = run(case, weights)
    assert got.shape[0] == 4
    torch.testing.assert_close(got, rows(case, weights), rtol=1e-5, atol=1e-5)


def test_a_first_axis_that_is_not_the_batch_is_refused_by_name(case):
    weights = randn(3, T, seed=7)
    with pytest.raises(UnsupportedModel, match=r"the.layer: expected a first axis of 3 rows .*got"):
        run(case, weights)


def test_two_threads_with_other_weights_do_not_mix(case):
    weights = [randn(4, T, seed=seed) for seed in (1, 2)]
    want = [run(case, w) for w in weights]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work(index: int) -> None:
        with routed(Routing(weights[index], None)):
            start.wait()
            for _ in range(20):
                if not torch.equal(case.twin(case.x), want[index]):
                    wrong.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and current() is None


def test_a_layer_can_be_copied_moved_and_asked_for_its_weight(case):
    weights = randn(4, T, seed=7)
    want = run(case, weights)
    case.twin = copy.deepcopy(case.twin)
    assert torch.equal(run(case, weights), want)
    assert case.twin.weight.dtype == torch.float32
    assert case.twin.weight.shape == case.inner.weight.shape
    double = case.twin.double()
    x = case.x.double() if case.x.is_floating_point() else case.x
    with routed(Routing(weights, None)):
        out = double(x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), want, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 4),
    seq=st.integers(1, 3),
    ranks=st.tuples(*[st.integers(0, 3)] * T),
    seed=st.integers(0, 999),
)
def test_a_linear_layer_is_linear_in_the_weights(batch, seq, ranks, seed):
    inner = randomised(nn.Linear(4, 3))
    layer = TwinLinear(inner, stacked(3, 4, seed, ranks).parts, whole(3, seed=seed), "the.layer")
    x, one, other = (randn(batch, *s, seed=seed + i) for i, s in enumerate([(seq, 4), (T,), (T,)]))

    def exclusive(weights):
        with routed(Routing(weights, None)):
            return layer(x) - inner(x)

    torch.testing.assert_close(
        exclusive(one + 2 * other), exclusive(one) + 2 * exclusive(other), rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------ quantised and sparse parts


QUANTISED = ["int8", "int4"]


def layer_of(storage: str, out: int = 40, in_: int = 70) -> Case:
    patches = {"weight": stacked(out, in_, seed=0, ranks=(3, 2, 4)), "bias": whole(out, seed=2)}
    x = randn(4, 7, in_, seed=9)
    return Case(nn.Linear(in_, out), affine(TwinLinear), patches, x).store(storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_kept_in_memory_is_what_is_stored(storage):
    parts = layer_of(storage).patches["weight"].parts
    for part in parts:
        held = {name: buffer.nbytes for name, buffer in part.named_buffers()}
        held.pop("owner")
        if isinstance(part, Packed):
            rank = len(part.owner)
            assert sum(held.values()) == rank * (
                row_bytes(70, part.bits) + row_bytes(40, part.bits)
            )
        elif isinstance(part, Scattered):
            assert sum(held.values()) == (4 + 2) * len(part.values) + 8 * (40 + 1)


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "float"])
@pytest.mark.parametrize("name", MATRICES)
def test_no_more_than_a_block_is_written_out_at_a_time(name, storage, monkeypatch):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    monkeypatch.setattr(parts_module, "BLOCK", 1)  # less than a row: then a row
    case = CASES[name]().store(storage)
    parts = [part for part in case.twin.parts if not isinstance(part, Factors)]
    for part in parts:
        sizes.clear()
        with Sizes():
            blocks = list(part._blocks(torch.float32))
        row = part.in_ + part.out if isinstance(part, Packed) else part.in_
        assert max(sizes) <= row
        assert len(blocks) == (len(part.owner) if isinstance(part, Packed) else part.out)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_moved_to_another_type_and_back_keeps_what_is_quantised(storage, dtype):
    case = layer_of(storage)
    weights = randn(4, T, seed=7).softmax(dim=1)
    want = rows(case, weights)
    before = {n: b.clone() for n, b in case.twin.named_buffers() if not b.is_floating_point()}
    case.twin.to(dtype)
    with routed(Routing(weights, None)):
        got = case.twin(case.x.to(dtype))
    assert got.dtype == dtype
    close = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float64: 1e-5}[dtype]
    assert float((got - want).abs().max()) <= close * float(want.abs().max())
    after = dict(case.twin.float().named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    if storage in QUANTISED:
        # The bias rides in floats beside the quantised weight.
        part = case.twin.parts[1]
        assert isinstance(part, Packed) and not any(b.is_floating_point() for b in part.buffers())


AUTOCAST = (
    "linear", "linear, bias only", "conv1d of gpt2", "embedding", "embedding that scales",
    "layer norm", "rms norm of llama", "convolution",
)  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", AUTOCAST)
def test_a_layer_runs_under_autocast(name, storage):
    case = CASES[name]().store(storage)
    weights = randn(4, T, seed=7).softmax(dim=1)
    want = rows(case, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(case, weights)
        assert got.dtype == case.inner(case.x).dtype
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_convolution_of_one_channel_has_the_models_type(storage, dtype):
    case = CASES["convolution, one channel out"]().store(storage)
    weights = randn(4, T, seed=7).softmax(dim=1)
    want = rows(case, weights)
    parts = tuple(copy.deepcopy(part).to(dtype) for part in case.patches["weight"].parts)
    twin = case.make(copy.deepcopy(case.inner).to(dtype), {"weight": parts})  # as `attach` does it
    with routed(Routing(weights, None)):
        got = twin(case.x.to(dtype))
    assert got.dtype == dtype
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())


def test_a_sparse_expert_whom_no_row_wants_is_not_even_written_out(monkeypatch):
    case = layer_of("sparse")
    seen = []
    monkeypatch.setattr(
        Scattered, "_blocks", lambda self, dtype, was=Scattered._blocks: seen.append(
            int(self.owner)) or was(self, dtype),
    )  # fmt: skip
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 2], [0, 0, 0], [1, 0, 0]])
    torch.testing.assert_close(run(case, weights), rows(case, weights), rtol=1e-5, atol=1e-5)
    assert seen == [0, 2]


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(1, 9), in_=st.integers(1, 20), share=st.floats(0, 1), block=st.integers(1, 50),
    count=st.integers(0, 7), seed=st.integers(0, 999),
)  # fmt: skip
def test_rows_and_blocks_of_a_sparse_part_are_those_of_the_whole(
    out, in_, share, block, count, seed
):
    index = torch.randperm(out * in_, generator=torch.Generator().manual_seed(seed))
    index = index[: round(share * out * in_)].sort().values
    sparse = Sparse(randn(len(index), seed=seed), index, (out, in_))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "BLOCK", block)
        part = Scattered(sparse, 1)
        want = sparse.dense()
        weights = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.5, 1.0]])
        torch.testing.assert_close(
            part.dense(weights, torch.float32), torch.stack([2 * want, 0.5 * want])
        )
        for other, turned in ((part.turned(), want.T), (part.one_channel(), want.reshape(1, -1))):
            assert torch.equal(torch.cat(list(other._blocks(torch.float32))), turned)
    ids = torch.randint(0, out, (2, count), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(part.look(ids, torch.float32), want[ids])


# ---------------------------------------------------------------------- bare parameters


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.token = nn.Parameter(randn(*shape, seed=0))


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 1, 6), (1, 6), (1, 2, 3, 4)])
def test_a_bare_parameter_reads_as_one_per_row(shape):
    holder = Holder(*shape)
    size = torch.Size(shape).numel() // shape[-1]
    patches = [whole(*shape, seed=1)]
    if size > 1:
        matrix = stacked(size, shape[-1], seed=1)
        patches += [stored(matrix, storages) for storages in STORAGES.values()]
    weights = randn(4, T, seed=2)
    for patch in patches:
        bare = holder.token.detach().clone()
        twin = copy.deepcopy(holder)
        mix = TwinParameter(twin.token.shape, getattr(patch, "parts", patch), "the.token")
        parametrize.register_parametrization(twin, "token", mix)
        assert torch.equal(twin.token, bare)
        with routed(Routing(weights, None)):
            got = twin.token
        want = torch.stack([bare[0] + mixed(patch, w, bare[0].shape) for w in weights])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 5, 6)])
def test_a_bare_parameter_without_a_leading_one_is_refused(shape):
    with pytest.raises(
        UnsupportedModel, match="the.token: a bare parameter of shape .* no leading"
    ):
        TwinParameter(torch.Size(shape), whole(*shape, seed=0), "the.token")


# ---------------------------------------------------------------- what cannot be run exactly


class Squares(nn.Module):
    """Not affine in its vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight**2


class Rolls(Squares):
    """Linear in its vector, but not entry by entry."""

    def forward(self, x):
        return x * self.weight.roll(1)


class Multiplies(nn.LayerNorm):
    """Affine in either vector, but not in both together."""

    def forward(self, x):
        return x * self.weight * self.bias


class TwoInputs(Squares):
    def forward(self, x, y):
        return x * self.weight + y


@pytest.mark.parametrize("kind", [Squares, Rolls, TwoInputs])
def test_a_module_that_is_not_affine_entry_by_entry_is_refused(kind):
    with pytest.raises(UnsupportedModel, match=f"the.layer: {kind.__name__} is not affine in its"):
        TwinElementwise(kind(), {"weight": whole(6, seed=0)}, "the.layer")


def test_two_vectors_that_multiply_each_other_are_refused():
    patches = {"weight": whole(6, seed=0), "bias": whole(6, seed=1)}
    with pytest.raises(UnsupportedModel, match="not affine in its vectors .'weight', 'bias'."):
        TwinElementwise(randomised(Multiplies(6)), patches, "the.layer")


class Normalises(nn.Embedding):
    def forward(self, input):
        found = super().forward(input)
        return found / found.norm(dim=-1, keepdim=True)


class TwoTensors(nn.Embedding):
    def forward(self, input, other):
        return super().forward(input + other)


class OnlyByName(nn.Embedding):
    def forward(self, *, input):
        return super().forward(input)


@pytest.mark.parametrize("kind", [TwoTensors, OnlyByName])
def test_an_embedding_that_is_not_called_with_one_tensor_is_refused(kind):
    message = f"the.layer: expected .* called with one tensor, but {kind.__name__}.forward takes"
    with pytest.raises(UnsupportedModel, match=message):
        TwinLookup(kind(9, 6), stacked(9, 6, seed=0).parts, "the.layer")


@pytest.mark.parametrize(
    "how",
    [
        lambda layer: layer(IDS, 2),
        lambda layer: layer(input_ids=IDS, past_key_values_length=2),
        lambda layer: layer(IDS, 1, position_ids=torch.tensor([2, 0, 5])),
        lambda layer: layer(IDS[:1], position_ids=torch.tensor([2, 0, 5])),
    ],
)
def test_what_else_an_embedding_is_called_with_reaches_both_lookups(how):
    case = CASES["embedding of positions"]()
    weights = randn(4, T, seed=0)
    with routed(Routing(weights, None)):
        got = how(case.twin)
    for row in range(4):
        torch.testing.assert_close(got[row], how(case.dense(weights[row]))[0])


def test_positions_without_a_batch_are_refused():
    class Shifted(nn.Embedding):
        def forward(self, input, flat=False):
            return super().forward(input[0] if flat else input)

    layer = TwinLookup(Shifted(9, 6), stacked(9, 6, seed=0).parts, "the.layer")
    with (
        routed(Routing(randn(4, T, seed=0), None)),
        pytest.raises(
            UnsupportedModel, match=r"expected Shifted to give \(batch, ..., out\) .*got \(3, 6\)"
        ),
    ):
        layer(IDS, flat=True)


def test_an_embedding_that_is_not_linear_in_its_table_is_refused():
    with pytest.raises(UnsupportedModel, match="the.layer: Normalises is not linear in its table"):
        TwinLookup(Normalises(9, 6), stacked(9, 6, seed=0).parts, "the.layer")


def test_a_grouped_convolution_is_refused():
    with pytest.raises(UnsupportedModel, match=r"the.layer: a grouped convolution \(groups=2\)"):
        TwinConv(nn.Conv1d(4, 6, 3, groups=2), stacked(6, 6, seed=0).parts, None, "the.layer")


@pytest.mark.parametrize("name", ["embedding", "embedding that scales"])
def test_ids_without_a_batch_are_refused(name):
    case = CASES[name]()
    with pytest.raises(UnsupportedModel, match=r"expected ids of shape \(batch, ...\), got \(3,\)"):
        run(case, randn(3, T, seed=0), IDS[0])


def test_a_routing_is_repeated_row_by_row():
    routing = Routing(torch.eye(2), torch.tensor([1, 0]))
    twice = routing.repeated(2)
    assert torch.equal(twice.weights, torch.eye(2)[[0, 0, 1, 1]])
    assert twice.head.tolist() == [1, 1, 0, 0]
    assert routing.repeated(1) is routing
    assert Routing(None, None).repeated(3) == Routing(None, None)


def test_a_routing_ends_with_its_block_whatever_happens():
    with pytest.raises(RuntimeError), routed(Routing(torch.ones(1, 1), None)):
        with routed(None):
            assert current() is None
        assert current() is not None
        raise RuntimeError
    assert current() is None
