"""The seven invariants of the design, on every architecture of `families.EVERY`.

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
from conftest import randn, router_by_hand
from families import BERT, EVERY, FAMILIES, Family
from tiny import (
    EXPERTS,
    adapter,
    batch_of,
    by_towers,
    inherit,
    made,
    merge,
    merged_folder,
    outputs,
    prompt_of,
    row,
)

from twinmerge.errors import InputError, RouterError, UnsupportedModel
from twinmerge.runtime.heads import HeadSwitch
from twinmerge.runtime.load import load
from twinmerge.runtime.per_row import NotRowWise
from twinmerge.runtime.router.features import keys
from twinmerge.runtime.routing import Mix, Routing, routed

CALLS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
KINDS = {
    *("bert", "distilbert", "deberta", "vit", "clip text", "convnext", "resnet"),
    *("gpt2", "llama tied", "llama classifier", "gemma", "mixtral", "t5"),
}
"""One for every kind of layer."""

QUICK = {"bert", "deberta", "vit", "resnet", "gpt2", "llama tied", "mixtral"}
"""Those of the quick tier; the other families take minutes together."""


def families(wanted=lambda name: True) -> list:
    """Names of families to run a test on, most of them in the slow tier."""
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(EVERY)
        if wanted(name)
    ]


@pytest.fixture(params=families())
def name(request) -> str:
    return request.param


@pytest.fixture(params=families(lambda name: EVERY[name].generates))
def generator(request) -> str:
    return request.param


@pytest.fixture(params=families(lambda name: EVERY[name].blocks))
def readable(request) -> str:
    """A family with blocks to read router features from."""
    return request.param


def weights_of(rows: int, seed: int = 0) -> torch.Tensor:
    """Soft weights, other ones in every row."""
    return (2 * randn(rows, len(EXPERTS), seed=seed)).softmax(dim=-1)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest output; a lone one may happen to lie near zero.

    Outputs that a row's head does not have, -inf, must be the same ones.
    """
    assert got.shape == want.shape
    difference = (got - want).masked_fill(got == want, 0).detach().abs().max()
    largest = want.masked_fill(want.isneginf(), 0).detach().abs().max().clamp(min=0.1)
    assert float(difference) <= tolerance * float(largest)


PER_TOKEN = ("start_logits", "end_logits", "last_hidden_state")


def seen(values: torch.Tensor, inputs: dict, index: int, name: str = "logits") -> torch.Tensor:
    """One row's values, where they mean something: not at padded positions."""
    mask = inputs.get("attention_mask")
    per_token = name in PER_TOKEN or (name == "logits" and values.ndim > 2)
    if mask is None or not per_token or "decoder_input_ids" in inputs:
        return values[index]
    return values[index][mask[index].bool()]


def assert_row(got, want, inputs: dict, index: int, at: int | None = None, **options) -> None:
    """Row `index` of two model outputs is the same; of `want` it is row `at` if that is given.

    Where heads differ in width, outputs that the row's head does not have must be -inf.
    """
    wanted, found = outputs(want), outputs(got)
    assert set(found) == set(wanted) and wanted
    for name, values in wanted.items():
        mine = seen(found[name], inputs, index, name)
        theirs = values[at : at + 1] if at is not None else values[index : index + 1]
        theirs = seen(theirs, row(inputs, index), 0, name)
        assert_close(mine[..., : theirs.shape[-1]], theirs, **options)
        assert torch.isneginf(mine[..., theirs.shape[-1] :]).all()


def assert_rows(got, want, inputs: dict, **options) -> None:
    """All rows of two model outputs are the same, at the same width."""
    assert shapes(got) == shapes(want)
    for index in range(len(next(iter(inputs.values())))):
        assert_row(got, want, inputs, index, **options)


def assert_equal(got, want) -> None:
    """Two model outputs have the same bits."""
    assert shapes(got) == shapes(want)
    assert all(torch.equal(outputs(got)[name], values) for name, values in outputs(want).items())


def shapes(output) -> dict:
    found = {name: value.shape for name, value in outputs(output).items()}
    assert found
    return found


def pads(name: str) -> list[str]:
    return ["right", "left"] if EVERY[name].text else ["none"]


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    _, differing, errors = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not differing and not errors


# --------------------------------------------------------------------------- 1: one expert


def test_all_weight_on_one_expert_gives_that_experts_own_outputs(name, zoo):
    twin = zoo.twin(name)
    for pad in pads(name):
        inputs = batch_of(EVERY[name], pad=pad)
        for expert in EXPERTS:
            got = twin(task=expert, **inputs)
            assert_rows(got, zoo.expert(name, expert)(**inputs), inputs)
            assert got.expert.tolist() == [EXPERTS.index(expert)] * 4


def test_a_batch_of_several_tasks_gives_every_row_its_own_experts_output(name, zoo):
    inputs = batch_of(EVERY[name])
    tasks = [EXPERTS[index] for index in (2, 0, 1, 0)]
    output = zoo.twin(name)(task=tasks, **inputs)
    for index, expert in enumerate(tasks):
        assert_row(output, zoo.expert(name, expert)(**inputs), inputs, index)


# ----------------------------------------------------------------------- 2: rows and dense


def test_a_mixed_batch_is_its_rows_one_by_one_and_the_densely_merged_model(name, zoo):
    twin, weights = zoo.twin(name, 3), weights_of(4)
    heads = [EXPERTS[index] for index in (1, 0, 2, 1)]
    for pad in pads(name):
        inputs = batch_of(EVERY[name], pad=pad)
        output = twin(weights=weights, head=heads, **inputs)
        assert torch.equal(output.weights, weights)
        for index, head in enumerate(heads):
            one = row(inputs, index)
            want = zoo.plain(name, 3, weights[index].tolist(), head)(**one)
            alone = twin(weights=weights[index], head=head, **one)
            assert_row(alone, want, one, 0)
            assert_row(output, want, inputs, index, at=0)


def test_weights_need_not_sum_to_one_nor_be_positive(name, zoo):
    weights, inputs = [0.7, -0.4, 1.1], batch_of(EVERY[name], rows=2)
    want = zoo.plain(name, "full", weights, "code")(**inputs)
    assert_rows(zoo.twin(name)(weights=weights, head="code", **inputs), want, inputs)


# ------------------------------------------------------------------------ 3: zero weights


def test_zero_weights_give_the_shared_expert_exactly(name, zoo):
    twin, inputs = zoo.twin(name), batch_of(EVERY[name])
    want = zoo.plain(name, "full", [0.0] * 3, "math")(**inputs)
    assert_equal(twin(weights=torch.zeros(4, 3), head="math", **inputs), want)
    weights = weights_of(4)
    weights[1] = 0
    mixed = twin(weights=weights, head="math", **inputs)
    assert_row(mixed, want, inputs, 1, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_static_merge_has_no_factors_and_gives_the_shared_expert_for_any_weights(name, zoo):
    twin, inputs = zoo.twin(name, "none"), batch_of(EVERY[name])
    want = zoo.plain(name, "none", [0.0] * 3, "law")(**inputs)
    assert_equal(twin(weights=weights_of(4), head="law", **inputs), want)
    assert all(not record.rank for t in twin.manifest.tensors for record in t.experts.values())


# ----------------------------------------------------------------------------- 4: adapters

LORA = {
    "bert": ("SEQ_CLS", ["query", "value"], ["query", "dense"], ["value"]),
    "bert answers": ("QUESTION_ANS", ["query", "value"], ["dense"], ["key"]),
    "deberta": ("SEQ_CLS", ["query_proj", "key_proj"], ["value_proj"], ["query_proj"]),
    "gpt2": ("CAUSAL_LM", ["c_attn"], ["c_fc", "c_proj"], ["c_proj"]),
    "llama": ("CAUSAL_LM", ["q_proj", "v_proj"], "all-linear", ["embed_tokens", "lm_head"]),
    "mixtral": ("CAUSAL_LM", ["q_proj", "v_proj"], ["k_proj", "o_proj"], ["q_proj"]),
    "modernbert": ("SEQ_CLS", ["Wqkv"], ["Wi", "Wo"], ["Wqkv", "Wi"]),
    "mpnet embeds": ("FEATURE_EXTRACTION", ["q", "v"], ["dense"], ["k"]),
    "t5": ("SEQ_2_SEQ_LM", ["q", "v"], ["wi", "wo", "k"], ["q"]),
}
"""Kind of task, and the layers that each expert's adapter has."""
SAVED = {"deberta": ["classifier", "pooler"], "modernbert": ["classifier", "head"]}
"""Modules that peft must be told to save: new ones that it does not know as heads."""
FORMS = (dict(r=2, lora_alpha=8), dict(r=1, use_rslora=True), dict(r=3, bias="all"))


@pytest.mark.parametrize("lora", families(lambda name: name in LORA))
def test_a_lora_expert_gives_what_its_merged_full_checkpoint_gives(lora, zoo, tmp_path):
    made, adapters, (task, *targets) = zoo.made(lora), {}, LORA[lora]
    base = made.family.base.from_pretrained(made.base)
    for index, expert in enumerate(EXPERTS):
        heads = {"num_labels": made.family.heads[index]} if made.family.heads else {}
        model = made.family.task(made.family.config(**made.family.sizes | heads))
        inherit(model, base)
        options = dict(target_modules=targets[index], task_type=task, **FORMS[index])
        options["modules_to_save"] = SAVED.get(lora)
        adapters[expert] = adapter(model, tmp_path / expert, seed=expert, **options)
    full = {expert: merged_folder(folder) for expert, folder in adapters.items()}
    merge(made.base, adapters, tmp_path / "from-adapters", exclusive={"rank": "full"})
    merge(made.base, full, tmp_path / "from-full", exclusive={"rank": "full"})
    one, other = load(tmp_path / "from-adapters"), load(tmp_path / "from-full")
    inputs = batch_of(made.family)
    experts = dataclasses.replace(made, experts=full)
    for expert in EXPERTS:
        want = experts.expert(expert)(**inputs)
        for twin in (one, other):
            assert_rows(twin(task=expert, **inputs), want, inputs)
    calls = dict(weights=weights_of(4), head="math", **inputs)
    assert_rows(one(**calls), other(**calls), inputs)


# ------------------------------------------------------------------------- 5: reproducible


def test_loading_twice_gives_equal_bits_and_building_twice_equal_bytes(name, zoo, tmp_path):
    made, first = zoo.made(name), zoo.artifact(name, 3)
    merge(made.base, made.experts, tmp_path / "again", exclusive={"rank": 3})
    assert_same_files(first, tmp_path / "again")
    calls = dict(weights=weights_of(4), head="code", **batch_of(made.family))
    one = zoo.twin(name, 3)(**calls)
    assert_equal(one, by_towers(load(tmp_path / "again"))(**calls))
    assert not any(values.isnan().any() for values in outputs(one).values())


# --------------------------------------------------------------------------- 7: generation


def test_greedy_tokens_are_those_of_the_densely_merged_model(generator, zoo):
    twin, inputs, weights = zoo.twin(generator, 3), prompt_of(EVERY[generator]), weights_of(3)
    got = twin.generate(weights=weights, **inputs, **CALLS)
    assert got.shape == (3, (1 if EVERY[generator].decoder else 7) + 5)
    for index in range(3):
        dense = zoo.plain(generator, 3, weights[index].tolist(), "math")
        assert torch.equal(got[index : index + 1], dense.generate(**row(inputs, index), **CALLS))


def test_beams_and_several_sequences_keep_each_rows_own_weights(generator, zoo):
    twin, inputs, weights = zoo.twin(generator, 3), prompt_of(EVERY[generator]), weights_of(3)
    beams = CALLS | dict(num_beams=3, num_return_sequences=2)
    # With one candidate left, sampling is greedy, so every sample is known.
    samples = CALLS | dict(do_sample=True, top_k=1, num_return_sequences=2)
    for options in (beams, samples):
        got = twin.generate(weights=weights, **inputs, **options).view(3, 2, -1)
        for index in range(3):
            dense = zoo.plain(generator, 3, weights[index].tolist(), "math")
            want = dense.generate(**row(inputs, index), **options)
            assert torch.equal(got[index], want)


def test_sampling_with_a_seed_gives_what_the_densely_merged_model_samples(generator, zoo):
    twin, inputs, weights = zoo.twin(generator, 3), prompt_of(EVERY[generator]), [0.2, 0.5, 0.3]
    options = CALLS | dict(do_sample=True, top_k=0, num_return_sequences=2)
    results = []
    for model in (twin, zoo.plain(generator, 3, weights, "math")):
        torch.manual_seed(1)
        own = {"weights": weights} if model is twin else {}
        results.append(model.generate(**own, **inputs, **options))
    assert torch.equal(*results)


@pytest.fixture
def route(zoo, monkeypatch):
    """Gives a family's twin a small random router: no data is needed to test what routing does."""

    def give(name: str, rank, inputs: dict, layer: int):
        twin = zoo.twin(name, rank)
        width = twin.features.read(inputs, keys([layer]))[layer, "mean"].shape[1]
        monkeypatch.setattr(twin, "router", router_by_hand(layer, width))
        return twin

    return give


def test_generation_routes_once_and_padding_and_batch_order_change_nothing(
    generator, route, monkeypatch
):
    inputs, routes = prompt_of(EVERY[generator]), []
    twin = route(generator, 3, inputs, layer=1)
    original = type(twin).routing

    def counted(self, **prompt):
        said = original(self, **prompt)
        routes.append(said.weights)
        return said

    monkeypatch.setattr(type(twin), "routing", counted)
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


def test_generation_with_a_router_runs_with_the_weights_of_the_prompt(generator, route):
    inputs = prompt_of(EVERY[generator])
    twin = route(generator, 3, inputs, layer=1)
    weights = twin.route(**inputs)
    want = twin.generate(weights=weights, **inputs, **CALLS)
    assert torch.equal(twin.generate(**inputs, **CALLS), want)
    one_expert = twin.generate(task="code", **inputs, **CALLS)
    assert torch.equal(one_expert, twin.generate(weights={"code": 1.0}, **inputs, **CALLS))


# ---------------------------------------------------------------------------- being routed


def test_without_weights_the_router_decides_weights_and_head(readable, route):
    inputs = batch_of(EVERY[readable], rows=6)
    twin = route(readable, "full", inputs, layer=2)
    output, weights = twin(**inputs), twin.route(**inputs)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert torch.equal(output.weights, weights)
    said = twin.routing(**inputs)
    assert torch.equal(said.weights, weights) and not said.new.any()
    if not hasattr(twin.model, "get_text_features"):
        assert torch.equal(output.routed.probabilities, said.probabilities)
    assert torch.equal(output.expert, weights.argmax(dim=1))
    heads = [EXPERTS[index] for index in output.expert]
    assert_equal(output, twin(weights=weights, head=heads, **inputs))


def test_the_router_reads_hidden_states_of_the_shared_expert_at_every_layer(readable, zoo):
    twin, inputs = zoo.twin(readable), batch_of(EVERY[readable])
    shared = zoo.plain(readable, "full", [0.0] * 3, "math")
    answer = shared(**inputs, output_hidden_states=True)
    answer = getattr(answer, "text_model_output", answer)  # of two towers, the first is read
    states = getattr(answer, "encoder_hidden_states", None) or answer.hidden_states
    with_weights_in_force = twin.features.read(inputs, keys(range(3)))
    for layer in (0, 1):  # the last one transformers gives after the final norm
        hidden = states[layer]
        mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None]
        want = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(with_weights_in_force[layer, "mean"], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"router layer 3: this model has layers 0 .* to 2"):
        twin.features.read(inputs, keys([3]))


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
        (dict(weights=[1.0, 0.0]), r"weights=: expected shape \(4, 3\) .*got \(2,\).*math, code"),
        (dict(weights=torch.ones(3, 3)), r"weights=: expected shape \(4, 3\).*got \(3, 3\)"),
        (dict(weights=[float("nan"), 0, 1]), "weights=: expected finite numbers, got NaN"),
        (dict(weights=[float("inf"), 0, 1]), "weights=: expected finite numbers, got NaN or inf"),
        (dict(weights={"mth": 1.0}), "weights='mth': no such expert. Did you mean 'math'"),
        (dict(weights=[0, 0, 0]), "weights: row 0 is all zero .* head= one of .'math', 'code'"),
        (dict(weights=[1, 0, 0], head="lw"), "head='lw': no such expert. Did you mean 'law'"),
        (dict(task="math", labels=torch.zeros(4)), "labels=: no loss is defined where experts"),
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
        assert torch.equal(got.weights, want.weights)
        assert_rows(got, want, inputs)


HEADS = {
    "bart classifier": ["classification_head"],
    "bert answers": ["qa_outputs"],
    "deberta": ["classifier", "pooler"],
    "deberta keys": ["classifier", "pooler"],
    "distilbert": ["classifier", "pre_classifier"],
    "efficientnet": ["classifier"],
    "llama classifier": ["score"],
    "modernbert": ["classifier", "head"],
    "t5 classifier": ["classification_head"],
}


def test_heads_stand_where_the_experts_heads_stood(name, zoo):
    twin = zoo.twin(name)
    found = [path for path, m in twin.model.named_modules() if isinstance(m, HeadSwitch)]
    default = ["classifier"] if EVERY[name].heads else []
    assert sorted(found) == HEADS.get(name, default)


def test_a_layer_that_is_given_other_rows_than_the_batch_says_so_by_name(zoo):
    layer = zoo.twin("bert").model.bert.encoder.layer[0].attention.self.query
    with routed(Routing(Mix(torch.ones(4, 3), (0, 1, 2)), None, 4)):
        with pytest.raises(NotRowWise, match="query"):
            layer(torch.zeros(10, 16))


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
        twin.features.read(inputs, keys([0]))


def test_two_experts_of_one_class_are_served_as_well_as_three(tmp_path):
    pair = made(FAMILIES["bert"], tmp_path, experts=("one", "two"))
    merge(pair.base, pair.experts, tmp_path / "out", exclusive={"rank": "full"})
    inputs = batch_of(pair.family)
    got = load(tmp_path / "out")(task="two", **inputs).logits
    assert_close(got, pair.expert("two")(**inputs).logits)


def test_a_merged_model_has_the_labels_of_its_own_head(zoo):
    twin = zoo.twin("bert")
    for name, labels in zip(twin.experts, (2, 3, 1), strict=True):
        config = twin.merged({name: 1.0}).config
        assert config.num_labels == labels
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
