"""What is wrong with rows, settings or a router's files: one clear message, or a defined answer."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import call as call  # a fixture
from test_cli import fails as fails  # a fixture
from texts import as_row, sentences, write_rows
from tiny import EXPERTS, merge

from twinmerge.artifact.format import MANIFEST
from twinmerge.artifact.reader import Artifact
from twinmerge.data import encode, pad
from twinmerge.errors import InputError, TwinMergeError, UnsupportedModel
from twinmerge.recipe import Router as Settings
from twinmerge.runtime.load import load
from twinmerge.runtime.router.fit import fit_router

A_SHARPNESS = "expected auto, top or a number of at least 1"
Texts = dict[str, list[tuple[str, ...]]]


@pytest.fixture
def artifact(bench, tmp_path) -> Path:
    return shutil.copytree(bench.plain, tmp_path / "artifact")


def written(folder: Path, texts: Texts) -> Path:
    for name, rows in texts.items():
        write_rows(folder / f"{name}.jsonl", [as_row(text) for text in rows])
    return folder


def noise(draw: random.Random, length: int) -> str:
    """Control characters, and letters of many scripts."""
    return "".join(chr(draw.choice([*range(1, 32), *range(127, 2000)])) for _ in range(length))


def inputs_of(model, texts) -> dict[str, torch.Tensor]:
    return pad(model.tokenizer, encode(model.tokenizer, texts, 40).rows)


# -------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"law": t["law"][:1]}, r"expert 'law': expected at least 5 rows .* got 1"),
        (lambda t: t | {"law": []}, "law.jsonl: is empty; expected at least one row"),
        (
            lambda t: {k: v for k, v in t.items() if k != "law"},
            "no rows for expert 'law'. Expected",
        ),
        (lambda t: t | {"law": [*t["law"], ("",)]}, r"expert 'law': a row has no text, got \(''"),
        (lambda t: t | {"law": [*t["law"], (" \t ",)]}, "expert 'law': a row has no text, got"),
        (
            lambda t: t | {"law": [("law1 law2",)] * 9},
            "expert 'law': after setting rows aside none are left to fit on. Give more rows that",
        ),
    ],
    ids=["one row", "an empty file", "no file", "no text", "blanks", "one text"],
)
def test_rows_that_cannot_be_fitted_on_are_told_with_the_experts_name(
    change,
    message,
    artifact,
    bench,
    tmp_path,
    fails,
):
    data = written(tmp_path / "data", change(bench.texts(10)))
    before = (artifact / MANIFEST).read_bytes()
    assert re.search(message, fails("fit-router", artifact, data, "--quiet"), re.DOTALL)
    assert (artifact / MANIFEST).read_bytes() == before
    assert sorted(path.name for path in artifact.iterdir() if path.name[0] == ".") == []


def test_a_line_each_makes_a_router_of_prompts(artifact, bench, tmp_path, call):
    data = written(tmp_path / "data", bench.texts(1))
    done = call("fit-router", artifact, data, "--kind", "prompts", "--quiet", "--json")
    assert done.code == 0 and done.json["held_out_accuracy"] is None
    routed = load(artifact).routing(**inputs_of(load(artifact), [("math1 the1",)]))
    assert float(routed.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["prototype", "linear", "prompts", "projection"])
def test_the_same_rows_under_two_experts_are_told(kind, artifact, bench):
    texts = bench.texts(20)
    texts["law"] = texts["law"][:8] + texts["math"][:12]
    record = fit_router(artifact, texts, Settings(kind=kind, layer=1))
    said = [warning for warning in record.warnings if "12 texts are among the rows" in warning]
    assert len(said) == 1 and said[0].startswith("math and law: ")
    assert "task= or allowed=" in said[0]
    assert Artifact(artifact).manifest.router.warnings == record.warnings


def test_rows_of_one_expert_under_another_are_told(artifact, bench):
    texts = bench.texts(60) | {"code": sentences("law", 60, seed=4)}
    record = fit_router(artifact, texts, Settings(layer=0))
    of_code = record.confusion["code"]  # by turns, of all rows but the calibrating
    assert of_code.get("law", 0) >= 3
    told = [w for w in record.warnings if w.startswith(("code: ", "law: "))]
    assert any(f"{of_code['law']} of its 48 held-out rows look like law" in w for w in told)
    assert not any("math" in warning for warning in record.warnings)


def test_rows_that_are_where_they_belong_raise_no_warning(artifact, bench):
    assert fit_router(artifact, bench.texts(60), Settings(layer=0)).warnings == ()


def test_binary_noise_is_text_like_any_other(artifact, bench, tmp_path, call):
    draw = random.Random(0)
    texts = bench.texts(20) | {"law": [(noise(draw, 60),) for _ in range(20)]}
    data = written(tmp_path / "data", texts)
    done = call("fit-router", artifact, data, "--layer", 1, "--quiet", "--json")
    assert done.code == 0 and 0 <= done.json["held_out_accuracy"] <= 1
    lines = (noise(draw, 200).replace("\n", " ").replace("\r", " ") + "\n").encode()
    answered = call("run", artifact, "--quiet", stdin=lines)
    assert answered.code == 0 and len(answered.lines) == 1
    told = call("run", artifact, "--quiet", stdin=bytes(range(256)))
    assert told.code == 1 and "standard input: cannot be read as UTF-8 text" in told.err


def test_a_very_long_text_is_cut_and_the_answer_says_so(artifact, bench, tmp_path, call):
    long = " ".join(["law1"] * 10_000)
    texts = bench.texts(20)
    data = written(tmp_path / "data", texts | {"law": [*texts["law"], (long,)]})
    done = call("fit-router", artifact, data, "--layer", 1, "--quiet", "--json")
    assert done.code == 0 and done.json["max_tokens"] == 40  # what the model has positions for
    lines = f"{long}\n{' '.join(['law1'] * 30)}\n".encode()
    cut, whole = call("run", artifact, "--quiet", stdin=lines).lines
    assert cut["truncated"] is True and "truncated" not in whole
    told = call("fit-router", artifact, data, "--max-tokens", 10_000, "--quiet")
    assert told.code == 1 and "--max-tokens 10000: the model has 40 positions" in told.err


def test_an_empty_text_gets_an_answer(bench, call):
    lines = (json.dumps({"text": ""}) + "\n").encode()
    (row,) = call("run", bench.routed, "--quiet", stdin=lines).lines
    assert row["expert"] in EXPERTS and 0 < row["confidence"] <= 1
    model = bench.model
    routed = model.routing(**inputs_of(model, [("",), ("math1 the1",)]))
    assert bool(routed.probabilities.isfinite().all())


# ---------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("DATA --sharpness 0.5", f"--sharpness: {A_SHARPNESS}, got 0.5.$"),
        ("DATA --sharpness inf", f"--sharpness: {A_SHARPNESS}, got inf.$"),
        ("DATA --sharpness low", f"--sharpness: {A_SHARPNESS}, got 'low'.$"),
        ("--kind none --weights math", "--weights math: expected names and numbers, `a=0.7,b=0.3`"),
        ("--kind none --weights math=x", "--weights math=x: expected names and numbers"),
        ("--kind none --weights math=1=2", "expected names and numbers"),
        ("--kind none --weights math=1,math=2", "math=1,math=2: expected every name once"),
        ("--kind none --weights maths=1", "'maths': no such expert. Did you mean 'math'"),
        ("--kind none --weights math=-1,law=2", "router weights: expected numbers above 0, got"),
        ("--kind none --weights math=0", "router weights: expected numbers above 0, got"),
        ("--kind none --weights math=nan", "--weights: Input should be a finite number, got nan"),
        ("--kind linear --weights math=1", "only a router of --kind none has fixed weights"),
        ("--kind none --encoder there", "--encoder there: a router of --kind none reads no text"),
        ("--kind none --examples 2", "--examples 2: expected DATA, whose rows are kept; got none"),
        ("--kind protype", "--kind: expected none, projection, .* or auto, got 'protype'.$"),
        ("--kind mlp --auto", "--auto compares kinds. Give one of them"),
        ("--kind prompts", "router kind prompts: expected texts of every expert, got none"),
        ("", "kinds projection and none"),
        ("--kind projection --layer 0", "router layer 0: a projection reads within blocks, 1 to 2"),
        ("--kind projection --layer 1,3", "a projection reads within blocks, 1 to 2 here"),
        ("DATA --layer 9", r"router layer 9: this model has layers 0 \(the embeddings\) to 2"),
        ("DATA --layer 0,9", "router layer 9: this model has layers 0"),
        ("DATA --layer last", "--layer: expected auto, an integer .* in a list, got 'last'.$"),
        ("DATA --layer -1", "--layer: expected auto, an integer of at least 0"),
        ("DATA --layer 1,1", r"several different ones in a list, got \[1, 1\].$"),
        ("DATA --layer auto,1", "--layer: expected auto, an integer of at least 0"),
        ("DATA --coverage 0", "--coverage: Input should be greater than 0, got 0.0"),
        ("DATA --coverage 1.5", "--coverage: Input should be less than or equal to 1, got 1.5"),
        ("DATA --coverage nan", "--coverage: Input should be a finite number"),
        ("DATA --pooling max", "--pooling: Input should be 'mean', 'first' or 'last', got 'max'"),
        ("DATA --rows 0", "--rows: Input should be greater than or equal to 1, got 0"),
        ("DATA --rows 3", "expected at least 5 rows to fit and check a router, got 3"),
        ("DATA --encoder there --layer 1", "layer: an encoder of the router's own is read at its"),
        ("DATA --encoder /not/there", "/not/there: cannot be opened .there is no such folder"),
        ("DATA --encoder DATA", "router encoder .*data: cannot be opened .* Expected a folder or"),
    ],
)
def test_settings_that_make_no_sense_are_told(
    words,
    message,
    artifact,
    bench,
    tmp_path,
    fails,
):
    data = written(tmp_path / "data", bench.texts(8))
    given = [data if word == "DATA" else word for word in words.split()]
    said = fails("fit-router", artifact, *given, "--quiet")
    assert re.search(message, said.strip(), re.DOTALL), said
    assert "Value error" not in said


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            dict(calibration=0.5, held_out=0.5),
            "^error: calibration and held_out: expected less tha",
        ),
        (dict(calibration=0), "--calibration: Input should be greater than 0, got 0"),
    ],
)
def test_a_recipe_that_leaves_no_row_to_fit_on_is_told(
    section,
    message,
    artifact,
    bench,
    tmp_path,
    fails,
):
    data = json.loads((artifact / MANIFEST).read_text())
    data["recipe"]["router"] = section
    (artifact / MANIFEST).write_text(json.dumps(data))
    said = fails("fit-router", artifact, written(tmp_path / "data", bench.texts(8)), "--quiet")
    assert re.search(message, said)


@pytest.mark.parametrize("exclusive", [{"rank": "none"}, {"form": "magnitude", "density": 0.1}])
def test_a_projection_needs_factors(exclusive, bench, tmp_path, fails):
    merge(bench.made.base, bench.made.experts, tmp_path / "out", exclusive=exclusive)
    said = fails("fit-router", tmp_path / "out", "--kind", "projection", "--quiet")
    assert "router kind projection: block 1 holds no factors" in said and "another kind" in said
    with pytest.raises(UnsupportedModel):
        fit_router(tmp_path / "out", None, Settings(kind="projection"))


# --------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", ["prototype", "linear", "mlp", "prompts"])
def test_a_model_whose_hidden_states_overflow_is_told(kind, artifact, bench, monkeypatch):
    from twinmerge.runtime.router.features import FeatureReader

    read = FeatureReader.read

    def overflowing(self, inputs, wanted):
        found = read(self, inputs, wanted)
        return {key: x.index_fill(1, torch.tensor([2]), float("nan")) for key, x in found.items()}

    monkeypatch.setattr(FeatureReader, "read", overflowing)
    with pytest.raises(InputError, match="NaN or infinity in the shared expert's hidden states"):
        fit_router(artifact, bench.texts(8), Settings(kind=kind, layer=1, epochs=2))


@pytest.mark.parametrize("kind", ["prototype", "linear", "mlp", "prompts"])
def test_a_layer_that_says_the_same_of_every_row_is_told(kind, artifact, bench, monkeypatch):
    from twinmerge.runtime.router.features import FeatureReader

    def same(self, inputs, wanted):
        return {key: torch.ones(len(inputs["input_ids"]), 16) for key in wanted}

    monkeypatch.setattr(FeatureReader, "read", same)
    with pytest.raises(InputError, match="all rows give the same features"):
        fit_router(artifact, bench.texts(8), Settings(kind=kind, layer=1, epochs=2))


# ---------------------------------------------------------------------------- how many experts


def of_experts(bench, folder: Path, count: int) -> tuple[Path, Texts]:
    """An artifact of this many experts and rows for each; experts are scaled copies of three."""
    experts, texts = {}, {}
    for index in range(count):
        kind, name = EXPERTS[index % 3], f"expert{index}"
        experts[name] = str(shutil.copytree(bench.made.experts[kind], folder / name))
        path = folder / name / "model.safetensors"
        tensors = {
            key: tensor * (1 + 0.01 * index) if tensor.is_floating_point() else tensor
            for key, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
        texts[name] = [
            (f"{words[0]} the{index % 20} the{index * 7 % 20}",)
            for words in sentences(kind, 8, seed=index)
        ]
    merge(bench.made.base, experts, folder / "artifact", exclusive={"rank": 2})
    return folder / "artifact", texts


@pytest.mark.parametrize(
    "count", [1, 2, pytest.param(40, marks=pytest.mark.slow)], ids=["one", "two", "forty"]
)
def test_every_kind_takes_one_expert_two_and_forty(count, bench, tmp_path):
    folder, texts = of_experts(bench, tmp_path, count)
    kinds = ["none", "projection", "prompts", "prototype", "linear", "mlp", "auto"]
    if count == 1:
        kinds.remove("projection")  # below
    for kind in kinds if count < 40 else ("projection", "auto"):
        asked: dict[str, Any] = dict(kind=kind, layer=1, epochs=2, hidden=8)
        fit_router(folder, None if kind == "none" else texts, Settings(**asked))
        model = load(folder)
        routed = model.routing(**inputs_of(model, [("math1 the1",), ("zzz",)]))
        assert routed.weights.shape == (2, count)
        torch.testing.assert_close(routed.probabilities.sum(dim=1), torch.ones(2))
        sums = routed.weights.sum(dim=1)
        torch.testing.assert_close(sums[~routed.new], torch.ones(int((~routed.new).sum())))
        assert bool((sums[routed.new] < 1).all())
        if count == 1:
            assert torch.equal(routed.weights, torch.ones(2, 1)) and model.router.novelty is None


def test_one_expert_has_nothing_to_project_on(bench, tmp_path):
    folder, _ = of_experts(bench, tmp_path, 1)  # it is the shared expert itself
    with pytest.raises(TwinMergeError, match="holds no factors"):
        fit_router(folder, None, Settings(kind="projection"))
