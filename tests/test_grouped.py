"""The paper's grouped variant: what is exact about it, what is lost, and that it says so."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import EXPERTS

from twinmerge.data import Encoded, encode, pad, read_tasks
from twinmerge.errors import InputError, RouterError
from twinmerge.evaluation.grouped import compare_grouped
from twinmerge.evaluation.score import evaluate, prepare
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.grouped import group_weights, route_rows, run_grouped
from twinmerge.runtime.load import load

ROOT = Path(__file__).parent.parent


def soft(rows: int, experts: int, seed: int) -> torch.Tensor:
    """Routing weights of all kinds, from near one-hot to near even."""
    return (2 * randn(rows, experts, seed=seed)).softmax(dim=-1)


many = dict(
    rows=st.integers(1, 40), experts=st.integers(1, 5), seed=st.integers(0, 99)
)  # what `soft` takes

# ----------------------------------------------------------------------------------- the groups


@settings(deadline=None, max_examples=25)
@given(groups=st.integers(1, 6), by=st.sampled_from(["weights", "logits"]), **many)
def test_every_row_has_its_groups_mean_and_error_is_the_distance(groups, by, rows, experts, seed):
    weights = soft(rows, experts, seed)
    weights = torch.cat([weights, weights[::2]])  # rows that occur twice count twice
    got = group_weights(weights, groups, by=by)
    for number in range(got.count):
        mine = got.group == number
        mean = weights[mine].double().mean(dim=0)
        torch.testing.assert_close(got.weights[mine].double(), mean.expand(mine.sum(), -1))
    distance = (weights - got.weights).norm(dim=-1)
    torch.testing.assert_close(got.error, distance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.weights.sum(dim=-1), torch.ones(len(weights)))


@settings(deadline=None, max_examples=25)
@given(groups=st.integers(1, 6), **many)
def test_a_group_is_of_one_bin_and_no_bin_has_more_groups_than_asked(groups, rows, experts, seed):
    weights = soft(rows, experts, seed)
    got = group_weights(weights, groups)
    own = weights.argmax(dim=-1)
    assert torch.equal(got.expert, own)
    assert torch.equal(got.weights.argmax(dim=-1), own)
    for expert in own.unique():
        mine = got.group[own == expert].unique()
        assert 1 <= len(mine) <= min(groups, int((own == expert).sum()))
        assert set(mine.tolist()).isdisjoint(got.group[own != expert].tolist())
    assert got.group.unique().tolist() == list(range(got.count))


@settings(deadline=None, max_examples=25)
@given(by=st.sampled_from(["weights", "logits"]), **many)
def test_as_many_groups_as_rows_lose_nothing(by, rows, experts, seed):
    weights = soft(rows, experts, seed)
    got = group_weights(weights, rows, by=by)
    assert torch.equal(got.weights, weights)
    assert got.count == len(weights.unique(dim=0)) and not got.error.any()


def test_equal_rows_are_one_group_and_exact_however_few_groups():
    two = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    weights = two[[0, 1, 1, 0, 1, 0, 0]]
    for groups in (1, 2, 20):
        got = group_weights(weights, groups)
        assert torch.equal(got.weights, weights) and got.count == 2


@settings(deadline=None, max_examples=25)
@given(groups=st.integers(1, 6), by=st.sampled_from(["weights", "logits"]), **many)
def test_the_order_of_rows_does_not_matter(groups, by, rows, experts, seed):
    weights = soft(rows, experts, seed)
    weights = torch.cat([weights, weights[::2]])
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    got, other = group_weights(weights, groups, by=by), group_weights(weights[order], groups, by=by)
    assert torch.equal(other.weights, got.weights[order])
    assert torch.equal(other.group, got.group[order])
    assert torch.equal(other.error, got.error[order])


def test_weights_that_many_rows_share_are_kept_apart_first():
    first = torch.tensor([0.60] * 50 + [0.70] * 50 + [0.82])
    got = group_weights(torch.stack([first, 1 - first], dim=-1), 2)
    # Of the three values alone, 0.60 and 0.70 are the closest.
    assert got.group[0] != got.group[50] == got.group[100]


def test_groups_depend_on_rows_and_seed_alone():
    weights = soft(200, 4, seed=0)
    first, again = group_weights(weights, 5, seed=3), group_weights(weights, 5, seed=3)
    assert torch.equal(first.group, again.group) and torch.equal(first.weights, again.weights)
    others = [group_weights(weights, 5, seed=seed).group for seed in range(8)]
    assert any(not torch.equal(first.group, other) for other in others)


def test_more_groups_come_closer():
    weights = soft(300, 4, seed=1)
    errors = [float(group_weights(weights, n).error.square().mean()) for n in (1, 3, 10, 40, 300)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] == 0


def test_logits_tell_apart_what_near_certain_weights_do_not():
    sure = torch.tensor([[1.0, 1e-7, 1e-30], [1.0, 1e-30, 1e-7], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1]])
    by_weights, by_logits = (group_weights(sure, 3, by=by).group for by in ("weights", "logits"))
    assert by_weights[0] == by_weights[1] and by_logits[0] != by_logits[1]
    zero = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2]])  # a softmax that underflowed
    assert bool(torch.isfinite(group_weights(zero, 2, by="logits").weights).all())


def test_rows_that_differ_in_the_last_bit_may_share_a_group_without_a_warning():
    weights = torch.tensor([[0.9, 0.1]]).repeat(6, 1)
    for row in range(6):
        for _ in range(row):
            weights[row, 0] = torch.nextafter(weights[row, 0], torch.tensor(1.0))
    got = group_weights(weights, 5)
    assert 1 <= got.count <= 5 and float(got.error.max()) < 1e-6


def test_some_rows_keep_the_groups_that_all_rows_made():
    got = group_weights(soft(30, 3, seed=2), 2)
    some = got.take([4, 29, 0])
    for name in ("weights", "expert", "group", "error"):
        assert torch.equal(getattr(some, name), getattr(got, name)[[4, 29, 0]])
    assert not len(got.take([]).group)


def test_bad_requests_are_named():
    weights = soft(4, 3, seed=0)
    with pytest.raises(InputError, match="groups=0: expected a whole number from 1 on"):
        group_weights(weights, 0)
    with pytest.raises(InputError, match="at least one row"):
        group_weights(weights[:0])
    with pytest.raises(InputError, match="expected finite numbers"):
        group_weights(weights / 0)
    unchecked = inspect.unwrap(group_weights)  # past the test suite's type checker
    with pytest.raises(InputError, match="by='logit'.*weights, logits. Did you mean 'logits'"):
        unchecked(weights, by="logit")


# --------------------------------------------------------------------------------- running them


@pytest.fixture
def rows(bench) -> Encoded:
    """Texts of all experts in turn, of many lengths."""
    texts = [text for three in zip(*bench.texts(8, seed=7).values(), strict=True) for text in three]
    return encode(bench.model.tokenizer, texts, 40)


def exact(model, rows: Encoded, **how) -> list[torch.Tensor]:
    """Every row alone, routed: the logits of the head that answers it."""
    outputs = list(model.outputs.values())
    found = []
    with torch.no_grad():
        for place, row in enumerate(rows.rows):
            own = {key: value[place] for key, value in how.items()}
            output = model(**pad(model.tokenizer, [row]), **own)
            found.append(output.logits[0, : outputs[int(output.expert)]])
    return found


@pytest.mark.parametrize("size", [3, 32])
def test_as_many_groups_as_rows_are_the_routed_mixed_batch(size, bench, rows):
    model = bench.model
    run = run_grouped(model, rows, groups=len(rows), batch_size=size)
    with torch.no_grad():
        mixed = model(**pad(model.tokenizer, rows.rows))
    assert torch.equal(run.expert, mixed.expert)
    for got, want, index in zip(run.logits, mixed.logits, run.expert.tolist(), strict=True):
        assert len(got) == list(model.outputs.values())[index]
        torch.testing.assert_close(got, want[: len(got)], rtol=1e-5, atol=1e-5)
    assert run.merges == run.grouped.count == len(route_rows(model, rows)[0].unique(dim=0))
    assert set(run.seconds) == {"route", "group", "merge", "forward"}


def test_fewer_groups_are_the_mixed_batch_at_the_groups_weights(bench, rows):
    model = bench.model
    run = run_grouped(model, rows, groups=2)
    assert run.merges <= 6 and float(run.grouped.error.max()) > 0  # it is an approximation
    wants = exact(model, rows, weights=run.grouped.weights[:, None])
    for got, want in zip(run.logits, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    lost = [
        float((got - want).abs().max())
        for got, want in zip(run.logits, exact(model, rows), strict=True)
    ]
    assert max(lost) > 1e-5


@pytest.mark.parametrize("groups", [1, 24])
def test_each_row_may_say_whose_head_answers(groups, bench, rows):
    model = bench.model
    heads = [EXPERTS[place // 3 % 3] for place in range(len(rows))]  # all three in every bin
    run = run_grouped(model, rows, groups=groups, head=heads)
    assert [EXPERTS[index] for index in run.expert.tolist()] == heads
    wants = exact(model, rows, weights=run.grouped.weights[:, None], head=heads)
    for got, want in zip(run.logits, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_dense_merge_a_group_whatever_the_heads(bench, rows, monkeypatch):
    merges = []
    at = DenseMerge.at
    monkeypatch.setattr(DenseMerge, "at", lambda *call: merges.append(1) or at(*call))
    heads = [EXPERTS[place // 3 % 3] for place in range(len(rows))]
    run = run_grouped(bench.model, rows, groups=2, head=heads)
    assert len(merges) == run.merges == run.grouped.count


def test_the_order_of_rows_does_not_change_their_answers(bench, rows):
    model = bench.model
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = Encoded([rows.rows[i] for i in order], [rows.cut[i] for i in order])
    one = run_grouped(model, rows, groups=2, batch_size=1)  # alone, so routed without padding
    other = run_grouped(model, shuffled, groups=2, batch_size=1)
    for place, i in enumerate(order):
        torch.testing.assert_close(other.logits[place], one.logits[i], rtol=0, atol=0)


def test_wrong_heads_no_rows_and_no_router_are_named(bench, rows):
    model = bench.model
    with pytest.raises(InputError, match="a name for each of 24 rows, got 2 names"):
        run_grouped(model, rows, head=["math", "code"])
    with pytest.raises(InputError, match="'maths': no such expert. Did you mean 'math'"):
        run_grouped(model, rows, head=["maths"] * len(rows))
    with pytest.raises(InputError, match="at least one row"):
        run_grouped(model, Encoded([], []))
    with pytest.raises(RouterError):
        run_grouped(load(bench.plain), rows)


def test_models_without_heads_run_too(causal_bench):
    model = causal_bench.model
    texts = [text for texts in causal_bench.texts(2, seed=7).values() for text in texts]
    rows = encode(model.tokenizer, texts, 40)
    run = run_grouped(model, rows, groups=len(rows), batch_size=1)
    for got, row in zip(run.logits, rows.rows, strict=True):
        with torch.no_grad():
            want = model(**pad(model.tokenizer, [row])).logits[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- the comparison


def test_scores_are_those_of_evaluate_where_nothing_is_lost(bench):
    model = bench.model
    found, _ = read_tasks(bench.data, EXPERTS, "test")
    tasks = prepare(model, found)
    reference = dict.fromkeys(EXPERTS, 0.8)
    first, all_groups = compare_grouped(model, tasks, [(99, "weights")], reference=reference)
    assert first.groups is None and first.loss is None and all_groups.groups == 99
    for way in (first, all_groups):
        assert set(way.reports) == {"routed", "known-head"}
        for protocol, got in way.reports.items():
            want = evaluate(model, tasks, protocol, reference=reference)
            assert got.routing_accuracy == pytest.approx(want.routing_accuracy)
            assert got.normalised() == pytest.approx(want.normalised(), abs=1e-4)
            for name, task in want.tasks.items():
                assert got.tasks[name].score == pytest.approx(task.score, abs=1e-4)
                assert (got.tasks[name].rows, got.tasks[name].metric) == (task.rows, task.metric)
    loss = all_groups.loss
    assert loss is not None and loss.merges == 36
    assert loss.agreement == 1.0 and loss.weight_error_largest == 0.0
    assert loss.logit_difference_largest < 1e-5 and loss.value_difference_mean < 1e-5
    assert json.loads(json.dumps(all_groups.to_dict()))["loss"]["merges"] == 36


def test_what_is_lost_is_measured(bench):
    model = bench.model
    found, _ = read_tasks(bench.data, EXPERTS, "test")
    tasks = prepare(model, found)
    ways = compare_grouped(model, tasks, [(1, "weights"), (4, "weights"), (4, "logits")])
    assert [(way.groups, way.by) for way in ways[1:]] == [
        (1, "weights"), (4, "weights"), (4, "logits")
    ]  # fmt: skip
    joined = Encoded(
        [row for task in tasks.values() for row in task.encoded.rows],
        [cut for task in tasks.values() for cut in task.encoded.cut],
    )
    for way in ways[1:]:
        assert way.loss is not None and way.groups is not None
        got = group_weights(route_rows(model, joined)[0], way.groups, by=way.by)
        assert way.loss.merges == got.count <= 3 * way.groups
        assert way.loss.weight_error_largest == pytest.approx(float(got.error.max()))
        assert way.loss.weight_error_mean == pytest.approx(float(got.error.mean()))
        assert way.loss.weight_error_largest > 0 and way.loss.logit_difference_largest > 0
        parts = [way.seconds[part] for part in ("route", "group", "merge", "forward")]
        assert sum(parts) <= way.seconds["total"] * 1.001


def test_rows_that_are_misled_get_their_true_head_under_known_head(bench):
    """Without a single row at its own expert, `routed` has no answers, `known-head` has all."""
    model = load(bench.routed)
    turned = {"math": "code", "code": "law", "law": "math"}
    order = [EXPERTS.index(turned[name]) for name in EXPERTS]
    routing = model.routing

    def misled(**inputs):
        said = routing(**inputs)
        turned = {"weights": said.weights[:, order], "probabilities": said.probabilities[:, order]}
        return dataclasses.replace(said, **turned)

    model.routing = misled
    found, _ = read_tasks(bench.data, EXPERTS, "test")
    tasks = prepare(model, found)
    _, way = compare_grouped(model, tasks, [(99, "weights")])
    assert way.reports["routed"].tasks["math"].score == 0.0
    heads = [name for name, task in tasks.items() for _ in task.truth]
    joined = Encoded([row for task in tasks.values() for row in task.encoded.rows], [False] * 36)
    guesses = [int(logits.argmax()) for logits in exact(model, joined, head=heads)]
    truth = [label for task in tasks.values() for label in task.truth]
    right = [guesses[i] == truth[i] for i, name in enumerate(heads) if name == "math"]
    assert way.reports["known-head"].tasks["math"].score == pytest.approx(sum(right) / len(right))


def test_a_comparison_without_tasks_is_refused(bench):
    with pytest.raises(InputError, match="at least one task"):
        compare_grouped(bench.model, {}, [(1, "weights")])


@pytest.mark.slow
def test_the_benchmark_writes_what_its_table_shows(bench, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import shutil

    sys.modules.pop("grouped", None)
    import grouped as script

    experts = tmp_path / "experts"
    for name in ("math", "code"):
        shutil.copytree(bench.made.experts[name], experts / name)
    out = tmp_path / "grouped.json"
    options = dict(rows=8, groups="1,99", logits_groups="2", split="test", rank=2, max_tokens=40)
    script.main(experts, bench.data, bench.made.base, out, router_rows=20, title="tiny", **options)
    found = json.loads(out.read_text())
    assert [way["groups"] for way in found["ways"]] == [None, 1, 99, 2]
    assert found["rows"] == 16 and set(found["experts"]["scores"]) == {"math", "code"}
    assert str(tmp_path) not in out.read_text()
    table = script.grouped_table(found)
    assert re.search(r"\| grouped, 99 in a bin \| \d+ \|", table)
    assert "| grouped by logits, 2 in a bin |" in table
    with pytest.raises(InputError, match="'1,x': expected integers"):
        script.numbers("1,x")
