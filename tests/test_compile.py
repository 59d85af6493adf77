"""`torch.compile` of the task model: whole graphs where a model only calls its layers.

`backend="eager"` runs the captured graphs as they are, so that what is compared is the capture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import randn
from families import EVERY
from tiny import batch_of
from torch import Tensor
from torch._dynamo.utils import counters

WHOLE = ("bert", "llama", "gpt2")
BROKEN = ("vit", "qwen3 moe")
"""Bare parameters, and a gate over tokens, are mixed outside of the graphs."""


@dataclass(frozen=True)
class Turn:
    """Weights of a batch of four rows, and the way that they are to run."""

    weights: Tensor
    way: str

    def call(self, twin: Any, inputs: dict[str, Tensor]) -> Any:
        options = {} if self.way == "shared" else {"plan": self.way}
        with torch.no_grad():
            output = twin(**inputs, weights=self.weights, head="code", **options)
        assert output.plan == self.way
        return output.logits


SOFT = [Turn(randn(4, 3, seed=seed).softmax(dim=1), "stacked") for seed in (1, 2)]
OWN = [Turn(torch.eye(3)[rows], "selected") for rows in ([0, 1, 2, 1], [2, 2, 0, 1])]
ONE = [Turn(randn(3, seed=seed).softmax(dim=0), "uniform") for seed in (3, 4)]
NONE = Turn(torch.zeros(3), "shared")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    jaxtyping.config.update("jaxtyping_disable", True)  # its checks draw numbers at random
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def pair(zoo, name: str, **options: Any) -> tuple[Any, Any]:
    """A model as it is, and a copy of it that is compiled."""
    plain = zoo.twin(name, 4)
    compiled = copy.deepcopy(plain)
    compiled.model.compile(backend="eager", **options)
    return plain, compiled


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def same(got: Tensor, want: Tensor) -> None:
    """Compiled logits are as wide as the widest of all heads, not of those in the batch."""
    width = want.shape[-1]
    torch.testing.assert_close(got[..., :width], want, atol=1e-5, rtol=1e-4)
    assert bool((got[..., width:] == float("-inf")).all())


@pytest.mark.parametrize("name", WHOLE)
def test_a_forward_is_one_graph_whichever_way_it_runs(name, zoo):
    plain, compiled = pair(zoo, name, fullgraph=True)
    inputs = batch_of(EVERY[name])
    # Each way twice, and all again in another order: no graph answers for another way.
    turns = [SOFT[0], OWN[0], NONE, ONE[0], SOFT[1], OWN[1], ONE[1], NONE]
    for turn in [*turns, *reversed(turns)]:
        same(turn.call(compiled, inputs), turn.call(plain, inputs))
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", WHOLE[:2])
def test_other_weights_and_rows_need_no_other_graph(name, zoo):
    plain, compiled = pair(zoo, name, fullgraph=True)
    inputs = batch_of(EVERY[name])
    for first, other in (SOFT, OWN):
        first.call(compiled, inputs)
        before = graphs()
        same(other.call(compiled, inputs), other.call(plain, inputs))
        more = batch_of(EVERY[name], seed=7)
        same(first.call(compiled, more), first.call(plain, more))
        assert graphs() == before


@pytest.mark.parametrize("name", WHOLE[:2])
def test_a_weighting_that_is_kept_merged_is_one_graph_too(name, zoo):
    plain, compiled = pair(zoo, name, fullgraph=True)
    inputs = batch_of(EVERY[name])
    for weights in (ONE[0].weights, ONE[1].weights, ONE[0].weights):
        merged, uniform = Turn(weights, "merged"), Turn(weights, "uniform")
        for _ in range(2):  # the first call merges, the next one finds it
            same(merged.call(compiled, inputs), uniform.call(plain, inputs))


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_read_bare_parameters_compile_in_pieces(name, zoo):
    plain, compiled = pair(zoo, name)
    inputs = batch_of(EVERY[name])
    # A mixture compiles for half a minute each way.
    for turn in [SOFT[0], OWN[0], NONE, ONE[0], SOFT[1], OWN[1]][: 1 if "moe" in name else None]:
        same(turn.call(compiled, inputs), turn.call(plain, inputs))
    assert counters["graph_break"] and graphs() > 1


@pytest.mark.parametrize("which", ["bench", "causal_bench"])
def test_a_compiled_model_routes_as_before(which, request):
    plain = request.getfixturevalue(which).model
    compiled = copy.deepcopy(plain)
    compiled.model.compile(backend="eager", fullgraph=True)
    texts = ["math1 the1 the2", "code1", "law2 the3"]
    inputs = plain.tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        same(compiled(**inputs, task="math").logits, plain(**inputs, task="math").logits)
        for twin in (compiled, plain):  # as if no expert changed anything before the router
            twin.untouched_layers = twin.router.last
        got, want = compiled(**inputs), plain(**inputs)
        plain.untouched_layers = -1
    assert compiled.features is not None
    torch.testing.assert_close(got.weights, want.weights)
    assert torch.equal(got.expert, want.expert)
    assert not counters["graph_break"]
