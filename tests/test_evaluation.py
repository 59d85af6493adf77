"""Scores that mean what they are called: metrics, protocols and the experts themselves."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk
from texts import EXPERTS, SIZES, save_tokenizer
from tiny import BERT, Family, adapter, inherit, made, merge, merged_folder, opened, perturb, save

from twinmerge.data import encode, pad, read_rows, read_tasks, text_of
from twinmerge.errors import CheckpointError, InputError, RecipeError
from twinmerge.evaluation.metrics import METRICS, metric
from twinmerge.evaluation.provenance import provenance
from twinmerge.evaluation.reference import expert_model, score_plain
from twinmerge.evaluation.score import (
    PROTOCOLS,
    Report,
    TaskScore,
    evaluate,
    filled,
    guesses_of,
    prepare,
)
from twinmerge.evaluation.tasks import Task, task_for
from twinmerge.evaluation.tasks.glue import GLUE
from twinmerge.recipe import Recipe
from twinmerge.runtime.load import load

# ------------------------------------------------------------------------------------ metrics

classes = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=2, max_size=30)


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # sklearn, matthews
@settings(deadline=None, max_examples=50)
@given(pairs=classes)
def test_class_metrics_are_scikit_learns(pairs):
    truth, guess = (list(map(float, column)) for column in zip(*pairs, strict=True))
    assert METRICS["accuracy"](truth, guess) == sk.accuracy_score(truth, guess)
    assert METRICS["matthews"](truth, guess) == sk.matthews_corrcoef(truth, guess)
    ones = [[float(value == 1) for value in column] for column in (truth, guess)]
    f1 = sk.f1_score(*ones, zero_division=0.0)
    want = (sk.accuracy_score(truth, guess) + f1) / 2
    assert METRICS["accuracy_f1"](truth, guess) == pytest.approx(want)
    each = [
        sk.f1_score([t == c for t in truth], [g == c for g in guess], zero_division=0.0)
        for c in set(truth)
    ]
    assert METRICS["macro_f1"](truth, guess) == pytest.approx(sum(each) / len(each))


def test_the_regression_metric_is_the_mean_of_scipys_two_correlations():
    truth, guess = randn(40, seed=0).tolist(), randn(40, seed=1).tolist()
    want = (pearsonr(truth, guess)[0] + spearmanr(truth, guess)[0]) / 2
    assert METRICS["pearson_spearman"](truth, guess) == pytest.approx(want)


@pytest.mark.parametrize(("truth", "guess"), [([1.0, 2.0], [5.0, 5.0]), ([2.0, 2.0], [1.0, 2.0])])
def test_a_correlation_with_a_constant_is_zero_and_no_nan(truth, guess):
    assert METRICS["pearson_spearman"](truth, guess) == 0.0


def test_matthews_of_one_class_guessed_is_zero():
    assert METRICS["matthews"]([0.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 0.0


def test_an_unknown_metric_names_the_one_that_was_meant():
    with pytest.raises(InputError, match="'acuracy': no such metric. Did you mean 'accuracy'"):
        metric("acuracy")


def test_glue_tasks_have_glues_metrics_and_others_fit_their_head():
    assert GLUE["cola"].metric == "matthews" and GLUE["qqp"].metric == "accuracy_f1"
    assert task_for("stsb", 1) == Task("pearson_spearman", ("sentence1", "sentence2"))
    assert task_for("mine", 3) == Task("accuracy") and task_for("mine", 1).metric[:7] == "pearson"
    assert all(task.metric in METRICS for task in GLUE.values())


# ----------------------------------------------------------------------- the normalised score


def report(scores: dict[str, float], reference: dict[str, float] | None, rows: int = 10) -> Report:
    tasks = {
        name: TaskScore(score, "accuracy", rows * (place + 1), 0.5 * (place + 1), 0, 1.0)
        for place, (name, score) in enumerate(scores.items())
    }
    return Report("routed", tasks, reference)


def test_the_normalised_score_is_the_mean_of_the_ratios():
    got = report({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.6})
    assert got.normalised() == pytest.approx((0.5 + 1.5) / 2)
    assert got.normalised(without=("b",)) == pytest.approx(0.5)
    assert got.mean == pytest.approx(0.65)
    assert got.routing_accuracy == pytest.approx((10 * 0.5 + 20 * 1.0) / 30)
    assert got.seconds_per_1000 == pytest.approx(1000 * 2 / 30)


@pytest.mark.parametrize("score", [0.0, -0.1])
def test_a_share_of_an_expert_that_scores_nothing_is_not_given(score):
    got = report({"a": 0.4, "b": 0.9}, {"a": score, "b": 0.6})
    assert got.normalised() is None and got.to_dict()["normalised"] is None
    assert got.normalised(without=("a",)) == pytest.approx(1.5)


def test_without_a_reference_or_tasks_there_is_no_normalised_score():
    assert report({"a": 0.4}, None).normalised() is None
    assert report({"a": 0.4}, {"a": 0.4}).normalised(without=("a",)) is None
    assert "expert" not in report({"a": 0.4}, None).to_dict()["tasks"]["a"]


# ------------------------------------------------------------------------------ no answer given


def test_a_row_of_another_head_is_wrong_even_where_the_class_numbers_agree(bench):
    model = load(bench.routed)
    rows = {"math": read_rows(bench.data / "math" / "test.jsonl")}
    right = evaluate(model, rows, "oracle").tasks["math"].score
    assert right > 0.5
    forced = model.forward
    model.forward = lambda **call: forced(**call | {"task": "math", "head": "code"})
    # Same logits row by row for math's classes or not: code's head answered, so nothing is right.
    assert evaluate(model, rows, "routed").tasks["math"].score == 0.0


def test_in_a_regression_no_answer_is_the_mean_of_the_right_heads_answers():
    assert filled([1.0, None, 3.0, None], regression=True) == [1.0, 2.0, 3.0, 2.0]
    assert filled([None, None], regression=True) == [0.0, 0.0]
    assert filled([1.0, None, 0.0], regression=False) == [1.0, -1.0, 0.0]


def test_guesses_look_at_the_heads_own_outputs_alone():
    logits = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.2, 9.0]])
    assert guesses_of(logits, ["no", "yes"]) == [1.0, 0.0]
    assert guesses_of(logits, ["a", "b", "c"]) == [2.0, 2.0]
    assert guesses_of(logits, None) == pytest.approx([0.1, 0.3])


def test_a_head_that_labels_tokens_is_refused():
    with pytest.raises(InputError, match=r"one answer per row.*\(2, 5, 3\)"):
        guesses_of(torch.zeros(2, 5, 3), ["a", "b", "c"])


# ---------------------------------------------------------------------------------- protocols


def test_each_protocol_calls_the_model_with_what_it_is_named_for(bench):
    model = load(bench.routed)
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    forward, calls = model.forward, []
    model.forward = lambda **call: (
        calls.append({k: v for k, v in call.items() if k in ("weights", "task", "head")})
        or forward(**call)
    )
    want = {
        "routed": lambda name: {},
        "known-head": lambda name: {"head": name},
        "oracle": lambda name: {"task": name},
        "shared": lambda name: {"weights": [0.0, 0.0, 0.0], "head": name},
    }
    assert set(want) == set(PROTOCOLS)
    for protocol in PROTOCOLS:
        calls.clear()
        got = evaluate(model, rows, protocol, batch_size=20)
        assert calls == [want[protocol](name) for name in EXPERTS]
        assert (got.routing_accuracy is None) == (protocol in ("oracle", "shared"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [1, 5, 32])
def test_a_score_is_that_of_the_same_rows_one_by_one(protocol, size, bench):
    model = bench.model
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    got = evaluate(model, rows, protocol, batch_size=size)
    for index, name in enumerate(EXPERTS):
        how = {"oracle": {"task": name}, "known-head": {"head": name}}.get(protocol, {})
        if protocol == "shared":
            how = {"weights": [0.0] * 3, "head": name}
        guesses, routed = [], 0
        for row in rows[name]:
            batch = pad(model.tokenizer, encode(model.tokenizer, [text_of(row)], 40).rows)
            with torch.no_grad():
                output = model(**batch, **how)
            if protocol in ("routed", "known-head"):  # also what is new, and runs without an expert
                routed += int(output.routed.probabilities.argmax()) == index
            value = output.logits[0, 0] if name == "law" else output.logits[0].argmax()
            guesses.append(float(value) if int(output.expert) == index else None)
        known = [guess for guess in guesses if guess is not None]
        instead = sum(known) / len(known) if name == "law" else -1.0
        filled = [instead if guess is None else guess for guess in guesses]
        truth = [float(row["label"]) for row in rows[name]]
        kind = "pearson_spearman" if name == "law" else "accuracy"
        assert got.tasks[name].score == pytest.approx(METRICS[kind](truth, filled), abs=1e-4)
        assert got.tasks[name].metric == kind and got.tasks[name].rows == 12
        if protocol in ("routed", "known-head"):
            assert got.tasks[name].routing_accuracy == routed / 12


def test_the_oracle_of_a_full_rank_merge_scores_as_the_experts_do(bench, tmp_path):
    merge(bench.made.base, bench.made.experts, tmp_path / "full", exclusive={"rank": "full"})
    model = load(tmp_path / "full")
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    prepared = prepare(model, rows)
    reference = {
        name: score_plain(model, expert_model(model, name, recipe_of(model)), name, task).score
        for name, task in prepared.items()
    }
    got = evaluate(model, prepared, "oracle", reference=reference)
    assert got.normalised() == pytest.approx(1.0, abs=1e-4)
    # By the way they are made, one label in five is not what the expert answers.
    assert reference["math"] == reference["code"] == pytest.approx(10 / 12)


def test_progress_counts_rows_up_to_all_of_them(bench):
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    seen = []
    evaluate(bench.model, rows, "oracle", progress=lambda *step: seen.append(step))
    assert seen == [("math", 0, 36), ("code", 12, 36), ("law", 24, 36), ("", 36, 36)]


# ------------------------------------------------------------------------------- rows and labels


def test_labels_may_be_the_names_of_classes(bench):
    rows = read_rows(bench.data / "code" / "test.jsonl.gz")
    names = bench.model.labels["code"]
    assert names == ["red", "green", "blue"]
    named = [row | {"label": names[row["label"]]} for row in rows]
    assert prepare(bench.model, {"code": named})["code"].truth == [r["label"] for r in rows]
    one, other = (evaluate(bench.model, {"code": r}, "oracle") for r in (rows, named))
    assert one.mean == other.mean


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"row 2: label 3 is not one of the expert's 3 classes \(0 to 2: red, green, blue\)"),
        (-1, "label -1 is not one of"),
        (0.5, "label 0.5 is not one of"),
        ("gren", "got 'gren'. Did you mean 'green'. Known: red, green, blue"),
        (None, "got None"),
        (True, "got True"),
        (float("nan"), "expected a finite number"),
    ],
)
def test_a_label_that_the_expert_does_not_have_is_named_with_its_row(label, message, bench):
    rows = [{"text": "code1", "label": 0}, {"text": "code1", "label": label}]
    with pytest.raises(InputError, match=message):
        prepare(bench.model, {"code": rows})


@pytest.mark.parametrize("label", ["high", None, float("inf")])
def test_a_regression_wants_finite_numbers(label, bench):
    with pytest.raises(InputError, match="task 'law', row 1: expected a finite number"):
        prepare(bench.model, {"law": [{"text": "law1", "label": label}]})


def test_bad_requests_are_refused_before_anything_runs(bench):
    rows = {"math": [{"text": "math1", "label": 0}]}
    with pytest.raises(InputError, match="task 'chess': no such expert. Known: math, code, law"):
        evaluate(bench.model, {"chess": rows["math"]})
    with pytest.raises(InputError, match="task 'math': expected at least one row"):
        evaluate(bench.model, {"math": []})
    with pytest.raises(InputError, match="at least one task"):
        evaluate(bench.model, {})
    with pytest.raises(InputError, match="no score of the expert 'math'"):
        evaluate(bench.model, rows, reference={"code": 1.0})


def test_an_unknown_protocol_lists_the_known_ones(bench):
    unchecked = inspect.unwrap(evaluate)  # past the test suite's type checker
    with pytest.raises(InputError, match="'best': expected one of routed, known-head, oracle"):
        unchecked(bench.model, {"math": [{"text": "math1", "label": 0}]}, "best")


def test_a_language_model_has_nothing_to_score(causal_bench):
    with pytest.raises(InputError, match="has no head with labels to score. Use `run`"):
        prepare(causal_bench.model, {"math": [{"text": "math1", "label": 0}]})


@pytest.mark.parametrize("outputs", [2, 1], ids=["classes", "regression"])
def test_heads_of_the_bases_shape_are_scored(outputs, tmp_path):
    cls, config = tf.BertForSequenceClassification, tf.BertConfig
    sizes = BERT | SIZES | {"num_labels": outputs}
    models = made(Family(cls, cls, config, sizes), tmp_path)
    save_tokenizer(models.base)
    manifest = merge(models.base, models.experts, tmp_path / "out", exclusive={"rank": "full"})
    assert {expert.outputs for expert in manifest.experts} == {None}
    model = load(tmp_path / "out")
    assert model.outputs == dict.fromkeys(EXPERTS, outputs)
    texts = ["math1", "the1 the2", "math3 the4 math5", "law1"]
    inputs = model.tokenizer(texts, return_tensors="pt", padding=True)
    logits = models.expert("math")(**inputs).logits
    own = logits[:, 0].tolist() if outputs == 1 else logits.argmax(dim=-1).tolist()
    rows = [{"text": text, "label": label} for text, label in zip(texts, own, strict=True)]
    got = evaluate(model, {"math": rows}, "oracle").tasks["math"]
    assert got.metric == ("accuracy" if outputs == 2 else "pearson_spearman")
    assert got.score == pytest.approx(1.0, abs=1e-4)


def test_rows_cut_to_the_limit_are_counted_in_the_score(bench):
    rows = read_rows(bench.data / "math" / "test.jsonl")
    lengths = [len(bench.model.tokenizer(*text_of(row))["input_ids"]) for row in rows]
    got = evaluate(bench.model, {"math": rows}, "oracle", max_tokens=10).tasks["math"]
    assert got.truncated == sum(length > 10 for length in lengths) > 0


# -------------------------------------------------------------------------- the experts themselves


def recipe_of(model, **moved: str) -> Recipe:
    """The recipe that a model was built from, experts in other places if given."""
    data = json.loads(json.dumps(model.manifest.recipe))
    for entry in data["models"]:
        entry["model"] = moved.get(entry["name"], entry["model"])
    return Recipe.model_validate(data)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_model_gives_the_checkpoints_own_outputs(name, bench):
    model = bench.model
    batch = pad(model.tokenizer, encode(model.tokenizer, [("math1 law2",), ("code1",)], 40).rows)
    with torch.no_grad():
        want = bench.made.expert(name)(**batch).logits
        got = expert_model(model, name, recipe_of(model))(**batch).logits
    assert torch.equal(got, want)


@pytest.fixture(scope="module")
def lora(bench, tmp_path_factory):
    """An artifact of two peft adapters with heads of their own, and the base's folder."""
    folder = tmp_path_factory.mktemp("lora")
    family, base = bench.family, opened(bench.family.base, bench.made.base)
    experts = {}
    for name, labels in (("one", 2), ("two", 3)):
        task = family.task(family.config(**family.sizes, num_labels=labels))
        perturb(task, 0.3, seed=name)
        inherit(task, base)
        experts[name] = adapter(
            task,
            folder / name,
            seed=name,
            task_type="SEQ_CLS",
            target_modules=["query", "value", "dense"],
            modules_to_save=["classifier"],
            r=2,
        )
    save(base, folder / "base")
    save_tokenizer(folder / "base")
    merge(str(folder / "base"), experts, folder / "artifact", exclusive={"rank": 4})
    return folder


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_expert_of_an_adapter_gives_what_peft_gives(name, lora, bench):
    model = load(lora / "artifact")
    batch = pad(model.tokenizer, encode(model.tokenizer, [("math1 law2",), ("code1",)], 40).rows)
    plain = opened(bench.family.task, merged_folder(str(lora / name)))
    with torch.no_grad():
        want = plain(**batch).logits
        got = expert_model(model, name, recipe_of(model))(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_expert_that_moved_is_found_where_one_says(bench, tmp_path):
    moved = shutil.copytree(bench.made.experts["math"], tmp_path / "moved")
    recipe = recipe_of(bench.model, math=str(moved))
    plain = expert_model(bench.model, "math", recipe, base=bench.made.base)
    assert plain.num_labels == 2


def test_an_expert_that_is_gone_is_an_error_that_names_its_folder(bench, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        expert_model(bench.model, "math", recipe_of(bench.model, math=str(tmp_path / "nowhere")))


def test_a_recipe_of_another_artifact_is_told(bench):
    recipe = recipe_of(bench.model)
    other = recipe.model_copy(update={"models": recipe.models[1:]})
    with pytest.raises(RecipeError, match="no expert 'math'"):
        expert_model(bench.model, "math", other)


def test_a_plain_model_is_scored_on_its_rows_in_any_batch_size(bench):
    model, rows = bench.model, read_rows(bench.data / "code" / "test.jsonl.gz")
    task = prepare(model, {"code": rows})["code"]
    plain = expert_model(model, "code", recipe_of(model))
    scores = [score_plain(model, plain, "code", task, batch_size=size) for size in (1, 5, 99)]
    assert {score.score for score in scores} == {10 / 12}
    assert scores[0].routing_accuracy is None and scores[0].rows == 12


def test_figures_come_with_commit_versions_and_hardware():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 1 << 20
    assert found["hardware"]["threads"] == torch.get_num_threads()
    if (Path(__file__).parents[1] / ".git").exists():
        assert len(found["commit"].rstrip("+")) == 12


def test_an_adapter_without_names_of_its_classes_is_warned_of(lora):
    warnings = load(lora / "artifact").manifest.warnings
    assert sum("carries no names of its" in warning for warning in warnings) == 2
