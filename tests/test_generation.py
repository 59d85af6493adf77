"""Generation in all the ways that transformers has, each beside the densely merged model.

`test_conformance.py` holds what every generating family must do (greedy, beams, sampling, one
routing); here are the other ways to call `generate`, on a few families, and caches that outlive
a request.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from conftest import randn, router_by_hand
from families import FAMILIES, Family
from texts import TextBench, save_tokenizer, sentences
from tiny import EVERY, EXPERTS, batch_of, made, merge, row
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer

from twinmerge import cli
from twinmerge.data import Chat, chat_of, encode, text_of
from twinmerge.errors import InputError
from twinmerge.merging.copies import _chat_template
from twinmerge.recipe import Router
from twinmerge.runtime.answer import answer_texts
from twinmerge.runtime.caches import tag
from twinmerge.runtime.load import load
from twinmerge.runtime.per_row import Ambiguous, NotRowWise
from twinmerge.runtime.router.fit import fit_router
from twinmerge.runtime.routing import Mix, Routing, current, routed

DECODERS = ["llama", "gpt2", "qwen3", "gemma"]
ENCODED = ["t5", "bart"]
CALLS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=DECODERS)
def decoder(request) -> str:
    return request.param


@pytest.fixture(params=DECODERS + ENCODED)
def name(request) -> str:
    return request.param


def prompts_of(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of 5 to 7 tokens, none of them an end."""
    side = "right" if name in ENCODED else "left"
    inputs = batch_of(EVERY[name], rows=rows, pad=side, seed=5)
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def weights_of(rows: int, seed: int = 0) -> torch.Tensor:
    return (2 * randn(rows, len(EXPERTS), seed=seed)).softmax(dim=-1)


def dense(zoo, name: str, weights: torch.Tensor):
    return zoo.plain(name, 3, weights.tolist(), "math")


def routed_by_hand(twin, layer: int = 1):
    """A twin with a small random router that tells rows apart."""
    twin.router = router_by_hand(layer)
    return twin


# ------------------------------------------------------------------------- ways to call generate


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12, "min_length": 12},
        {"generation_config": GenerationConfig(**CALLS, num_beams=2, num_return_sequences=2)},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2} | CALLS,
        {"use_cache": False} | CALLS,
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True} | CALLS,
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 4},
    ],
    ids=["max length", "configuration", "processors", "no cache", "beams", "samples"],
)
def test_options_of_generate_give_the_densely_merged_models_tokens(name, options, zoo):
    twin, inputs, weights = zoo.twin(name, 3), prompts_of(name), weights_of(3)
    got = twin.generate(weights=weights, **inputs, **options)
    each = len(got) // 3
    for index in range(3):
        want = dense(zoo, name, weights[index]).generate(**row(inputs, index), **options)
        mine = got[index * each : (index + 1) * each, : want.shape[1]]
        assert torch.equal(mine, want)


def test_the_prompt_may_come_by_position_or_as_inputs(name, zoo):
    twin, inputs = zoo.twin(name, 3), prompts_of(name, rows=1)
    ids, chosen = inputs["input_ids"], {"weights": weights_of(1)}
    want = twin.generate(input_ids=ids, **chosen, **CALLS)
    assert torch.equal(twin.generate(ids, **chosen, **CALLS), want)
    assert torch.equal(twin.generate(inputs=ids, **chosen, **CALLS), want)
    with pytest.raises(InputError, match="the prompt once, got it by position and as input_ids="):
        twin.generate(ids, input_ids=ids, **chosen, **CALLS)


def test_without_a_mask_padding_is_told_by_its_token_as_transformers_does(decoder, zoo):
    twin, inputs = zoo.twin(decoder, 3), prompts_of(decoder)
    weights = weights_of(3)
    with_mask = twin.generate(weights=weights, **inputs, **CALLS)
    assert torch.equal(twin.generate(inputs["input_ids"], weights=weights, **CALLS), with_mask)
    twin = routed_by_hand(load(zoo.artifact(decoder, 3)))
    with_mask = twin.generate(**inputs, **CALLS)
    assert torch.equal(twin.generate(inputs["input_ids"], **CALLS), with_mask)


def test_without_a_prompt_generation_starts_from_the_begin_token(zoo):
    twin, weights = zoo.twin("llama", 3), weights_of(1)
    want = dense(zoo, "llama", weights[0]).generate(**CALLS)
    assert torch.equal(twin.generate(weights=weights[0], **CALLS), want)
    with pytest.raises(InputError, match="expected a prompt .input_ids=. for the router"):
        routed_by_hand(load(zoo.artifact("llama", 3))).generate(**CALLS)


def test_embeddings_serve_as_a_prompt(decoder, zoo):
    twin, weights = zoo.twin(decoder, 3), weights_of(3)
    embeds = randn(3, 6, 16, seed=3)
    got = twin.generate(inputs_embeds=embeds, weights=weights, **CALLS)
    for index in range(3):
        plain = dense(zoo, decoder, weights[index])
        assert torch.equal(
            got[index], plain.generate(inputs_embeds=embeds[index][None], **CALLS)[0]
        )


def test_scores_are_those_of_the_densely_merged_model(name, zoo):
    twin, inputs, weights = zoo.twin(name, 3), prompts_of(name), weights_of(3)
    asked = CALLS | {"return_dict_in_generate": True, "output_scores": True}
    got = twin.generate(weights=weights, **inputs, **asked)
    for index in range(3):
        want = dense(zoo, name, weights[index]).generate(**row(inputs, index), **asked)
        assert torch.equal(got.sequences[index], want.sequences[0]) and len(got.scores) == 5
        for mine, theirs in zip(got.scores, want.scores, strict=True):
            torch.testing.assert_close(mine[index], theirs[0], rtol=1e-4, atol=1e-5)


def test_a_static_cache_gives_the_same_tokens(decoder, zoo):
    twin, inputs, weights = zoo.twin(decoder, 3), prompts_of(decoder), weights_of(3)
    want = twin.generate(weights=weights, **inputs, **CALLS)
    static = CALLS | {"cache_implementation": "static"}
    assert torch.equal(twin.generate(weights=weights, **inputs, **static), want)
    # One that the caller made, and empties between requests of other weights.
    cache = StaticCache(config=twin.model.config, max_cache_len=20)
    for own in (weights, weights.flip(0)):
        cache.reset()
        got = twin.generate(weights=own, past_key_values=cache, **inputs, **CALLS)
        assert torch.equal(got, twin.generate(weights=own, **inputs, **CALLS))


def test_a_long_prompt_may_be_read_in_chunks(zoo):
    twin, inputs, weights = zoo.twin("llama", 3), prompts_of("llama"), weights_of(3)
    want = twin.generate(weights=weights, **inputs, **CALLS)
    got = twin.generate(weights=weights, **inputs, **CALLS, prefill_chunk_size=2)
    assert torch.equal(got, want)


def test_an_assistant_changes_nothing(decoder, zoo):
    twin, inputs, weights = zoo.twin(decoder, 3), prompts_of(decoder, rows=1), weights_of(1)
    want = twin.generate(weights=weights, **inputs, **CALLS)
    helper = zoo.made(decoder).expert("code")
    got = twin.generate(weights=weights, **inputs, **CALLS, assistant_model=helper)
    assert torch.equal(got, want)
    assert torch.equal(
        twin.generate(weights=weights, **inputs, **CALLS, prompt_lookup_num_tokens=2), want
    )
    with pytest.raises(InputError, match="plain transformers model, got a TwinModel"):
        twin.generate(weights=weights, **inputs, assistant_model=twin)


def test_stopping_criteria_stop(zoo):
    twin, inputs, weights = zoo.twin("llama", 3), prompts_of("llama"), weights_of(3)

    def enough(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= 9)

    stop = tf.StoppingCriteriaList([enough])
    got = twin.generate(
        weights=weights,
        **inputs,
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        stopping_criteria=stop,
    )
    assert got.shape[1] == 9
    whole = twin.generate(weights=weights, **inputs, **CALLS)
    assert torch.equal(got, whole[:, :9])


def test_a_streamer_in_a_thread_says_what_generate_returns(causal_bench):
    model = causal_bench.model
    tokenizer = model.tokenizer
    inputs = tokenizer("math1 the2 math3", return_tensors="pt")
    want = model.generate(**inputs, **CALLS)[0, inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, **CALLS, "streamer": streamer}
    )
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert said == tokenizer.decode(want)


def test_two_threads_with_other_weights_do_not_meet(zoo):
    twin, inputs = zoo.twin("llama", 3), prompts_of("llama")
    tasks, wants, gots = ["math", "law"], {}, {}
    for task in tasks:
        wants[task] = twin.generate(task=task, **inputs, **CALLS, num_beams=2)

    def run(task: str) -> None:
        gots[task] = [twin.generate(task=task, **inputs, **CALLS, num_beams=2) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(wants["math"], wants["law"])
    assert all(torch.equal(got, wants[task]) for task in tasks for got in gots[task])


def test_an_encoder_decoder_routes_on_what_its_encoder_reads(zoo):
    for name in ENCODED:
        twin, inputs = routed_by_hand(load(zoo.artifact(name, 3))), prompts_of(name)
        weights = twin.route(**inputs)  # without a word of the decoder's
        assert not torch.allclose(weights[0], weights[1], atol=1e-2)
        for options in (CALLS, CALLS | {"num_beams": 2}):
            want = twin.generate(weights=weights, **inputs, **options)
            assert torch.equal(twin.generate(**inputs, **options), want)


def test_a_model_that_runs_one_weighting_at_a_time_generates_row_group_by_row_group(zoo):
    twin, inputs = load(zoo.artifact("llama", 3)), prompts_of("llama", rows=4)
    weights = weights_of(2)[[0, 1, 0, 1]]
    beams = CALLS | {"num_beams": 3, "num_return_sequences": 2}
    wants = [twin.generate(weights=weights, **inputs, **options) for options in (CALLS, beams)]
    twin.planner.mixes_rows = "for this test"
    for want, options in zip(wants, (CALLS, beams), strict=True):
        assert torch.equal(twin.generate(weights=weights, **inputs, **options), want)
    for name in ("return_dict_in_generate", "streamer"):
        with pytest.raises(InputError, match=f"{name}=: LlamaForCausalLM runs one weighting"):
            twin.generate(weights=weights, **inputs, **CALLS | {name: True})
    one = twin.generate(weights=weights[0], **inputs, **CALLS, return_dict_in_generate=True)
    assert one.past_key_values is not None


def test_one_weighting_is_merged_densely_where_enough_tokens_come(zoo):
    twin, inputs = load(zoo.artifact("llama", 3)), prompts_of("llama", rows=1)
    for new, ways in ((1, set()), (40, {"merged"})):
        assert (7 + new < twin.break_even) == (not ways)
        weights = weights_of(1, seed=new)
        got = twin.generate(weights=weights, **inputs, max_new_tokens=new, do_sample=False)
        assert (twin.planner.merged_bytes > 0) == bool(ways)
        twin.planner.forget()
        plain = twin.merged(weights[0])
        want = plain.generate(**inputs, max_new_tokens=new, do_sample=False)
        assert torch.equal(got, want)


def test_routing_in_the_pass_of_the_prompt_decides_as_a_pass_of_its_own(zoo, monkeypatch):
    # As if no expert touched the layers before the router's: both passes must then agree.
    for name in ("llama", "gpt2", "bart"):
        twin, inputs = routed_by_hand(load(zoo.artifact(name, 3)), layer=0), prompts_of(name)
        seen = []
        read = type(twin.features).read

        def counted(self, *given, read=read, seen=seen):
            seen.append(given)
            return read(self, *given)

        monkeypatch.setattr(type(twin.features), "read", counted)
        weights = twin.route(**inputs)
        assert len(seen) == 1
        beams = CALLS | {"num_beams": 2, "num_return_sequences": 2}
        for options in (CALLS, beams):
            asked = options | {"return_dict_in_generate": True}
            twin.untouched_layers = 0
            got = twin.generate(**inputs, **asked)
            assert len(seen) == 1  # nothing was read in a pass of its own
            tag = got.past_key_values._twinmerge_weights
            torch.testing.assert_close(tag[:: len(tag) // 3], weights)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ENCODED)
def test_what_an_encoder_gave_before_is_generated_from(name, zoo, monkeypatch):
    twin, inputs = routed_by_hand(load(zoo.artifact(name, 3)), layer=0), prompts_of(name)

    def encoded(routing: Routing) -> dict:  # anew each time: beams repeat its rows in place
        with routed(routing):
            return {"encoder_outputs": twin.model.get_encoder()(**inputs)}

    weights, mask = twin.route(**inputs), {"attention_mask": inputs["attention_mask"]}
    mixed = Routing(Mix(weights, (0, 1, 2)), None, 3)
    twin.untouched_layers = 0  # the router would read on the way, and nothing passes there
    for options in (CALLS, CALLS | {"num_beams": 2}):
        want = twin.generate(weights=weights, **inputs, **options)
        assert torch.equal(twin.generate(**inputs, **encoded(mixed), **options), want)
        got = twin.generate(weights=weights, **mask, **encoded(mixed), **options)
        assert torch.equal(got, want)
    with pytest.raises(InputError, match="expected a prompt .input_ids=. for the router to read"):
        twin.generate(**mask, **encoded(mixed), **CALLS)
    some = weights[[0, 1, 0]]
    want = twin.generate(weights=some, **inputs, **CALLS)
    monkeypatch.setattr(twin.planner, "mixes_rows", "for this test")
    given = encoded(Routing(Mix(some, (0, 1, 2)), None, 3))
    assert torch.equal(twin.generate(weights=some, **mask, **given, **CALLS), want)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}]
)
def test_a_function_of_allowed_tokens_is_told_the_rows_number(options, zoo, monkeypatch):
    twin, inputs = zoo.twin("llama", 3), prompts_of("llama", rows=4)
    each = options.get("num_return_sequences", 1)
    weights = weights_of(2)[[0, 1, 0, 1]]
    calls = CALLS | options | {"prefix_allowed_tokens_fn": lambda place, ids: [10 + place]}
    want = twin.generate(weights=weights, **inputs, **calls)
    assert want[:, -1].tolist() == [10 + place for place in range(4 * each)]
    monkeypatch.setattr(twin.planner, "mixes_rows", "for this test")
    assert torch.equal(twin.generate(weights=weights, **inputs, **calls), want)


def test_generation_splits_for_good_only_where_that_helps(zoo):
    twin, inputs = load(zoo.artifact("llama", 3)), prompts_of("llama")
    want = twin.generate(weights=weights_of(3), **inputs, **CALLS)
    problem: list[Exception] = [Ambiguous("the.layer: cannot tell")]

    def refuse(*_) -> None:
        if not current().mix.one:
            raise problem[0]

    twin.model.model.layers[1].register_forward_pre_hook(refuse)
    assert torch.equal(twin.generate(weights=weights_of(3), **inputs, **CALLS), want)
    assert twin.planner.mixes_rows is None
    problem[0] = NotRowWise("the.layer: seen late")
    streamer = SimpleNamespace(put=lambda tokens: None, end=lambda: None)
    with pytest.raises(InputError, match="streamer=: LlamaForCausalLM runs one weighting"):
        twin.generate(weights=weights_of(3), **inputs, **CALLS, streamer=streamer)
    assert twin.planner.mixes_rows is None
    assert torch.equal(twin.generate(weights=weights_of(3), **inputs, **CALLS), want)
    assert twin.planner.mixes_rows == "the.layer: seen late"


# ---------------------------------------------------------------------------- prompt caching


def with_prefix(name: str, rows: int = 3, length: int = 4):
    """A prefix of one row, and left-padded prompts of 1 to 3 further tokens.

    Models that attend to a window get prompts of 3 further tokens.
    """
    draw = torch.Generator().manual_seed(2)
    prefix = torch.randint(3, 40, (1, length), generator=draw)
    ids = torch.zeros(rows, length + 3, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index in range(rows):
        more = 3 if "sliding_window" in EVERY[name].sizes else 1 + index % 3
        own = torch.randint(3, 40, (more,), generator=draw)
        whole = torch.cat([prefix[0], own])
        ids[index, -len(whole) :], mask[index, -len(whole) :] = whole, 1
    return prefix, {"input_ids": ids, "attention_mask": mask}


PREFIXED = [*DECODERS, "mistral"]


@pytest.mark.parametrize("name", PREFIXED)
def test_a_cached_prefix_gives_the_tokens_of_whole_prompts(name, zoo):
    twin, weights = zoo.twin(name, 3), weights_of(1)[0]
    prefix, inputs = with_prefix(name)
    cached = twin.prefill(input_ids=prefix, weights=weights)
    before = copy.deepcopy(cached)
    assert len(cached) == 4 and torch.equal(cached.weights, weights[None])
    several = CALLS | {"num_beams": 3, "num_return_sequences": 2}
    for options in (CALLS, several, CALLS):
        want = twin.generate(weights=weights, **inputs, **options)
        assert torch.equal(twin.generate(prompt_cache=cached, **inputs, **options), want)
        plain = dense(zoo, name, weights).generate(**row_alone(inputs, 1), **options)
        assert torch.equal(want[len(want) // 3][-5:], plain[0, -5:])
    mine, then = cached.cache.layers[0], before.cache.layers[0]
    assert torch.equal(mine.keys, then.keys) and torch.equal(mine.values, then.values)


def row_alone(inputs, index):
    """One row without its padding."""
    kept = inputs["attention_mask"][index].bool()
    return {key: value[index : index + 1, kept] for key, value in inputs.items()}


def test_a_cached_prefix_is_not_run_again(zoo):
    twin, weights = load(zoo.artifact("llama", 3)), weights_of(1)[0]
    prefix, inputs = with_prefix("llama")
    cached = twin.prefill(input_ids=prefix, weights=weights)
    lengths = []
    twin.model.get_submodule("model.layers.0").register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    twin.generate(prompt_cache=cached, **inputs, **CALLS)
    assert lengths == [3, 1, 1, 1, 1]


def test_every_row_may_have_a_prefix_of_its_own(decoder, zoo):
    twin, inputs, weights = zoo.twin(decoder, 3), prompts_of(decoder), weights_of(3)
    cached = twin.prefill(**inputs, weights=weights)
    # The same prompts and two tokens more, padded further to the left.
    more = torch.randint(3, 40, (3, 2), generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(3, 1, dtype=torch.long)
    longer = {
        "input_ids": torch.cat([zeros, inputs["input_ids"], more], dim=1),
        "attention_mask": torch.cat(
            [zeros, inputs["attention_mask"], torch.ones_like(more)], dim=1
        ),
    }
    want = twin.generate(weights=weights, **longer, **CALLS)
    assert torch.equal(twin.generate(prompt_cache=cached, **longer, **CALLS), want)


def test_a_prompt_that_is_the_prefix_itself_runs_its_last_token_again(decoder, zoo):
    twin, weights = zoo.twin(decoder, 3), weights_of(1)[0]
    prefix, inputs = with_prefix(decoder)
    cached = twin.prefill(input_ids=prefix, weights=weights)
    want = twin.generate(prefix, weights=weights, **CALLS)
    assert torch.equal(twin.generate(prefix, prompt_cache=cached, **CALLS), want)
    alone = row_alone(inputs, 2)["input_ids"]
    pair = {
        "input_ids": torch.cat(
            [torch.cat([torch.zeros(1, 3, dtype=torch.long), prefix], 1), alone]
        ),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]),
    }
    want = twin.generate(weights=weights, **pair, **CALLS)
    assert torch.equal(twin.generate(prompt_cache=cached, **pair, **CALLS), want)


def test_a_prefix_is_routed_when_it_is_run_and_decides_for_all_that_follows(zoo):
    twin = routed_by_hand(load(zoo.artifact("llama", 3)))
    prefix, inputs = with_prefix("llama")
    cached = twin.prefill(input_ids=prefix)
    weights = twin.route(input_ids=prefix)
    torch.testing.assert_close(cached.weights, weights)
    want = twin.generate(weights=weights[0], **inputs, **CALLS)
    assert torch.equal(twin.generate(prompt_cache=cached, **inputs, **CALLS), want)


def test_a_prompt_cache_that_does_not_fit_is_refused_with_the_reason(zoo):
    twin, weights = zoo.twin("llama", 3), weights_of(1)[0]
    prefix, inputs = with_prefix("llama")
    cached = twin.prefill(input_ids=prefix, weights=weights)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    cases = [
        (other | CALLS, "row 0 does not begin with the 4 tokens of the prefix"),
        (inputs | {"weights": weights.flip(0)}, r"made with the weights \{math: .* asks for"),
        (inputs | {"task": "law"}, r"the call asks for \{law: 1\}"),
        (inputs | {"past_key_values": DynamicCache()}, "no past_key_values= or inputs_embeds="),
        ({"inputs_embeds": randn(1, 3, 16, seed=0)}, "expected whole prompts as input_ids="),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            twin.generate(prompt_cache=cached, **options)
    two = twin.prefill(input_ids=prefix.expand(2, -1), weights=weights)
    with pytest.raises(InputError, match="holds 2 rows, the prompts are 3"):
        twin.generate(prompt_cache=two, **inputs)
    with pytest.raises(InputError, match="an encoder reads a prompt as a whole"):
        zoo.twin("bart", 3).prefill(input_ids=prefix, task="law")
    with pytest.raises(InputError, match="MistralForCausalLM attends to a window of columns"):
        mistral = zoo.twin("mistral", 3)
        mistral.generate(prompt_cache=mistral.prefill(input_ids=prefix, weights=weights), **inputs)
    with pytest.raises(InputError, match="BertForSequenceClassification cannot generate"):
        zoo.twin("bert").prefill(input_ids=prefix, task="law")


def test_a_second_turn_keeps_the_weights_of_the_first(zoo):
    twin = routed_by_hand(load(zoo.artifact("llama", 3)))
    inputs = row(prompts_of("llama"), 0)
    weights = twin.route(**inputs)
    first = twin.generate(**inputs, **CALLS, return_dict_in_generate=True)
    asked = torch.cat([first.sequences, torch.tensor([[7, 9, 11]])], dim=1)
    assert not torch.allclose(twin.route(input_ids=asked), weights, atol=1e-3)
    want = twin.generate(asked, weights=weights, **CALLS)
    kept = copy.deepcopy(first.past_key_values)
    assert torch.equal(twin.generate(asked, past_key_values=first.past_key_values, **CALLS), want)
    again = twin.generate(asked, past_key_values=kept, weights=weights, **CALLS)
    assert torch.equal(again, want)


def test_a_cache_made_with_other_weights_is_refused(zoo):
    twin = routed_by_hand(load(zoo.artifact("llama", 3)))
    inputs = row(prompts_of("llama"), 0)
    first = twin.generate(task="math", **inputs, **CALLS, return_dict_in_generate=True)
    with pytest.raises(InputError, match=r"made with the weights \{math: 1\} in row 0, .*law: 1"):
        twin.generate(first.sequences, past_key_values=first.past_key_values, task="law", **CALLS)
    # Made by another model, or by the one inside: only the caller knows with what.
    foreign = zoo.made("llama").expert("math")(**inputs, use_cache=True).past_key_values
    longer = torch.cat([inputs["input_ids"], torch.tensor([[5]])], dim=1)
    with pytest.raises(InputError, match="what it was made with is not known"):
        twin.generate(longer, past_key_values=foreign, **CALLS)
    got = twin.generate(longer, past_key_values=foreign, task="math", **CALLS)
    assert got.shape == (1, 13)
    rows = twin.generate(
        **prompts_of("llama"), weights=weights_of(3), **CALLS, return_dict_in_generate=True
    )
    with pytest.raises(InputError, match="holds 3 rows, made of 3; the call has 2"):
        twin.generate(rows.sequences[:2], past_key_values=rows.past_key_values, **CALLS)


def test_a_cache_keeps_its_weights_whatever_becomes_of_the_callers(zoo):
    twin, inputs = zoo.twin("llama", 3), prompts_of("llama")
    weights = weights_of(3)
    cache = twin(**inputs, weights=weights, use_cache=True).past_key_values
    prefix = twin.prefill(**inputs, weights=weights)
    kept = weights.clone()
    weights.copy_(weights.flip(0))
    step = torch.full((3, 1), 5)
    with pytest.raises(InputError, match="the cache was made with the weights"):
        twin(input_ids=step, past_key_values=cache, weights=weights)
    assert prefix.weights.equal(kept)
    with pytest.raises(InputError, match="got what model.prefill.. made. Give it to generate"):
        twin(input_ids=step, past_key_values=prefix)


@torch.no_grad()
def test_weights_follow_the_rows_of_a_cache_that_are_moved(zoo):
    twin, inputs = zoo.twin("llama", 3), {"input_ids": torch.randint(3, 30, (3, 6))}
    weights = weights_of(3)
    cache = twin(**inputs, weights=weights, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    rows = order.repeat_interleave(2)[[5, 0, 2]]
    step = torch.tensor([[4], [5], [6]])
    got = twin(input_ids=step, past_key_values=cache)
    assert got.weights.equal(weights[rows])
    whole = twin(
        input_ids=torch.cat([inputs["input_ids"][rows], step], dim=1), weights=weights[rows]
    )
    torch.testing.assert_close(got.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guess", ["assistant_model", "prompt_lookup_num_tokens"])
def test_guessed_tokens_and_a_cache_that_is_brought_are_refused(guess, zoo):
    """transformers gives other greedy tokens with both than without the cache."""
    twin, inputs = zoo.twin("llama", 3), row(prompts_of("llama"), 0)
    value = 2 if guess == "prompt_lookup_num_tokens" else twin.merged({"math": 1.0})
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5]])], dim=1)
    prefix = twin.prefill(task="math", **inputs)
    for brought in ({"prompt_cache": prefix}, {"past_key_values": copy.deepcopy(prefix.cache)}):
        with pytest.raises(InputError, match=f"{guess}= with {next(iter(brought))}=: transformers"):
            twin.generate(ids, **{guess: value}, **brought, **CALLS)


def test_a_recurrent_state_carries_its_weights_too(tmp_path):
    config = dict(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    mamba = Family(tf.MambaForCausalLM, tf.MambaForCausalLM, tf.MambaConfig, config)
    models = made(mamba, tmp_path)
    merge(models.base, models.experts, tmp_path / "out")
    twin, ids = load(tmp_path / "out"), torch.randint(3, 30, (2, 5))
    state = twin(input_ids=ids, task="math", use_cache=True).cache_params
    with pytest.raises(InputError, match=r"made with the weights \{math: 1\} in row 0"):
        twin(input_ids=ids[:, :1], cache_params=state, task="law")
    with pytest.raises(InputError, match="the call asks for"):
        twin(input_ids=ids[:, :1], cache_params=state, past_key_values=None, task="law")
    with pytest.raises(InputError, match="the call asks for"):
        twin.generate(ids, cache_params=state, task="law", max_new_tokens=2)
    mixed = copy.deepcopy(state)
    tag(twin, mixed, torch.eye(3)[:2])
    with pytest.raises(InputError, match="cannot be cut"):
        twin(input_ids=ids[:, :1], cache_params=mixed, plan="split")
    got = twin(input_ids=ids[:, :1], cache_params=state)
    assert got.weights[:, 0].tolist() == [1, 1]
    with pytest.raises(InputError, match="mems=: is valid for the weights that it was made with"):
        twin(input_ids=ids, mems=[torch.zeros(1)], task="math")


def test_a_cache_of_another_artifact_or_dtype_is_refused(zoo):
    """Of the same names, base and weights: only what the experts are differs."""
    one, other = load(zoo.artifact("llama", 3)), load(zoo.artifact("llama"))
    inputs = row(prompts_of("llama"), 0)
    prefix = one.prefill(task="math", **inputs)
    asked = torch.cat([inputs["input_ids"], torch.tensor([[5]])], dim=1)
    assert one.generate(asked, prompt_cache=prefix, **CALLS).shape == (1, 13)
    assert load(one.folder).generate(asked, prompt_cache=prefix, **CALLS).shape == (1, 13)
    with pytest.raises(InputError, match="prompt_cache=: was made by a model of another artifact"):
        other.generate(asked, prompt_cache=prefix, **CALLS)
    for call in (other, other.generate):
        cache = copy.deepcopy(prefix.cache)
        with pytest.raises(InputError, match="past_key_values=: was made by a model of another"):
            call(input_ids=asked, past_key_values=cache, task="math")
    with pytest.raises(InputError, match="was made in torch.float32, this model runs in torch.bf"):
        load(one.folder, dtype="bfloat16").generate(asked, prompt_cache=prefix, **CALLS)


def test_a_forward_with_a_cache_runs_with_the_weights_that_made_it(zoo):
    twin = routed_by_hand(load(zoo.artifact("llama", 3)))
    inputs = prompts_of("llama")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.tensor([[5], [6], [7]])
    longer = {"attention_mask": torch.cat([mask, torch.ones_like(more)], dim=1)}
    places = {"position_ids": longer["attention_mask"].cumsum(1) - 1}
    first = twin(input_ids=ids, attention_mask=mask, position_ids=places["position_ids"][:, :-1])
    assert first.weights is not None
    next_ = {"input_ids": more, "position_ids": places["position_ids"][:, -1:]} | longer
    kept = copy.deepcopy(first.model_output.past_key_values)
    got = twin(**next_, past_key_values=first.model_output.past_key_values)
    assert torch.equal(got.weights, first.weights)
    whole = twin(input_ids=torch.cat([ids, more], dim=1), weights=first.weights, **longer, **places)
    torch.testing.assert_close(got.logits[:, 0], whole.logits[:, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="A cache is valid for the weights that it was made with"):
        twin(**next_, past_key_values=kept, task="law")


def test_what_is_dropped_holds_for_the_cache_too(zoo):
    twin, inputs, weights = zoo.twin("llama", 3), prompts_of("llama"), weights_of(3)
    more = {"input_ids": torch.tensor([[5], [6], [7]])}
    plain = twin(weights=weights, use_cache=True, input_ids=inputs["input_ids"])
    for options in ({"top_k": 1}, {"threshold": 0.5}):
        with pytest.raises(InputError, match="A cache is valid for the weights that it was made"):
            twin(**more, past_key_values=plain.past_key_values, **options)
        first = twin(weights=weights, input_ids=inputs["input_ids"], use_cache=True, **options)
        kept = copy.deepcopy(first.past_key_values)
        again = twin(**more, past_key_values=first.past_key_values, weights=weights, **options)
        assert torch.equal(again.weights, first.weights)
        assert torch.equal(again.dropped, first.dropped)
        rest = twin(**more, past_key_values=copy.deepcopy(kept))
        told = twin(**more, past_key_values=kept, **options)
        assert torch.equal(again.logits, rest.logits) and torch.equal(told.logits, rest.logits)
        assert torch.equal(rest.weights, first.weights) and not told.dropped.any()


# --------------------------------------------------------------------------- answers of `run`


def test_run_answers_with_an_encoder_decoder_as_its_expert_does(tmp_path):
    sizes = EVERY["bart"].sizes | {"vocab_size": 43, "max_position_embeddings": 40}
    bench = TextBench(tmp_path, dataclasses.replace(EVERY["bart"], sizes=sizes))
    made = bench.made
    save_tokenizer(made.base)  # marks at both ends, as BART has them
    merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": "full"})
    twin, expert = load(tmp_path / "out"), made.expert("code")
    texts = [("code1 the2 code3",), ("law1",), ("math1 math2 the3 the4",)]
    results = list(answer_texts(twin, texts, task="code", max_new_tokens=6))
    for text, result in zip(texts, results, strict=True):
        inputs = twin.tokenizer(*text, return_tensors="pt", return_token_type_ids=False)
        want = expert.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = twin.tokenizer.decode(want[0], skip_special_tokens=True)
        assert result["answer"] == said and result["expert"] == "code"
    assert len({result["answer"] for result in results}) > 1


# ----------------------------------------------------------------------------------------- chats

TEMPLATE = (
    "{% for m in messages %}{{ '' if m.role == 'assistant' else '[CLS] ' }}{{ m.content }}"
    "{{ ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}{{ '[CLS]' }}{% endif %}"
)


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    begin = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return begin + [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.fixture
def chatty(causal_bench):
    """The routed bench model, whose tokenizer has a template for the time of a test."""
    tokenizer = causal_bench.model.tokenizer
    tokenizer.chat_template = TEMPLATE
    yield causal_bench.model
    tokenizer.chat_template = None


def test_a_chat_ends_with_what_is_to_be_answered():
    chat = chat_of(turns("math1", "the1", "math2", "the2"))
    assert [message["content"] for message in chat.messages] == ["math1", "the1", "math2"]
    assert text_of({"messages": turns("math1"), "text": "not this"}) == Chat(
        ({"role": "user", "content": "math1"},)
    )
    assert text_of({"messages": turns("math1"), "text": "this"}, ["text"]) == ("this",)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hello"], r"messages\[0\]: expected an object such as .*got 'hello'"),
        ([{"role": "user"}], r"messages\[0\]: .*got \{'role': 'user'\}"),
        ([{"content": "x"}], r"messages\[0\]"),
        ([{"role": "assistant", "content": "x"}], "got 1 from the assistant alone"),
        ([], "expected a message to answer, got 0"),
    ],
)
def test_messages_that_are_no_chat_are_refused_with_an_example(messages, message):
    with pytest.raises(InputError, match=message):
        chat_of(messages)


def test_a_chat_is_encoded_by_the_tokenizers_template(chatty):
    tokenizer, messages = chatty.tokenizer, turns("math1 math2", "the1", "code1")
    encoded = encode(tokenizer, [("law1",), chat_of(messages)], 40)
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encoded.rows[1]["input_ids"] == want and encoded.cut == [False, False]
    assert tokenizer.decode(want) == "[CLS] math1 math2 [SEP] the1 [SEP] [CLS] code1 [SEP] [CLS]"
    assert encoded.rows[0]["input_ids"] == tokenizer("law1")["input_ids"]


def test_a_long_chat_loses_its_oldest_turns_and_never_the_last(chatty):
    tokenizer = chatty.tokenizer
    chat = chat_of(turns("math1 math2", "the1", "code1", system="law1"))
    encoded = encode(tokenizer, [chat], 7)
    said = tokenizer.decode(encoded.rows[0]["input_ids"])
    assert encoded.cut == [True] and said == "[CLS] law1 [SEP] [CLS] code1 [SEP] [CLS]"
    with pytest.raises(InputError, match="the last turn of a chat alone has 7 tokens"):
        encode(tokenizer, [chat], 6)


def test_a_chat_without_a_template_is_refused(causal_bench):
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        encode(causal_bench.model.tokenizer, [chat_of(turns("math1"))], 40)


def test_chats_are_routed_and_answered_as_their_template_says(chatty):
    chats = [chat_of(turns("math1 math2 math3")), chat_of(turns("code1 code2", "the1", "code3"))]
    results = list(answer_texts(chatty, chats, max_new_tokens=4))
    tokenizer = chatty.tokenizer
    for chat, result in zip(chats, results, strict=True):
        inputs = tokenizer.apply_chat_template(
            list(chat.messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        weights = chatty.route(**inputs)[0]
        assert result["expert"] == chatty.experts[int(weights.argmax())]
        assert result["weight"] == pytest.approx(float(weights.max()), abs=1e-3)
        tokens = chatty.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert result["answer"] == tokenizer.decode(new, skip_special_tokens=True)
    assert results[0]["weights"] != results[1]["weights"]


def test_run_answers_rows_of_messages_and_gives_them_back(causal_bench, tmp_path, capsys):
    folder = tmp_path / "chats"
    shutil.copytree(causal_bench.routed, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"id": 1, "messages": turns("math1 math2")}, {"text": "law1 law2"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.app(["run", str(folder), str(lines), "--max-new-tokens", "3", "-q"], standalone_mode=False)
    got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = load(folder)
    wants = list(answer_texts(model, [text_of(row) for row in rows], max_new_tokens=3))
    assert got == [row | want for row, want in zip(rows, wants, strict=True)]


@pytest.mark.parametrize("kind", ["prototype", "mlp"])
def test_a_router_can_be_fitted_on_chats(kind, causal_bench, tmp_path):
    folder = tmp_path / "chats"
    shutil.copytree(causal_bench.plain, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    mlp = dict(epochs=25, hidden=24, batch_size=16, learning_rate=0.01, dropout=0.1)
    settings = Router(kind=kind, **mlp)
    chats = {
        name: [chat_of(turns(" ".join(text))) for text in sentences(name, 20)] for name in EXPERTS
    }
    assert fit_router(folder, chats, settings).held_out_accuracy > 0.8


def built_with(causal_bench, folder: Path, base: str | None, experts: list[str | None]):
    """An artifact of copies of the bench's checkpoints with these chat templates."""
    made = causal_bench.made
    folders = {"base": made.base, **made.experts}
    for (name, source), template in zip(folders.items(), [base, *experts], strict=True):
        shutil.copytree(source, folder / name)
        if template is not None:
            (folder / name / "chat_template.jinja").write_text(template)
    copies = {name: str(folder / name) for name in made.experts}
    return merge(str(folder / "base"), copies, folder / "out")


@pytest.mark.parametrize(
    ("base", "experts", "kept", "warned"),
    [
        ("A", ["A", "A", None], "A", []),
        ("A", ["A", "B", None], "A", ["expert 'code': its chat template is another"]),
        (None, ["B", "B", None], "B", []),
        (None, ["A", "B", None], None, ["the experts math, code have different chat templates"]),
        (None, [None] * 3, None, []),
    ],
)
def test_the_bases_chat_template_is_kept_else_the_one_of_the_experts(
    base, experts, kept, warned, causal_bench, tmp_path
):
    manifest = built_with(causal_bench, tmp_path, base, experts)
    twin = load(tmp_path / "out")  # digests are those of the files
    assert twin.tokenizer.chat_template == kept
    told = [warning for warning in manifest.warnings if "chat template" in warning]
    assert len(told) == len(warned)
    assert all(said.startswith(want) for said, want in zip(told, warned, strict=True))


def test_a_chat_template_inside_the_tokenizers_configuration_counts(causal_bench, tmp_path):
    for name, template in (("base", "A"), ("other", [{"name": "default", "template": "B"}])):
        (tmp_path / name).mkdir()
        config = json.dumps({"chat_template": template})
        (tmp_path / name / "tokenizer_config.json").write_text(config)
    assert _chat_template(tmp_path / "base") == "A" and _chat_template(tmp_path / "other") == "B"
    assert _chat_template(tmp_path) is None


def test_the_families_that_generate_here_are_those_that_the_conformance_suite_knows():
    assert set(DECODERS) <= set(FAMILIES) and set(ENCODED) <= set(EVERY)
