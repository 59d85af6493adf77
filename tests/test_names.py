"""Names: what a file calls a tensor, and which part of the live model it fills.

Every place is held to numbers: the part of the model that it names is, bit for bit, the tensor of
the file that transformers loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from twinmerge.runtime.names import Place, by_parameter, places

TEXT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = TEXT | SPECIAL | dict(intermediate_size=24, num_key_value_heads=1)
BERT = TEXT | dict(intermediate_size=24, max_position_embeddings=14)
MOE = LLAMA | dict(moe_intermediate_size=10, num_experts=12, num_experts_per_tok=2, head_dim=8)
DEEPSEEK = LLAMA | dict(
    num_key_value_heads=2,
    moe_intermediate_size=10,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VIT |= dict(image_size=8, patch_size=4)

CASES: dict[str, tuple[Any, Any, Any]] = {
    # name -> (saved as, loaded as, configuration)
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**LLAMA, num_local_experts=12),
    ),
    "mixtral body": (
        tf.MixtralModel,
        tf.MixtralForSequenceClassification,
        tf.MixtralConfig(**LLAMA, num_local_experts=3),
    ),
    "qwen3 moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**MOE)),
    "olmoe": (tf.OlmoeForCausalLM, tf.OlmoeForCausalLM, tf.OlmoeConfig(**MOE)),
    "deepseek": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config(**DEEPSEEK),
    ),
    "vit": (tf.ViTModel, tf.ViTForImageClassification, tf.ViTConfig(**VIT)),
    "vit head": (tf.ViTForImageClassification, tf.ViTModel, tf.ViTConfig(**VIT)),
    "llama tied": (
        tf.LlamaForCausalLM,
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    ),
    "bert under a task": (
        tf.BertModel,
        tf.BertForSequenceClassification,
        tf.BertConfig(**BERT),
    ),
    "bert without its task": (
        tf.BertForSequenceClassification,
        tf.BertModel,
        tf.BertConfig(**BERT),
    ),
    "resnet": (
        tf.ResNetModel,
        tf.ResNetForImageClassification,
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]),
    ),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3ForCausalLM, tf.Phi3Config(**LLAMA)),
    "gpt neox": (
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**BERT | SPECIAL),
    ),
}
STACKED = {"mixtral", "mixtral body", "qwen3 moe", "olmoe", "deepseek"}


def loaded(name: str, folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model saved and loaded by transformers, and the tensors of its file."""
    saved_as, loaded_as, config = CASES[name]
    torch.manual_seed(0)
    model = saved_as(config)
    with torch.no_grad():  # what is all ones or zeros would be found anywhere
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    model.save_pretrained(folder)
    model, info = loaded_as.from_pretrained(folder, output_loading_info=True)
    own = {"classifier", "score", "pooler"}
    lost = [*info["unexpected_keys"], *info["missing_keys"]]
    assert all(own & set(key.split(".")) for key in lost)
    return model, load_file(folder / "model.safetensors")


def placed(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Place]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return places(model, model.base_model_prefix, shapes)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_place_holds_the_very_tensor_of_the_file(name, tmp_path):
    model, tensors = loaded(name, tmp_path)
    found = placed(model, tensors)
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for tensor, place in found.items():
        assert torch.equal(live[place.parameter][place.index], tensors[tensor]), tensor
    floats = {tensor for tensor, value in tensors.items() if value.is_floating_point()}
    heads = {"classifier"} if name in ("bert without its task", "vit head") else set()
    heads |= {"pooler"} if name == "vit" else set()
    assert floats - set(found) == {n for n in floats if heads & set(n.split("."))}
    # Nothing of the model is left that a file would fill, but new heads.
    groups = by_parameter(found)
    for parameter, value in live.items():
        if parameter not in model.state_dict() or not value.is_floating_point():
            continue
        filled = sum(tensors[tensor].numel() for tensor in groups.get(parameter, ()))
        new = {"classifier", "score", "pooler", "lm_head"} & set(parameter.split("."))
        assert filled == value.numel() or (new and filled == 0), parameter
    assert bool([place for place in found.values() if place.index]) == (name in STACKED)


def test_experts_are_in_the_order_of_their_numbers_gate_before_up(tmp_path):
    model, tensors = loaded("qwen3 moe", tmp_path)
    found = placed(model, tensors)
    mlp = "model.layers.1.mlp.experts"
    assert found[f"{mlp}.10.gate_proj.weight"] == Place(f"{mlp}.gate_up_proj", (10, slice(0, 10)))
    assert found[f"{mlp}.2.up_proj.weight"] == Place(f"{mlp}.gate_up_proj", (2, slice(10, 20)))
    assert found[f"{mlp}.11.down_proj.weight"] == Place(f"{mlp}.down_proj", (11, slice(0, 16)))
    groups = by_parameter(found)
    assert len(groups[f"{mlp}.gate_up_proj"]) == 24 and len(groups[f"{mlp}.down_proj"]) == 12
    assert groups["model.norm.weight"] == ["model.norm.weight"]
    assert sum(map(len, groups.values())) == len(tensors)


def test_a_stack_that_is_not_whole_has_no_place(tmp_path):
    model, tensors = loaded("mixtral", tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix = model.base_model_prefix
    moe = "model.layers.0.block_sparse_moe.experts"
    without = {n: s for n, s in shapes.items() if n != f"{moe}.3.w1.weight"}
    found = places(model, prefix, without)
    assert not [n for n in found if n.startswith(moe) and (".w1." in n or ".w3." in n)]
    assert len([n for n in found if n.startswith(moe)]) == 12  # w2 is a stack of its own
    odd = shapes | {f"{moe}.3.w2.weight": (24, 16)}
    found = places(model, prefix, odd)
    assert len([n for n in found if n.startswith(moe)]) == 24
    swapped = {n: s[::-1] if n.startswith(moe) else s for n, s in shapes.items()}
    assert not [n for n in places(model, prefix, swapped) if n.startswith(moe)]


def test_other_ways_of_making_a_weight_have_no_place(tmp_path, monkeypatch):
    import transformers.conversion_mapping as mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    model, tensors = loaded("mixtral", tmp_path)
    original = mapping.get_model_conversion_mapping

    def changed(operations):
        def conversions(model):
            found = original(model)
            for each in found:
                if hasattr(each, "operations") and len(each.operations) == 2:
                    each.operations = operations
            return found

        return conversions

    w13 = [n for n in tensors if ".experts." in n and ".w2." not in n]
    for operations in (
        [MergeModulelist(dim=0), Concatenate(dim=2)],
        [MergeModulelist(dim=1), Concatenate(dim=1)],
        [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
        [Concatenate(dim=1)],
        [MergeModulelist(dim=0)],
    ):
        monkeypatch.setattr(mapping, "get_model_conversion_mapping", changed(operations))
        found = placed(model, tensors)
        assert not set(w13) & set(found) and len(found) == len(tensors) - len(w13)


def test_what_a_model_lacks_or_has_in_another_shape_has_no_place():
    model = tf.BertForSequenceClassification(tf.BertConfig(**BERT))
    name = "encoder.layer.0.output.dense.weight"
    assert places(model, "bert", {name: (16, 24)}) == {name: Place(f"bert.{name}")}
    assert places(model, "bert", {name: (24, 16), "cls.predictions.bias": (40,)}) == {}
    # A buffer that is never saved is nothing that a file fills.
    llama = tf.LlamaModel(tf.LlamaConfig(**LLAMA))
    frequencies = {"rotary_emb.inv_freq": tuple(llama.rotary_emb.inv_freq.shape)}
    assert places(llama, "model", frequencies) == {}
