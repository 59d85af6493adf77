"""The cost model: beside numbers counted by hand, and beside what torch counts as it runs."""

from __future__ import annotations

import pytest
import torch
from families import EVERY
from torch.utils.flop_counter import FlopCounterMode

from twinmerge.errors import InputError, UnsupportedModel
from twinmerge.runtime.cost import forward_cost, plan_costs, routing_share

COUNTED = [
    "bert",
    "bert tokens",
    "bert answers",
    "distilbert",
    "electra",
    "modernbert",
    "clip text",
    "llama",
    "llama tied",
    "llama classifier",
    "gpt2",
    "qwen3",
    "phi3",
    "neox",
    "t5",
    "t5 classifier",
    "bart",
]


def model_of(name: str):
    family = EVERY[name]
    config = family.config(**family.sizes)
    return family.task._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", COUNTED)
def test_a_forward_costs_what_torch_counts(name, tokens):
    family, model = EVERY[name], model_of(name)
    ids = torch.full((1, tokens), family.ends or 7)
    if "classifier" in name and family.decoder:
        ids[:, -1] = model.config.eos_token_id
    inputs = {"input_ids": ids}
    if family.decoder and family.generates:
        inputs["decoder_input_ids"] = ids
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert 2 * forward_cost(model, tokens).total == counter.get_total_flops()


def test_a_tiny_bert_costs_what_one_counts_by_hand():
    cost = forward_cost(model_of("bert"), 7)
    # Four matrices of 16 × 16, two of 16 × 24, scores and their product with the values.
    block = 7 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 7 * 7 * 16
    assert cost.blocks == (block, block) and cost.embedding == 0
    assert cost.head == 16 * 16 + 16 * 2  # pooler and classifier, of one token
    assert cost.until(1) == block and cost.total == 2 * block + cost.head


def test_an_images_patches_are_projected_before_the_first_block():
    cost = forward_cost(model_of("vit"), 5)
    assert cost.embedding == 5 * 16 * 3 * 4 * 4
    assert routing_share(model_of("vit"), 0, 5) == cost.embedding / cost.total


def test_a_mixtures_token_runs_through_some_of_its_experts():
    dense, mixed = forward_cost(model_of("llama"), 4), forward_cost(model_of("mixtral"), 4)
    mlp, gate = 3 * 16 * 24, 4 * 16
    assert mixed.blocks[0] - dense.blocks[0] == 4 * (mlp + gate)  # two experts, where one mlp was


def test_routing_costs_the_blocks_below_its_layer():
    model = model_of("bert")
    shares = [routing_share(model, layer, 7) for layer in range(3)]
    assert shares[0] == 0 and 0.49 < shares[1] < 0.5 and shares[2] < 1
    with pytest.raises(InputError, match="router layer 3: this model has layers 0"):
        routing_share(model, 3, 7)


@pytest.mark.parametrize("name", ["convnext", "resnet", "efficientnet", "clip"])
def test_what_does_not_follow_from_shapes_is_not_guessed(name):
    with pytest.raises(UnsupportedModel, match=r"convolution that is no embedding|towers"):
        forward_cost(model_of(name), 5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_shared_expert_costs_what_the_plain_model_costs(name, zoo):
    twin = zoo.twin(name, 3)
    more = 16 if name == "bert" else 0  # its widest head has 3 outputs, the plain one 2
    assert forward_cost(twin.model, 7).total == forward_cost(model_of(name), 7).total + more


def test_the_ways_to_run_cost_what_one_counts_by_hand(zoo):
    costs = plan_costs(zoo.twin("bert", 3), active=1)
    square, wide = 4 * 2, 2 * 2  # matrices of 16 × 16 and 16 × 24 in the two blocks
    plain = (square + 1) * 256 + wide * 384  # and the pooler
    factors = 3 * ((square + 1) * 32 + wide * 40)
    assert costs.plain == costs.merged == plain
    ranks = 3 + 3 + 2  # of the tables of words, positions and types: no product, but A
    assert costs.stacked == plain + 3 * (factors + ranks * 16)
    assert costs.selected == plain + factors + ranks * 16
    two = plan_costs(zoo.twin("bert", 3), active=2)
    assert two.selected - plain == 2 * (costs.selected - plain)
    assert plan_costs(zoo.twin("bert", 3), active=3).selected == costs.stacked
    with pytest.raises(InputError, match="active=4: expected 1 to 3 experts"):
        plan_costs(zoo.twin("bert", 3), active=4)


def test_merging_pays_from_about_in_out_by_in_plus_out_tokens(zoo):
    costs = plan_costs(zoo.twin("llama", 3))
    assert costs.break_even == costs.merging / (costs.stacked - costs.merged)
    # Between the matrices' own numbers, 16 × 8 and 16 × 24, but for the table of words.
    assert 16 * 8 / 24 < costs.break_even < 40 * 16 / 16


def test_the_second_use_of_a_tied_matrix_counts(zoo):
    tied, untied = (plan_costs(zoo.twin(n, 3)).plain for n in ("llama tied", "llama"))
    kv = 2 * 2 * 16 * 8  # the other has one head of keys and values, of two
    assert tied == untied + kv
