"""What the study tries beyond the paper does what it says, within the bytes that it says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randn
from hypothesis import given
from hypothesis import strategies as st
from lab import lab as lab_module
from lab.better import better
from lab.better.activation import aware
from lab.better.basis import cores, joint, product
from lab.better.correction import correctable, corrected
from lab.better.cutter import Cutter, TooLarge
from lab.better.files import balanced
from lab.better.moments import moments
from lab.better.ranks import budgeted, cost, even, stored
from lab.better.refit import refit, settled, start
from lab.better.store import DTYPES, decode, encode, room, row_size
from lab.better.way import Way
from lab.lab import Lab, Settings
from lab.records import Records
from lab.rivals.packed import from_file, to_file
from torch import nn

from twinmerge.artifact.codec import dequantise, quantise
from twinmerge.merging.linalg import svd
from twinmerge.runtime.attach import named_tensors
from twinmerge.runtime.export import DenseMerge

# ------------------------------------------------------------------------------------------- bytes

MATRICES = [(3, 70), (0, 8), (2, 64), (1, 9)]
"""Rows and their length: an odd one, none, a whole group, more than a group."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_as_their_dtype_rounds_them_and_cost_what_is_said(dtype):
    rows = [randn(*shape, seed=seed) for seed, shape in enumerate(MATRICES)]
    packed = from_file(to_file(encode("x", rows, dtype)))
    back = decode(packed, "x", MATRICES, dtype)
    for x, y in zip(rows, back, strict=True):
        if dtype.startswith("int"):
            bits = int(dtype[3:])
            want = dequantise(quantise(x, bits)) if len(x) else x
        else:
            want = x.to(getattr(torch, dtype)).float()
        assert torch.equal(y, want)
    data = sum(x.nbytes for x in packed.values())
    assert data == sum(rows * row_size(n, dtype) for rows, n in MATRICES)


def test_what_float16_cannot_hold_is_an_error():
    with pytest.raises(ValueError, match="x: a number is not finite in float16"):
        encode("x", [torch.full((1, 2), 1e6)], "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [900, 5000, 123_456])
def test_rows_that_fill_the_room_make_a_file_that_fits_and_leave_little(dtype, limit):
    fixed = {"classifier.weight.head": randn(2, 16, seed=0)}
    left = room(fixed, "x", dtype, limit)
    rows = left // row_size(16, dtype)
    size = len(to_file(fixed | encode("x", [randn(rows, 16, seed=1)], dtype)))
    assert limit - row_size(16, dtype) - 48 < size <= limit


# -------------------------------------------------------------------------------------- correction


@given(st.integers(0, 99))
def test_bias_correction_gives_the_mean_output_back(seed):
    weight, bias = randn(5, 7, seed=seed), randn(5, seed=seed + 1)
    cut = weight + randn(5, 7, seed=seed + 2)
    x = 3 + randn(40, 7, seed=seed + 3)
    vectors = {"a.bias": bias, "norm.weight": randn(7, seed=4)}
    found = corrected(vectors, {"a.weight": weight - cut}, {"a": x.mean(dim=0)})
    want = (x @ weight.T + bias).mean(dim=0)
    torch.testing.assert_close((x @ cut.T + found["a.bias"]).mean(dim=0), want)
    assert found["norm.weight"] is vectors["norm.weight"]


def test_a_layer_whose_bias_is_not_stored_is_left():
    lost = {"a.weight": randn(2, 3, seed=0)}
    assert corrected({}, lost, {"a": randn(3, seed=1)}) == {}
    assert correctable({"a.bias": randn(2, seed=0)}, {"a": randn(3, seed=1), "b": lost}) == ["a"]


class Net(nn.Module):
    """Two tokens each of `values` come into `first`, the first of each row into `pooler`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pooler = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.pooler(self.first(values)[:, 0])


@pytest.mark.parametrize("centred", [False, True])
def test_moments_are_those_of_the_tokens_that_the_mask_shows(centred):
    torch.manual_seed(0)
    net, values = Net(), randn(6, 5, 3, seed=0)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [5]])
    batches = [{"values": values[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    found = moments(net, batches, ["first", "pooler"], second=True)
    with torch.no_grad():
        into = {"first": values[mask].double(), "pooler": net.first(values)[:, 0].double()}
    for path, x in into.items():
        torch.testing.assert_close(found[path].mean, x.mean(dim=0), rtol=1e-6, atol=1e-6)
        want = torch.cov(x.T, correction=0) if centred else x.T @ x / len(x)
        second = found[path].second(centred=centred)
        torch.testing.assert_close(second, want, rtol=1e-5, atol=1e-6)
    assert moments(net, batches, ["first"])["first"].products is None
    assert not net.first._forward_pre_hooks and not net.pooler._forward_pre_hooks


# ------------------------------------------------------------------------------------- activations


def dense(found):
    return found.u * found.s @ found.vh


@pytest.mark.parametrize("rank", [1, 3])
def test_activation_aware_svd_without_a_preference_is_the_plain_one(rank):
    d = randn(6, 5, seed=0)
    found = aware(d, torch.eye(5), ridge=0.1)
    torch.testing.assert_close(
        dense(found.cut(rank)), dense(svd(d).cut(rank)), rtol=1e-4, atol=1e-5
    )


@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_activation_aware_svd_is_the_best_in_its_own_norm(seed, rank):
    d, x = randn(6, 5, seed=seed), randn(30, 5, seed=seed + 1) @ randn(5, 5, seed=seed + 2)
    c = x.T @ x / len(x)

    def error(product):
        return float(((d - product) @ x.T).square().sum() / len(x))

    kept = aware(d, c, ridge=0.0).cut(rank)
    least = error(dense(kept))
    # As Eckart and Young say of D L, whose singular values these are.
    tail = float(aware(d, c, ridge=0.0).s[rank:].square().sum())
    assert least == pytest.approx(tail, rel=1e-3, abs=1e-4)
    slack = 1e-4 * error(torch.zeros_like(d))
    assert least <= error(dense(svd(d).cut(rank))) + slack
    for step in (1e-3, 1e-2, 1e-1):
        moved = (kept.u + step * randn(6, rank, seed=7)) * kept.s
        assert least <= error(moved @ (kept.vh + step * randn(rank, 5, seed=8))) + slack


# ------------------------------------------------------------------------------------------- refit


@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_each_round_of_the_refit_lowers_the_error(seed, ranks):
    experts = [randn(6, 5, seed=seed + i) for i in range(3)]
    mean = torch.stack(experts).mean(dim=0)
    factors = [svd(x - mean).cut(rank) for x, rank in zip(experts, ranks, strict=True)]
    fit = start(experts, factors)
    torch.testing.assert_close(fit.shared, mean)
    for _ in range(4):
        after = refit(experts, fit)
        assert after.error <= fit.error + 1e-4
        assert [len(f.s) for f in after.factors] == ranks
        fit = after
    rests = [x - fit.shared - dense(f) for x, f in zip(experts, fit.factors, strict=True)]
    assert fit.error == pytest.approx(sum(float(x.square().sum()) for x in rests), abs=1e-4)


def test_a_refit_that_raises_the_error_is_noticed():
    experts = [randn(6, 5, seed=i) for i in range(3)]
    fit = start(experts, [svd(x).cut(2) for x in experts])
    with pytest.raises(AssertionError):
        refit(experts, replace(fit, error=0.0))


# ------------------------------------------------------------------------------------------- ranks

SHAPES = {"a": (64, 64), "b": (20, 64), "c": (7, 9)}


def spectra(seed):
    return {
        name: torch.linalg.svdvals(10.0**i * randn(*shape, seed=seed + i))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def left(values, ranks):
    return sum(float(s[ranks[name] :].double().square().sum()) for name, s in values.items())


@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), space=st.integers(0, 40_000))
def test_budgeted_ranks_fit_and_lose_no_more_than_even_ones(dtype, seed, space):
    values, same = spectra(seed), even(SHAPES, dtype, space)
    assert stored(SHAPES, same, dtype) <= space
    for bytes_ in (space, stored(SHAPES, same, dtype)):
        ranks = budgeted(values, SHAPES, dtype, bytes_)
        assert stored(SHAPES, ranks, dtype) <= bytes_
        assert left(values, ranks) <= left(values, same) * (1 + 1e-9)
        assert all(rank <= min(SHAPES[name]) for name, rank in ranks.items())


def test_the_even_rank_is_the_largest_that_fits():
    one = sum(cost(shape, "int4") for shape in SHAPES.values())
    assert even(SHAPES, "int4", one - 1) == dict.fromkeys(SHAPES, 0)
    assert even(SHAPES, "int4", one) == dict.fromkeys(SHAPES, 1)
    assert even(SHAPES, "int4", 3 * one - 1) == dict.fromkeys(SHAPES, 2)
    assert even(SHAPES, "int4", 10**6) == {"a": 64, "b": 20, "c": 7}


def test_bytes_go_where_the_error_is():
    values = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    shapes = {"a": (3, 3), "b": (3, 3)}
    assert budgeted(values, shapes, "float32", 3 * cost((3, 3), "float32")) == {"a": 3, "b": 0}


# ------------------------------------------------------------------------------------------- basis


def test_a_shared_basis_of_full_size_is_exact():
    differences = [randn(6, 5, seed=i) for i in range(3)]
    basis = joint(differences, 6)
    assert basis.u.shape == (6, 6) and basis.v.shape == (5, 5)
    for d in differences:
        torch.testing.assert_close(product(basis, cores(basis, [d])[0]), d, rtol=1e-4, atol=1e-5)


def test_a_core_is_the_best_for_its_bases_rounded_as_they_are():
    differences = [randn(6, 5, seed=i) for i in range(3)]
    basis = joint(differences, 2)
    basis = replace(basis, u=dequantise(quantise(basis.u, 4)), v=dequantise(quantise(basis.v, 4)))
    for d in differences:
        (found,) = cores(basis, [d])
        least = float((d - product(basis, found)).square().sum())
        for seed in range(5):
            moved = found + 0.1 * randn(2, 2, seed=seed)
            assert least < float((d - product(basis, moved)).square().sum())


def test_what_the_experts_share_needs_one_basis():
    u, v = randn(6, 2, seed=0), randn(2, 5, seed=1)
    differences = [u @ randn(2, 2, seed=i) @ v for i in range(3)]
    basis = joint(differences, 2)
    for d in differences:
        torch.testing.assert_close(product(basis, cores(basis, [d])[0]), d, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------- ways


def test_ways_that_cannot_be_are_known():
    assert not Way().clash and not Way(correct=True, ridge=0.1).clash
    assert not Way(ranks="budget", rounds=3, correct=True).clash
    assert "not kept" in Way(correct=True, vectors="none").clash
    assert Way(rounds=1, ridge=0.1).clash
    assert Way(rounds=1, ranks="basis").clash
    assert Way(ranks="basis", ridge=0.1).clash


def test_a_ways_title_says_what_differs_from_the_papers():
    assert Way().title == "plain"
    way = Way("int4", "int8", ranks="budget", correct=True, inputs=64)
    assert way.title == "int4 factors + budgeted ranks + vectors in int8 + bias correction"
    assert way.settings == {
        "factors": "int4", "vectors": "int8", "ranks": "budget", "correct": True, "inputs": 64
    }  # fmt: skip
    assert Way("int4", "none").title == "int4 factors + vectors not kept"


def test_balanced_factors_have_the_same_product_and_equal_lengths():
    found = svd(randn(6, 5, seed=0))
    found = replace(found, s=torch.cat([found.s[:3] * 1e-6, torch.zeros(2)]))
    b, a = balanced(found)
    torch.testing.assert_close(b.T @ a, dense(found), rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(b[:3].norm(dim=1), a[:3].norm(dim=1), rtol=1e-4, atol=0)


TASKS = ("math", "code")


def opened(bench, folder: Path, ranks=Settings.ranks) -> Lab:
    settings = Settings(
        choose_rows=6, better_rows=6, test_rows=8, max_tokens=32, seeds=(0,), ranks=ranks, noisy=()
    )
    return Lab(
        list(TASKS),
        {name: Path(bench.made.experts[name]) for name in TASKS},
        {name: bench.data for name in TASKS},
        bench.made.base,
        folder / "work",
        settings,
        Records(folder / "out", {"experts": list(TASKS)}),
    )


@pytest.fixture(scope="module")
def cutter(bench, tmp_path_factory):
    return Cutter(opened(bench, tmp_path_factory.mktemp("better")))


WAYS = [
    Way(),
    Way("int8"),
    Way("int4", "int8", correct=True, inputs=8),
    Way("int4", "none"),
    Way("float16", "float32", ranks="budget"),
    Way("int4", ranks="basis", correct=True, inputs=8),
    Way(rounds=2),
    Way("int4", "int8", ranks="budget", rounds=1, correct=True, inputs=8),
    Way(ridge=0.1, inputs=8),
    Way("int8", ridge=0.1, correct=True, inputs=8),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.title)
def test_files_fit_the_budget_and_a_larger_one_loses_less(cutter, way):
    errors = []
    for budget in (0.25, 0.8):
        made = cutter.made(way, budget)
        sizes = made.sizes(cutter.sources.base_float16)
        assert sizes["experts"] == sum(map(len, made.experts.values()))
        assert sizes["largest"] == max(map(len, made.experts.values()))
        assert 0 < sizes["share"] <= budget
        errors.append(made.error)
    assert errors[1] < errors[0] < 1
    for task in TASKS:
        found, head = cutter.read(made, task), from_file(made.experts[task])
        lost = sum(float((cutter.sources.vectors[task][n] - found[n]).square().sum())
                   for n in cutter.matrices)  # fmt: skip
        whole = sum(float(cutter.difference(task, n).square().sum()) for n in cutter.matrices)
        assert lost < whole
        assert {name for name in head if name.endswith(".head")} == set(cutter.sources.heads[task])


@pytest.mark.slow
def test_all_that_can_be_kept_gives_the_expert_back(cutter):
    for way in (Way("float32", "float32"), Way("float32", "float32", ranks="basis")):
        made = cutter.made(way, 50)
        for task in TASKS:
            found = cutter.read(made, task)
            for name, x in cutter.sources.vectors[task].items():
                torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)


def is_float16(x):
    return torch.allclose(x, x.half().float(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("float32", "float32"), Way(rounds=2)], ids=lambda w: w.title)
def test_the_shared_expert_is_what_an_artifact_in_float16_holds(cutter, way):
    made = cutter.made(way, 0.5)
    for name, x in made.shared.items():
        assert is_float16(cutter.sources.base[name] + x), name
    if not way.rounds:
        artifact = cutter.lab.built(cutter.lab.recipe("linear", stored="float16"))
        merge = DenseMerge(lab_module.opened(artifact))
        whole = dict(named_tensors(merge.at(torch.zeros(len(TASKS)), "math")))
        for name, x in made.shared.items():
            torch.testing.assert_close(cutter.sources.base[name] + x, whole[name])
    # What no expert changed is held by it, too.
    whole = dict(named_tensors(cutter.model(made, "math")))
    heads = {name.removesuffix(".head") for name in cutter.sources.heads["math"]}
    others = set(whole) - set(made.shared) - heads
    assert all(is_float16(whole[name]) for name in others)
    expert = cutter.sources.vectors["math"]
    found = cutter.read(made, "math")
    for name in cutter.plain_vectors:
        torch.testing.assert_close(found[name], expert[name], rtol=1e-3, atol=1e-5)


def test_a_shared_expert_that_is_rounded_gets_the_best_factors_beside_it():
    experts = [randn(6, 5, seed=i) for i in range(3)]
    fit = refit(experts, start(experts, [svd(x).cut(2) for x in experts]))
    rounded = (4 * fit.shared).round() / 4
    after = settled(experts, fit, rounded)
    assert after.shared is rounded and [len(f.s) for f in after.factors] == [2, 2, 2]
    tails = [torch.linalg.svdvals(x - rounded)[2:].square().sum() for x in experts]
    assert after.error == pytest.approx(float(sum(tails)), rel=1e-4)


@pytest.mark.slow
def test_a_correction_costs_no_byte_and_moves_the_biases_of_linear_layers_alone(cutter):
    way = Way("int4")
    before, after = cutter.made(way, 0.3), cutter.made(replace(way, correct=True, inputs=8), 0.3)
    assert after.corrected == len(cutter.sources.layers) > 0 == before.corrected
    biases = {f"{path}.bias" for path in cutter.sources.layers}
    for task in TASKS:
        assert len(before.experts[task]) == len(after.experts[task])
        old, new = cutter.read(before, task), cutter.read(after, task)
        assert {name for name in old if not torch.equal(old[name], new[name])} == biases


@pytest.mark.slow
def test_a_budget_that_heads_and_vectors_exceed_is_refused(cutter):
    for way in (Way(), Way(ranks="basis")):
        with pytest.raises(TooLarge, match="bytes more than"):
            cutter.made(way, 0.01)


@pytest.mark.slow
def test_more_rounds_go_on_where_fewer_stopped(cutter):
    one, three = (cutter.made(Way(rounds=rounds), 0.3) for rounds in (1, 3))
    cutter._fits = None
    again = cutter.made(Way(rounds=3), 0.3)
    assert cutter.made(Way(rounds=1), 0.3).experts == one.experts
    assert again.experts == three.experts and three.error < one.error


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [Settings.ranks, (1, 16)], ids=["whole", "quick"])
def test_the_study_has_its_records_and_a_second_run_adds_none(bench, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(better, "BUDGETS", {0.02: 0.9, 0.3: 0.9, 0.8: 0.95})
    said: list[str] = []
    lab = opened(bench, tmp_path, ranks)
    better.better(lab, said.append)
    every = [record for record in lab.records.all() if record["part"] == "better"]
    found = [record for record in every if "left out" not in record]
    left = [record for record in every if "left out" in record]
    for record in left:
        head = {"part", "name", "settings", "commit"}
        assert set(record) == {*head, "left out"} and record["left out"]
    for budget in (0.3, 0.8):
        mine = [record for record in found if record["settings"]["budget"] == budget]
        tried = [record for record in mine if "test" not in record]
        assert all(0 < record["bytes"]["share"] <= budget for record in mine)
        assert all(math.isfinite(record["error"]) for record in mine)
        names = {record["name"] for record in tried}
        for part in ("plain", "int4", "basis", "budgeted", "correction", "aware", "refitted"):
            assert any(part in name for name in names), part
        assert any("vectors in" in name and "correction" in name for name in names)
        best = max(record["validation"]["normalised"] for record in tried)
        kept = [record for record in mine if "test" in record]
        assert [record["name"].split(":")[0] for record in kept] == ["kept", "the paper's"]
        assert kept[0]["validation"]["normalised"] == best
        assert kept[1]["name"] == "the paper's: plain"
        assert set(kept[0]["test"]["scores"]) == set(TASKS)
    assert not any(record["settings"]["budget"] == 0.02 for record in found)
    small = [record for record in left if record["settings"]["budget"] == 0.02]
    dials = better.FEW if ranks == (1, 16) else better.Dials()
    assert [record["settings"]["factors"] for record in small] == list(dials.factors)
    assert all("bytes more than" in record["left out"] for record in small)
    assert any("do not fit; nothing is tried" in text for text in said)
    # What is tried at the first budget that fits is chosen there for the next.
    counts = [sum(r["settings"]["budget"] == b for r in found) for b in (0.3, 0.8)]
    assert len(every) == len({(r["name"], str(r["settings"])) for r in every})
    assert ranks == (1, 16) or counts[1] < counts[0] < 36

    monkeypatch.setattr(Cutter, "made", lambda *_: pytest.fail("made again"))
    before = lab.records.file.read_bytes()
    better.better(opened(bench, tmp_path, ranks), lambda _: None)
    assert lab.records.file.read_bytes() == before


@pytest.mark.slow
def test_what_cannot_be_is_recorded_once_and_has_no_score(bench, tmp_path):
    lab, said = opened(bench, tmp_path), []
    for _ in range(2):
        search = better.Search(Cutter(lab), said.append, 0.3)
        assert search.best([Way(rounds=1, ridge=0.1, inputs=8)]) is None and not search.scores
    (record,) = lab.records.all()
    assert record["left out"].startswith("only own factors") and "validation" not in record
    assert len(said) == 2 and "left out, only own factors" in said[0]
