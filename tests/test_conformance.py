"""The seven invariants of the design, on every architecture of `tiny.FAMILIES`.

A family joins by its entry there. Everything is compared with transformers' own models: an
expert's folder as `from_pretrained` opens it, or a checkpoint merged densely by the test from the
artifact's files alone.
"""

from __future__ import annotations

import dataclasses
import filecmp
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import randn
from tiny import (
    BERT,
    EXPERTS,
    FAMILIES,
    Family,
    adapter,
    batch_of,
    inherit,
    made,
    merge,
    merged_folder,
    row,
)

from twinmerge.errors import InputError, RouterError, UnsupportedModel
from twinmerge.runtime.heads import HeadSwitch
from twinmerge.runtime.load import load
from twinmerge.runtime.router.mlp import RouterMLP

ALL = sorted(FAMILIES)
CAUSAL = sorted(name for name, family in FAMILIES.items() if family.causal)
CALLS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=ALL)
def name(request) -> str:
    return request.param


@pytest.fixture(params=CAUSAL)
def causal(request) -> str:
    return request.param


def weights_of(rows: int, seed: int = 0) -> torch.Tensor:
    """Soft weights, other ones in every row."""
    return (2 * randn(rows, len(EXPERTS), seed=seed)).softmax(dim=-1)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest output."""
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


def seen(logits: torch.Tensor, inputs: dict, index: int) -> torch.Tensor:
    """One row's logits, where they mean something: not at padded positions."""
    mask = inputs.get("attention_mask")
    return logits[index] if logits.ndim < 3 or mask is None else logits[index][mask[index].bool()]


def pads(name: str) -> list[str]:
    return ["none"] if FAMILIES[name].image else ["right", "left"]


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    _, differing, errors = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not differing and not errors


# --------------------------------------------------------------------------- 1: one expert


def test_all_weight_on_one_expert_gives_that_experts_own_outputs(name, zoo):
    made, twin = zoo.made(name), zoo.twin(name)
    for pad in pads(name):
        inputs = batch_of(made.family, pad=pad)
        for expert in EXPERTS:
            want = made.expert(expert)(**inputs).logits
            got = twin(task=expert, **inputs)
            for index in range(4):
                assert_close(seen(got.logits, inputs, index), seen(want, inputs, index))
            assert got.expert.tolist() == [EXPERTS.index(expert)] * 4


def test_a_batch_of_several_tasks_gives_every_row_its_own_experts_output(name, zoo):
    made, twin = zoo.made(name), zoo.twin(name)
    inputs = batch_of(made.family)
    tasks = [EXPERTS[index] for index in (2, 0, 1, 0)]
    output = twin(task=tasks, **inputs)
    for index, expert in enumerate(tasks):
        want = seen(made.expert(expert)(**inputs).logits, inputs, index)
        got = seen(output.logits, inputs, index)
        assert_close(got[..., : want.shape[-1]], want)
        assert torch.isneginf(got[..., want.shape[-1] :]).all()


# ----------------------------------------------------------------------- 2: rows and dense


@pytest.mark.parametrize("rank", ["full", 3])
def test_a_mixed_batch_is_its_rows_one_by_one_and_the_densely_merged_model(name, rank, zoo):
    made, twin = zoo.made(name), zoo.twin(name, rank)
    weights, heads = weights_of(4), [EXPERTS[index] for index in (1, 0, 2, 1)]
    for pad in pads(name):
        inputs = batch_of(made.family, pad=pad)
        output = twin(weights=weights, head=heads, **inputs)
        assert torch.equal(output.weights, weights)
        for index, head in enumerate(heads):
            one = row(inputs, index)
            alone = twin(weights=weights[index], head=head, **one).logits
            dense = zoo.plain(name, rank, weights[index].tolist(), head)(**one).logits
            want = seen(dense, one, 0)
            assert_close(seen(alone, one, 0), want)
            assert_close(seen(output.logits, inputs, index)[..., : want.shape[-1]], want)


def test_weights_need_not_sum_to_one_nor_be_positive(name, zoo):
    made, twin = zoo.made(name), zoo.twin(name)
    weights = [0.7, -0.4, 1.1]
    inputs = batch_of(made.family, rows=2)
    want = zoo.plain(name, "full", weights, "code")(**inputs).logits
    got = twin(weights=weights, head="code", **inputs).logits
    for index in range(2):
        assert_close(seen(got, inputs, index), seen(want, inputs, index))


# ------------------------------------------------------------------------ 3: zero weights


def test_zero_weights_give_the_shared_expert_exactly(name, zoo):
    made, twin = zoo.made(name), zoo.twin(name)
    inputs = batch_of(made.family)
    want = zoo.plain(name, "full", [0.0] * 3, "math")(**inputs).logits
    got = twin(weights=torch.zeros(4, 3), head="math", **inputs)
    assert torch.equal(got.logits, want)
    weights = weights_of(4)
    weights[1] = 0
    mixed = twin(weights=weights, head="math", **inputs).logits
    assert_close(seen(mixed, inputs, 1), seen(want, inputs, 1), tolerance=1e-6)


def test_a_static_merge_has_no_factors_and_gives_the_shared_expert_for_any_weights(name, zoo):
    made, twin = zoo.made(name), zoo.twin(name, "none")
    inputs = batch_of(made.family)
    want = zoo.plain(name, "none", [0.0] * 3, "law")(**inputs).logits
    assert torch.equal(twin(weights=weights_of(4), head="law", **inputs).logits, want)
    assert all(not record.rank for t in twin.manifest.tensors for record in t.experts.values())


# ----------------------------------------------------------------------------- 4: adapters

LORA = {
    "bert": [
        dict(target_modules=["query", "value"], r=2, lora_alpha=8, task_type="SEQ_CLS"),
        dict(target_modules=["query", "dense"], r=1, use_rslora=True, task_type="SEQ_CLS"),
        dict(target_modules=["value"], r=3, bias="all", task_type="SEQ_CLS"),
    ],
    "llama": [
        dict(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=8, task_type="CAUSAL_LM"),
        dict(target_modules="all-linear", r=1, use_rslora=True, task_type="CAUSAL_LM"),
        dict(target_modules=["embed_tokens", "lm_head"], r=3, task_type="CAUSAL_LM"),
    ],
}


@pytest.mark.parametrize("name", sorted(LORA))
def test_a_lora_expert_gives_what_its_merged_full_checkpoint_gives(name, zoo, tmp_path):
    made, adapters = zoo.made(name), {}
    base = made.family.base.from_pretrained(made.base)
    for index, (expert, lora) in enumerate(zip(EXPERTS, LORA[name], strict=True)):
        heads = {"num_labels": made.family.heads[index]} if made.family.heads else {}
        model = made.family.task(made.family.config(**made.family.sizes | heads))
        inherit(model, base)
        adapters[expert] = adapter(model, tmp_path / expert, seed=expert, **lora)
    full = {expert: merged_folder(folder) for expert, folder in adapters.items()}
    merge(made.base, adapters, tmp_path / "from-adapters", exclusive={"rank": "full"})
    merge(made.base, full, tmp_path / "from-full", exclusive={"rank": "full"})
    one, other = load(tmp_path / "from-adapters"), load(tmp_path / "from-full")
    inputs = batch_of(made.family)
    experts = dataclasses.replace(made, experts=full)
    for expert in EXPERTS:
        want = experts.expert(expert)(**inputs).logits
        for twin in (one, other):
            got = twin(task=expert, **inputs).logits
            for index in range(4):
                assert_close(seen(got, inputs, index), seen(want, inputs, index))
    weights = weights_of(4)
    got = one(weights=weights, head="math", **inputs).logits
    want = other(weights=weights, head="math", **inputs).logits
    for index in range(4):
        assert_close(seen(got, inputs, index), seen(want, inputs, index))


# ------------------------------------------------------------------------- 5: reproducible


def test_loading_twice_gives_equal_bits_and_building_twice_equal_bytes(name, zoo, tmp_path):
    made, first = zoo.made(name), zoo.artifact(name, 3)
    merge(made.base, made.experts, tmp_path / "again", exclusive={"rank": 3})
    assert_same_files(first, tmp_path / "again")
    inputs = batch_of(made.family)
    calls = dict(weights=weights_of(4), head="code", **inputs)
    one = zoo.twin(name, 3)(**calls).logits
    other = load(tmp_path / "again")(**calls).logits
    assert torch.equal(one, other) and not torch.isnan(one).any()


# --------------------------------------------------------------------------- 7: generation


def left_padded(name: str, rows: int = 3):
    return batch_of(FAMILIES[name], rows=rows, pad="left", seed=5)


def test_greedy_tokens_are_those_of_the_densely_merged_model(causal, zoo):
    twin, inputs, weights = zoo.twin(causal, 3), left_padded(causal), weights_of(3)
    got = twin.generate(weights=weights, **inputs, **CALLS)
    assert got.shape == (3, 12)
    for index in range(3):
        dense = zoo.plain(causal, 3, weights[index].tolist(), "math")
        assert torch.equal(got[index : index + 1], dense.generate(**row(inputs, index), **CALLS))


def test_beams_and_several_sequences_keep_each_rows_own_weights(causal, zoo):
    twin, inputs, weights = zoo.twin(causal, 3), left_padded(causal), weights_of(3)
    beams = CALLS | dict(num_beams=3, num_return_sequences=2)
    # With one candidate left, sampling is greedy, so every sample is known.
    samples = CALLS | dict(do_sample=True, top_k=1, num_return_sequences=2)
    for options in (beams, samples):
        got = twin.generate(weights=weights, **inputs, **options).view(3, 2, -1)
        for index in range(3):
            dense = zoo.plain(causal, 3, weights[index].tolist(), "math")
            want = dense.generate(**row(inputs, index), **options)
            assert torch.equal(got[index], want)


def test_sampling_with_a_seed_gives_what_the_densely_merged_model_samples(causal, zoo):
    twin, inputs, weights = zoo.twin(causal, 3), left_padded(causal), [0.2, 0.5, 0.3]
    options = CALLS | dict(do_sample=True, top_k=0, num_return_sequences=2)
    results = []
    for model in (twin, zoo.plain(causal, 3, weights, "math")):
        torch.manual_seed(1)
        own = {"weights": weights} if model is twin else {}
        results.append(model.generate(**own, **inputs, **options))
    assert torch.equal(*results)


def routed_by_hand(twin, layer: int = 1):
    """A twin with a small random router: no data is needed to test what routing does."""
    torch.manual_seed(0)
    router = RouterMLP(16, 8, len(EXPERTS)).eval()
    with torch.no_grad():
        router.layers[-1].weight.mul_(20)  # so that rows are told apart
    twin.router, twin.router_layer = router, layer
    return twin


def test_generation_routes_once_and_padding_and_batch_order_change_nothing(
    causal, zoo, monkeypatch
):
    twin = routed_by_hand(load(zoo.artifact(causal, 3)))
    inputs, routes = left_padded(causal), []
    route = type(twin).route

    def counted(self, **prompt):
        routes.append(route(self, **prompt))
        return routes[-1]

    monkeypatch.setattr(type(twin), "route", counted)
    together = twin.generate(**inputs, **CALLS)
    assert len(routes) == 1 and not torch.allclose(routes[0][0], routes[0][1], atol=1e-2)

    turned = {key: value.flip(0) for key, value in inputs.items()}
    assert torch.equal(twin.generate(**turned, **CALLS), together.flip(0))
    for index in range(3):
        alone = row(inputs, index)
        bare = {key: value[alone["attention_mask"].bool()][None] for key, value in alone.items()}
        torch.testing.assert_close(twin.route(**bare), routes[0][index : index + 1])
        tokens = twin.generate(**bare, **CALLS)
        assert torch.equal(tokens[0, -5:], together[index, -5:])
        del bare["attention_mask"]
        assert torch.equal(twin.generate(**bare, **CALLS), tokens)


def test_generation_with_a_router_runs_with_the_weights_of_the_prompt(causal, zoo):
    twin = routed_by_hand(load(zoo.artifact(causal, 3)))
    inputs = left_padded(causal)
    weights = twin.route(**inputs)
    want = twin.generate(weights=weights, **inputs, **CALLS)
    assert torch.equal(twin.generate(**inputs, **CALLS), want)
    one_expert = twin.generate(task="code", **inputs, **CALLS)
    assert torch.equal(one_expert, twin.generate(weights={"code": 1.0}, **inputs, **CALLS))


# ---------------------------------------------------------------------------- being routed


def test_without_weights_the_router_decides_weights_and_head(name, zoo):
    family = FAMILIES[name]
    twin = routed_by_hand(load(zoo.artifact(name)), layer=2)
    inputs = batch_of(family, rows=6)
    output, weights = twin(**inputs), twin.route(**inputs)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert torch.equal(output.weights, weights)
    assert torch.equal(output.expert, weights.argmax(dim=1))
    heads = [EXPERTS[index] for index in output.expert]
    assert torch.equal(output.logits, twin(weights=weights, head=heads, **inputs).logits)


def test_the_router_reads_hidden_states_of_the_shared_expert_at_every_layer(name, zoo):
    family, twin = FAMILIES[name], zoo.twin(name)
    shared = zoo.plain(name, "full", [0.0] * 3, "math")
    inputs = batch_of(family, pad="right")
    states = shared(**inputs, output_hidden_states=True).hidden_states
    with_weights_in_force = twin.features.read(inputs, [0, 1, 2])
    for layer in (0, 1):  # the last one transformers gives after the final norm
        hidden = states[layer]
        mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None]
        want = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(with_weights_in_force[layer], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"router layer 3: this model has layers 0 .* to 2"):
        twin.features.read(inputs, [3])


def test_rows_go_to_the_head_of_their_highest_weight(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"], rows=3)
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.3, 0.4, 0.3]])
    output = twin(weights=weights, **inputs)
    assert output.expert.tolist() == [2, 0, 1]
    assert torch.isfinite(output.logits).sum(dim=1).tolist() == [1, 2, 3]
    assert output.logits.softmax(dim=1).sum(dim=1).allclose(torch.ones(3))


def test_answers_name_the_expert_and_its_own_label(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"], rows=3)
    output = twin(task=["code", "law", "math"], **inputs)
    answers = twin.answers(output)
    assert [answer.expert for answer in answers] == ["code", "law", "math"]
    assert [answer.weight for answer in answers] == [1.0, 1.0, 1.0]
    assert twin.labels == {
        "math": ["LABEL_0", "LABEL_1"],
        "code": ["LABEL_0", "LABEL_1", "LABEL_2"],
        "law": None,
    }
    best = int(output.logits[0].argmax())
    assert answers[0].label == f"LABEL_{best}"
    assert answers[0].score == pytest.approx(float(output.logits[0].softmax(0)[best]), rel=1e-5)
    assert answers[1].label is None and answers[1].score == float(output.logits[1, 0])


def test_answers_in_words_exist_for_one_answer_per_row_only(zoo, tmp_path):
    twin = zoo.twin("bert tokens")
    output = twin(**batch_of(FAMILIES["bert tokens"]), task="math")
    with pytest.raises(InputError, match=r"\(batch, class\), but BertForTokenClassification gave"):
        twin.answers(output)
    headless = Family(tf.BertModel, tf.BertModel, tf.BertConfig, BERT)
    models = made(headless, tmp_path)
    merge(models.base, models.experts, tmp_path / "out")
    twin = load(tmp_path / "out")
    with pytest.raises(InputError, match=r"but BertModel gave no logits.*read output.logits"):
        twin.answers(twin(**batch_of(headless), task="math"))


def test_the_models_inside_keep_no_memory_of_a_routing(zoo):
    twin, inputs = zoo.twin("llama"), batch_of(FAMILIES["llama"])
    before = twin(weights=torch.zeros(3), **inputs).logits
    twin(task="math", **inputs)
    with pytest.raises(IndexError):
        twin(task="math", input_ids=torch.full((1, 3), 999))  # fails midway
    assert torch.equal(twin.model(**inputs).logits, before)


# ------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(task="mth"), "task='mth': no such expert. Did you mean 'math'. Known: math, code"),
        (dict(task="x"), "task='x': no such expert. Known: math, code, law"),
        (dict(task=["math"]), "task=: expected one name or 4 of them, got 1"),
        (dict(task="math", weights=[1, 0, 0]), "give task= or weights=, not both"),
        (dict(weights=[1.0, 0.0]), r"weights=: expected shape \(4, 3\) .*got \(4, 2\).*math, code"),
        (dict(weights=torch.ones(3, 3)), r"weights=: expected shape \(4, 3\).*got \(3, 3\)"),
        (dict(weights=[float("nan"), 0, 1]), "weights=: expected finite numbers, got NaN"),
        (dict(weights=[float("inf"), 0, 1]), "weights=: expected finite numbers, got NaN or inf"),
        (dict(weights={"mth": 1.0}), "weights='mth': no such expert. Did you mean 'math'"),
        (dict(weights=[0, 0, 0]), "weights: row 0 is all zero .* head= one of .'math', 'code'"),
        (dict(weights=[1, 0, 0], head="lw"), "head='lw': no such expert. Did you mean 'law'"),
        (dict(task="math", labels=torch.zeros(4)), "labels=: no loss is defined over rows with"),
    ],
)
def test_wrong_arguments_are_told_with_what_was_expected(arguments, message, zoo):
    inputs = batch_of(FAMILIES["bert"])
    with pytest.raises(InputError, match=message):
        zoo.twin("bert")(**arguments, **inputs)


def test_missing_inputs_and_a_missing_router_are_told_with_the_way_out(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"])
    with pytest.raises(InputError, match="expected input_ids.*got attention_mask.*Tokenize text"):
        twin(task="math", attention_mask=inputs["attention_mask"])
    with pytest.raises(InputError, match="got nothing"):
        twin(task="math")
    with pytest.raises(RouterError, match="has no router yet.*fit-router.*task= or weights="):
        twin(**inputs)
    with pytest.raises(InputError, match="BertForSequenceClassification cannot generate"):
        twin.generate(task="math", **inputs)
    with pytest.raises(InputError, match="no head was chosen"):
        twin.model(**inputs)


def test_one_vector_or_one_mapping_of_weights_serves_all_rows(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"])
    want = twin(weights=torch.tensor([[0.25, 0.0, 0.75]] * 4), **inputs)
    for weights in ([0.25, 0, 0.75], torch.tensor([0.25, 0, 0.75]), {"law": 0.75, "math": 0.25}):
        got = twin(weights=weights, **inputs)
        assert torch.equal(got.logits, want.logits) and torch.equal(got.weights, want.weights)


def test_heads_stand_where_the_experts_heads_stood(zoo):
    switches = {
        name: sorted(
            p for p, m in zoo.twin(name).model.named_modules() if isinstance(m, HeadSwitch)
        )
        for name in ALL
    }
    want = {
        "bert": ["classifier"],
        "bert tokens": ["classifier"],
        "roberta": ["classifier"],
        "distilbert": ["classifier", "pre_classifier"],
        "vit": ["classifier"],
        "llama classifier": ["score"],
    }
    assert switches == {name: want.get(name, []) for name in ALL}


def test_a_model_that_mixes_rows_is_refused_by_the_name_of_its_layer(zoo, tmp_path):
    twin = zoo.twin("bert")
    layer = twin.model.bert.encoder.layer[0].attention.self.query
    from twinmerge.runtime.routing import Routing, routed

    with routed(Routing(torch.ones(4, 3), None)):
        with pytest.raises(UnsupportedModel, match=r"query: expected a first axis of 4 rows"):
            layer(torch.zeros(12, 16))


def test_a_model_without_a_list_of_blocks_runs_with_given_weights(tmp_path):
    # ALBERT runs one block several times: nothing to read features from.
    sizes = BERT | dict(embedding_size=8)
    albert = Family(
        tf.AlbertModel, tf.AlbertForSequenceClassification, tf.AlbertConfig, sizes, heads=(2, 3, 1)
    )
    made_ = made(albert, tmp_path)
    merge(made_.base, made_.experts, tmp_path / "out", exclusive={"rank": "full"})
    twin, inputs = load(tmp_path / "out"), batch_of(albert)
    assert_close(twin(task="code", **inputs).logits, made_.expert("code")(**inputs).logits)
    with pytest.raises(
        UnsupportedModel, match="found no list of .2. blocks .* Give weights= or ta"
    ):
        twin.features.read(inputs, [0])


def test_an_expert_layer_that_mixes_rows_is_refused_at_load(tmp_path):
    # MPNet looks up one table of relative positions for all rows. Run with as many rows as tokens,
    # its axes would pass for the batch: only a dry run of unequal sizes tells.
    mpnet = Family(
        tf.MPNetModel, tf.MPNetForSequenceClassification, tf.MPNetConfig, BERT, heads=(2, 3, 1)
    )
    made_ = made(mpnet, tmp_path)
    merge(made_.base, made_.experts, tmp_path / "out")
    with pytest.raises(
        UnsupportedModel, match=r"relative_attention_bias: expected .* got \(5, 5\)"
    ):
        load(tmp_path / "out")


def test_an_encoder_decoder_with_relative_positions_is_refused_at_load(tmp_path):
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    marks = dict(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    t5 = Family(
        tf.T5Model, tf.T5ForSequenceClassification, tf.T5Config, sizes | marks, heads=(2, 3, 1)
    )
    made_ = made(t5, tmp_path)
    merge(made_.base, made_.experts, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="relative_attention_bias: expected a first axis"):
        load(tmp_path / "out")


def test_weights_that_the_live_model_fuses_are_refused_by_name(tmp_path):
    sizes = FAMILIES["llama"].sizes | {"num_local_experts": 2}
    mixtral = Family(tf.MixtralForCausalLM, tf.MixtralForCausalLM, tf.MixtralConfig, sizes)
    made_ = made(mixtral, tmp_path)
    merge(made_.base, made_.experts, tmp_path / "out")
    with pytest.raises(
        UnsupportedModel, match="experts.0.w1.weight: the experts differ in it, but M"
    ):
        load(tmp_path / "out")


def test_two_experts_of_one_class_are_served_as_well_as_three(tmp_path):
    pair = made(FAMILIES["bert"], tmp_path, experts=("one", "two"))
    merge(pair.base, pair.experts, tmp_path / "out", exclusive={"rank": "full"})
    inputs = batch_of(pair.family)
    got = load(tmp_path / "out")(task="two", **inputs).logits
    assert_close(got, pair.expert("two")(**inputs).logits)


def test_a_merged_model_has_the_labels_of_its_own_head(zoo):
    twin = zoo.twin("bert")
    for name, outputs in zip(twin.experts, (2, 3, 1), strict=True):
        config = twin.merged({name: 1.0}).config
        assert config.num_labels == outputs
        assert list(config.id2label.values()) == (twin.labels[name] or ["LABEL_0"])


def test_a_decoder_that_classifies_answers_alike_alone_and_in_a_padded_batch(tmp_path):
    from texts import save_tokenizer

    family = FAMILIES["llama classifier"]
    sizes = {k: v for k, v in family.sizes.items() if k != "pad_token_id"}
    family = Family(family.base, family.task, family.config, sizes | dict(vocab_size=120),
                    heads=(2, 3, 1), expert_sizes=dict(pad_token_id=0))  # fmt: skip
    made_ = made(family, tmp_path)
    save_tokenizer(made_.base, pairs=False, pad=False)
    merge(made_.base, made_.experts, tmp_path / "out", exclusive={"rank": "full"})
    twin = load(tmp_path / "out")
    assert twin.config.pad_token_id == twin.tokenizer.pad_token_id is not None
    texts = ["math1 math2 law1 code1", "code1"]
    batch = twin.tokenizer(texts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    both = twin(**batch, task="code").logits
    for index, text in enumerate(texts):
        alone = twin.tokenizer([text], return_tensors="pt")
        alone.pop("token_type_ids", None)
        assert_close(twin(**alone, task="code").logits[0], both[index])
