"""`transformers.pipeline(model=twin)`: the row's own labels, as the expert's own pipeline."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
import transformers as tf
from PIL import Image
from test_conformance import assert_same_files
from texts import LABELS, SIZES, TextBench, sentences
from tiny import BERT, EXPERTS, Family, merge
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_classification import TextClassificationPipeline
from transformers.pipelines.text_generation import TextGenerationPipeline

from twinmerge.errors import InputError
from twinmerge.runtime import pipelines
from twinmerge.runtime.labels import OF_A_HEAD
from twinmerge.runtime.load import load

TOLERANCE = dict(atol=1e-5, rtol=1e-4)
"""Batches are padded, and float32 adds in another order then."""

TEXTS = [text[0] for name in EXPERTS for text in sentences(name, 4)]


def own(bench: TextBench, name: str, task: str, **options: Any) -> Any:
    """The stock pipeline of one expert, merged densely: exactly its own knowledge and labels."""
    plain = bench.model.merged({name: 1.0}, head=name)
    return tf.pipeline(task, model=plain, tokenizer=bench.model.tokenizer, device="cpu", **options)


def same(got: Any, want: Any) -> bool:
    """The same answers, but for rounding of scores and what only ours say."""
    if isinstance(want, list):
        return len(got) == len(want) and all(same(*pair) for pair in zip(got, want, strict=True))
    if isinstance(want, dict):
        return all(same(got[key], value) for key, value in want.items())
    if isinstance(want, (float, np.floating)):
        return bool(np.isclose(got, want, **TOLERANCE))
    return got == want


# ------------------------------------------------------------------------- classification of texts


def test_the_plain_call_gives_every_row_the_labels_of_its_own_expert(bench):
    twin = bench.model
    pipe = tf.pipeline("text-classification", model=twin, tokenizer=twin.tokenizer, device="cpu")
    inputs = twin.tokenizer(TEXTS, return_tensors="pt", padding=True)
    answers = twin.answers(twin(**inputs))
    assert {answer.expert for answer in answers} == set(EXPERTS)  # else this shows little
    for batch_size in (1, 5, 12):
        found = pipe(TEXTS, batch_size=batch_size)
        for each, answer in zip(found, answers, strict=True):
            assert each["expert"] == answer.expert
            assert each["label"] == (answer.label or "LABEL_0")
            assert same(each, {"score": answer.score, "weight": answer.weight})


@pytest.mark.parametrize("name", EXPERTS)
def test_an_experts_rows_are_answered_as_by_its_own_pipeline(name, bench):
    ours = bench.model.pipeline("sentiment-analysis")
    stock = own(bench, name, "text-classification")
    # The stock pipeline makes a probability of a regression's value unless it is told what it is.
    regression = {"function_to_apply": "none"} if name == "law" else {}
    for settings in ({}, {"top_k": None}, {"top_k": 2}, {"function_to_apply": "sigmoid"}):
        want = stock(TEXTS, **{**regression, **settings})
        assert same(ours(TEXTS, task=name, **settings), want)
        assert same(ours(TEXTS, task=name, batch_size=4, **settings), want)
    assert same(ours(TEXTS[0], task=name), stock(TEXTS[0], **regression))
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    assert same(ours(pair, task=name), stock(pair, **regression))


def test_weights_and_heads_can_be_given_when_it_is_made_or_called(bench):
    pipe = bench.model.pipeline("text-classification", weights={"math": 1.0}, head="code")
    made = pipe(TEXTS[:3], top_k=None)
    assert [sorted(each["label"] for each in row) for row in made] == [sorted(LABELS["code"])] * 3
    assert all(each["expert"] == "code" and each["weight"] == 0.0 for row in made for each in row)
    called = pipe(TEXTS[:3], head="math")
    assert {each["label"] for each in called} <= set(LABELS["math"])
    assert {each["weight"] for each in called} == {1.0}


def test_several_labels_at_once_are_several_probabilities(bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "several")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["experts"][1]["config"]["problem_type"] = "multi_label_classification"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    scores = load(folder).pipeline("text-classification")(TEXTS[0], task="code", top_k=None)
    stock = own(bench, "code", "text-classification", function_to_apply="sigmoid")
    assert same(scores, stock(TEXTS[0], top_k=None))


def test_a_stock_pipeline_that_cannot_know_the_labels_is_an_error_not_a_wrong_label(bench):
    twin = bench.model
    with pytest.raises(InputError, match="math, code, law have labels of their own.*pipeline"):
        TextClassificationPipeline(model=twin, tokenizer=twin.tokenizer, task="x")(TEXTS[0])
    with pytest.raises(InputError, match="labels of their own"):
        tf.pipeline("zero-shot-classification", model=twin, tokenizer=twin.tokenizer)(
            TEXTS[0], candidate_labels=["a", "b"]
        )


# ------------------------------------------------------------------------------ the configuration


def test_the_configuration_has_no_label_where_the_experts_differ(bench):
    twin = bench.model
    for name in OF_A_HEAD:
        with pytest.raises(InputError, match=rf"config.{name}: the experts math, code, law"):
            getattr(twin.config, name)
        assert getattr(twin.config, name, "none") == "none" and not hasattr(twin.config, name)
    assert isinstance(twin.config, tf.BertConfig)
    assert twin.config.hidden_size == twin.model.config.hidden_size == 16
    assert repr(twin.config) == repr(twin.model.config)
    for config in (copy.deepcopy(twin.config), pickle.loads(pickle.dumps(twin.config))):
        assert config.hidden_size == 16 and not hasattr(config, "id2label")
        config.pad_token_id = 7
    assert twin.model.config.pad_token_id == 0
    twin.config.pad_token_id = 3
    assert twin.model.config.pad_token_id == 3
    twin.config.pad_token_id = 0


def test_labels_that_all_experts_share_are_the_configurations(causal_bench, alike):
    assert alike.config is alike.model.config
    assert alike.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert causal_bench.model.config is causal_bench.model.model.config


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A classifier whose experts have the same labels."""
    family = Family(
        tf.BertModel,
        tf.BertForSequenceClassification,
        tf.BertConfig,
        BERT | SIZES,
        heads=(2, 2, 2),
    )
    bench = TextBench(tmp_path_factory.mktemp("alike"), family)
    out = bench.folder / "artifact"
    merge(bench.made.base, bench.made.experts, out, exclusive={"rank": 4})
    return load(out)


def test_there_the_stock_pipeline_is_right_too(alike):
    ours = alike.pipeline("text-classification")
    stock = TextClassificationPipeline(model=alike, tokenizer=alike.tokenizer, task="x")
    weights = {"math": 0.5, "law": 0.3}
    want = ours(TEXTS, weights=weights)
    stock.model = Weighted(alike, weights)
    for batch_size in (1, 4):
        assert same(want, stock(TEXTS, batch_size=batch_size))


class Weighted:
    """A model that has no router, called with weights."""

    def __init__(self, twin: Any, weights: Any) -> None:
        self.twin, self.weights = twin, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.twin, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.twin(**inputs, weights=self.weights)


# --------------------------------------------------------------------------- tokens and features


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TextBench:
    """A token classifier with a tokenizer, whose experts have 2, 3 and 5 labels."""
    family = Family(
        tf.BertModel,
        tf.BertForTokenClassification,
        tf.BertConfig,
        BERT | SIZES,
        heads=(2, 3, 5),
    )
    return TextBench(tmp_path_factory.mktemp("tokens"), family)


def test_tokens_are_labelled_as_by_the_experts_own_pipeline(tokens):
    twin = tokens.model
    ours = tf.pipeline("ner", model=twin, tokenizer=twin.tokenizer, device="cpu")
    for name in EXPERTS:
        for settings in ({}, {"aggregation_strategy": "simple"}):
            stock = own(tokens, name, "ner", **settings)
            want = stock(TEXTS[:5])
            assert any(want)
            assert same(ours(TEXTS[:5], task=name, **settings), want)
            assert same(ours(TEXTS[:5], task=name, batch_size=3, **settings), want)
    routed = ours(TEXTS)
    answered = twin(**twin.tokenizer(TEXTS, return_tensors="pt", padding=True)).expert.tolist()
    assert set(answered) == {0, 1, 2}
    for text, found, index in zip(TEXTS, routed, answered, strict=True):
        known = twin.labels[twin.experts[index]]
        assert found and {each["entity"] for each in found} <= set(known), text


def test_a_long_text_in_pieces_has_the_labels_of_each_pieces_expert(tokens):
    twin = tokens.model
    twin.tokenizer.model_max_length = 8
    try:
        pipe = twin.pipeline("token-classification", stride=2, aggregation_strategy="simple")
        found = pipe("law0 law1 law2 law3 law4 law5 law0 law1 law2 law3 law4 law5", task="law")
    finally:
        twin.tokenizer.model_max_length = int(1e30)
    assert len(found) > 1 and {each["entity_group"] for each in found} <= {
        label.split("-")[-1] for label in twin.labels["law"]
    }


def test_features_are_the_models_not_the_weights(bench):
    twin = bench.model
    pipe = tf.pipeline("feature-extraction", model=twin, tokenizer=twin.tokenizer, device="cpu")
    for name in ("math", "code"):
        want = own(bench, name, "feature-extraction")(TEXTS[:4])
        assert same(pipe(TEXTS[:4], task=name), want)
        assert same(pipe(TEXTS[:4], task=name, batch_size=4), want)


# ----------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures() -> list[Any]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(5)]


@pytest.fixture
def processor() -> Any:
    return tf.ViTImageProcessorPil(size={"height": 8, "width": 8})


def test_images_are_classified_as_by_the_experts_own_pipeline(zoo, pictures, processor):
    twin = zoo.twin("vit")
    ours = tf.pipeline("image-classification", model=twin, image_processor=processor, device="cpu")
    for name in EXPERTS:
        plain = twin.merged({name: 1.0}, head=name)
        stock = tf.pipeline(
            "image-classification", model=plain, image_processor=processor, device="cpu"
        )
        want = stock(pictures)
        assert same(ours(pictures, task=name), want)
        assert same(ours(pictures, task=name, batch_size=5), want)


def test_without_an_image_processor_in_the_artifact_it_says_so(zoo, pictures, processor):
    twin = zoo.twin("vit")
    with pytest.raises(InputError, match="holds no image processor.*a pipeline: image_processor="):
        twin.pipeline("image-classification")
    pipe = twin.pipeline("image-classification", image_processor=processor, weights={"law": 1.0})
    assert pipe(pictures[0])[0]["expert"] == "law"


# ----------------------------------------------------------------------------------- generation

PROMPTS = ["math1 the2 math4", "code1", "law3 the1 law4 law5 the9"]
GREEDY = dict(max_new_tokens=5, do_sample=False)


def test_text_is_generated_as_by_the_densely_merged_model(causal_bench):
    twin = causal_bench.model
    pipe = tf.pipeline("text-generation", model=twin, tokenizer=twin.tokenizer, device="cpu")
    for name in EXPERTS:
        stock = own(causal_bench, name, "text-generation")
        for settings in (GREEDY, GREEDY | {"num_beams": 2, "num_return_sequences": 2}):
            want = stock(PROMPTS, **settings)
            assert pipe(PROMPTS, task=name, **settings) == want
            assert pipe(PROMPTS, task=name, batch_size=3, **settings) == want
    routed = pipe(PROMPTS, **GREEDY)
    assert pipe(PROMPTS, batch_size=2, **GREEDY) == routed
    assert pipe(PROMPTS[0], **GREEDY) == routed[0]


def test_a_chat_goes_through_the_chat_template(causal_bench):
    twin = causal_bench.model
    tokenizer = copy.deepcopy(twin.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][:0] + m['content'] }} {% endfor %}"
    )
    pipe = tf.pipeline("text-generation", model=twin, tokenizer=tokenizer, device="cpu")
    chat = [{"role": "user", "content": "code1 the4"}]
    (found,) = pipe(chat, **GREEDY)
    assert found["generated_text"][0] == chat[0]
    assert found["generated_text"][1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = twin.generate(**ids, **GREEDY)[0, ids["input_ids"].shape[1] :]
    assert found["generated_text"][1]["content"] == tokenizer.decode(new, skip_special_tokens=True)
    assert pipe([chat, chat], batch_size=2, **GREEDY) == [[found], [found]]


# -------------------------------------------------------------------------------- the pipelines


def test_other_models_get_the_stock_pipelines(bench, causal_bench):
    assert type(own(bench, "math", "text-classification")) is TextClassificationPipeline
    assert type(own(causal_bench, "math", "text-generation")) is TextGenerationPipeline


def test_what_somebody_else_registered_stays(monkeypatch):
    class Theirs(TextClassificationPipeline):
        pass

    entry = PIPELINE_REGISTRY.supported_tasks["text-classification"]
    monkeypatch.setitem(entry, "impl", Theirs)
    pipelines.register()
    assert entry["impl"] is Theirs


def test_a_saved_pipeline_is_the_artifact(causal_bench, tmp_path):
    causal_bench.model.pipeline("text-generation").save_pretrained(tmp_path / "out")
    assert_same_files(causal_bench.routed, tmp_path / "out")


def test_nothing_is_said_of_an_unknown_model_class(bench, caplog):
    tf.logging.enable_propagation()
    try:
        assert "TwinModel" in repr(bench.model.pipeline("text-classification"))
    finally:
        tf.logging.disable_propagation()
    assert "is not supported" not in caplog.text


def test_a_pipeline_can_be_copied(bench):
    pipe = copy.copy(bench.model.pipeline("text-classification"))
    assert pipe(TEXTS[0])[0]["expert"] == "math"


def test_an_unknown_task_names_those_that_there_are(bench):
    with pytest.raises(InputError, match="expected one of text-classification, token-"):
        bench.model.pipeline("text-to-speech")


def test_the_pipelines_words_for_a_choice_are_the_models(bench):
    assert set(pipelines.CHOICES) <= set(inspect.signature(bench.model.forward).parameters)
