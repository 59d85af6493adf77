"""Rows that others wrote: read strictly, tokenized without losing count, batched without losing
order."""

from __future__ import annotations

import gzip
import json
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import COMMON, WORDS, save_tokenizer, write_rows
from transformers import AutoTokenizer

from twinmerge.data import (
    COLUMNS,
    batches,
    drawn,
    encode,
    known_positions,
    pad,
    parse_inputs,
    read_rows,
    read_tasks,
    sample,
    task_files,
    text_of,
    token_limit,
)
from twinmerge.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_back_as_they_were_written_gzipped_or_not(name, tmp_path):
    rows = [{"text": "ein Bär\u2028zwei", "label": 1}, {"text": "b", "nested": {"x": [1.5, None]}}]
    assert read_rows(write_rows(tmp_path / name, rows)) == rows


def test_a_byte_order_mark_and_empty_lines_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\n\n'.encode())
    assert read_rows(path) == [{"text": "a"}, {"text": "b"}]


def test_a_line_that_is_not_json_is_named_by_its_number_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 3: not JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "kind"), [("[1, 2]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")]
)
def test_a_row_that_is_no_object_is_refused_with_an_example(line, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=rf"line 2: expected a JSON object such as .* got {kind}"):
        read_rows(path)


def test_brackets_nested_without_end_are_an_error_and_no_crash(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_rows(path)


@pytest.mark.parametrize("damage", ["not gzip", "cut short", "byte changed", "not UTF-8"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    noise = "".join(random.Random(0).choices("abcdefghij", k=4000))
    whole = gzip.compress(json.dumps({"text": noise}).encode())
    damaged = {
        "not gzip": b'{"text": "a"}',
        "cut short": whole[: len(whole) // 2],
        "byte changed": whole[:100] + b"\xff" * 50 + whole[150:],
        "not UTF-8": gzip.compress(b'{"text": "\xff"}'),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz: cannot be read as JSON lines"):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="gone.jsonl: cannot be read"):
        read_rows(tmp_path / "gone.jsonl")


# ------------------------------------------------------------------------------ folders of tasks


def test_tasks_are_found_as_files_and_as_folders_of_splits(tmp_path):
    one = [{"text": "a"}]
    write_rows(tmp_path / "flat.jsonl", one)
    write_rows(tmp_path / "v1.5.jsonl.gz", one)
    write_rows(tmp_path / "deep" / "test.jsonl", one)
    write_rows(tmp_path / "packed" / "test.jsonl.gz", one)
    write_rows(tmp_path / "other" / "train.jsonl", one)
    (tmp_path / "notes.txt").write_text("no task")
    assert task_files(tmp_path, "test") == {
        "flat": tmp_path / "flat.jsonl",
        "v1.5": tmp_path / "v1.5.jsonl.gz",
        "deep": tmp_path / "deep" / "test.jsonl",
        "packed": tmp_path / "packed" / "test.jsonl.gz",
    }


def test_a_missing_folder_of_tasks_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: expected a folder with rows"):
        read_tasks(tmp_path / "nowhere", ["math"], "test")


def test_an_expert_without_rows_is_named_with_the_file_that_was_meant(tmp_path):
    write_rows(tmp_path / "maths.jsonl", [{"text": "a"}])
    with pytest.raises(InputError) as caught:
        read_tasks(tmp_path, ["math", "code", "law"], "test")
    message = str(caught.value)
    assert "expert 'math' and 2 others" in message and "Did you mean 'maths'?" in message
    assert "math/test.jsonl or math.jsonl" in message and "found tasks: maths" in message


def test_tasks_that_no_expert_answers_are_reported(tmp_path):
    for name in ("math", "poetry", "chess"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    rows, unused = read_tasks(tmp_path, ["math"], "test")
    assert rows == {"math": [{"text": "math"}]} and unused == ["chess", "poetry"]


def test_an_empty_file_is_an_error_and_not_zero_rows(tmp_path):
    write_rows(tmp_path / "math.jsonl", [])
    with pytest.raises(InputError, match=r"math\.jsonl: is empty"):
        read_tasks(tmp_path, ["math"], "test")


# ------------------------------------------------------------------------------------ inputs


def test_plain_lines_are_texts_and_a_tab_makes_a_pair():
    assert parse_inputs(["one text\n", "\n", "left\tright\r\n"]) == [
        {"text": "one text"},
        {"text": "left", "text_pair": "right"},
    ]


def test_two_tabs_in_a_line_are_refused_with_the_lines_number():
    with pytest.raises(InputError, match="stdin, line 3: expected one text, or two .* got 3 parts"):
        parse_inputs(["a", "", "b\tc\td"], "stdin")


def test_a_first_line_with_a_brace_means_json_lines():
    lines = ['  {"text": "a"}', "", '{"text": "b"']
    assert parse_inputs(lines[:2]) == [{"text": "a"}]
    with pytest.raises(InputError, match="input, line 3: not JSON"):
        parse_inputs(lines)


# ----------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("names", COLUMNS, ids="+".join)
def test_every_known_column_is_found(names):
    row = {name: f"value of {name}" for name in names} | {"label": 1, "idx": 7}
    assert text_of(row) == tuple(row[name] for name in names)


def test_named_columns_win_over_known_ones():
    row = {"text": "a", "body": "b", "title": "c"}
    assert text_of(row, ["body"]) == ("b",)
    assert text_of(row, ["title", "body"]) == ("c", "b")


@pytest.mark.parametrize("row", [{}, {"txt": "a"}, {"text": None, "label": 0}])
def test_a_row_without_text_says_what_it_has_and_what_was_expected(row):
    with pytest.raises(InputError, match="a row has the columns .*Name yours with --columns"):
        text_of(row)


def test_a_column_that_holds_no_text_is_told_by_name():
    with pytest.raises(InputError, match="a row's column text holds 5 .int.; expected text"):
        text_of({"text": 5})
    with pytest.raises(InputError, match="a row's column body holds 1.5 .float.; expected text"):
        text_of({"body": 1.5}, ["body"])


def test_a_pair_whose_second_text_is_null_is_a_single_text():
    assert text_of({"text": "a", "text_pair": None}) == ("a",)


@pytest.mark.parametrize("columns", [[], ["a", "b", "c"]])
def test_only_one_or_two_columns_make_a_text(columns):
    with pytest.raises(InputError, match="expected one column, or two for a pair"):
        text_of({"a": "1", "b": "2", "c": "3", "text": "x"}, columns)


# ---------------------------------------------------------------------------------- encoding

words = st.lists(st.sampled_from([*WORDS["math"], *COMMON]), min_size=1, max_size=9).map(" ".join)
texts = st.one_of(st.tuples(words), st.tuples(words, words))


@settings(deadline=None, max_examples=30)
@given(mixed=st.lists(texts, min_size=1, max_size=6), limit=st.integers(4, 20))
def test_mixed_singles_and_pairs_encode_as_each_does_alone(mixed, limit, tokenizer):
    together = encode(tokenizer, mixed, limit)
    for text, row, cut in zip(mixed, together.rows, together.cut, strict=True):
        alone = dict(tokenizer(*text, truncation=True, max_length=limit))
        assert row == alone and len(row["input_ids"]) <= limit
        assert cut == (len(tokenizer(*text)["input_ids"]) > limit)
    assert together.truncated == sum(together.cut) and len(together) == len(mixed)


def test_a_text_of_just_the_limit_is_not_counted_as_cut(tokenizer):
    text = " ".join(COMMON[:6])  # and two marks
    assert encode(tokenizer, [(text,)], 8).truncated == 0
    assert encode(tokenizer, [(text,)], 7).truncated == 1


def test_a_limit_that_leaves_no_room_for_the_tokenizers_marks_is_refused(tokenizer):
    with pytest.raises(InputError, match="--max-tokens 2: too few for the marks"):
        encode(tokenizer, [("the1",), ("the1", "the2")], 2)


@settings(deadline=None, max_examples=25)
@given(mixed=st.lists(texts, min_size=1, max_size=9), size=st.integers(1, 4))
def test_batches_hold_every_row_once_and_say_which(mixed, size, tokenizer):
    encoded = encode(tokenizer, mixed, 30)
    seen = []
    for indices, batch in batches(tokenizer, encoded, size):
        assert len(indices) == len(batch["input_ids"]) <= size
        for place, index in enumerate(indices):
            ids = encoded.rows[index]["input_ids"]
            assert batch["input_ids"][place, : len(ids)].tolist() == ids
            assert batch["attention_mask"][place].sum() == len(ids)
        seen += indices
    assert sorted(seen) == list(range(len(mixed)))


def test_batches_hold_rows_of_similar_length(tokenizer):
    lengths = [9, 1, 8, 2, 7, 3]
    encoded = encode(tokenizer, [(" ".join(COMMON[:n]),) for n in lengths], 30)
    got = [[lengths[i] for i in indices] for indices, _ in batches(tokenizer, encoded, 2)]
    assert got == [[1, 2], [3, 7], [8, 9]]


def test_a_tokenizer_without_a_padding_token_pads_behind_the_mask(tmp_path):
    save_tokenizer(tmp_path, pairs=False, pad=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id is None
    batch = pad(tokenizer, encode(tokenizer, [("the1",), ("the1 the2 the3",)], 9).rows)
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 4]
    assert batch["input_ids"][0, 2:].tolist() == [tokenizer.eos_token_id] * 2


def test_a_sample_is_drawn_without_replacement_and_by_the_seed_alone():
    rows = list(range(50))
    drawn = sample(rows, 20, seed=3)
    assert len(set(drawn)) == 20 and drawn == sample(rows, 20, seed=3) != sample(rows, 20, seed=4)
    assert sorted(sample(rows, 99, seed=0)) == rows


# ------------------------------------------------------------------------------- token limits


def test_the_limit_is_what_was_asked_for_within_the_models_positions():
    model = SimpleNamespace(config=tf.BertConfig(max_position_embeddings=128))
    assert token_limit(model, None) == 128 and token_limit(model, 100) == 100
    assert token_limit(SimpleNamespace(config=tf.LlamaConfig()), None) == 512
    assert token_limit(SimpleNamespace(), 9) == 9
    with pytest.raises(InputError, match="--max-tokens 129: the model has 128 positions"):
        token_limit(model, 129)


def test_a_model_without_a_known_number_of_positions_has_no_limit():
    assert known_positions(SimpleNamespace(config=tf.GPT2Config(n_positions=32))) == 32
    assert known_positions(SimpleNamespace()) > 10**6


@pytest.mark.parametrize("asked", [0, -5])
def test_a_limit_below_one_is_refused_and_not_taken_for_none(asked):
    with pytest.raises(InputError, match="expected at least 1"):
        token_limit(SimpleNamespace(config=tf.BertConfig()), asked)


def test_robertas_positions_start_after_the_padding_index_and_all_below_the_limit_run():
    config = tf.RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=12,
        pad_token_id=1,
    )
    model = tf.RobertaModel(config).eval()
    limit = token_limit(model, None)
    assert limit == 10
    assert model(input_ids=torch.full((1, limit), 5)).last_hidden_state.shape[1] == limit
    with pytest.raises((IndexError, RuntimeError)):  # the next length is one too many
        model(input_ids=torch.full((1, limit + 1), 5))


def test_some_rows_are_drawn_not_the_first_and_stay_in_order():
    rows = list(range(100))
    some = drawn(rows, 10)
    assert len(some) == 10 == len(set(some)) and some == sorted(some) and some[-1] > 50
    assert drawn(rows, 10) == some
    assert drawn(rows, None) == drawn(rows, 100) == drawn(rows, 1000) == rows
