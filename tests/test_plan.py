"""Which way a batch runs: the plan, what is kept merged, cut batches, and the dry run."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import randn, router_by_hand
from families import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import assert_equal, assert_rows
from tiny import EXPERTS, adapter, batch_of, inherit, merge, outputs
from torch import nn
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from twinmerge.errors import InputError, RouterError, UnsupportedModel
from twinmerge.runtime.dryrun import dry_run
from twinmerge.runtime.layers import TwinAny, TwinConv, TwinLinear, Whole
from twinmerge.runtime.load import load
from twinmerge.runtime.lookup import TwinEmbedding
from twinmerge.runtime.parts import Factors
from twinmerge.runtime.per_row import Ambiguous, NotRowWise, per_row
from twinmerge.runtime.plan import Planner, drop, groups
from twinmerge.runtime.reading import read_mixed
from twinmerge.runtime.routing import Routing, Store, current, routed
from twinmerge.runtime.split import joined, run_split

T = 4
"""Experts."""
DIFFERENT = torch.tensor([[0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [1.0, 0, 0, 0]])
ALIKE = torch.tensor([[0.2, 0.8, 0, 0]] * 3)
ONE_EACH = torch.eye(4)[[0, 2, 3]]


def weights_of(rows: int) -> torch.Tensor:
    return randn(rows, len(EXPERTS), seed=0).softmax(dim=1)


def unchecked(function: Any) -> Any:
    """As callers outside of the tests find it: nothing looks at the types of what they pass."""
    return inspect.unwrap(function)


# ------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("weights", "way", "lasts", "want"),
    [
        (torch.zeros(3, T), "auto", False, "shared"),
        (torch.zeros(3, T), "merged", True, "shared"),
        (torch.zeros(3, T), "split", False, "shared"),
        (
            DIFFERENT[:2] * 0 + torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]),
            "auto",
            False,
            "stacked",
        ),
        (DIFFERENT, "stacked", False, "stacked"),
        (DIFFERENT, "split", False, "split"),
        (DIFFERENT, "selected", False, "selected"),
        (ONE_EACH, "auto", False, "selected"),
        (ONE_EACH, "stacked", False, "stacked"),
        (ALIKE, "auto", False, "uniform"),
        (ALIKE, "auto", True, "merged"),
        (ALIKE, "merged", False, "merged"),
        (ALIKE, "uniform", True, "uniform"),
        (ALIKE, "stacked", False, "stacked"),
        (ALIKE, "selected", False, "selected"),
        (ALIKE, "split", False, "split"),
        (ALIKE[:1], "auto", False, "uniform"),
    ],
)
def test_the_way_follows_from_the_weights(weights, way, lasts, want):
    head = torch.arange(len(weights))
    routing, name = Planner().plan(weights, head, way=way, lasts=lasts)
    assert name == want and routing.batch == len(weights) and routing.head is head
    if want == "shared":
        assert routing.mix is None
        return
    mix = routing.mix
    assert mix.active == tuple(weights.any(dim=0).nonzero()[:, 0].tolist())
    assert mix.one == (want in ("uniform", "merged") or len(weights) == 1)
    assert torch.equal(mix.weights.expand(len(weights), -1), weights)
    assert (mix.store is not None) == (want == "merged")
    assert (mix.chosen is not None) == (want == "selected")
    assert mix.convex == bool((weights.sum(dim=1) <= 1).all())


def test_chosen_experts_are_all_that_have_a_weight():
    for weights in (DIFFERENT, ONE_EACH, -DIFFERENT):
        routing, _ = Planner().plan(weights, way="selected")
        lost = weights.scatter(1, routing.mix.chosen, 0)
        assert not lost.any() and routing.mix.chosen.shape[1] == int((weights != 0).sum(1).max())


@pytest.mark.parametrize(
    ("weights", "way", "message"),
    [
        (
            DIFFERENT,
            "fast",
            "plan='fast': expected one of auto, merged, uniform, selected, stacked",
        ),
        (DIFFERENT, "merged", r"plan='merged': expected one weighting .* \(expert,\)"),
        (DIFFERENT, "uniform", "plan='uniform': expected one weighting for the whole batch"),
    ],
)
def test_a_way_that_the_weights_do_not_allow_is_an_error(weights, way, message):
    with pytest.raises(InputError, match=message):
        unchecked(Planner.plan)(Planner(), weights, way=way)


def test_a_model_that_mixes_rows_is_split_unless_all_rows_are_alike():
    planner = Planner(mixes_rows="the.layer: no rows")
    assert planner.plan(DIFFERENT)[1] == "split"
    assert planner.plan(ALIKE)[1] == "uniform"
    assert planner.plan(DIFFERENT[:1])[1] == "uniform"
    for way in ("stacked", "selected"):
        message = f"plan='{way}': this model cannot run rows of other weights .*the.layer: no rows"
        with pytest.raises(InputError, match=message):
            planner.plan(DIFFERENT, way=way)
        assert planner.plan(ALIKE, way=way)[1] == way


# ------------------------------------------------------------------ what is kept merged


def key_of(planner: Planner, weights: torch.Tensor, **options: Any) -> Store | None:
    return planner.plan(weights, **options)[0].mix.store


def test_weights_that_come_again_are_kept_merged():
    planner, other = Planner(), torch.tensor([[0.0, 0.5, 0, 0]] * 2)
    assert key_of(planner, ALIKE) is None  # once is not often
    store = key_of(planner, ALIKE)
    assert store is not None and key_of(planner, ALIKE[:1]) is store
    store.kept(("layer", "weight"), ALIKE, lambda: torch.zeros(10, dtype=torch.float64))
    assert planner.merged_bytes == 80
    assert key_of(planner, other) is None and key_of(planner, ALIKE) is store
    assert key_of(planner, other, lasts=True) is not store  # and the first one has to go
    assert planner.merged_bytes == 0 and key_of(planner, ALIKE) is None
    assert key_of(planner, ALIKE, way="uniform") is None


def test_a_call_that_merges_nothing_leaves_what_is_kept():
    planner, other = Planner(), torch.tensor([[0.0, 0.5, 0, 0]] * 2)
    store = key_of(planner, ALIKE, way="merged")
    for _ in range(3):
        assert key_of(planner, other, way="uniform", lasts=True) is None
    assert list(planner._stores.values()) == [store]


def test_threads_may_share_a_planner():
    threads: list[threading.Thread] = []

    class Stores(OrderedDict):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            if found and not threads:  # between the look and the take, another call evicts it
                other = {"target": planner.plan, "args": (ONE_EACH[:1],), "kwargs": {"lasts": True}}
                threads.append(threading.Thread(**other))
                threads[0].start()
                threads[0].join(0.5)
            return found

    planner = Planner(_stores=Stores())
    store = key_of(planner, ALIKE, way="merged")
    assert key_of(planner, ALIKE) is store
    threads[0].join()
    assert len(planner._stores) == 1 and store not in planner._stores.values()


def test_as_many_are_kept_as_is_said_and_the_oldest_goes():
    weights = [torch.eye(4)[i : i + 1] for i in range(3)]
    planner = Planner(keep=2)
    stores = [key_of(planner, w, lasts=True) for w in weights[:2]]
    assert key_of(planner, weights[0]) is stores[0]  # now the younger one
    key_of(planner, weights[2], lasts=True)
    assert key_of(planner, weights[0]) is stores[0]
    assert key_of(planner, weights[1], lasts=True) is not stores[1]
    planner = Planner(keep=0)
    assert key_of(planner, ALIKE, lasts=True) is None and key_of(planner, ALIKE) is None
    one, other = (key_of(planner, ALIKE, way="merged") for _ in range(2))
    assert one is not other and planner.merged_bytes == 0


def test_what_is_kept_is_forgotten_when_told_and_not_sent_along():
    planner = Planner(mixes_rows="so", keep=3)
    store = key_of(planner, ALIKE, way="merged")
    store.kept(("layer", "weight"), ALIKE, lambda: torch.ones(3))
    for other in (copy.deepcopy(planner), pickle.loads(pickle.dumps(planner))):
        assert (other.mixes_rows, other.keep, other.merged_bytes) == ("so", 3, 0)
    assert planner.merged_bytes == 12
    planner.forget()
    assert planner.merged_bytes == 0 and key_of(planner, ALIKE) is None


@pytest.fixture(scope="module")
def bert(zoo):
    """A twin of one's own, to change."""
    return load(zoo.artifact("bert", 3))


def test_a_model_merges_once_and_forgets_when_it_moves(bert):
    inputs, weights = batch_of(EVERY["bert"]), [0.2, 0.5, 0.3]
    seen = [bert(weights=weights, **inputs) for _ in range(3)]
    assert [output.plan for output in seen] == ["uniform", "merged", "merged"]
    assert torch.equal(seen[1].logits, seen[2].logits)
    torch.testing.assert_close(seen[0].logits, seen[1].logits, rtol=1e-4, atol=1e-5)
    differs = {record.name for record in bert.manifest.tensors if record.kind == "matrix"}
    kept = next(iter(bert.planner._stores.values()))
    assert len(kept) >= len(differs) and bert.planner.merged_bytes == kept.bytes > 0
    bert.double()
    assert bert.planner.merged_bytes == 0
    again = bert(weights=weights, **inputs)
    assert again.plan == "uniform" and again.logits.dtype == torch.float64
    bert.float()
    other = bert(weights=[0.6, 0.2, 0.2], **inputs)
    want = bert(weights=torch.tensor([[0.6, 0.2, 0.2]] * 4), plan="stacked", **inputs)
    torch.testing.assert_close(other.logits, want.logits, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ top_k and threshold

WEIGHTS = st.lists(
    st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=80)
@given(rows=WEIGHTS, top_k=st.none() | st.integers(1, 5), threshold=st.none() | st.floats(0, 0.99))
def test_what_is_dropped_is_the_smallest_and_is_said(rows, top_k, threshold):
    weights = torch.tensor(rows)
    found = drop(weights, top_k, threshold)
    kept = found.weights
    assert torch.equal(kept[kept != 0], weights[kept != 0])  # nothing is scaled up
    if top_k is None and threshold is None:
        assert found.dropped is None and torch.equal(kept, weights)
        return
    torch.testing.assert_close(found.dropped, (weights.abs() - kept.abs()).sum(dim=1))
    for before, after in zip(weights.abs(), kept.abs(), strict=True):
        gone = before[(after == 0) & (before > 0)]
        if top_k is not None:
            assert (after != 0).sum() <= top_k
        if threshold is not None:
            assert (after[after != 0] >= threshold).all()
        elif len(gone):
            assert gone.max() <= after[after != 0].min()
            assert (after != 0).sum() == top_k
        if top_k is None and len(gone):
            assert gone.max() < threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0: expected a whole number from 1"),
        ({"top_k": 1.5}, "top_k=1.5: expected a whole number"),
        ({"top_k": True}, "top_k=True: expected a whole number"),
        ({"threshold": -0.1}, "threshold=-0.1: expected a weight from 0 to below 1"),
        ({"threshold": 1}, "threshold=1: expected a weight"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        unchecked(drop)(DIFFERENT, options.get("top_k"), options.get("threshold"))


def test_of_equal_weights_the_first_stay_however_many_rows_there_are():
    for rows in (1, 2, 16, 64):
        kept = drop(torch.full((rows, 8), 0.125), 2, None).weights
        assert torch.equal(kept.count_nonzero(dim=0), torch.tensor([rows] * 2 + [0] * 6))


def test_the_head_is_that_of_the_highest_weight_that_is_left(bert):
    inputs = batch_of(EVERY["bert"])
    weights = torch.tensor([[-0.9, 0.3, 0.1], [-0.9, 0.3, 0.1], [0.4, 0.4, 0.2], [0.1, 0.2, 0.25]])
    assert bert(weights=weights, **inputs).expert.tolist() == [1, 1, 0, 2]
    assert bert(weights=weights, top_k=1, **inputs).expert.tolist() == [0, 0, 0, 2]
    # Of the last row nothing is left.
    assert bert(weights=weights, threshold=0.28, **inputs).expert.tolist() == [1, 1, 0, 2]


def test_a_model_runs_with_what_is_left_and_says_what_it_dropped(zoo):
    twin, inputs, weights = zoo.twin("bert", 3), batch_of(EVERY["bert"]), weights_of(4)
    assert twin(weights=weights, **inputs).dropped is None
    output = twin(weights=weights, top_k=1, **inputs)
    best = weights.argmax(dim=1)
    assert torch.equal(output.expert, best) and output.plan == "selected"
    torch.testing.assert_close(output.dropped, 1 - weights.gather(1, best[:, None])[:, 0])
    assert_equal(output, twin(weights=output.weights, **inputs))
    few = twin(weights=weights, threshold=0.3, **inputs)
    assert torch.equal(few.weights, torch.where(weights >= 0.3, weights, 0))


@pytest.mark.parametrize("way", ["stacked", "selected", "split"])
def test_all_ways_give_the_same(way, zoo):
    twin, inputs = zoo.twin("bert", 3), batch_of(EVERY["bert"])
    for top_k in (None, 1, 2):
        options = dict(weights=weights_of(4), top_k=top_k, **inputs)
        got = twin(plan=way, **options)
        assert got.plan == way
        assert_rows(got, twin(**options), inputs)


# ------------------------------------------------------------------ batches cut by weighting


def test_groups_are_rows_of_equal_weights_and_heads():
    weights = DIFFERENT[[0, 1, 0, 2, 0, 1]]
    head = torch.tensor([0, 1, 0, 1, 1, 1])
    planner = Planner(mixes_rows="so")
    cut = groups(planner.plan(weights, head)[0], weights)
    assert sorted(sorted(group.rows.tolist()) for group in cut) == [[0, 2], [1, 5], [3], [4]]
    for group in cut:
        routing = group.routing
        assert routing.batch == len(group.rows) == len(routing.head) and routing.mix.one
        assert torch.equal(routing.head, head[group.rows])
        assert torch.equal(routing.mix.weights.expand(len(group.rows), -1), weights[group.rows])
        assert routing.mix.active == tuple(routing.mix.weights[0].nonzero()[:, 0].tolist())
    weights[3] = 0
    empty = [g for g in groups(planner.plan(weights, head)[0], weights) if 3 in g.rows.tolist()]
    assert empty[0].routing.mix is None


Pair = namedtuple("Pair", "left right")


@dataclass
class Answer(ModelOutput):
    logits: Any = None
    states: Any = None
    nothing: Any = None
    scores: Any = None


def test_a_cut_batch_is_put_together_as_it_was():
    weights = DIFFERENT[[0, 1, 0, 2]]
    cut = groups(Routing(Planner().plan(weights)[0].mix, None, 4), weights)
    x, whole, ids = randn(4, 5, seed=0), randn(3, 3, seed=1), torch.arange(4)[:, None]

    def call(x, whole, nested, flag):
        assert flag == "kept" and whole.shape == (3, 3)
        own = current().mix.weights[0]
        assert all(torch.equal(weights[i], own) for i in nested.states[0][:, 0])
        width = 2 + int(own.count_nonzero())  # heads of other widths
        return Answer(x[:, :1].expand(-1, width), (x, (x * 2,)), None, x.sum(dim=1))

    nested = Answer(states=(ids,))
    inputs = dict(x=x, whole=whole, nested=nested, flag="kept")
    with pytest.raises(UnsupportedModel, match=r"logits: rows .* other shapes, \(3,\) and \(4,\)"):
        run_split(call, inputs, cut, 4)  # not a matter of heads
    seen = run_split(call, inputs, cut, 4, heads=True)
    assert isinstance(seen, Answer) and seen.nothing is None
    assert torch.equal(seen.states[0], x) and torch.equal(seen.states[1][0], 2 * x)
    assert torch.equal(seen.scores, x.sum(dim=1))
    for row in range(4):
        width = 2 + int(weights[row].count_nonzero())
        assert torch.equal(seen.logits[row, :width], x[row, :1].expand(width))
        assert torch.isneginf(seen.logits[row, width:]).all()


def test_a_vector_as_long_as_the_batch_is_not_cut():
    cut = groups(Routing(Planner().plan(DIFFERENT)[0].mix, None, 3), DIFFERENT)
    with pytest.raises(UnsupportedModel, match="positions: has 3 entries, as many as the batch"):
        run_split(lambda **_: None, {"positions": torch.arange(3)}, cut, 3)


def test_positions_of_several_kinds_have_the_batch_second():
    weights = DIFFERENT[[0, 1, 0, 2]]
    cut = groups(Routing(Planner().plan(weights)[0].mix, None, 4), weights)
    places, other = randn(3, 4, 5, seed=0), randn(4, 2, 5, seed=1)

    def call(position_ids, other):
        return {"places": position_ids.transpose(0, 1), "other": other}

    seen = run_split(call, {"position_ids": places, "other": other}, cut, 4)
    assert torch.equal(seen["places"], places.transpose(0, 1))
    assert torch.equal(seen["other"], other)
    cut = groups(Routing(Planner().plan(DIFFERENT)[0].mix, None, 3), DIFFERENT)
    with pytest.raises(UnsupportedModel, match="position_ids: has 3 entries, as many as the batch"):
        run_split(call, {"position_ids": places, "other": other}, cut, 3)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.ones(()), torch.ones(())], r"output of \(\) has no axis of rows"),
        ([torch.ones(3, 2), torch.ones(1, 2)], r"output of \(3, 2\) has no axis of rows"),
        ([DynamicCache(), DynamicCache()], "output: a DynamicCache cannot be put together"),
        ([torch.ones(2, 4), torch.ones(1, 3)], r"output: rows .* other shapes, \(3,\) and \(4,\)"),
        ([{"mems": torch.ones(7, 2)}, {"mems": torch.ones(7, 1)}], r"mems of .* Ask for no mems"),
        ([{"kv": DynamicCache()}, {"kv": DynamicCache()}], "kv: a DynamicCache .*use_cache=False"),
    ],
)
def test_what_cannot_be_put_together_is_said(outputs, message):
    with pytest.raises(UnsupportedModel, match=message):
        joined(outputs, [2, 1], torch.arange(3))


SPLIT = ["bert", "bert answers", "llama", "vit", "t5 classifier"]
MORE = ["convnext", "mixtral", "t5", "bart classifier", "gpt2", "mpnet", "resnet"]


@pytest.mark.parametrize("name", [*SPLIT, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_model_that_mixes_rows_gives_what_it_gives_otherwise(name, zoo, monkeypatch):
    twin, inputs = zoo.twin(name, 3), batch_of(EVERY[name])
    options = dict(weights=weights_of(4)[[0, 1, 0, 2]], output_hidden_states=True, **inputs)
    want = twin(**options)
    monkeypatch.setattr(twin.planner, "mixes_rows", "by hand")
    got = twin(**options)
    assert got.plan == "split"
    assert torch.equal(got.weights, want.weights) and torch.equal(got.expert, want.expert)
    assert_rows(got, want, inputs)
    states = getattr(got.model_output, "hidden_states", None)
    if states is not None:
        assert isinstance(states, tuple) and len(states) == len(want.hidden_states)
        for mine, theirs in zip(states, want.hidden_states, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    task = ["math", "code", "math", "law"]
    monkeypatch.setattr(twin.planner, "mixes_rows", None)
    want = twin(task=task, **inputs)
    monkeypatch.setattr(twin.planner, "mixes_rows", "by hand")
    assert_rows(twin(task=task, **inputs), want, inputs)


def test_a_cache_cannot_be_cut(zoo, monkeypatch):
    twin, inputs = zoo.twin("llama", 3), batch_of(EVERY["llama"])
    monkeypatch.setattr(twin.planner, "mixes_rows", "by hand")
    with pytest.raises(InputError, match="past_key_values=, .* a cache cannot be cut"):
        twin(weights=weights_of(4), past_key_values=DynamicCache(), **inputs)
    with pytest.raises(UnsupportedModel, match="a DynamicCache cannot be put together .*use_cache"):
        twin(weights=weights_of(4), use_cache=True, **inputs)
    one = twin(weights=[0.2, 0.3, 0.5], use_cache=True, **inputs)
    assert one.plan != "split" and one.past_key_values is not None


def test_what_no_dry_run_saw_is_split_from_then_on(zoo):
    twin, inputs, calls = load(zoo.artifact("bert", 3)), batch_of(EVERY["bert"]), []
    want = twin(weights=weights_of(4), **inputs)

    def refuse(*_: Any) -> None:
        routing = current()
        calls.append(routing.batch)
        if routing.mix is not None and not routing.mix.one:
            raise NotRowWise("the.layer: seen late")

    hook = twin.model.bert.encoder.register_forward_pre_hook(refuse)
    got = twin(weights=weights_of(4), **inputs)
    assert got.plan == "split" and calls == [4, 1, 1, 1, 1]
    assert twin.planner.mixes_rows == "the.layer: seen late"
    assert_rows(got, want, inputs)
    calls.clear()
    assert twin(weights=weights_of(4), **inputs).plan == "split" and calls == [1, 1, 1, 1]
    twin.planner.mixes_rows = None
    with pytest.raises(NotRowWise, match="seen late"):  # asked for by name
        twin(weights=weights_of(4), plan="stacked", **inputs)
    hook.remove()


def test_a_coincidence_splits_one_batch_and_a_failure_none(zoo):
    twin, inputs = load(zoo.artifact("bert", 3)), batch_of(EVERY["bert"])
    problem: list[Exception] = []

    def refuse(*_: Any) -> None:
        routing = current()
        if problem and (routing.mix is None or not routing.mix.one):
            raise problem[0]

    twin.model.bert.encoder.register_forward_pre_hook(refuse)
    problem.append(Ambiguous("the.layer: cannot tell"))
    assert twin(weights=weights_of(4), **inputs).plan == "split"
    assert twin.planner.mixes_rows is None
    problem[0] = NotRowWise("the.layer: seen late")
    with pytest.raises(IndexError):  # also one by one
        twin(weights=weights_of(4), input_ids=torch.full((4, 3), 999))
    assert twin.planner.mixes_rows is None
    problem.clear()
    assert twin(weights=weights_of(4), **inputs).plan != "split"


@pytest.mark.parametrize("plan", ["auto", "stacked", "split"])
@pytest.mark.parametrize("name", ["token_type_ids", "attention_mask", "position_ids"])
def test_inputs_of_other_batch_lengths_are_refused_by_every_plan(name, plan, bert):
    ids = batch_of(EVERY["bert"])["input_ids"]
    odd = {name: torch.zeros(3, 7, dtype=torch.long)}
    for how in ({"weights": weights_of(4)}, {"task": "math"}, {}):
        with pytest.raises(InputError, match=f"{name}: has 3 rows, input_ids has 4. Expected as"):
            bert(input_ids=ids, plan=plan, **odd, **how)
    assert bert.planner.mixes_rows is None


def test_one_row_of_positions_serves_all(bert):
    ids = batch_of(EVERY["bert"])["input_ids"]
    one, weights = torch.arange(7).flip(0)[None], weights_of(4)
    want = bert(input_ids=ids, weights=weights, position_ids=one.expand(4, -1))
    for plan in ("auto", "split"):
        got = bert(input_ids=ids, weights=weights, position_ids=one, plan=plan)
        assert_rows(got, want, {"input_ids": ids})


def test_texts_and_images_of_several_weightings_are_not_compared(zoo):
    twin, inputs = load(zoo.artifact("clip", 3)), batch_of(EVERY["clip"])
    weights = weights_of(4)
    for plan in ("auto", "split"):
        with pytest.raises(UnsupportedModel, match="CLIPModel compares .* Call get_text_features"):
            twin(weights=weights, plan=plan, **inputs)
    assert twin.planner.mixes_rows is None
    few = inputs | {"pixel_values": inputs["pixel_values"][:2]}
    for plan in ("auto", "stacked", "split"):
        with pytest.raises(InputError, match=r"pixel_values: \(2, .* one image for each of 4 rows"):
            twin(weights=weights, plan=plan, **few)
    alike = twin(weights=weights[0], **few)  # four texts for each of two images
    want = zoo.plain("clip", 3, weights[0].tolist(), "math")(**few)
    torch.testing.assert_close(alike.logits_per_image, want.logits_per_image, rtol=1e-4, atol=1e-4)
    assert alike.logits_per_text.shape == (4, 2)


def test_a_value_per_row_within_an_outputs_tuples_is_found(bert, monkeypatch):
    calls = []

    def inner(**inputs: Any) -> Any:
        routing = current()
        calls.append(routing.batch)
        value = torch.zeros(len(inputs["input_ids"]), 2)
        if not routing.mix.one:
            value = per_row(randn(4, 4, 2, seed=0), "the.table")
        return Answer(states=((value,),))

    monkeypatch.setattr(bert.model, "forward", inner)
    output = bert(weights=weights_of(4), **batch_of(EVERY["bert"]))
    monkeypatch.setattr(bert.planner, "mixes_rows", None)
    assert output.plan == "split" and calls == [4, 1, 1, 1, 1]
    assert type(output.states[0][0]) is torch.Tensor


def test_the_output_says_which_are_the_logits_whatever_form_was_asked_for(bert, monkeypatch):
    inputs = batch_of(EVERY["bert"])
    want = bert(weights=weights_of(4), **inputs)
    assert_equal(bert(weights=weights_of(4), return_dict=False, **inputs), want)
    monkeypatch.setattr(bert.model.config, "return_dict", False)
    assert_equal(bert(weights=weights_of(4), **inputs), want)


# ------------------------------------------------------------------ routing on the way


TARGETS = {"math": ["query", "value"], "code": ["query", "dense"], "law": ["value"]}


def routed_by_hand(twin: Any, layer: int) -> Any:
    """A twin with a small random router that tells rows apart."""
    twin.router = router_by_hand(layer)
    return twin


@pytest.fixture(scope="module")
def adapters(zoo, tmp_path_factory):
    """Experts of adapters alone: no embedding differs, and the router reads there."""
    made, out = zoo.made("bert"), tmp_path_factory.mktemp("adapters")
    base, folders = made.family.base.from_pretrained(made.base), {}
    for index, expert in enumerate(EXPERTS):
        heads = {"num_labels": made.family.heads[index]}
        model = made.family.task(made.family.config(**made.family.sizes | heads))
        inherit(model, base)
        options = dict(target_modules=TARGETS[expert], task_type="SEQ_CLS", r=2)
        folders[expert] = adapter(model, out / expert, seed=expert, **options)
    merge(made.base, folders, out / "artifact", exclusive={"rank": "full"})
    return out / "artifact"


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"threshold": 0.3, "plan": "stacked"}])
def test_a_router_that_reads_before_any_difference_costs_no_forward(adapters, options):
    twin, inputs, passes = load(adapters), batch_of(EVERY["bert"], rows=5), []
    assert twin.untouched_layers == 0 and twin.planner.mixes_rows is None
    twin = routed_by_hand(twin, layer=0)
    first = twin.features.blocks[0]
    hook = first.register_forward_hook(lambda *_: passes.append(1))
    got = twin(**options, **inputs)
    assert len(passes) == 1
    weights = twin.route(**inputs)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
    passes.clear()
    twin.untouched_layers = -1
    want = twin(**options, **inputs)
    assert len(passes) == 1 + (twin.router.last > 0)
    assert_equal(got, want)
    assert (got.plan, got.expert.tolist()) == (want.plan, want.expert.tolist())
    assert torch.equal(got.weights, want.weights)
    if "top_k" in options:
        assert got.plan == "selected" and torch.equal(got.dropped, want.dropped)
    named = twin(head="code", **options, **inputs)
    twin.untouched_layers = 0
    assert_equal(twin(head="code", **options, **inputs), named)
    split = twin(plan="split", **inputs)
    assert split.plan == "split" and torch.equal(split.weights, weights)
    hook.remove()


def test_what_is_seen_on_the_way_is_split_from_then_on_too(adapters):
    twin, inputs = load(adapters), batch_of(EVERY["bert"], rows=5)
    twin = routed_by_hand(twin, layer=0)
    want = twin(**inputs)

    def refuse(*_: Any) -> None:
        routing = current()
        if routing is not None and routing.mix is not None and not routing.mix.one:
            raise NotRowWise("the.layer: seen late")

    twin.features.blocks[1].register_forward_pre_hook(refuse)
    for _ in range(2):
        got = twin(**inputs)
        assert got.plan == "split" and twin.planner.mixes_rows == "the.layer: seen late"
        assert_rows(got, want, inputs)


@pytest.mark.parametrize("untouched", [0, -1])
def test_a_router_is_not_part_of_the_gradients(adapters, untouched):
    twin = routed_by_hand(load(adapters), layer=0)
    twin.untouched_layers = untouched
    words = twin.model.get_input_embeddings()(batch_of(EVERY["bert"])["input_ids"])
    output = twin(inputs_embeds=words.detach().requires_grad_())
    assert output.logits.requires_grad and not output.weights.requires_grad


@pytest.mark.parametrize("untouched", [0, -1])
def test_a_router_that_gives_no_numbers_is_told(adapters, untouched):
    twin, inputs = routed_by_hand(load(adapters), layer=0), batch_of(EVERY["bert"])
    twin.untouched_layers = untouched
    twin.router.scorer.register_forward_hook(
        lambda _, args, out: out.masked_fill(torch.arange(4)[:, None] == 2, float("nan"))
    )
    with pytest.raises(
        RouterError, match=r"NaN in row 2, from features \(mlp, reads layer 0\) that are finite"
    ):
        twin(**inputs)
    if untouched < 0:
        with pytest.raises(RouterError, match="fit the router again"):
            twin.route(**inputs)


def test_a_router_that_reads_later_takes_a_pass_of_its_own(adapters):
    twin, inputs, passes = load(adapters), batch_of(EVERY["bert"]), []
    twin = routed_by_hand(twin, layer=1)
    twin.features.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    output = twin(**inputs)
    assert len(passes) == 2
    assert torch.equal(output.weights, twin.route(**inputs))


def test_experts_whose_embeddings_differ_leave_no_layer_untouched(zoo):
    assert zoo.twin("bert", 3).untouched_layers == -1
    assert zoo.twin("bert", "none").untouched_layers == 2


# ------------------------------------------------------------------ the dry run


class Toy(nn.Module):
    """Words (batch, seq) -> (batch, seq, 6), through whatever stands in the middle."""

    main_input_name = "input_ids"

    def __init__(self, middle: Any, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20, **config)
        self.words = nn.Embedding(20, 6)
        self.layer = nn.Linear(6, 6)
        self.scale = Scale()
        self.middle = middle
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=index))
        self.requires_grad_(False)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.middle(self, self.words(input_ids))}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.by


def factors(out: int, in_: int) -> tuple[Factors]:
    a, b = randn(6, in_, seed=1), randn(out, 6, seed=2)
    return (Factors(a, b, [2, 0, 4]),)


def twin_of(middle: Any, *which: str, **config: Any) -> Toy:
    toy = Toy(middle, **config)
    if "words" in which:
        toy.words = TwinEmbedding(toy.words, factors(20, 6), "words")
    if "layer" in which:
        toy.layer = TwinLinear(toy.layer, factors(6, 6), Whole(randn(3, 6, seed=3)), "layer")
    if "scale" in which:
        read_mixed(toy.scale, {"by": Whole(randn(3, 6, seed=4))}, "scale")
    return toy


FINE = {
    "a layer": lambda toy, x: toy.layer(x),
    "a scale": lambda toy, x: toy.scale(x),
    "a weight without its layer": lambda toy, x: x @ toy.layer.weight,
    "a layer on what serves all": lambda toy, x: x + toy.layer(torch.ones(1, 1, 6)),
    "one answer for each row": lambda toy, x: toy.layer(x)[:, 0, 0],
}
MIXED = {
    "rows turned around": (lambda toy, x: x + x.flip(0), "row 0 of a dry run's batch is not what"),
    "rows averaged": (lambda toy, x: x + x.mean(dim=0), "row . of a dry run's batch"),
    "tokens before rows": (lambda toy, x: toy.layer(x.transpose(0, 1)).transpose(0, 1), "layer: "),
    "rows and tokens in one": (lambda toy, x: toy.layer(x.flatten(0, 1)).view(x.shape), "layer: "),
    "tokens scaled before rows": (lambda toy, x: toy.scale(x.transpose(0, 1)), "scale: "),
    "rows and tokens scaled in one": (lambda toy, x: toy.scale(x.flatten(0, 1)).view(x.shape),
                                      "scale: "),
    "no rows": (lambda toy, x: toy.layer(x).sum(), r"output 0 of \(\) has no axis of rows"),
    "a weight for an answer": (lambda toy, x: toy.layer.weight, r"output 0 of \(6, 6\)"),
    "scores of rows for rows": (lambda toy, x: toy.layer(x)[:, 0] @ x[:, 0].T, "dry run"),
    "an error for many rows": (
        lambda toy, x: toy.layer(x) if len(x) == 1 or current().mix is None else 1 / 0,
        "ZeroDivisionError in a dry run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_a_model_whose_rows_stand_alone_passes_the_dry_run(name):
    for which in (("words", "layer", "scale"), ("layer", "scale"), ("words",)):
        assert dry_run(twin_of(FINE[name], *which), 3).mixes_rows is None


@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_rows_is_found_by_the_dry_run(name):
    middle, message = MIXED[name]
    found = dry_run(twin_of(middle, "words", "layer", "scale"), 3)
    assert found.mixes_rows is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.mixes_rows)


def test_a_model_that_no_inputs_fit_is_split_to_be_safe():
    toy = twin_of(lambda toy, x: x[:, :, :, :, None], "layer")
    assert "no inputs" in dry_run(toy, 3).mixes_rows


def test_one_weighting_that_fails_is_an_error():
    def fails(toy: Toy, x: torch.Tensor) -> torch.Tensor:
        return x if current() is None or current().mix is None else 1 / 0

    with pytest.raises(UnsupportedModel, match="Toy: a dry run of one row failed .ZeroDivision"):
        dry_run(twin_of(fails, "layer"), 3)


def test_layers_of_no_row_wise_form_are_found_by_the_dry_run():
    toy = twin_of(lambda toy, x: toy.bend(x), "layer")
    toy.bend = TwinAny(nn.PReLU(5), {"weight": Whole(randn(3, 5, seed=0))}, "bend")
    assert dry_run(toy, 3).mixes_rows == "bend: a PReLU has no row-wise form"
    inner = nn.Conv1d(5, 5, 3, groups=5, padding=1, padding_mode="circular").requires_grad_(False)
    toy.bend = TwinConv(inner, factors(5, 3), None, "conv")
    assert dry_run(toy, 3).mixes_rows == "conv: padding_mode='circular'"


def test_small_differences_of_experts_are_seen_as_well_as_large_ones():
    # Of one row for all others, by axes that happen to be as long as the dry run's batch.
    def mixes(toy: Toy, x: torch.Tensor) -> torch.Tensor:
        return x + toy.layer(torch.ones(3, 6))[:, None].sum(dim=0)

    toy = twin_of(mixes, "layer")
    for buffer in toy.layer.buffers():
        buffer.mul_(0.02)
    assert dry_run(toy, 3).mixes_rows is not None


def test_layers_before_the_first_difference_are_counted():
    class Blocks(Toy):
        def __init__(self, place: int) -> None:
            super().__init__(None, num_hidden_layers=3)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)).requires_grad_(False)
            if place < 3:
                self.blocks[place] = nn.Sequential(
                    nn.Identity(), TwinLinear(self.blocks[place], factors(6, 6), None, "layer")
                )

        def forward(self, input_ids, attention_mask=None):
            x = self.words(input_ids)
            for block in self.blocks:
                x = block(x)
            return {"logits": x}

    for place in range(4):
        found = dry_run(Blocks(place), 3)
        assert (found.mixes_rows, found.untouched) == (None, place)


def test_sizes_that_coincide_change_nothing(zoo):
    # T5's and MPNet's tables have as many queries as the batch has rows.
    for name, rows in (("t5", 4), ("mpnet", 7), ("deberta", 7)):
        twin, inputs = zoo.twin(name, 3), batch_of(EVERY[name], rows=rows)
        weights = 2 * weights_of(rows)
        got = twin(weights=weights, head="math", **inputs)
        assert got.plan == "stacked"
        assert_rows(got, twin(weights=weights, head="math", plan="split", **inputs), inputs)
        assert len(next(iter(outputs(got).values()))) == rows


def test_nothing_is_left_of_a_routing_after_a_dry_run():
    with routed(None):
        dry_run(twin_of(FINE["a layer"], "layer"), 3)
        assert current() is None


def test_a_lowered_keep_frees_what_was_kept():
    planner = Planner(keep=2)
    stores = [key_of(planner, w, way="merged") for w in (ALIKE, ONE_EACH[:1])]
    assert stores[0] is not stores[1] and len(planner._stores) == 2
    planner.keep = 0
    key_of(planner, ALIKE, way="merged")
    assert len(planner._stores) == 0


@pytest.mark.parametrize("name", ["tasks", "tsk", "topk", "weight", "treshold"])
def test_a_misspelt_option_is_not_an_input(name, zoo):
    twin, inputs = zoo.twin("bert"), batch_of(EVERY["bert"])
    with pytest.raises(InputError, match=f"{name}=: no such option. Did you mean"):
        twin(**inputs, **{name: "math"})


def test_inputs_by_position_are_answered_with_what_to_do(zoo):
    with pytest.raises(InputError, match="expected inputs by name, got a str by position. Token"):
        zoo.twin("bert")("a text")
