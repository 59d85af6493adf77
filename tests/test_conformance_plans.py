"""Every way of running a batch gives the same answers, on every architecture of `families.EVERY`.

What a mixed batch must answer is told by its rows run one weighting at a time ("split"), which
`test_conformance` compares with densely merged models.
"""

from __future__ import annotations

import pytest
import torch
from conftest import randn
from families import EVERY
from test_conformance import KINDS, assert_row, assert_rows, families, weights_of
from tiny import EXPERTS, batch_of, outputs, prompt_of

from twinmerge.errors import InputError


@pytest.fixture(params=families())
def name(request) -> str:
    return request.param


def heads_of(rows: int) -> list[str]:
    return [EXPERTS[(index + 1) % 3] for index in range(rows)]


def sparse_weights(rows: int) -> torch.Tensor:
    """One or two experts a row, other ones in every row."""
    weights = weights_of(rows, seed=1)
    weights[torch.arange(rows), torch.arange(rows) % 3] = 0
    weights[::2, 2] = 0
    return weights


# ------------------------------------------------------------------------------ mixed batches


def test_a_batch_is_known_by_its_rows_and_not_by_the_length_of_an_axis(name, zoo):
    # 2 heads, 5 patches, 7 tokens, 16 channels: lengths that other axes of the tiny models have.
    twin = zoo.twin(name, 3)
    for rows in (2, 5, 7, 16):
        # Three weightings are enough to tell rows apart, and "split" is quick with few of them.
        inputs, some = batch_of(EVERY[name], rows=rows), torch.arange(rows) % 3
        calls = dict(weights=weights_of(3)[some], head=heads_of(rows), **inputs)
        assert_rows(twin(**calls), twin(plan="split", **calls), inputs)


def test_rows_together_answer_as_one_weighting_at_a_time(name, zoo):
    twin, inputs = zoo.twin(name, 3), batch_of(EVERY[name])
    ways = [] if twin.planner.mixes_rows else ["stacked", "selected"]
    for weights in (weights_of(4), sparse_weights(4), torch.eye(3)[[2, 0, 1, 0]]):
        calls = dict(weights=weights, head=heads_of(4), **inputs)
        one_by_one = twin(plan="split", **calls)
        assert one_by_one.plan == "split"
        for plan in [*ways, "auto"]:
            together = twin(plan=plan, **calls)
            assert plan in (together.plan, "auto")
            assert_rows(together, one_by_one, inputs)


# ------------------------------------------------------------------- one weighting for all rows


def test_one_weighting_for_all_rows_is_the_densely_merged_model(name, zoo):
    twin, inputs, weights = zoo.twin(name, 3), batch_of(EVERY[name]), [0.7, -0.4, 1.1]
    want = zoo.plain(name, 3, weights, "code")(**inputs)
    for plan in ("uniform", "merged", "split") + (() if twin.planner.mixes_rows else ("stacked",)):
        got = twin(weights=weights, head="code", plan=plan, **inputs)
        assert got.plan == plan
        assert_rows(got, want, inputs)
    twin.planner.forget()


def test_merged_weights_are_those_of_the_call_and_not_of_the_one_before(name, zoo):
    twin, inputs = zoo.twin(name, 3), batch_of(EVERY[name])
    some, others = [0.2, 0.5, 0.3], [0.6, 0.1, 0.3]
    first = twin(weights=some, head="law", plan="merged", **inputs)
    second = twin(weights=others, head="law", plan="merged", **inputs)
    again = twin(weights=some, head="law", plan="merged", **inputs)
    assert_rows(again, first, inputs)
    assert_rows(second, zoo.plain(name, 3, others, "law")(**inputs), inputs)
    name_, values = next(iter(outputs(first).items()))
    assert not torch.allclose(outputs(second)[name_], values, rtol=1e-3, atol=1e-3)
    twin.planner.forget()


# ---------------------------------------------------------------------------- what is dropped


def test_top_k_runs_the_highest_weights_as_they_are_and_says_what_it_dropped(name, zoo):
    twin, inputs, weights = zoo.twin(name, 3), batch_of(EVERY[name]), weights_of(4)
    heads = [EXPERTS[index] for index in weights.argmax(dim=1)]
    best = weights.max(dim=1).values
    kept = torch.zeros_like(weights).scatter(1, weights.argmax(dim=1, keepdim=True), best[:, None])
    want = twin(weights=kept, head=heads, **inputs)
    for options in (dict(top_k=1), dict(threshold=float(best.min()))):
        if "threshold" in options:
            kept = torch.where(weights >= options["threshold"], weights, 0)
            want = twin(weights=kept, head=heads, **inputs)
        got = twin(weights=weights, **options, **inputs)
        assert torch.equal(got.weights, kept)
        torch.testing.assert_close(got.dropped, 1 - kept.sum(dim=1))
        assert got.expert.tolist() == weights.argmax(dim=1).tolist()
        assert_rows(got, want, inputs)
    assert want.dropped is None


@pytest.mark.parametrize("name", sorted(KINDS))
def test_top_1_of_a_sure_router_is_the_expert(name, zoo):
    twin, inputs = zoo.twin(name), batch_of(EVERY[name])
    weights = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    noise = 1e-3 * randn(4, 3, seed=3).abs() * (1 - weights)
    got = twin(weights=weights + noise, top_k=1, **inputs)
    torch.testing.assert_close(got.dropped, noise.sum(dim=1))
    for index, expert in enumerate(("code", "math", "law", "code")):
        assert_row(got, zoo.expert(name, expert)(**inputs), inputs, index)


# -------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("generator", families(lambda name: EVERY[name].generates))
def test_a_prompt_repeated_in_a_batch_gets_the_tokens_of_its_own_weights(generator, zoo):
    # As many rows as heads, and twice one prompt: rows differ by their weights alone.
    twin, inputs = zoo.twin(generator, 3), prompt_of(EVERY[generator], rows=1)
    twice = {key: value.repeat(2, 1) for key, value in inputs.items()}
    weights, calls = weights_of(2), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = twin.generate(weights=weights, **twice, **calls)
    for index in range(2):
        alone = twin.generate(weights=weights[index], **inputs, **calls)
        assert torch.equal(got[index : index + 1], alone)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_way_that_does_not_fit_the_weights_is_refused(name, zoo):
    twin, inputs = zoo.twin(name, 3), batch_of(EVERY[name])
    for plan in ("merged", "uniform"):
        with pytest.raises(InputError, match=f"plan='{plan}': expected one weighting for the wh"):
            twin(weights=weights_of(4), head="law", plan=plan, **inputs)
