"""A budget is spent where it lowers the error most, to the byte, and what is told of it is so."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import (
    EXPERTS,
    FAMILIES,
    Made,
    adapter,
    exclusive,
    expert_tensors,
    made,
    merge,
    opened,
    recipe,
    shared_tensors,
)

from twinmerge.artifact.codec import decode_quantised, dequantise
from twinmerge.artifact.format import Manifest
from twinmerge.errors import RecipeError
from twinmerge.merging import keep
from twinmerge.merging.budget import Key, spend, spend_evenly
from twinmerge.merging.journal import Candidate
from twinmerge.merging.plan import make_plan

# ------------------------------------------------------------------------ spending, by itself

GAINS = st.lists(st.integers(0, 50), min_size=0, max_size=4)
"""How much each component of a matrix lowers the squared error."""


def candidate(gains: list[int]) -> Candidate:
    squares = [float(sum(gains[rank:])) for rank in range(len(gains) + 1)]
    captured = [squares[0] - square for square in squares]
    return Candidate(squares=tuple(squares), captured=tuple(captured), missed=0.0)


@st.composite
def spectra(draw, *, falling: bool = True, cost: int | None = None):
    """(candidates, costs): up to three tensors of two experts, each with a few components."""
    candidates: dict[Key, Candidate] = {}
    prices: dict[str, int] = {}
    for tensor in "abc"[: draw(st.integers(1, 3))]:
        prices[tensor] = cost or draw(st.integers(1, 9))
        for expert in ("math", "code")[: draw(st.integers(1, 2))]:
            gains = draw(GAINS)
            candidates[tensor, expert] = candidate(
                sorted(gains, reverse=True) if falling else gains
            )
    return candidates, prices


def best(candidates: dict[Key, Candidate], costs: dict[str, int], budget: int) -> float:
    """The least squared error that the budget allows, by trying all ranks."""
    keys = list(candidates)
    choices = itertools.product(*(range(len(candidates[key].squares)) for key in keys))
    return min(
        sum(candidates[key].squares[rank] for key, rank in zip(keys, ranks, strict=True))
        for ranks in choices
        if sum(rank * costs[key[0]] for key, rank in zip(keys, ranks, strict=True)) <= budget
    )


def check(spent, candidates: dict[Key, Candidate], costs: dict[str, int], budget: int) -> None:
    assert set(spent.ranks) == set(candidates)
    assert all(0 <= rank < len(candidates[key].squares) for key, rank in spent.ranks.items())
    assert spent.bytes == sum(rank * costs[key[0]] for key, rank in spent.ranks.items()) <= budget
    square = sum(candidates[key].squares[rank] for key, rank in spent.ranks.items())
    assert spent.square == pytest.approx(square)


def largest_gain(candidates: dict[Key, Candidate]) -> float:
    pairs = (itertools.pairwise(c.squares) for c in candidates.values())
    return max((one - two for each in pairs for one, two in each), default=0.0)


@settings(deadline=None, max_examples=150)
@given(spectra(), st.integers(0, 80))
def test_greedy_misses_the_best_by_one_component_at_most(drawn, budget):
    candidates, costs = drawn
    spent, even = spend(candidates, costs, budget), spend_evenly(candidates, costs, budget)
    check(spent, candidates, costs, budget)
    check(even, candidates, costs, budget)
    slack = largest_gain(candidates)
    assert best(candidates, costs, budget) <= spent.square
    assert spent.square <= best(candidates, costs, budget) + slack
    assert spent.square <= even.square + slack


@settings(deadline=None, max_examples=100)
@given(spectra(cost=4), st.integers(0, 80))
def test_greedy_is_best_where_all_components_cost_the_same(drawn, budget):
    candidates, costs = drawn
    assert spend(candidates, costs, budget).square == best(candidates, costs, budget)


@settings(deadline=None, max_examples=100)
@given(spectra(falling=False), st.integers(0, 80))
def test_a_component_that_gains_little_does_not_hide_the_next(drawn, budget):
    # As quantising makes them: the squared error as stored need not fall evenly, or at all.
    candidates, costs = drawn
    spent = spend(candidates, costs, budget)
    check(spent, candidates, costs, budget)
    whole = sum((len(c.squares) - 1) * costs[key[0]] for key, c in candidates.items())
    if budget >= whole:
        assert spent.square == 0
    four = 4 * largest_gain(candidates)  # as many as a matrix has here
    assert spent.square <= best(candidates, costs, budget) + four


def test_a_component_that_does_harm_is_not_bought():
    rising = Candidate(squares=(4.0, 5.0, 6.0), captured=(0.0, 1.0, 2.0), missed=0.0)
    dip = Candidate(squares=(4.0, 5.0, 1.0, 2.0), captured=(0.0, 1.0, 2.0, 3.0), missed=0.0)
    spent = spend({("a", "x"): rising, ("b", "x"): dip}, {"a": 1, "b": 1}, 100)
    assert spent.ranks == {("a", "x"): 0, ("b", "x"): 2}


def test_bytes_go_to_what_is_cheap_for_its_gain():
    candidates = {("large", "x"): candidate([10, 9]), ("small", "x"): candidate([4, 3])}
    costs = {"large": 100, "small": 10}
    assert spend(candidates, costs, 20).ranks == {("large", "x"): 0, ("small", "x"): 2}
    assert spend(candidates, costs, 120).ranks == {("large", "x"): 1, ("small", "x"): 2}
    assert spend_evenly(candidates, costs, 120).ranks == {("large", "x"): 1, ("small", "x"): 2}
    assert spend_evenly(candidates, costs, 110).ranks == {("large", "x"): 1, ("small", "x"): 1}
    assert spend(candidates, costs, 0).bytes == spend({}, {}, 9).bytes == 0


# --------------------------------------------------------------------------------- artifacts

DTYPES = [None, "float32", "bfloat16", "float16", "int8", "int4"]


def part(tensors: dict[str, torch.Tensor], name: str, record) -> torch.Tensor:
    """What an expert's file says of one matrix, quantised or not."""
    if f"{name}.a.q" not in tensors:
        return exclusive(tensors, name, torch.empty(record.shape))
    out, in_ = record.matrix
    rank = len(tensors[f"{name}.a.q"])
    bits = 8 if tensors[f"{name}.a.q"].dtype == torch.int8 else 4
    a, b = (
        dequantise(
            decode_quantised(
                {key: tensors[f"{name}.{side}.{key}"] for key in ("q", "scale")}, rank, n, bits
            ),
            torch.float64,
        )
        for side, n in (("a", in_), ("b", out))
    )
    return (b.T @ a).view(record.shape)


def measured(made: Made, folder: Path, manifest: Manifest) -> tuple[dict[Key, float], float]:
    """The errors of all matrices, and the one over all of them, from the files alone."""
    shared, errors, lost, whole = shared_tensors(folder), {}, 0.0, 0.0
    for name, reference in made.experts.items():
        theirs, mine = load_file(Path(reference, "model.safetensors")), expert_tensors(folder, name)
        for record in manifest.tensors:
            if record.kind != "matrix":
                continue
            prefixes = ("", f"{made.family.task.base_model_prefix}.")
            own = next(theirs[p + record.name] for p in prefixes if p + record.name in theirs)
            delta = own.double() - shared[record.name].double()
            rest = (delta - part(mine, record.name, record)).square().sum()
            square = delta.square().sum()
            errors[record.name, name] = float((rest / square).sqrt())
            lost, whole = lost + float(rest), whole + float(square)
    return errors, (lost / whole) ** 0.5


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "experts").iterdir())


def spent_on(made: Made, out: Path, budget: Any, **more: Any) -> Manifest:
    exclusive = {"budget": budget} | more.pop("exclusive", {})
    return merge(made.base, made.experts, out, exclusive=exclusive, **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_weigh_no_more_than_the_budget_and_err_as_told(dtype, zoo, tmp_path):
    made = zoo.made("bert")
    budget = 14_000 if dtype in ("int8", "int4") else 20_000
    manifest = spent_on(made, tmp_path / "out", budget, exclusive={"dtype": dtype})
    record = manifest.budget
    assert record is not None and record.bytes == 3 * budget
    assert on_disk(tmp_path / "out") == sum(expert.bytes for expert in manifest.experts)
    assert on_disk(tmp_path / "out") == record.spent <= record.bytes
    assert record.spent >= 0.9 * record.bytes
    errors, total = measured(made, tmp_path / "out", manifest)
    shares = {
        (tensor.name, expert): share
        for tensor in manifest.tensors
        if tensor.kind == "matrix"
        for expert, share in tensor.experts.items()
    }
    assert set(shares) == set(errors)
    kinds = {"int8": "int8", "int4": "int4"}
    for key, share in shares.items():
        assert share.error == pytest.approx(errors[key], abs=2e-4)
        assert share.bound - 1e-6 <= share.truncation <= share.error + 1e-6
        assert share.storage == kinds.get(dtype or "", "factors")
    assert record.error == pytest.approx(total, abs=1e-4)
    assert record.error < record.even_error
    for name in EXPERTS:
        tensors = expert_tensors(tmp_path / "out", name)
        held = {s.storage for s in (shares[k] for k in shares if k[1] == name) if s.rank}
        assert held == {kinds.get(dtype or "", "factors")}
        for tensor in manifest.tensors:
            if tensor.kind == "matrix":
                mine = [t for k, t in tensors.items() if k.startswith(tensor.name + ".")]
                assert sum(t.nbytes for t in mine) == tensor.experts[name].bytes
                assert bool(mine) == bool(tensor.experts[name].rank)


def test_fewer_bits_buy_more_rank(zoo, tmp_path):
    made, ranks = zoo.made("bert"), {}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        out = tmp_path / dtype
        manifest = spent_on(made, out, 20_000, exclusive={"dtype": dtype})
        shares = [s for t in manifest.tensors if t.kind == "matrix" for s in t.experts.values()]
        ranks[dtype] = sum(share.rank for share in shares)
    assert ranks["float32"] < ranks["bfloat16"] < ranks["int8"] < ranks["int4"]


def test_a_share_of_the_shared_expert_is_a_budget(zoo, tmp_path):
    made = zoo.made("bert")
    manifest = spent_on(made, tmp_path / "out", "45%")
    shared = sum(record.bytes for record in manifest.tensors)
    assert manifest.budget.bytes == 3 * int(0.45 * shared)
    assert on_disk(tmp_path / "out") == manifest.budget.spent <= manifest.budget.bytes


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_error_of_the_even_rank_is_what_building_with_it_measures(dtype, zoo, tmp_path):
    made = zoo.made("bert")
    budget = 14_000 if dtype == "int4" else 20_000
    record = spent_on(made, tmp_path / "out", budget, exclusive={"dtype": dtype}).budget
    around = []
    for rank in (record.even_rank - 1, record.even_rank + 1):
        out = tmp_path / str(rank)
        exclusive = {"rank": rank, "dtype": dtype}
        manifest = merge(made.base, made.experts, out, exclusive=exclusive)
        around.append(measured(made, out, manifest)[1])
    # Some have that rank, and the others one less or one more.
    assert around[1] - 1e-4 <= record.even_error <= around[0] + 1e-4
    assert record.error <= record.even_error


def test_a_budget_buys_the_same_ranks_as_spending_all_spectra(zoo, tmp_path):
    """The whole way, against greedy over singular values that torch finds in the files."""
    made = zoo.made("bert")
    manifest = spent_on(made, tmp_path / "out", 25_000)
    shared, candidates, costs = shared_tensors(tmp_path / "out"), {}, {}
    ranks = {}
    for name, reference in made.experts.items():
        theirs = load_file(Path(reference, "model.safetensors"))
        for record in manifest.tensors:
            if record.kind == "matrix":
                own = theirs[f"bert.{record.name}"].double() - shared[record.name].double()
                s = torch.linalg.svdvals(own.view(record.matrix)).square()
                tail = [float(s[rank:].sum()) for rank in range(len(s) + 1)]
                captured = [tail[0] - x for x in tail]
                key = record.name, name
                candidates[key] = Candidate(
                    squares=tuple(tail), captured=tuple(captured), missed=0.0
                )
                costs[record.name] = 4 * sum(record.matrix)
                ranks[key] = record.experts[name].rank
    bought = sum(rank * costs[key[0]] for key, rank in ranks.items())
    assert spend(candidates, costs, bought).ranks == ranks


def test_a_budget_beyond_everything_keeps_everything(zoo, tmp_path):
    made = zoo.made("bert")
    manifest = spent_on(made, tmp_path / "out", "1GB")
    record = manifest.budget
    assert record.at_reach == 0 and record.spent < record.bytes == 3 * 10**9
    assert record.error < 1e-3 and record.even_error < 1e-3
    errors, total = measured(made, tmp_path / "out", manifest)
    assert total < 1e-6
    for tensor in manifest.tensors:
        if tensor.kind == "matrix":
            for name, share in tensor.experts.items():
                assert share.rank == min(tensor.matrix)
                assert share.error == pytest.approx(errors[tensor.name, name], abs=1e-6)


def test_a_budget_smaller_than_what_is_kept_whole_names_both_numbers(zoo, tmp_path):
    made = zoo.made("bert")
    plan = make_plan(recipe(made.base, made.experts))
    whole = plan.whole_bytes()
    plan.close()
    with pytest.raises(RecipeError) as caught:
        spent_on(made, tmp_path / "out", whole - 1)
    assert f"{whole - 1:,} bytes for each expert" in str(caught.value)
    assert "exclusive.budget" in str(caught.value) and "rank: none" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_least_budget_that_is_taken_is_kept(zoo, tmp_path):
    """From where it is refused upwards: headers count too."""
    made = zoo.made("bert")
    plan = make_plan(recipe(made.base, made.experts))
    whole = plan.whole_bytes()
    plan.close()
    taken = []
    for budget in (whole, whole + 1000, whole + 3000, whole + 5000, whole + 8000):
        out = tmp_path / str(budget)
        try:
            manifest = spent_on(made, out, budget)
        except RecipeError:
            assert not taken and not out.exists()
            continue
        taken.append(budget)
        assert on_disk(out) == manifest.budget.spent <= manifest.budget.bytes == 3 * budget
    assert taken


def test_what_might_have_had_more_rank_is_counted(zoo, tmp_path, monkeypatch):
    made = zoo.made("bert")
    monkeypatch.setattr(keep, "LEAST_REACH", 1)
    monkeypatch.setattr(keep, "REACH", 0)
    manifest = spent_on(made, tmp_path / "out", 40_000)
    shares = [
        (min(tensor.matrix), share)
        for tensor in manifest.tensors
        if tensor.kind == "matrix"
        for share in tensor.experts.values()
    ]
    assert {share.rank for _, share in shares} == {1}
    assert manifest.budget.at_reach == sum(1 < short for short, _ in shares) > 0
    monkeypatch.undo()
    assert spent_on(made, tmp_path / "again", 20_000).budget.at_reach == 0


# ---------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("lora")
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 24}
    sizes = FAMILIES["llama"].sizes | wide | {"num_hidden_layers": 1}
    family = dataclasses.replace(FAMILIES["llama"], sizes=sizes)
    base = made(family, folder, experts=()).base
    options = dict(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_alpha=4)
    experts = {
        name: adapter(opened(tf.LlamaForCausalLM, base), folder / name, name, r=rank, **options)
        for name, rank in (("one", 4), ("two", 3))
    }
    return Made(family, base, experts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_for_adapters_is_spent_on_what_they_change(dtype, lora, tmp_path):
    manifest = spent_on(lora, tmp_path / "out", 3000, exclusive={"dtype": dtype})
    assert on_disk(tmp_path / "out") == manifest.budget.spent <= manifest.budget.bytes == 6000
    full = {n: f"{folder}-merged" for n, folder in lora.experts.items()}
    changed = [tensor for tensor in manifest.tensors if tensor.experts]
    assert {t.name.rsplit(".", 2)[1] for t in changed} == {"q_proj", "up_proj"}
    shared = shared_tensors(tmp_path / "out")
    lost = whole = 0.0
    for name, folder in full.items():
        theirs = load_file(f"{folder}/model.safetensors")
        mine = expert_tensors(tmp_path / "out", name)
        for record in changed:
            delta = theirs[record.name].double() - shared[record.name].double()
            rest = (delta - part(mine, record.name, record)).square().sum()
            error = float((rest / delta.square().sum()).sqrt())
            assert record.experts[name].error == pytest.approx(error, abs=3e-4)
            lost, whole = lost + float(rest), whole + float(delta.square().sum())
    assert manifest.budget.error == pytest.approx((lost / whole) ** 0.5, abs=3e-4)
    assert 0 < manifest.budget.error <= manifest.budget.even_error


def test_all_that_adapters_hold_is_not_called_out_of_reach(lora, tmp_path):
    manifest = spent_on(lora, tmp_path / "out", "1MB")
    ranks = {share.rank for t in manifest.tensors for share in t.experts.values()}
    assert ranks == {7}  # 4 + 3: the average mixes them
    assert manifest.budget.error < 1e-3
    assert manifest.budget.at_reach == 0
