"""What a caller may give, and what is said of what a caller may not."""

from __future__ import annotations

import copy

import jaxtyping
import pytest
import torch
from tiny import FAMILIES, batch_of

import twinmerge
from twinmerge.errors import InputError, UnsupportedModel
from twinmerge.runtime.arguments import as_weights
from twinmerge.runtime.load import load

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
        ("math", "weights='math': expected numbers.*One expert alone is weights={'math': 1.0}, in"),
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
        (dict(task={"math"}), "task=: expected the name of an expert or 4 of them, got {'math'}"),
        (dict(weights={"math": "x"}), "weights={'math': 'x'}: expected a number"),
        (dict(weights={"math": None}), "weights={'math': None}: expected a number"),
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


def test_a_loss_keeps_a_batch_in_one_piece(zoo):
    """Where cutting it would be cheaper, there would be one loss for each piece."""
    twin, ids = zoo.twin("llama"), torch.randint(3, 30, (64, 12))
    weights = torch.eye(3)[torch.arange(64) % 3]
    twin.planner.forget()
    assert twin(input_ids=ids, labels=ids, weights=weights).loss.isfinite()
    bert = zoo.twin("bert")
    assert bert(input_ids=ids, task=["math", "law"] * 32).plan == "split"
    assert bert.decide({"input_ids": ids, "labels": ids}, weights=weights).way == "selected"


@pytest.mark.parametrize("plan", ["auto", "split"])
def test_a_weight_of_zero_has_its_gradient(plan, zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"], rows=3)

    def value(weights: torch.Tensor) -> torch.Tensor:
        logits = twin(**inputs, weights=weights, head="math", plan=plan).logits
        return (logits[:, :2] * torch.tensor([1.0, -0.5])).sum()

    weights = torch.eye(3)[[0, 1, 0]].requires_grad_(True)
    value(weights).backward()
    want = torch.zeros(3, 3)
    with torch.no_grad():
        for place in range(9):
            step = torch.zeros(9).index_fill(0, torch.tensor([place]), 0.01).view(3, 3)
            want.view(-1)[place] = (value(weights + step) - value(weights - step)) / 0.02
    assert float(want.abs().max()) > 1e-2
    torch.testing.assert_close(weights.grad, want, rtol=1e-2, atol=1e-4)


def test_norms_alone_can_be_trained(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"])
    norm = twin.model.bert.embeddings.LayerNorm
    norm.weight.requires_grad_(True)
    try:
        twin(**inputs, weights=torch.eye(3)[[0, 1, 2, 0]], head="math").logits.sum().backward()
        assert norm.weight.grad is not None and bool(norm.weight.grad.any())
    finally:
        norm.weight.requires_grad_(False)
        norm.weight.grad = None


def test_gradient_checkpointing_is_refused_where_it_would_run_as_the_shared_expert(zoo):
    twin, inputs = load(zoo.artifact("bert")), batch_of(FAMILIES["bert"])
    twin.model.activation_checkpointing_enable()
    twin.train()
    with pytest.raises(UnsupportedModel, match="gradient checkpointing runs layers again after"):
        twin(**inputs, task="math")
    with torch.no_grad():
        twin(**inputs, task="math")


def test_training_mode_leaves_the_router_alone(bench):
    twin = copy.deepcopy(bench.model)
    inputs = twin.tokenizer(["math1 the1", "code1", "law2 the3"], return_tensors="pt", padding=True)
    before = {name: tensor.clone() for name, tensor in twin.router.state_dict().items()}
    twin.train()
    for _ in range(3):
        twin(**inputs)
    assert all(tensor.equal(before[name]) for name, tensor in twin.router.state_dict().items())
    with pytest.raises(InputError, match="in training mode, where dropout is at work"):
        twinmerge.evaluate(twin, {"math": [{"text": "a", "label": 0}]}, "routed")


@pytest.mark.parametrize("options", [{}, {"top_k": 1}])
def test_the_head_is_that_of_the_highest_weight_that_is_one(options, zoo):
    twin, inputs = zoo.twin("bert"), batch_of(FAMILIES["bert"])
    for weights, head in (({"law": -1.0}, 2), ({"code": -0.5, "law": -1.0}, 2 if options else 1)):
        assert twin(**inputs, weights=weights, **options).expert.tolist() == [head] * 4
    law = twin.merged({"law": -1.0})(**inputs).logits
    torch.testing.assert_close(
        twin(**inputs, weights={"law": -1.0}).logits[:, : law.shape[1]], law, rtol=1e-4, atol=1e-5
    )


def test_misspelt_options_of_towers_and_pipelines_are_told(zoo):
    ids = torch.randint(3, 30, (2, 5))
    with pytest.raises(InputError, match="wieghts=: no such option. Did you mean 'weights'"):
        zoo.twin("clip").get_text_features(input_ids=ids, wieghts=[1, 0, 0])
    pipe = zoo.twin("bert").pipeline("text-classification")
    with pytest.raises(InputError, match="taks=: no such option. Did you mean 'task'"):
        pipe("good", taks="math")
    with pytest.raises(InputError, match="task=: a pipeline takes one name for all rows"):
        pipe(["good", "bad"], task=["math", "law"])
    with pytest.raises(InputError, match="weights=: a pipeline takes one weighting for all rows"):
        pipe(["good", "bad"], weights=torch.eye(3)[:2])


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
