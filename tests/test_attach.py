"""What stands in for a module gives what the module gives, also to several callers at once."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import tiny
import torch
from conftest import randn
from families import EVERY
from tiny import batch_of, merge, outputs
from torch import nn

from twinmerge.runtime.attach import _layer
from twinmerge.runtime.layers import TwinAny, TwinBatchNorm, TwinConv, Whole
from twinmerge.runtime.load import load
from twinmerge.runtime.parts import Factors
from twinmerge.runtime.routing import Mix, Store


class Activated(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Standardized(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_its_parent():
    shift = {"bias": Whole(randn(3, 4, seed=0))}
    assert type(_layer(nn.BatchNorm2d(4), shift, "norm")) is TwinBatchNorm
    assert type(_layer(Activated(4), shift, "norm")) is not TwinBatchNorm
    kernel = {"weight": (Factors(randn(3, 18, seed=1), randn(4, 3, seed=2), (1, 1, 1)),)}
    assert type(_layer(nn.Conv2d(2, 4, 3), kernel, "conv")) is TwinConv
    assert type(_layer(Standardized(2, 4, 3), kernel, "conv")) is not TwinConv
    grown = {"weight_ih_l0": (Factors(randn(3, 2, seed=1), randn(12, 3, seed=2), (1, 1, 1)),)}
    assert type(_layer(nn.GRU(2, 4), grown, "gru")) is TwinAny


@pytest.mark.parametrize("name", ["resnet", "vit", "mixtral"])
def test_threads_that_run_one_model_with_other_weights_do_not_disturb_each_other(name, zoo):
    twin, family = load(zoo.artifact(name, 3)), EVERY[name]
    inputs = batch_of(family)
    weights = [randn(3, seed=seed).softmax(dim=0) for seed in range(3)]
    heads = {"head": "math"} if family.heads else {}
    before = {key: value.clone() for key, value in twin.state_dict().items()}

    def run(index: int) -> torch.Tensor:
        with torch.no_grad():
            output = twin(weights=weights[index], plan="uniform", **heads, **inputs)
        return next(iter(outputs(output.model_output).values()))

    want, wrong = [run(index) for index in range(3)], []
    start = threading.Barrier(3)

    def work(index: int) -> None:
        start.wait()
        for _ in range(15):
            if not torch.allclose(run(index), want[index], atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())


def test_what_is_read_before_the_router_and_used_after_it_is_not_routed_on_the_way(
    tmp_path, monkeypatch
):
    """DeBERTa's table of relative positions is read before its first block, and used in it."""
    family = EVERY["deberta"]
    family = dataclasses.replace(family, sizes=family.sizes | {"norm_rel_ebd": "none"})
    perturb = tiny.perturb

    def but_for_embeddings(model, scale, seed):
        kept = {k: v.clone() for k, v in model.state_dict().items() if ".embeddings." in k}
        perturb(model, scale, seed)
        if seed != "base":
            model.load_state_dict(kept, strict=False)

    monkeypatch.setattr(tiny, "perturb", but_for_embeddings)
    made = tiny.made(family, tmp_path)
    merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": 2})
    twin = load(tmp_path / "out")
    assert twin.untouched_layers == -1 and twin.planner.mixes_rows is None


def test_the_head_of_a_merged_model_is_its_own(zoo):
    twin, inputs = zoo.twin("bert"), batch_of(EVERY["bert"])
    want = twin(task="math", plan="uniform", **inputs).logits
    merged = twin.merged({"math": 1.0})
    with torch.no_grad():
        merged.classifier.weight.zero_()
    merged.bfloat16().requires_grad_(True)
    assert torch.equal(twin(task="math", plan="uniform", **inputs).logits, want)
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_a_merge_that_is_kept_follows_its_weight_and_serves_autograd(zoo):
    twin, inputs = load(zoo.artifact("llama", 3)), batch_of(EVERY["llama"])
    calls = {"weights": [0.2, 0.5, 0.3], **inputs}
    with torch.inference_mode():
        before = twin(plan="merged", **calls).logits
    with torch.no_grad():
        twin.model.model.layers[0].mlp.gate_proj._parameters["weight"].mul_(3)
    merged, uniform = (twin(plan=plan, **calls).logits for plan in ("merged", "uniform"))
    torch.testing.assert_close(merged, uniform)
    assert not torch.allclose(merged, before)
    table = twin.model.get_input_embeddings()
    embeds = table(inputs["input_ids"]).detach().requires_grad_(True)
    mask = inputs["attention_mask"]
    twin(weights=calls["weights"], plan="merged", inputs_embeds=embeds, attention_mask=mask)[
        0
    ].sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.any())


def test_nothing_is_kept_of_weights_that_are_learnt(zoo):
    twin, inputs = load(zoo.artifact("bert", 3)), batch_of(EVERY["bert"])
    weights = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    for _ in range(3):  # a graph that was kept could not be gone through twice
        twin(weights=weights, head="math", **inputs).logits.sum().backward()
    assert weights.grad is not None and twin.planner.merged_bytes == 0


def test_a_store_counts_its_bytes():
    store, source = Store(), randn(3, 4, seed=0)
    made = [store.kept(("layer", "weight"), source, lambda: source * 2) for _ in range(2)]
    assert made[0] is made[1] and store.bytes == 48 and len(store) == 1
    source.add_(1)
    assert torch.equal(store.kept(("layer", "weight"), source, lambda: source * 2), source * 2)
    assert Mix(torch.ones(1, 1), (0,), store=store).store is store
