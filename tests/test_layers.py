"""Every layer gives each row what the densely merged layer would give it, whichever way it runs."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
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
from twinmerge.errors import InputError, UnsupportedModel
from twinmerge.runtime.layers import (
    Affine,
    TwinAny,
    TwinBatchNorm,
    TwinConv,
    TwinConv1D,
    TwinElementwise,
    TwinLayerNorm,
    TwinLinear,
    Whole,
)
from twinmerge.runtime.lookup import TwinEmbedding, TwinLookup
from twinmerge.runtime.parts import Factors, Packed, Part, PartList, Scattered
from twinmerge.runtime.parts import part as parts_module
from twinmerge.runtime.parts import stacked as stack_parts
from twinmerge.runtime.per_row import NotRowWise, PerRow
from twinmerge.runtime.reading import read_mixed
from twinmerge.runtime.routing import Mix, Routing, Store, current, routed

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
    owner = owners(ranks)
    a, b = 0.5 * randn(len(owner), in_, seed=seed), 0.5 * randn(out, len(owner), seed=seed + 1)
    each = [b[:, owner == t] @ a[owner == t] for t in range(len(ranks))]
    return Matrix((Factors(a, b, ranks),), torch.stack(each))


def owners(ranks: tuple[int, ...]) -> torch.Tensor:
    """Whose each component is."""
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))


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
    owner = owners(factors.ranks)
    parts: list[Part] = []
    for t, storage in enumerate(storages):
        mine = owner == t
        ranks = [factors.ranks[t] if s == t else 0 for s in range(len(storages))]
        if storage == "float":
            parts.append(Factors(factors.a[mine], factors.bt[mine].T, ranks))
        elif storage in ("half", "few"):
            full = dense[t] if mine.any() else randn(*dense[t].shape, seed=t)
            few = max(1, full.numel() // 40) if storage == "few" else full.numel() // 2
            index = torch.randperm(full.numel(), generator=torch.Generator().manual_seed(t))
            index = index[:few].sort().values
            sparse = Sparse(full.flatten()[index], index, tuple(full.shape))
            dense[t] = sparse.dense()
            parts.append(Scattered(sparse, t, len(storages)))
        elif mine.any():
            bits = int(storage.removeprefix("int"))
            a, b = quantise(factors.a[mine], bits), quantise(factors.bt[mine], bits)
            parts.append(Packed(a, b, ranks))
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
        self.twin = self.make(self.inner, plain).train(self.inner.training)  # as `attach` does it
        return self

    def dense(self, weights: torch.Tensor) -> nn.Module:
        """The layer with its weights merged for one row."""
        merged = copy.deepcopy(self.inner)
        with torch.no_grad():
            for name, patch in self.patches.items():
                tensor = getattr(merged, name)
                tensor.add_(mixed(patch, weights, tensor.shape))
        return merged


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + index))
    return module.requires_grad_(False)


def batch_norm(module: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of its own."""
    module.running_mean.copy_(randn(len(module.running_mean), seed=98))
    module.running_var.copy_(20 + randn(len(module.running_var), seed=99))
    return module.eval()


def affine(kind):
    return lambda m, p: kind(m, p.get("weight", ()), p.get("bias"), "the.layer")


def norm(module, patches):
    return TwinLayerNorm(module, patches.get("weight"), patches.get("bias"), "the.layer")


def table(kind):
    return lambda m, p: kind(m, p["weight"], "the.layer")


def every(kind):
    return lambda m, p: kind(m, p, "the.layer")


elementwise = every(TwinElementwise)


IDS = torch.tensor([[0, 3, 8], [1, 1, 2], [7, 0, 4], [5, 6, 0]])
WEIGHT = {"weight": stacked(5, 6, seed=0)}
BIAS = {"bias": whole(5, seed=2)}
IMAGE = randn(4, 3, 9, 10, seed=9)
KERNEL = {"weight": stacked(5, 3 * 3 * 2, seed=0), "bias": whole(5, seed=2)}


def conv2d(**options):
    return nn.Conv2d(3, 5, (3, 2), **options)


def grouped(inner: nn.Module, x: torch.Tensor) -> Case:
    out, matrix = inner.out_channels, inner.weight[0].numel()
    patches = {"weight": stacked(out, matrix, seed=0)}
    if inner.bias is not None:
        patches["bias"] = whole(out, seed=2)
    return Case(inner, affine(TwinConv), patches, x)


STATISTICS = {"running_mean": whole(3, seed=0), "running_var": whole(3, seed=1)}
GAINS = {"weight": whole(3, seed=2), "bias": whole(3, seed=3)}


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
    "convolution, in groups": lambda: grouped(
        nn.Conv2d(4, 6, 3, groups=2, stride=(2, 1), padding=(1, 2)), randn(4, 4, 9, 10, seed=9)
    ),
    "convolution, depthwise": lambda: grouped(
        nn.Conv2d(3, 3, (3, 5), groups=3, padding="same", dilation=(2, 1)), IMAGE
    ),
    "convolution, depthwise on one axis": lambda: grouped(
        nn.Conv1d(3, 6, 4, groups=3, bias=False), IMAGE[:, :, 0]
    ),
    "batch norm": lambda: Case(
        batch_norm(nn.BatchNorm2d(3, eps=1e-2)), every(TwinBatchNorm), STATISTICS | GAINS, IMAGE
    ),
    "batch norm, statistics only": lambda: Case(
        batch_norm(nn.BatchNorm1d(3)), every(TwinBatchNorm), STATISTICS, IMAGE[:, :, 0]
    ),
    "batch norm, gain only": lambda: Case(
        batch_norm(nn.BatchNorm2d(3)), every(TwinBatchNorm), {"weight": GAINS["weight"]}, IMAGE
    ),
    "batch norm that is not affine": lambda: Case(
        batch_norm(nn.BatchNorm1d(3, affine=False)),
        every(TwinBatchNorm),
        {"running_var": STATISTICS["running_var"]},
        IMAGE[:, :, 0, 0],
    ),
}


MATRICES = [
    name for name in CASES if any(isinstance(p, Matrix) for p in CASES[name]().patches.values())
]


def cases(*storages: str):
    """A fixture: every case, those of matrices in each of these storages."""
    plain = [(name, "float") for name in CASES if name not in MATRICES or "float" in storages]
    params = plain + [(name, s) for name in MATRICES for s in storages if s != "float"]

    @pytest.fixture(params=params, ids=", ".join)
    def made(request, monkeypatch) -> Case:
        name, storage = request.param
        monkeypatch.setattr(parts_module, "BLOCK", 24)  # several blocks of each part
        return CASES[name]().store(storage)

    return made


plain_case = cases("float")
case = cases("float", "several ways")
every_case = cases(*STORAGES)


def mix_of(
    weights: torch.Tensor, chosen: int | None = None, store: Store | None = None, gather: int = 0
) -> Mix:
    active = tuple(weights.any(dim=0).nonzero()[:, 0].tolist())
    ids = None if chosen is None else weights.abs().topk(chosen, dim=1).indices
    return Mix(weights, active, ids, gather, store)


def top(weights: torch.Tensor, k: int) -> torch.Tensor:
    """All but each row's k largest weights become zero."""
    best = weights.abs().topk(k, dim=1).indices
    return torch.zeros_like(weights).scatter(1, best, weights.gather(1, best))


def ways(weights: torch.Tensor) -> Iterator[tuple[str, Mix]]:
    """Weights that follow from these, and every way in which a batch can run with them."""
    yield "stacked", mix_of(weights)
    for expert in range(T):
        without = weights.clone()
        without[:, expert] = 0
        yield f"stacked without expert {expert}", mix_of(without)
    for k in (1, 2):
        yield f"selected, {k} for each row", mix_of(top(weights, k), chosen=k)
        yield f"too few tokens to select {k}", mix_of(top(weights, k), chosen=k, gather=10**9)
    yield "uniform by factors", mix_of(weights[:1])
    yield "uniform", mix_of(weights[:1])
    yield "uniform with one expert", mix_of(top(weights[:1], 1))
    store = Store()
    for time in ("first", "second"):
        yield f"merged for the {time} time", mix_of(weights[:1], store=store)


def routing(mix: Mix | None, batch: int = 4) -> Routing:
    return Routing(mix, None, batch)


def run(case: Case, weights: torch.Tensor | Mix | None, x: torch.Tensor | None = None):
    mix = weights if weights is None or isinstance(weights, Mix) else mix_of(weights)
    with routed(routing(mix)):
        return case.twin(case.x if x is None else x)


def each(got: torch.Tensor) -> torch.Tensor:
    """What serves all rows, as one value for each of them."""
    if not isinstance(got, PerRow):
        return got
    assert got.shape[0] == 1
    return got.per_row.squeeze(1)


def rows(case: Case, weights: torch.Tensor) -> torch.Tensor:
    """Every row through its own densely merged layer."""
    batch = max(len(weights), len(case.x))
    inputs, weights = case.x.expand(batch, *case.x.shape[1:]), weights.expand(batch, -1)
    outputs = [case.dense(w)(x[None]) for w, x in zip(weights, inputs, strict=True)]
    return torch.cat(outputs)


def test_outside_of_a_routing_a_layer_is_exactly_the_shared_one(plain_case):
    want = plain_case.inner(plain_case.x)
    assert torch.equal(plain_case.twin(plain_case.x), want)
    assert torch.equal(run(plain_case, None), want)


def test_zero_weights_give_the_shared_layer(case):
    for weights in (torch.zeros(4, T), torch.zeros(1, T)):
        mix = Mix(weights, tuple(range(T)))
        torch.testing.assert_close(run(case, mix), case.inner(case.x), rtol=1e-6, atol=1e-6)


def test_every_row_is_as_its_own_densely_merged_layer_whichever_way_it_runs(
    every_case, monkeypatch
):
    denser = Affine._denser
    for way, mix in ways(randn(4, T, seed=7)):
        monkeypatch.setattr(Affine, "_denser", (lambda *_: False) if "factors" in way else denser)
        got, want = run(every_case, mix), rows(every_case, mix.weights)
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-5, msg=lambda m, way=way: f"{way}: {m}"
        )


def test_all_weight_on_one_expert_is_that_experts_layer(every_case):
    weights = torch.eye(T)[[2, 0, 1, 2]]
    for mix in (mix_of(weights), mix_of(weights, chosen=1)):
        torch.testing.assert_close(
            run(every_case, mix), rows(every_case, weights), rtol=1e-5, atol=1e-5
        )


def test_what_is_merged_once_is_not_merged_again(case, monkeypatch):
    store, weights = Store(), randn(1, T, seed=7)
    want = run(case, mix_of(weights, store=store))
    if not store:  # vectors alone are as cheap as they are
        assert not any(isinstance(patch, Matrix) for patch in case.patches.values())
        return
    names = {name for _, name in store}
    assert {name for name, p in case.patches.items() if isinstance(p, Matrix)} <= names
    assert store.bytes == sum(getattr(case.inner, name).nbytes for name in names)

    def forbidden(*_):
        raise AssertionError("merged again")

    monkeypatch.setattr(PartList, "merged", forbidden)
    monkeypatch.setattr(Whole, "merged", forbidden)
    assert torch.equal(run(case, mix_of(weights, store=store)), want)


def test_what_is_merged_under_autocast_serves_without_it_too(plain_case):
    store, weights = Store(), randn(1, T, seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(plain_case, mix_of(weights, store=store))
    got = run(plain_case, mix_of(weights, store=store))
    torch.testing.assert_close(got, rows(plain_case, weights), rtol=1e-5, atol=1e-5)


def test_rows_without_weights_beside_others_are_the_shared_layers(case):
    weights = top(randn(4, T, seed=7), 1)
    weights[[1, 3]] = 0
    want = case.inner(case.x)[[1, 3]]
    for mix in (mix_of(weights), mix_of(weights, chosen=1)):
        torch.testing.assert_close(run(case, mix)[[1, 3]], want, rtol=1e-6, atol=1e-6)


def test_rows_do_not_see_each_other(case):
    order = torch.tensor([2, 0, 3, 1])
    weights = top(randn(4, T, seed=7), 2)
    for chosen in (None, 2):
        mix, turned = (mix_of(w, chosen) for w in (weights, weights[order]))
        got = run(case, turned, case.x[order])
        torch.testing.assert_close(got, run(case, mix)[order], rtol=1e-6, atol=1e-6)


def test_one_row_of_input_serves_a_batch_of_weights(every_case):
    # Position embeddings come so: computed once, with a first axis of 1.
    every_case.x = every_case.x[:1]
    for way, mix in ways(randn(4, T, seed=7)):
        got = each(run(every_case, mix))
        assert len(got) == len(mix.weights), way
        torch.testing.assert_close(got, rows(every_case, mix.weights), rtol=1e-5, atol=1e-5)


def test_a_first_axis_that_is_not_the_batch_is_told_or_gives_a_value_per_row(plain_case):
    weights = randn(3, T, seed=7)
    with routed(routing(mix_of(weights), 3)):
        if type(plain_case.twin) is TwinEmbedding:
            got = plain_case.twin(plain_case.x)
            assert isinstance(got, PerRow) and got.shape == plain_case.inner(plain_case.x).shape
            want = torch.stack([plain_case.dense(w)(plain_case.x) for w in weights])
            torch.testing.assert_close(got.per_row, want, rtol=1e-5, atol=1e-5)
            return
        message = r"the.layer: expected a first axis of 3 rows .*got \(4, "
        with pytest.raises(NotRowWise, match=message):
            plain_case.twin(plain_case.x)


def test_one_weighting_serves_any_number_of_rows(plain_case):
    weights, x = randn(1, T, seed=7), torch.cat([plain_case.x, plain_case.x])
    for way, mix in ways(weights):
        if not mix.one or "without" in way:
            continue
        plain_case.x = x[:5]
        torch.testing.assert_close(
            run(plain_case, mix), rows(plain_case, mix.weights), rtol=1e-5, atol=1e-5
        )


def test_two_threads_with_other_weights_do_not_mix(plain_case):
    weights = [mix_of(randn(4, T, seed=seed)) for seed in (1, 2)]
    want = [run(plain_case, w) for w in weights]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work(index: int) -> None:
        with routed(routing(weights[index])):
            start.wait()
            for _ in range(5):
                if not torch.equal(plain_case.twin(plain_case.x), want[index]):
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
    for name in case.patches:
        assert torch.equal(getattr(case.twin, name), getattr(case.inner, name))
    double = case.twin.double()
    x = case.x.double() if case.x.is_floating_point() else case.x
    for mix in (mix_of(weights), mix_of(weights[:1]), mix_of(weights[:1], store=Store())):
        with routed(routing(mix)):
            out = double(x)
        assert out.dtype == torch.float64
        want = rows(case, mix.weights).float()
        torch.testing.assert_close(out.float(), want, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_is_read_without_the_layer_is_mixed_too(case):
    weights = randn(4, T, seed=7)
    for name in case.patches:
        own = getattr(case.inner, name)
        for mix in (mix_of(weights), mix_of(top(weights, 1), chosen=1), mix_of(weights[:1])):
            with routed(routing(mix)) as cell:
                got = getattr(case.twin, name)
                assert (got.shape, got.dtype, got.ndim) == (own.shape, own.dtype, own.ndim)
                assert isinstance(got, PerRow) and got._rows is None and cell.reads == 1
                if own.ndim > 2 and len(own) > 1 and not mix.one:  # kernels are applied as a whole
                    with pytest.raises(NotRowWise, match="cannot be another for every row"):
                        got.float()
                    continue
                values = got.per_row
            want = torch.stack([getattr(case.dense(w), name) for w in mix.weights])
            torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)


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
        with routed(routing(mix_of(weights), batch)):
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
        if isinstance(part, Packed):
            assert sum(held.values()) == sum(part.ranks) * (
                row_bytes(70, part.bits) + row_bytes(40, part.bits)
            )
        elif isinstance(part, Scattered):
            assert sum(held.values()) == (4 + 2) * len(part.values) + 8 * (40 + 1)
        else:
            assert sum(held.values()) == 4 * sum(part.ranks) * (70 + 40)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MATRICES)
def test_no_layer_holds_its_parts_twice(name, storage):
    case = CASES[name]().store(storage)
    if name == "convolution, one channel out":
        return  # keeps a row of kernels, too

    def bytes_of(*modules: nn.Module) -> int:
        tensors = [t for m in modules for t in (*m.buffers(), *m.parameters()) if t.ndim]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    assert bytes_of(case.twin) == bytes_of(case.twin.twin_mixers, case.inner)
    stored = sum(bytes_of(part) for part in case.patches["weight"].parts)
    assert bytes_of(case.twin.twin_mixers["weight"]) <= stored + 8 * 20  # where each row begins


def test_one_weighting_is_merged_where_that_costs_less_than_its_factors(monkeypatch):
    layer, merged = layer_of("float").twin, []
    monkeypatch.setattr(
        PartList, "merged", lambda *_, was=PartList.merged: merged.append(1) or was(*_)
    )
    for tokens in (1, 25, 26, 60):  # 40 * 70 / (40 + 70) is 25.5
        merged.clear()
        with routed(routing(mix_of(randn(1, T, seed=7)), 1)):
            layer(randn(1, tokens, 70, seed=9))
        assert bool(merged) == (tokens > 25)


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
    mix = mix_of(torch.ones(1, T))
    for part in case.twin.twin_mixers["weight"]:
        if isinstance(part, Factors):
            continue
        x, y = randn(1, part.in_, seed=1), torch.zeros(1, part.out)
        sizes.clear()
        with Sizes():
            y = part.linear(y, x, mix)
        assert sizes and max(sizes) <= part.in_ + part.out
        torch.testing.assert_close(y, x @ part.dense(mix.weights, x.dtype)[0].T)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_moved_to_another_type_and_back_keeps_what_is_quantised(storage, dtype):
    case = layer_of(storage)
    weights = randn(4, T, seed=7).softmax(dim=1)
    want = rows(case, weights)
    before = {n: b.clone() for n, b in case.twin.named_buffers() if not b.is_floating_point()}
    case.twin.to(dtype)
    close = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float64: 1e-5}[dtype]
    for chosen in (None, T):
        with routed(routing(mix_of(weights, chosen))):
            got = case.twin(case.x.to(dtype))
        assert got.dtype == dtype
        assert float((got - want).abs().max()) <= close * float(want.abs().max())
    after = dict(case.twin.float().named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    if storage in QUANTISED:
        # The bias rides in floats beside the quantised weight.
        part = case.twin.parts[0]
        assert isinstance(part, Packed) and not any(b.is_floating_point() for b in part.buffers())


AUTOCAST = (
    "linear", "linear, bias only", "conv1d of gpt2", "embedding", "embedding that scales",
    "layer norm", "rms norm of llama", "convolution", "convolution, depthwise", "batch norm",
)  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", AUTOCAST)
def test_a_layer_runs_under_autocast(name, storage):
    case = CASES[name]().store(storage)
    weights = randn(4, T, seed=7).softmax(dim=1)
    mixes = (mix_of(weights), mix_of(top(weights, 2), chosen=2), mix_of(weights[:1], store=Store()))
    for mix in mixes:
        want = rows(case, mix.weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(case, mix)
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
    with routed(routing(mix_of(weights))):
        got = twin(case.x.to(dtype))
    assert got.dtype == dtype
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())


def test_a_sparse_expert_whom_no_row_wants_is_not_even_written_out(monkeypatch):
    case = layer_of("sparse")
    seen = []
    monkeypatch.setattr(
        Scattered, "_blocks", lambda self, dtype, was=Scattered._blocks: seen.append(
            self.expert) or was(self, dtype),
    )  # fmt: skip
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 2], [0, 0, 0], [1, 0, 0]])
    for chosen in (None, 1):
        seen.clear()
        got = run(case, mix_of(weights, chosen))
        torch.testing.assert_close(got, rows(case, weights), rtol=1e-5, atol=1e-5)
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
        part = Scattered(sparse, 1, T)
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
        self.other = nn.Parameter(randn(2, seed=1))

    def forward(self):
        return self.token


SHAPES = [(1, 5, 6), (1, 1, 6), (1, 6), (1, 2, 3, 4), (6,), (5, 6)]


def patches_of(*shape: int) -> list[Matrix | Whole]:
    """What experts may know of a bare parameter of that shape."""
    size = torch.Size(shape).numel() // shape[-1]
    if size == 1:
        return [whole(*shape, seed=1)]
    matrix = stacked(size, shape[-1], seed=1)
    return [whole(*shape, seed=1), *(stored(matrix, each) for each in STORAGES.values())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bare_parameter_reads_as_another_for_every_row(shape):
    for patch in patches_of(*shape):
        holder = Holder(*shape)
        bare = holder.token.detach().clone()
        read_mixed(holder, {"token": getattr(patch, "parts", patch)}, "the.module")
        assert holder.token is holder._parameters["token"] and torch.equal(holder(), bare)
        for way, mix in ways(randn(4, T, seed=2)):
            want = torch.stack([bare + mixed(patch, w, bare.shape) for w in mix.weights])
            with routed(routing(mix)) as cell:
                got = holder()
                assert (got.shape, got.dtype, got.device) == (bare.shape, bare.dtype, bare.device)
                assert isinstance(got, PerRow) and got._rows is None and cell.reads == 1
                torch.testing.assert_close(got.per_row, want, msg=lambda m, way=way: f"{way}: {m}")
                assert cell.reads == 1
                assert type(holder.other) is nn.Parameter
                if mix.one:  # then it is a tensor like any other
                    out = holder() + 1
                    assert type(out) is torch.Tensor
                    torch.testing.assert_close(out, want[0] + 1)


def test_a_module_that_reads_mixed_stays_what_it_is():
    holder, patch = Holder(1, 5, 6), stored(stacked(5, 6, seed=1), STORAGES["several ways"])
    state = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    read_mixed(holder, {"token": patch.parts}, "the.module")
    assert isinstance(holder, Holder) and type(holder).__name__ == "Holder"
    mix = mix_of(randn(4, T, seed=2))

    def values(module):
        with routed(routing(mix)):
            return module.token.per_row.detach()

    want = values(holder)
    stream = io.BytesIO()
    torch.save(holder, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(holder),
        pickle.loads(pickle.dumps(holder)),
        torch.load(stream, weights_only=False),
        copy.deepcopy(holder).double().float(),
    ):
        assert type(other) is type(holder) and other.token is not holder.token
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
        torch.testing.assert_close(values(other), want)
        other.token.data.add_(1)
        torch.testing.assert_close(values(other), want + 1)
    torch.testing.assert_close(values(holder), want)
    half = copy.deepcopy(holder).to(torch.bfloat16)
    assert values(half).dtype == torch.bfloat16
    assert float((values(half) - want).abs().max()) <= 0.05 * float(want.abs().max())
    holder.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    torch.testing.assert_close(values(holder), want + 1)
    names = [name for name, _ in holder.named_parameters()]
    assert names == ["token", "other"]


def test_a_weight_multiplied_by_hand_is_as_the_layer(monkeypatch):
    # Tied embeddings and MobileBERT's head do so.
    for case in (CASES["linear"](), CASES["linear"]().store("several ways")):
        for way, mix in ways(randn(4, T, seed=7)):
            with routed(routing(mix)):
                got = F.linear(case.x, case.twin.weight, case.twin.bias)
                turned = case.x @ case.twin.weight.T + case.twin.bias
            want = rows(case, mix.weights)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=way)
            torch.testing.assert_close(turned, want, rtol=1e-5, atol=1e-5, msg=way)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 4, 5)])
def test_fused_weights_cannot_be_another_for_every_row_but_for_all(shape):
    holder, patch = Holder(*shape), whole(*shape, seed=1)
    bare = holder.token.detach().clone()
    read_mixed(holder, {"token": patch}, "the.module")
    weights = randn(4, T, seed=2)
    with routed(routing(mix_of(weights))):
        assert holder.token.shape == shape
        with pytest.raises(NotRowWise, match="the.module: .* cannot be another for every row"):
            holder.token + 1
    with routed(routing(mix_of(weights[:1]))):
        torch.testing.assert_close(holder.token * 1, bare + mixed(patch, weights[0], bare.shape))


# ---------------------------------------------------------------- batch norms


def test_a_mixed_variance_that_is_negative_is_an_error_and_not_a_nan():
    case = CASES["batch norm"]()
    weights = torch.tensor([[1.0, 0.0, 0.0]] * 3 + [[0.0, 200.0, -200.0]])
    spread = case.inner.running_var + torch.stack(
        [mixed(case.patches["running_var"], w, case.inner.running_var.shape) for w in weights]
    )
    assert spread.min() < 0  # so it can be asked
    with pytest.raises(InputError, match=r"the.layer: .* running variance is -\d.*from 0 to 1"):
        run(case, weights)
    torch.testing.assert_close(run(case, weights[:3], case.x[:3]), rows(case, weights)[:3])


@pytest.mark.parametrize("broken", ["training", "statistics"])
def test_a_batch_norm_that_is_trained_is_refused(broken):
    case = CASES["batch norm, gain only"]()
    if broken == "training":
        case.twin.train()
    else:
        case.inner.running_mean = case.inner.running_var = None
    for weights in (randn(4, T, seed=7), randn(1, T, seed=7)):
        with pytest.raises(UnsupportedModel, match="the.layer: a BatchNorm .* model.eval"):
            run(case, weights)


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


class NeedsTwo(Squares):
    def forward(self, x, y):
        return x * self.weight + y


@pytest.mark.parametrize("kind", [Squares, Rolls, NeedsTwo])
def test_a_module_that_is_not_affine_entry_by_entry_is_not_run_so(kind):
    with pytest.raises(NotRowWise, match=f"the.layer: {kind.__name__} is not affine in its"):
        TwinElementwise(kind(), {"weight": whole(6, seed=0)}, "the.layer")


def test_two_vectors_that_multiply_each_other_are_not_run_so():
    patches = {"weight": whole(6, seed=0), "bias": whole(6, seed=1)}
    with pytest.raises(NotRowWise, match="not affine in its vectors .'weight', 'bias'."):
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
def test_an_embedding_that_is_not_called_with_one_tensor_is_not_run_so(kind):
    message = f"the.layer: {kind.__name__}.forward takes .*, not one tensor"
    with pytest.raises(NotRowWise, match=message):
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
    with routed(routing(mix_of(weights))):
        got = how(case.twin)
    for row in range(4):
        torch.testing.assert_close(got[row], how(case.dense(weights[row]))[0])


class Shifted(nn.Embedding):
    def forward(self, input, flat=False):
        return super().forward(input[0] if flat else input)


def test_positions_without_a_batch_are_told():
    layer = TwinLookup(Shifted(9, 6), stacked(9, 6, seed=0).parts, "the.layer")
    with routed(routing(mix_of(randn(4, T, seed=0)))):
        with pytest.raises(NotRowWise, match=r"the.layer: Shifted gives \(3, 6\) for ids \(4, 3\)"):
            layer(IDS, flat=True)


def test_an_embedding_that_is_not_linear_in_its_table_is_not_run_so():
    with pytest.raises(NotRowWise, match="the.layer: Normalises is not linear in its table"):
        TwinLookup(Normalises(9, 6), stacked(9, 6, seed=0).parts, "the.layer")


def recurrent() -> Case:
    patches = {"weight_ih_l0": stacked(12, 6, seed=0), "bias_hh_l0": whole(12, seed=1)}
    return Case(nn.GRU(6, 4, batch_first=True), every(TwinAny), patches, randn(4, 7, 6, seed=9))


ANY = {
    "squares": lambda: Case(
        Squares(), every(TwinAny), {"weight": whole(6, seed=0)}, randn(4, 6, seed=9)
    ),
    "rolls": lambda: Case(
        Rolls(), every(TwinAny), {"weight": whole(6, seed=0)}, randn(4, 6, seed=9)
    ),
    "multiplies": lambda: Case(
        Multiplies(6),
        every(TwinAny),
        {"weight": whole(6, seed=0), "bias": whole(6, seed=1)},
        randn(4, 6, seed=9),
    ),
    "normalises": lambda: Case(
        Normalises(9, 6), every(TwinAny), {"weight": stacked(9, 6, seed=0)}, IDS
    ),
    "turned convolution": lambda: Case(
        nn.ConvTranspose1d(3, 5, 4),
        every(TwinAny),
        {"weight": stacked(3, 20, seed=0)},
        IMAGE[:, :, 0],
    ),  # fmt: skip
    "grouped convolution, circular padding": lambda: grouped(
        nn.Conv1d(3, 6, 3, groups=3, padding=1, padding_mode="circular"), IMAGE[:, :, 0]
    ),
}


@pytest.mark.parametrize("storage", ["float", "several ways"])
@pytest.mark.parametrize("name", ANY)
def test_what_has_no_form_row_by_row_is_exact_with_one_weighting(name, storage):
    case = ANY[name]().store(storage)
    assert torch.equal(case.twin(case.x), case.inner(case.x))
    assert torch.equal(run(case, None), case.inner(case.x))
    weights = randn(4, T, seed=7)
    store = Store()
    for mix in (mix_of(weights[:1]), *[mix_of(weights[:1], store=store)] * 2):
        torch.testing.assert_close(run(case, mix), rows(case, mix.weights), rtol=1e-5, atol=1e-5)
    assert {attribute for _, attribute in store} == set(case.patches)
    with pytest.raises(NotRowWise, match="the.layer: "):
        run(case, weights)


def test_a_module_of_several_outputs_is_exact_with_one_weighting_too():
    case = recurrent()
    weights = randn(1, T, seed=7)
    with routed(routing(mix_of(weights))):
        got, state = case.twin(case.x)
    want, last = case.dense(weights[0])(case.x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- tables that are no rows' own


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "ids", [IDS[0], IDS[:, :2], torch.stack([IDS] * 3)], ids=["n", "n k", "n k l"]
)
def test_ids_without_a_batch_give_a_value_per_row(ids, storage):
    case = CASES["embedding"]().store(storage)
    for way, mix in ways(randn(5, T, seed=0)):
        with routed(routing(mix, 5)):
            got = case.twin(ids)
        if mix.one:
            torch.testing.assert_close(got, case.dense(mix.weights[0])(ids), msg=way)
            continue
        assert isinstance(got, PerRow) and got.shape == (*ids.shape, 6)
        want = torch.stack([case.dense(w)(ids) for w in mix.weights])
        torch.testing.assert_close(got.per_row, want, rtol=1e-5, atol=1e-5, msg=way)


def test_a_table_of_positions_is_no_batch_of_its_own_length():
    # T5 reads (query, key) ids; with as many rows as queries their axes look alike.
    case = CASES["embedding"]()

    def looked_up(rows: int, *ids: int):
        weights, table = randn(rows, T, seed=0), torch.arange(9).repeat(9)[: ids[0] * ids[1]]
        table = table.view(ids)
        with routed(routing(mix_of(weights), rows)):
            got = case.twin(table)
        assert isinstance(got, PerRow) and got.shape == (*ids, 6)
        want = torch.stack([case.dense(w)(table) for w in weights])
        torch.testing.assert_close(got.per_row, want, rtol=1e-5, atol=1e-5)

    looked_up(3, 5, 5)  # as in the dry run
    for rows in (2, 4, 7):
        looked_up(rows, rows, 6)
        looked_up(rows, 1, 6)  # a step of a generation


@pytest.mark.parametrize("ids", [IDS[0], torch.stack([IDS[0]] * 5)])
def test_an_embedding_of_another_class_cannot_tell_whose_they_are(ids):
    case = CASES["embedding that scales"]()
    with pytest.raises(NotRowWise, match="the.layer"):
        run(case, randn(3, T, seed=0), ids)


# ---------------------------------------------------------------- routing


def test_a_routing_ends_with_its_block_whatever_happens():
    one = routing(mix_of(torch.ones(1, 1)), 1)
    with pytest.raises(RuntimeError), routed(one):
        with routed(None):
            assert current() is None
        assert current() is one
        raise RuntimeError
    assert current() is None


def test_a_mix_is_repeated_row_by_row():
    mix = mix_of(randn(3, T, seed=0), chosen=2)
    twice = mix.repeated(2)
    assert torch.equal(twice.weights, mix.weights[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(twice.chosen, mix.chosen[[0, 0, 1, 1, 2, 2]])
    assert twice.active == mix.active and not twice.memo


@pytest.mark.parametrize("name", [*MATRICES, "layer norm", "rms norm of llama"])
def test_what_a_mix_remembers_is_only_what_it_found(name):
    case = CASES[name]()
    weights = randn(4, T, seed=7)
    for chosen in (None, 2):
        mix = mix_of(top(weights, 2), chosen)
        want = [run(case, mix_of(top(weights, 2), chosen)) for _ in range(2)]
        assert all(torch.equal(run(case, mix), w) for w in want)


def test_rows_in_order_of_their_experts_are_found_once():
    mix = mix_of(torch.tensor([[1.0, 0, 0], [0, 0, 2], [0, 3, 0], [1, 0, 0]]), chosen=1)
    assert [mix.rows_of(t).tolist() for t in range(T)] == [[0, 3], [2], [1]]
    assert mix.rows_of(1) is mix.rows_of(1)
