"""What a caller may give, and what is said of what a caller may not."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from tiny import FAMILIES, batch_of

import twinmerge
from twinmerge.errors import InputError
from twinmerge.runtime.arguments import as_weights

NAMES = ("math", "code", "law")
CPU = torch.device("cpu")


@pytest.fixture
def unchecked():
    """Without the type checks of the tests, as callers run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def llama(zoo):
    return zoo.twin("llama"), batch_of(FAMILIES["llama"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("math", "weights='math': expected numbers.*For an expert by name give task='math'"),
        ([{"math": 1.0}, 3], "expected a {name: weight} for every row, got 3"),
        ([{"mth": 1.0}, {"law": 1.0}], "weights='mth': no such expert. Did you mean 'math'"),
        (["a", "b", "c"], "weights=: expected numbers"),
        ([0.5, 0.5], r"expected shape \(2, 3\) \(batch, expert\) or \(3,\), got \(2,\)"),
    ],
)
def test_weights_that_are_none_are_told_as_they_came(given, message):
    with pytest.raises(InputError, match=message):
        as_weights(given, NAMES, 2, CPU)


def test_every_row_may_have_a_mapping_of_its_own():
    found = as_weights([{"law": 0.5}, {"math": 1, "code": 0.25}], NAMES, 2, CPU)
    assert found.tolist() == [[0, 0, 0.5], [1, 0.25, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(task=0), "task=: expected the name of an expert or 4 of them, got 0 .int."),
        (dict(task={"math": 1}), "task=: expected the name of an expert or 4 of them, got {'math'"),
        (dict(task="math", threshold="0.1"), "threshold='0.1': expected a weight from 0 to below"),
        (dict(task="math", plan=None), "plan=None: expected one of auto, merged"),
        (dict(task="math", input_ids=[[3, 4]]), "input_ids=: expected a tensor, .*got a list. Tok"),
    ],
)
def test_arguments_of_another_type_are_told(arguments, message, zoo, unchecked):
    with pytest.raises(InputError, match=message):
        zoo.twin("bert")(**batch_of(FAMILIES["bert"]) | arguments)


def test_images_that_are_no_tensor_are_sent_to_the_image_processor(zoo):
    with pytest.raises(InputError, match="pixel_values=: .*got a list. .*model.image_processor"):
        zoo.twin("vit")(pixel_values=["a picture"], task="math")
    with pytest.raises(InputError, match="no tokenizer .*reads images: see model.image_processor"):
        _ = zoo.twin("vit").tokenizer
    with pytest.raises(InputError, match="no image processor that transformers can open"):
        _ = zoo.twin("bert").image_processor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(inputs="a text"), "expected the prompt as a tensor .*, got a str by position"),
        (dict(input_ids=[[3]]), "expected the prompt as a tensor .*, got a list as input_ids="),
        (dict(threshold=0.1), r"threshold=: no option of generate.*weights_for\(prompt, top_k="),
        (dict(plan="split"), "plan=: no option of generate"),
        (dict(head="math"), "head=: no option of generate. A generation has no task heads"),
        (dict(prompt_cache="x"), "prompt_cache=: expected what model.prefill.. made, got a str"),
    ],
)
def test_what_generate_does_not_take_is_told(arguments, message, llama, unchecked):
    twin, inputs = llama
    given = inputs if "inputs" not in arguments else {}
    with pytest.raises(InputError, match=message):
        twin.generate(**given | {"task": "math", "max_new_tokens": 1} | arguments)


def test_a_cache_of_other_rows_is_told(llama):
    twin, inputs = llama
    cache = twin(**inputs, task="math", use_cache=True).past_key_values
    for rows in (2, 8):
        with pytest.raises(InputError, match=f"holds 4 rows, made of 4; the call has {rows}"):
            twin(input_ids=torch.full((rows, 1), 3), past_key_values=cache)


def test_one_weighting_is_not_cut_also_where_split_is_asked_for(llama):
    twin, inputs = llama
    want = twin(**inputs, task="math", use_cache=True)
    step = {"input_ids": torch.full((4, 1), 3)}
    got = twin(**step, past_key_values=want.past_key_values, plan="split")
    ids = torch.cat([inputs["input_ids"], step["input_ids"]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    whole = twin(input_ids=ids, attention_mask=mask, task="math")
    assert got.plan == "split"
    torch.testing.assert_close(got.logits[0, -1], whole.logits[0, -1], rtol=1e-4, atol=1e-5)


def test_a_prefix_may_run_with_few_experts(llama):
    twin, inputs = llama
    kept = twin.prefill(**inputs, weights=[0.5, 0.3, 0.2], top_k=2)
    assert kept.weights.allclose(torch.tensor([0.5, 0.3, 0.0]).expand(4, 3))


def test_a_language_model_gives_its_loss(llama):
    twin, inputs = llama
    weights = {"math": 0.7, "law": 0.3}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    want = twin.merged(weights)(**inputs, labels=labels).loss
    assert twin(**inputs, labels=labels, weights=weights).loss.item() == pytest.approx(want.item())
    mixed = torch.eye(3)[[0, 1, 2, 0]]
    alone = []  # of each row, by its tokens that count
    for row in range(4):
        own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        model = twin.merged(mixed[row].tolist())
        alone.append(model(**own, labels=labels[row : row + 1]).loss)
    counts = (labels[:, 1:] != -100).sum(dim=1)
    want = (torch.stack(alone) * counts).sum() / counts.sum()
    got = twin(**inputs, labels=labels, weights=mixed).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_as_many_weightings_are_remembered_as_may_be_kept(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"])
    twin.planner.forget()
    for wrong in ("3", -1, True, 1.5):
        with pytest.raises(InputError, match="planner.keep=.*expected a whole number from 0 on"):
            twin.planner.keep = wrong
    twin.planner.keep = 2
    try:
        loop = ["math", "law"] * 3
        plans = [twin(**inputs, task=name).plan for name in loop]
        assert plans == ["uniform"] * 2 + ["merged"] * 4
        plans = [twin(**inputs, task=name).plan for name in NAMES * 2]
        assert plans == ["merged", "uniform", "merged"] * 2
    finally:
        twin.planner.keep = 1
        twin.planner.forget()


def test_devices_and_dtypes_that_do_not_serve_are_told(zoo):
    folder = zoo.twin("bert").folder
    with pytest.raises(InputError, match="device warp: cannot be used here"):
        twinmerge.load(folder, device="warp")
    with pytest.raises(InputError, match="dtype=torch.int8: expected a float dtype"):
        twinmerge.load(folder, dtype=torch.int8)
    with pytest.raises(InputError, match="torch_dtype=: is called dtype= here"):
        twinmerge.TwinModel.from_pretrained(folder, torch_dtype="float16")


def test_a_model_shows_itself_in_two_lines(zoo):
    shown = repr(zoo.twin("bert"))
    assert shown.count("\n") == 1 and "3 experts: math, code, law" in shown
    assert "router: none; torch.float32, cpu" in shown
