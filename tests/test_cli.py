"""The command line: results on stdout, all else on stderr, a mistake is one message and code 1."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import binomtest
from texts import EXPERTS, LABELS, as_row, sentences, write_rows

import twinmerge
from twinmerge import cli, show
from twinmerge.artifact.reader import Artifact
from twinmerge.data import drawn, read_rows
from twinmerge.runtime.load import load


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def call(monkeypatch, capfd):
    """`twinmerge WORDS` by `main()`, as the console script calls it."""

    def run(*words: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["twinmerge", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def fails(call):
    """A call that must end with 1, one message on stderr, nothing on stdout, and no traceback."""

    def run(*words: object, stdin: bytes = b"") -> str:
        done = call(*words, stdin=stdin)
        assert done.code == 1 and done.out == "", (done.code, done.out, done.err)
        assert done.err.count("error: ") == 1 and "Traceback" not in done.err
        return done.err[done.err.index("error: ") :]

    return run


# ------------------------------------------------------------------------------------- merge


def test_merge_builds_what_the_recipe_says_with_paths_beside_it(call, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's relative paths count from the recipe
    done = call("merge", bench.recipe, tmp_path / "out", "--json")
    assert done.code == 0
    manifest = Artifact(tmp_path / "out").manifest
    assert [e["name"] for e in done.json["experts"]] == list(manifest.names) == list(EXPERTS)
    assert manifest.base == "./base" and manifest.experts[0].reference == "./math"
    assert done.json["router"] is None and done.json["merge_method"] == "linear"
    sizes = done.json["bytes"]
    assert sizes["experts"] == sum(e.bytes for e in manifest.experts)
    assert sizes["all"] == sum((tmp_path / "out" / name).stat().st_size for name in manifest.files)


def test_merge_prints_a_table_for_people(call, bench, tmp_path):
    done = call("merge", bench.recipe, tmp_path / "out")
    assert done.code == 0 and "3 experts of ./base" in done.out
    assert all(name in done.out for name in EXPERTS) and "fit-router" in done.out


def test_a_dry_run_writes_nothing_and_its_numbers_hold(call, bench, tmp_path):
    done = call("merge", bench.recipe, tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0 and not list(tmp_path.iterdir())
    real = call("merge", bench.recipe, tmp_path / "out", "--json").json
    manifest = Artifact(tmp_path / "out").manifest
    said = done.json
    assert said["experts"] == 3 and said["model_class"] == manifest.model_class
    assert said["shared_bytes"] == real["bytes"]["shared"]
    assert sum(said["tensors"].values()) == len(manifest.tensors)
    stored = [
        sum(tensor.experts[name].bytes for tensor in manifest.tensors if name in tensor.experts)
        for name in EXPERTS
    ]
    assert said["bytes_per_expert_at_most"] >= max(stored) > said["bytes_per_expert_at_most"] / 2
    largest = max(tensor.bytes for tensor in manifest.tensors)
    assert largest <= said["peak_memory_bytes"] <= 20 * largest


def test_a_dry_run_for_people_names_the_same_bytes(call, bench, tmp_path):
    done = call("merge", bench.recipe, tmp_path / "out", "--dry-run")
    said = call("merge", bench.recipe, tmp_path / "out", "--dry-run", "--json").json
    assert done.out.startswith("nothing written")
    assert f"bytes per expert at most: {said['bytes_per_expert_at_most']:,}" in done.out


def test_merge_takes_another_base_from_where_one_stands(call, bench, tmp_path, monkeypatch):
    shutil.copytree(bench.made.base, tmp_path / "base")  # as the recipe has one beside it, too
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"_mark": "mine"}))
    assert call("merge", bench.recipe, "out", "--base", "base").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_mark"] == "mine"
    assert Artifact("out").manifest.base == "base"


def test_shards_hold_no_more_than_asked(call, bench, tmp_path):
    call("merge", bench.recipe, tmp_path / "out", "--max-shard-bytes", 4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def edited(bench, tmp_path: Path, **changes) -> Path:
    """The bench's recipe with other keys, and absolute paths."""
    recipe = json.loads(bench.recipe.read_text())
    recipe["base_model"] = bench.made.base
    for entry, folder in zip(recipe["models"], bench.made.experts.values(), strict=True):
        entry["model"] = folder
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclusiv": {}}, "exclusiv: unknown key. Did you mean 'exclusive'?"),
        ({"merge_method": "tise"}, "no method 'tise'. Did you mean 'ties'?"),
        ({"base_model": "./nowhere/base"}, "nowhere"),
        ({"models": []}, "at least one expert"),
    ],
)
def test_a_wrong_recipe_is_one_message(changes, message, fails, bench, tmp_path):
    said = fails("merge", edited(bench, tmp_path, **changes), tmp_path / "out")
    assert message in said and not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_named(fails, tmp_path):
    assert "gone.yaml: cannot read the recipe" in fails("merge", tmp_path / "gone.yaml", "out")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_folder_that_is_not_empty_is_left_alone(dry, fails, bench, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    said = fails("merge", bench.recipe, tmp_path / "out", *dry)
    assert "is not empty" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --------------------------------------------------------------------------------- fit-router


def test_fit_router_stores_a_router_and_says_how_good_it_is(call, bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    done = call("fit-router", folder, bench.data, "--json")
    entry = Artifact(folder).manifest.router
    assert done.code == 0 and done.json == entry.model_dump(mode="json") | {"said": entry.said}
    assert entry.kind == "prototype" and entry.sharpness == 1  # the recipe's router section
    assert "twinmerge fit-router" not in (folder / "README.md").read_text()


def test_options_of_fit_router_win_over_the_recipe(call, bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    words = ("--layer", 1, "--rows", 10, "--split", "validation", "--columns", "text")
    words += ("--kind", "mlp", "--sharpness", "top", "--coverage", 0.9)
    done = call("fit-router", folder, bench.data, *words)
    entry = Artifact(folder).manifest.router
    assert done.code == 0 and [each.layers for each in entry.tried] == [(1,)]
    assert (entry.kind, entry.sharpness, entry.novelty.coverage) == ("mlp", "top", 0.9)
    # Of 10 rows each, 2 calibrate; the router that is stored learns from the others, and, as they
    # are few, each of them was held out once.
    assert entry.rows == dict.fromkeys(EXPERTS, 8) and entry.held_out_rows == 24
    assert entry.calibration_rows == 6 and entry.refitted
    assert f"{entry.held_out_accuracy:.1%} of {entry.held_out_rows} held-out rows" in done.out
    low, high = binomial(entry.held_out_accuracy, entry.held_out_rows)
    assert f"(95 % interval {low:.1%} to {high:.1%})" in done.out


def binomial(rate: float, rows: int) -> tuple[float, float]:
    found = binomtest(round(rate * rows), rows).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def test_tasks_that_are_no_expert_are_noted_on_stderr(call, bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    data = shutil.copytree(bench.data, tmp_path / "data")
    write_rows(data / "chess" / "train.jsonl", [{"text": "e4"}])
    done = call("fit-router", folder, data, "--json", "--layer", "0")
    assert done.code == 0 and "'chess' is no expert" in done.err and "chess" not in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--layer", "first"),
            "--layer: expected auto, an integer of at least 0 .* got 'first'\\.$",
        ),
        (("--layer", "²"), "--layer: expected auto, an integer"),
        (("--layer", "7"), "router layer 7: this model has layers 0"),
        (("--rows", "0"), "--rows: "),
        (("--split", "dev"), "no rows for expert 'math' and 2 others"),
        (("--columns", "body"), "expected text in body"),
        (("--max-tokens", "99"), "the model has 40 positions"),
        (("--max-tokens", "2"), "--max-tokens 2: too few"),
    ],
)
def test_a_wrong_option_of_fit_router_is_one_message(words, message, fails, bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    assert re.search(message, fails("fit-router", folder, bench.data, *words))
    assert Artifact(folder).manifest.router is None


# ---------------------------------------------------------------------------------------- run


def mixed(count: int = 3) -> list[tuple[str, ...]]:
    return [
        text for row in zip(*(sentences(n, count, 9) for n in EXPERTS), strict=True) for text in row
    ]


def test_run_answers_every_line_in_its_order(call, bench, tmp_path):
    texts = mixed()
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join("\t".join(text) for text in texts) + "\n")
    done = call("run", bench.routed, file, "--batch-size", 2)
    assert done.code == 0
    assert [
        tuple(line[k] for k in ("text", "text_pair") if k in line) for line in done.lines
    ] == texts
    for line in done.lines:
        best = max(line["weights"], key=line["weights"].get)
        assert line["expert"] == best and line["weight"] == line["weights"][best]
        assert sum(line["weights"].values()) == pytest.approx(1, abs=0.002)
        if line["expert"] == "law":
            assert isinstance(line["answer"], float) and "score" not in line
        else:
            assert line["answer"] in LABELS[line["expert"]] and 0 < line["score"] <= 1
    assert len({line["expert"] for line in done.lines}) == 3


def test_answers_do_not_depend_on_the_batch_size_nor_on_their_neighbours(call, bench):
    stdin = "".join(json.dumps(as_row(text)) + "\n" for text in mixed()).encode()
    runs = [call("run", bench.routed, "--batch-size", n, stdin=stdin).lines for n in (1, 4, 32)]
    for lines in runs[1:]:
        for one, other in zip(runs[0], lines, strict=True):
            assert one["expert"] == other["expert"] and one["text"] == other["text"]
            assert one["weight"] == pytest.approx(other["weight"], abs=2e-4)


def test_json_lines_keep_their_own_columns_and_line_separators(call, bench):
    row = {"id": 7, "sentence1": "math1\u2028math2", "sentence2": "the1\x0bthe2", "label": "ä"}
    done = call("run", bench.routed, stdin=json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert done.code == 0
    answers = [json.loads(line) for line in done.out.split("\n") if line]
    assert len(answers) == 1 and answers[0].items() >= row.items()


def test_task_uses_that_expert_for_every_row(call, bench):
    stdin = "".join("\t".join(text) + "\n" for text in mixed()).encode()
    lines = call("run", bench.plain, "--task", "code", stdin=stdin).lines  # no router needed
    assert {line["expert"] for line in lines} == {"code"}
    assert all(
        line["weights"] == {"code": 1.0} and line["answer"] in LABELS["code"] for line in lines
    )


def test_a_cut_row_says_so(call, bench):
    stdin = f"{'math1 ' * 20}\nmath1 the1\n".encode()
    lines = call("run", bench.routed, "--max-tokens", 8, stdin=stdin).lines
    assert [line.get("truncated") for line in lines] == [True, None]


def test_columns_called_as_ours_are_renamed_in_every_row_also_of_a_regression(call, bench):
    ours = {"expert": 1, "weight": 2, "answer": "mine", "score": 4.2, "weights": 3, "truncated": 5}
    stdin = json.dumps({"text": "law1 the2", "id": 7} | ours).encode()
    for task in ("law", "math"):  # a regression has no score
        line = call("run", bench.plain, "--task", task, stdin=stdin).lines[0]
        assert {key: line[f"input_{key}"] for key in ours} == ours and line["id"] == 7
        assert "truncated" not in line and ("score" in line) == (task == "math")


def test_a_dtype_is_what_the_model_runs_in(call, bench):
    whole, half, wrong = (
        call("run", bench.routed, "--dtype", name, stdin=b"good\n")
        for name in ("auto", "bfloat16", "int8")
    )
    assert whole.code == half.code == 0
    assert whole.json["score"] != half.json["score"]
    assert whole.json["score"] == pytest.approx(half.json["score"], rel=0.05)
    assert wrong.code == 1 and "dtype='int8': expected a float dtype" in wrong.err


def test_a_column_that_is_no_text_is_told_by_name_and_value(call, bench):
    done = call("run", bench.routed, stdin=b'{"text": "math1"}\n{"text": 3}\n')
    assert done.code == 1
    told = "standard input: row 2: a row's column text holds 3 (int); expected text, in quotes"
    assert told in done.err


def test_fixed_weights_are_no_confidence(call, bench, tmp_path):
    out = shutil.copytree(bench.plain, tmp_path / "out")
    call("fit-router", out, "--kind", "none", "--weights", "math=0.7,law=0.3")
    (line,) = call("run", out, stdin=b"math1 math2\n").lines
    assert "confidence" not in line and line["weights"] == {"math": 0.7, "law": 0.3}


def test_the_version_is_told(call):
    done = call("--version")
    assert done.code == 0 and done.out == f"twinmerge {twinmerge.__version__}\n"


def test_columns_name_the_text(call, bench):
    stdin = b'{"body": "math1 the1", "text": "law1"}\n'
    named = call("run", bench.routed, "--columns", "body", stdin=stdin).lines[0]
    plain = call("run", bench.routed, stdin=b"math1 the1\n").lines[0]
    assert named["weights"] == plain["weights"]


def test_a_language_model_writes_on(call, causal_bench):
    texts = mixed(2)
    stdin = "".join(json.dumps(as_row(text)) + "\n" for text in texts).encode()
    words = ("run", causal_bench.routed, "--max-new-tokens", 5)
    lines = call(*words, stdin=stdin).lines
    assert [line["expert"] in EXPERTS for line in lines] == [True] * 6
    model = causal_bench.model
    for text, line in zip(texts, lines, strict=True):
        inputs = model.tokenizer(*text, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        start = inputs["input_ids"].shape[1]
        assert line["answer"] == model.tokenizer.decode(new[0, start:], skip_special_tokens=True)
    forced = call(*words, "--task", "law", stdin=stdin).lines
    assert {line["expert"] for line in forced} == {"law"}


def test_a_prompt_is_cut_to_what_new_tokens_leave_of_the_positions(call, fails, causal_bench):
    stdin = ("math1 the1 " * 20 + "\n" + "math1 the1\n").encode()  # 41 tokens and 3, of 40
    words = ("run", causal_bench.plain, "--task", "math", "--max-new-tokens")
    lines = call(*words, 30, stdin=stdin).lines
    assert [line.get("truncated") for line in lines] == [True, None]
    (cut,) = call(*words, 30, "--max-tokens", 10, stdin=stdin.split(b"\n")[0]).lines
    assert cut["answer"] == lines[0]["answer"]
    message = "--max-new-tokens 40: expected fewer than the model's 40 positions"
    assert message in fails(*words, 40, stdin=stdin)


@pytest.mark.parametrize("which", ["bench", "causal_bench"])
def test_top_k_and_threshold_restrict_the_weights_and_say_what_they_dropped(which, call, request):
    artifact = request.getfixturevalue(which).routed
    stdin = "".join(json.dumps(as_row(text)) + "\n" for text in mixed(2)).encode()
    words = ("run", artifact, "--max-new-tokens", 3)
    whole = call(*words, stdin=stdin).lines
    assert not any("dropped" in line for line in whole)
    for option, kept in (
        (("--top-k", 1), lambda row: [max(row)]),
        (("--top-k", 2), lambda row: sorted(row)[-2:]),
        (("--threshold", 0.3), lambda row: [weight for weight in row if weight >= 0.3]),
    ):
        for before, line in zip(whole, call(*words, *option, stdin=stdin).lines, strict=True):
            weights = list(before["weights"].values())
            assert sorted(line["weights"].values()) == pytest.approx(sorted(kept(weights)))
            lost = sum(weights) - sum(kept(weights))
            assert line["dropped"] == pytest.approx(lost, abs=2e-3)
            assert line["expert"] == before["expert"]


def test_a_row_whose_weights_are_all_dropped_runs_as_the_shared_expert(call, bench):
    text = next(text[0] for text in mixed(6) if len(text) == 1)
    words = ("run", bench.routed, "--threshold", 0.99999)
    (line,) = call(*words, stdin=text.encode()).lines
    assert line["weights"] == {} and line["weight"] == 0 and line["dropped"] == pytest.approx(1)
    inputs = bench.model.tokenizer(text, return_tensors="pt")
    zeros = [0.0] * len(EXPERTS)
    shared = bench.model(**inputs, weights=zeros, head=line["expert"])
    (want,) = bench.model.answers(shared)
    assert line["answer"] == (want.label or pytest.approx(want.score, abs=1e-3))


def test_a_new_row_gets_less_of_its_expert_and_the_likeliest_head(call, bench):
    text, model = "nowhere nowhere nowhere nowhere", load(bench.watchful)
    (own,) = bench.texts(2)["math"][1]  # one of the rows that the router is fitted on
    known, new = call("run", bench.watchful, stdin=f"{own}\n{text}\n".encode()).lines
    assert sum(known["weights"].values()) == pytest.approx(1, abs=2e-3) and "new" not in known
    inputs = model.tokenizer(text, return_tensors="pt")
    routed = model.routing(**inputs)
    likeliest = EXPERTS[int(routed.probabilities.argmax())]
    assert bool(routed.new) and new["new"] is True
    assert sum(new["weights"].values()) < 0.9 and new["expert"] == likeliest
    (want,) = model.answers(model(**inputs, weights=routed.weights, head=likeliest))
    assert new["answer"] == (want.label or pytest.approx(want.score, abs=1e-3))


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (("--threshold", "1"), b"a\n", "threshold=1.0: expected a weight from 0 to below 1"),
        (("--task", "lew"), b"a\n", "'lew': no such expert. Did you mean 'law'?"),
        ((), b"", "standard input: no rows to answer"),
        ((), b"a\tb\tc\n", "standard input, line 1: expected one text, or two"),
        ((), b'{"text": "a"}\n\n{"text"\n', "standard input, line 3: not JSON"),
        ((), b'{"txt": "a"}\n', "a row has the columns txt"),
        ((), b"\xff\xfe\n", "standard input: cannot be read as UTF-8"),
        (("--columns", "a,b,c"), b'{"a": "a"}\n', "expected one column, or two for a pair"),
        (("--device", "warp"), b"a\n", "--device warp: cannot be used here"),
        (("--max-tokens", "0"), b"a\n", "--max-tokens 0: expected at least 1"),
        (("no-such-file.txt",), b"", "no-such-file.txt: there is no such file"),
    ],
)
def test_a_wrong_request_of_run_is_one_message(words, stdin, message, fails, bench):
    assert message in fails("run", bench.routed, *words, stdin=stdin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_message(fails, bench):
    assert "--device cuda: cannot be used here" in fails(
        "run", bench.routed, "--device", "cuda", stdin=b"a\n"
    )


def test_without_a_router_run_says_how_to_get_one(fails, bench):
    assert "twinmerge fit-router" in fails("run", bench.plain, stdin=b"math1\n")


def test_a_folder_that_is_no_artifact_is_named(fails, tmp_path):
    for words in (("run", tmp_path), ("inspect", tmp_path), ("eval", tmp_path, tmp_path)):
        assert f"{tmp_path}: expected a folder written by 'twinmerge merge'" in fails(
            *words, stdin=b"a\n"
        )


# --------------------------------------------------------------------------------------- eval


def test_eval_scores_every_protocol_as_the_library_does(call, bench):
    from twinmerge.data import read_tasks
    from twinmerge.evaluation.score import PROTOCOLS, evaluate

    words = [word for protocol in PROTOCOLS for word in ("--protocol", protocol)]
    done = call("eval", bench.routed, bench.data, *words, "--json")
    assert done.code == 0 and done.json["split"] == "test"
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    for got, protocol in zip(done.json["reports"], PROTOCOLS, strict=True):
        want = evaluate(bench.model, rows, protocol).to_dict()
        assert got["protocol"] == protocol and got["normalised"] is None
        assert {n: t["score"] for n, t in got["tasks"].items()} == pytest.approx(
            {n: t["score"] for n, t in want["tasks"].items()}
        )


def test_eval_normalises_by_the_experts_themselves(call, bench, monkeypatch):
    done = call(
        "eval",
        bench.routed,
        bench.data,
        "--experts",
        bench.recipe,
        "--json",
        "--protocol",
        "oracle",
    )
    report = done.json["reports"][0]
    assert report["tasks"]["math"]["expert"] == pytest.approx(10 / 12)
    ratios = [task["score"] / task["expert"] for task in report["tasks"].values()]
    assert report["normalised"] == pytest.approx(sum(ratios) / 3)


def test_eval_restricts_routed_weights_and_records_it(call, bench):
    protocols = [word for p in ("routed", "known-head", "oracle") for word in ("--protocol", p)]
    words = ("eval", bench.routed, bench.data, "--rows", 6, *protocols)
    plain = call(*words, "--json").json["reports"]
    routed, known, oracle = call(*words, "--top-k", 1, "--threshold", 0.2, "--json").json["reports"]
    for report in (routed, known):
        assert report["top_k"] == 1 and report["threshold"] == 0.2
        assert all(0 < task["dropped"] < 0.67 for task in report["tasks"].values())
    for report in (*plain, oracle):  # nothing that could be dropped, nothing recorded
        assert not {"top_k", "threshold"} & set(report)
        assert not any("dropped" in task for task in report["tasks"].values())
    assert [r["routing_accuracy"] for r in (routed, known, oracle)] == [
        r["routing_accuracy"] for r in plain
    ]
    said = call(*words, "--top-k", 1).out
    assert said.count("top_k 1: ") == 2 and "of a row's weight dropped on average" in said


@pytest.mark.parametrize("command", ["eval", "report"])
def test_some_rows_are_drawn_as_files_may_be_sorted(command, call, bench, tmp_path, monkeypatch):
    real, asked = drawn, []
    monkeypatch.setattr("twinmerge.data.drawn", lambda *a: asked.append(a) or real(*a))
    places = ("--to", tmp_path / "page.html") if command == "report" else ()
    call(command, bench.routed, bench.data, *places, "--rows", 6)
    assert [most for _, most in asked] == [6] * 3 and all(len(rows) > 6 for rows, _ in asked)


def test_eval_prints_a_table_for_people(call, bench, monkeypatch):
    monkeypatch.chdir(bench.folder)
    done = call(
        "eval", bench.routed, bench.data, "--experts", bench.recipe, "--rows", 6, "--max-tokens", 10
    )
    assert "protocol: routed" in done.out and "normalised" in done.out
    assert "rows were cut to fit" in done.err and "routed right" in done.out


def test_an_expert_that_scores_nothing_ends_in_no_division_by_zero(call, bench, tmp_path):
    data = shutil.copytree(bench.data, tmp_path / "data")
    rows = [r for i, r in enumerate(read_rows(data / "math" / "test.jsonl")) if i % 5 == 4]
    write_rows(data / "math" / "test.jsonl", rows)  # the rows that it gets wrong
    asked = ("eval", bench.routed, data, "--experts", bench.recipe, "--protocol", "oracle")
    done = call(*asked)
    assert done.code == 0 and "normalised " not in done.out.splitlines()[-1]
    again = call(
        "eval", bench.routed, data, "--experts", bench.recipe, "--protocol", "oracle", "--json"
    )
    assert again.json["reports"][0]["normalised"] is None


def test_wrong_requests_of_eval_are_one_message(fails, bench, tmp_path):
    assert "--protocol best: expected one of routed, known-head, oracle, shared" in fails(
        "eval", bench.routed, bench.data, "--protocol", "best"
    )
    assert "no rows for expert 'math'" in fails("eval", bench.routed, bench.data, "--split", "dev")
    assert "nowhere" in fails("eval", bench.routed, tmp_path / "nowhere")
    assert "fit-router" in fails("eval", bench.plain, bench.data)


# ------------------------------------------------------------------------------------ inspect


def test_inspect_tells_what_the_manifest_says(call, bench):
    manifest = Artifact(bench.routed).manifest
    got = call("inspect", bench.routed, "--json", "--tensors").json
    assert got["base"] == manifest.base and got["model_class"] == manifest.model_class
    assert got["tensors"] == [record.model_dump(mode="json") for record in manifest.tensors]
    for told, expert in zip(got["experts"], manifest.experts, strict=True):
        assert (told["name"], told["bytes"], told["drift"]) == (
            expert.name,
            expert.bytes,
            expert.drift,
        )
        assert told["max_rank"] == 4 and told["kind"] == "full"
        assert 0 < told["mean_relative_error"] < 1
        assert told["share_of_base"] == pytest.approx(expert.bytes / got["bytes"]["shared"])
    assert got["router"]["bytes"] == got["bytes"]["router"] == manifest.router.bytes
    assert "tensors" not in call("inspect", bench.routed, "--json").json


def test_inspect_for_people_names_experts_bytes_router_and_tensors(call, bench):
    done = call("inspect", bench.routed, "--tensors")
    manifest = Artifact(bench.routed).manifest
    assert all(record.name in done.out for record in manifest.tensors)
    assert f"router: {manifest.router.said}" in done.out
    assert "router: none yet" in call("inspect", bench.plain).out


def test_inspect_notices_a_changed_byte_unless_told_not_to_look(call, fails, bench, tmp_path):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    file = folder / "experts" / "math.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "SHA-256 differs" in fails("inspect", folder)
    assert call("inspect", folder, "--no-check").code == 0


# ----------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("command", ["", "merge", "fit-router", "run", "eval", "inspect"])
def test_every_command_explains_itself(command, call):
    done = call(*([command] if command else []), "--help")
    assert done.code == 0 and "Usage" in done.out and len(done.out.splitlines()) > 8


@pytest.mark.parametrize(
    "words",
    [("mrege",), ("merge",), ("run", "x", "--batch-size", "0"), ("run", "x", "--top-k", "0")],
)
def test_a_line_that_cannot_be_parsed_ends_with_usage_and_no_traceback(words, call):
    done = call(*words)
    assert done.code == 2 and "Usage" in done.err and "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_installed_program_keeps_progress_off_stdout_and_tracebacks_away(bench):
    """In processes of their own, as a shell calls it."""
    program = [sys.executable, "-m", "twinmerge.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def shell(*words: object, **options):
        command = [*program, *map(str, words)]
        return subprocess.run(command, capture_output=True, env=environment, **options)

    done = shell("run", bench.routed, input="math1 Bär\n".encode())
    assert done.returncode == 0 and done.stderr == b""
    assert json.loads(done.stdout)["text"] == "math1 Bär"
    done = shell("inspect", "/nowhere")
    assert (
        done.returncode == 1 and done.stdout == b"" and done.stderr.startswith(b"error: /nowhere")
    )


def test_a_mistake_of_ours_is_a_traceback(monkeypatch, bench):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(show, "summarise", broken)
    monkeypatch.setattr(sys, "argv", ["twinmerge", "inspect", str(bench.plain)])
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_eval_tells_when_its_rows_may_be_those_that_the_router_was_fitted_on(call, bench, tmp_path):
    for name in EXPERTS:
        write_rows(tmp_path / f"{name}.jsonl", read_rows(next((bench.data / name).glob("test*"))))
    done = call("eval", bench.routed, tmp_path, "--protocol", "oracle")
    assert done.code == 0 and "has one file and no test part" in done.err
    assert "no test part" not in call("eval", bench.routed, bench.data, "--rows", 2).err


def test_a_wrong_folder_is_told_before_the_input_is_read(fails, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "expected a folder written by 'twinmerge merge'" in fails("run", tmp_path / "notes.txt")
