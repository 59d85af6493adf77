"""Folders that others wrote: read as stored, adapters exactly as peft itself merges them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from conftest import randn
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from twinmerge.checkpoint import (
    UNCHANGED,
    Checkpoint,
    LowRank,
    align,
    check_shapes,
    is_head,
    open_expert,
)
from twinmerge.errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingTensor,
    ShapeMismatch,
    UnsafePickle,
    UnsupportedCheckpoint,
)

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def bert(cls=BertForSequenceClassification, seed=0, **more):
    torch.manual_seed(seed)
    sizes = SMALL | dict(intermediate_size=24, max_position_embeddings=12) | more
    return shaken(cls(BertConfig(**sizes)))


def llama(cls=LlamaForCausalLM, seed=0, **more):
    torch.manual_seed(seed)
    return shaken(cls(LlamaConfig(**SMALL | dict(intermediate_size=24, pad_token_id=0) | more)))


def gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    return shaken(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


def vit(seed=0):
    torch.manual_seed(seed)
    sizes = SMALL | dict(intermediate_size=24, image_size=8, patch_size=4)
    del sizes["vocab_size"]
    return shaken(ViTForImageClassification(ViTConfig(**sizes)))


def shaken(model):
    """No two tensors equal by chance: fresh biases are all zero and norm gains all one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def saved(model, folder: Path, **options) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def adapted(model, folder: Path, base: str | None = None, **options):
    """A peft adapter of `model` with random factors, saved; the live peft model."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**options))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                touched = "lora_" in name or "modules_to_save" in name or parameter.requires_grad
                if touched:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        peft_model.save_pretrained(folder)
    return peft_model


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def merged_by_peft(peft_model) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_model.merge_and_unload().state_dict()


def stored_as(name: str) -> str:
    """The name in the file of a ViT's tensor: transformers 5 has other names in live models."""
    if name.startswith("vit.layers."):
        name = name.replace("vit.layers", "vit.encoder.layer").replace("mlp.fc2", "output.dense")
        name = name.replace("mlp.fc1", "intermediate.dense")
        name = name.replace("attention.o_proj", "attention.output.dense")
        for word in ("query", "key", "value"):
            name = name.replace(f"attention.{word[0]}_proj", f"attention.attention.{word}")
    return name


QV = ["query", "value"]
ADAPTERS = {
    "plain": (bert, dict(target_modules=QV, r=3, lora_alpha=7)),
    "patterns": (
        bert,
        dict(
            target_modules=[*QV, "dense"],
            r=2,
            lora_alpha=5,
            rank_pattern={
                "query": 4,
                r"layer\.1\.attention\.self\.value": 1,
                "^bert.pooler.dense": 3,
            },
            alpha_pattern={"0.attention.self.query": 9, "output.dense": 2},
        ),
    ),
    "rslora": (bert, dict(target_modules=QV, r=4, lora_alpha=3, use_rslora=True)),
    "conv1d": (gpt2, dict(target_modules=["c_attn", "c_proj"], r=3, fan_in_fan_out=True)),
    "conv1d square only": (gpt2, dict(target_modules=["attn.c_proj"], r=3, fan_in_fan_out=True)),
    "embeddings": (bert, dict(target_modules=["word_embeddings", "position_embeddings"], r=3)),
    "modules_to_save": (
        bert,
        dict(target_modules=QV, r=2, modules_to_save=["classifier", "pooler"]),
    ),
    "task type": (bert, dict(target_modules=QV, r=2, task_type="SEQ_CLS")),
    "lora_bias": (bert, dict(target_modules=QV, r=2, lora_alpha=6, lora_bias=True)),
    "bias all": (bert, dict(target_modules=QV, r=2, bias="all")),
    "bias lora_only": (bert, dict(target_modules=QV, r=2, bias="lora_only")),
    "mixed": (
        bert,
        dict(
            target_modules=[*QV, "word_embeddings"],
            r=2,
            rank_pattern={"value": 5},
            use_rslora=True,
            bias="all",
            lora_bias=False,
            modules_to_save=["classifier"],
        ),
    ),
    "llama": (llama, dict(target_modules="all-linear", r=2, init_lora_weights="gaussian")),
    "llama head": (llama, dict(target_modules=["lm_head", "q_proj"], r=2)),
    "orthogonal": (llama, dict(target_modules=["q_proj"], r=2, init_lora_weights="orthogonal")),
    "conv kernel": (vit, dict(target_modules=["projection", "q_proj", "v_proj", "fc2"], r=2)),
    "some layers": (bert, dict(target_modules=QV, r=2, layers_to_transform=[1])),
}


@pytest.mark.parametrize("variety", sorted(ADAPTERS))
def test_an_adapter_reads_as_what_peft_merges(variety, tmp_path):
    make, options = ADAPTERS[variety]
    base = Checkpoint.open(saved(make(), tmp_path / "base"))
    peft_model = adapted(make(), tmp_path / "adapter", **options)
    expert = open_expert("task", str(tmp_path / "adapter"), base)
    want = {stored_as(n): w for n, w in merged_by_peft(peft_model).items()}

    assert expert.is_adapter and expert.config == base.config
    assert expert.missing() == [] and expert.head_names() == []
    assert expert.names() == base.names()
    vectors = {n: expert.task_vector(n) for n in expert.names()}
    assert any(isinstance(v, LowRank) for v in vectors.values())
    for name, vector in vectors.items():
        w_0, w_t = base.read(name), expert.read(name)
        torch.testing.assert_close(w_t, want[name], rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)
        assert tuple(w_t.shape) == expert.info(name).shape and w_t.dtype == expert.info(name).dtype
        if isinstance(vector, LowRank):
            delta = (vector.b @ vector.a).reshape(w_0.shape)
            torch.testing.assert_close(w_0 + delta, want[name], rtol=0, atol=1e-6)
        elif vector is UNCHANGED:
            assert torch.equal(w_0, w_t)
        else:
            assert not torch.equal(w_0, w_t)


def test_an_adapter_trained_on_a_task_model_fits_a_headless_base(tmp_path):
    model = bert()
    base = Checkpoint.open(saved(model.bert, tmp_path / "base"))
    options = dict(target_modules=QV, r=2, task_type="SEQ_CLS", bias="all")
    peft_model = adapted(model, tmp_path / "adapter", **options)
    expert = open_expert("task", str(tmp_path / "adapter"), base)
    want = merged_by_peft(peft_model)
    assert expert.prefix == "bert." and expert.base_prefix == ""
    assert expert.head_names() == ["classifier.bias", "classifier.weight"]
    for name in expert.names():
        torch.testing.assert_close(expert.read(name), want["bert." + name], rtol=0, atol=1e-6)
    for name in expert.head_names():
        torch.testing.assert_close(expert.read(name), want[name], rtol=0, atol=0)
        assert expert.task_vector(name) is None


def test_an_adapter_with_more_labels_than_the_base_brings_its_own_head(tmp_path):
    base = Checkpoint.open(saved(bert(num_labels=2), tmp_path / "base"))
    adapted(bert(num_labels=3), tmp_path / "adapter", target_modules=QV, task_type="SEQ_CLS")
    expert = open_expert("task", str(tmp_path / "adapter"), base)
    assert expert.head_names() == ["classifier.bias", "classifier.weight"]
    assert expert.info("classifier.weight").shape == (3, 16)
    assert "classifier.bias" not in expert.names() and expert.missing() == []
    check_shapes(base, expert)


def test_an_adapter_can_be_named_together_with_its_base(tmp_path):
    here = saved(bert(), tmp_path / "base+v1@home")
    base = Checkpoint.open(here)
    adapted(bert(), tmp_path / "a", target_modules=QV)
    for reference in (f"{here}+{tmp_path}/a", f"{tmp_path}/./base+v1@home/+{tmp_path}/a"):
        assert open_expert("task", reference, base).is_adapter
    saved(bert(), tmp_path / "other")
    with pytest.raises(CheckpointError, match="not the recipe's base"):
        open_expert("task", f"{tmp_path}/other+{tmp_path}/a", base)
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        open_expert("task", f"{here}+{tmp_path}/other", base)


def test_a_base_named_otherwise_by_the_adapter_is_a_note_and_no_error(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "a", target_modules=QV)
    assert open_expert("task", str(tmp_path / "a"), base).notes == []
    edit(tmp_path / "a/adapter_config.json", base_model_name_or_path="acme/bert")
    (note,) = open_expert("task", str(tmp_path / "a"), base).notes
    assert "acme/bert" in note


def test_an_adapter_in_bfloat16_is_added_in_float32(tmp_path):
    base = Checkpoint.open(saved(bert().to(torch.bfloat16), tmp_path / "base"))
    adapted(bert().to(torch.bfloat16), tmp_path / "a", target_modules=QV, r=2, lora_alpha=4)
    expert = open_expert("task", str(tmp_path / "a"), base)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    vector = expert.task_vector(name)
    assert isinstance(vector, LowRank) and vector.a.dtype == torch.float32
    assert expert.read(name).dtype == torch.float32 == expert.info(name).dtype
    assert torch.equal(expert.read(name), base.read(name).float() + vector.b @ vector.a)
    assert expert.read("bert.pooler.dense.weight").dtype == torch.bfloat16


def test_an_adapter_on_a_tied_embedding_changes_both_ends_and_says_so(tmp_path):
    model = llama(tie_word_embeddings=True)
    base = Checkpoint.open(saved(model, tmp_path / "base"))
    assert "lm_head.weight" not in base.names()
    peft_model = adapted(model, tmp_path / "a", target_modules=["embed_tokens"], r=2)
    expert = open_expert("task", str(tmp_path / "a"), base)
    want = merged_by_peft(peft_model)["model.embed_tokens.weight"]
    torch.testing.assert_close(expert.read("model.embed_tokens.weight"), want, rtol=0, atol=1e-6)
    assert "merge_and_unload" in expert.notes[0]
    adapted(llama(tie_word_embeddings=True), tmp_path / "b", target_modules=["lm_head"], r=2)
    with pytest.raises(UnsupportedCheckpoint, match="(?s)lm_head.*ties it"):
        open_expert("task", str(tmp_path / "b"), base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(peft_type="IA3"), "peft_type IA3"),
        (dict(use_dora=True), "DoRA"),
        (dict(alora_invocation_tokens=[1]), "aLoRA"),
        (dict(use_qalora=True), "QA-LoRA"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(target_parameters=["w"]), "target_parameters"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(megatron_config={"a": 1}), "Megatron"),
        (dict(kasa_config={"beta": 1}), "KaSA"),
        (dict(init_lora_weights="pissa_niter_16"), "pissa_niter_16"),
        (dict(init_lora_weights="olora"), "olora"),
        (dict(init_lora_weights="corda"), "corda"),
        (dict(init_lora_weights="loftq"), "loftq"),
        (dict(init_lora_weights="lora_ga"), "lora_ga"),
        (dict(use_next_years_idea=True), "use_next_years_idea"),
    ],
)
def test_a_variant_that_is_no_plain_sum_is_refused_by_name(change, words, tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    (tmp_path / "a").mkdir()
    config = dict(peft_type="LORA", r=2, lora_alpha=2) | change
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match=f"(?s){words}.*merge_and_unload"):
        open_expert("task", str(tmp_path / "a"), base)


def test_a_real_dora_adapter_is_refused(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "a", target_modules=QV, use_dora=True)
    with pytest.raises(UnsupportedCheckpoint, match="DoRA"):
        open_expert("task", str(tmp_path / "a"), base)
    edit(tmp_path / "a/adapter_config.json", use_dora=False)
    with pytest.raises(CheckpointError, match="(?s)lora_magnitude_vector.*Nothing is dropped"):
        open_expert("task", str(tmp_path / "a"), base)


def test_an_adapter_for_another_base_is_named_with_its_shapes(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(hidden_size=8), tmp_path / "narrow", target_modules=QV, r=2)
    with pytest.raises(CheckpointError, match=r"(?s)query.*\(16, 16\).*\(2, 8\).*another base"):
        open_expert("task", str(tmp_path / "narrow"), base)
    adapted(llama(), tmp_path / "llama", target_modules=["q_proj"], r=2)
    with pytest.raises(CheckpointError, match=r"(?s)q_proj.*no such tensor.*another base"):
        open_expert("task", str(tmp_path / "llama"), base)


def test_a_rank_that_the_config_does_not_know_is_an_error(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "a", target_modules=QV, r=2)
    edit(tmp_path / "a/adapter_config.json", r=4)
    with pytest.raises(CheckpointError, match=r"(?s)rank 4 .*got rank 2.*scale"):
        open_expert("task", str(tmp_path / "a"), base)


def test_every_tensor_of_an_adapter_is_used_or_named(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "a", target_modules=QV, r=2)
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.surprise.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="surprise.weight"):
        open_expert("task", str(tmp_path / "a"), base)
    lost = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != lost}, file)
    with pytest.raises(CheckpointError, match="no lora_B.weight"):
        open_expert("task", str(tmp_path / "a"), base)


def test_an_adapter_reads_the_same_from_bin_and_with_the_adapters_name_left_in(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "a", target_modules=QV, r=2, modules_to_save=["classifier"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b/adapter_model.safetensors")
    (tmp_path / "b/adapter_model.safetensors").unlink()
    renamed = {
        n.replace(".weight", ".default.weight") if "lora" in n else n: t for n, t in tensors.items()
    }
    old = "base_model.model.classifier."
    renamed = {n.replace(old, old + "modules_to_save."): t for n, t in renamed.items()}
    torch.save(renamed, tmp_path / "b/adapter_model.bin")
    one, two = (open_expert("task", str(tmp_path / x), base) for x in "ab")
    assert all(torch.equal(one.read(n), two.read(n)) for n in base.names())


# ------------------------------------------------------------------------ full checkpoints


def test_one_file_shards_and_bin_read_the_same(tmp_path):
    model = bert()
    one = Checkpoint.open(saved(model, tmp_path / "one"))
    shards = Checkpoint.open(saved(model, tmp_path / "shards", max_shard_size="8KB"))
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    state = model.state_dict()
    for kind in ("bin", "legacy"):
        saved(model.config, tmp_path / kind)
        options = dict(_use_new_zipfile_serialization=kind == "bin")
        torch.save(state, tmp_path / kind / "pytorch_model.bin", **options)
    saved(model.config, tmp_path / "bins")
    index = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(state)}
    for shard in set(index.values()):
        torch.save({n: state[n] for n in state if index[n] == shard}, tmp_path / "bins" / shard)
    (tmp_path / "bins/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))

    for other in [shards, *(Checkpoint.open(str(tmp_path / x)) for x in ("bin", "legacy", "bins"))]:
        assert set(one.names()) <= set(other.names())
        for name in one.names():
            assert one.info(name) == other.info(name)
            assert torch.equal(one.read(name), other.read(name))
    assert shards.bytes() == one.bytes() == sum(4 * p.numel() for p in model.parameters())
    one.close()
    assert torch.equal(one.read("classifier.bias"), model.classifier.bias)  # opens again


def test_two_names_of_one_storage_in_a_bin_are_fine_and_count_once(tmp_path):
    model = llama(tie_word_embeddings=True)
    saved(model.config, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(str(tmp_path))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint.names())
    assert checkpoint.bytes() == sum(4 * p.numel() for p in model.parameters())


def test_a_task_model_is_seen_under_a_headless_bases_names_and_the_other_way_round(tmp_path):
    task = bert(seed=1)
    saved(bert(BertModel), tmp_path / "headless")
    saved(task, tmp_path / "task")
    saved(bert(BertForMaskedLM), tmp_path / "masked")
    saved(task.bert, tmp_path / "bare")
    headless, masked = (Checkpoint.open(str(tmp_path / x)) for x in ("headless", "masked"))

    expert = open_expert("task", str(tmp_path / "task"), headless)
    assert (expert.prefix, expert.base_prefix, expert.is_adapter) == ("bert.", "", False)
    assert expert.names() == headless.names()
    assert expert.head_names() == ["classifier.bias", "classifier.weight"]
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(expert.read(name), task.state_dict()["bert." + name])
    assert torch.equal(expert.read("classifier.weight"), task.classifier.weight)
    assert expert.task_vector(name) is None

    expert = open_expert("task", str(tmp_path / "bare"), masked)
    assert (expert.prefix, expert.base_prefix) == ("", "bert.")
    assert torch.equal(expert.read("bert." + name), task.state_dict()["bert." + name])
    assert all(n.startswith("cls.") for n in expert.missing()) and expert.missing()
    assert expert.head_names() == ["pooler.dense.bias", "pooler.dense.weight"]


def test_a_decoder_is_never_aligned_with_an_encoder():
    _, _, found = align(["encoder.0.w", "encoder.1.w"], ["decoder.0.w", "decoder.1.w"])
    assert found == {}
    before, after, found = align(["model.a.w", "head.w"], ["model.text.a.w", "head.w"])
    assert (before, after) == ("model.", "model.text.")
    assert found == {"model.a.w": "model.text.a.w", "head.w": "head.w"}


def test_old_spellings_of_layer_norm_are_the_same_tensor(tmp_path):
    saved(bert(), tmp_path / "task")
    shutil.copytree(tmp_path / "task", tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, other in old.items():
        tensors = {n.replace(new, other): t for n, t in tensors.items()}
    save_file(tensors, file)
    base = Checkpoint.open(str(tmp_path / "old"))
    expert = open_expert("task", str(tmp_path / "task"), base)
    assert expert.missing() == [] == expert.head_names()
    assert all(torch.equal(expert.read(n), base.read(n)) for n in base.names())


def test_another_number_of_labels_is_a_head_weight_and_bias_together(tmp_path):
    base = Checkpoint.open(saved(bert(num_labels=2), tmp_path / "base"))
    labels = {0: "no", 1: "maybe", 2: "yes"}
    saved(bert(num_labels=3, id2label=labels), tmp_path / "task")
    expert = open_expert("task", str(tmp_path / "task"), base)
    assert expert.head_names() == ["classifier.bias", "classifier.weight"]
    assert expert.missing() == []
    assert not set(expert.head_names()) & set(expert.names())
    check_shapes(base, expert)
    assert is_head("classifier.weight", base) and not is_head("bert.pooler.dense.weight", base)


def test_a_sequence_classifier_is_an_expert_of_a_language_model(tmp_path):
    base = Checkpoint.open(saved(llama(), tmp_path / "base"))
    saved(llama(LlamaForSequenceClassification, num_labels=3), tmp_path / "task")
    expert = open_expert("task", str(tmp_path / "task"), base)
    assert expert.head_names() == ["score.weight"] and expert.missing() == ["lm_head.weight"]
    assert not is_head("lm_head.weight", base)


def test_tied_weights_are_read_once_whichever_side_stores_them_twice(tmp_path):
    tied = llama(tie_word_embeddings=True)
    once = saved(tied, tmp_path / "once")
    twice = tmp_path / "twice"
    saved(tied.config, twice)
    torch.save(tied.state_dict(), twice / "pytorch_model.bin")
    expert = open_expert("task", str(twice), Checkpoint.open(once))
    assert expert.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert expert.head_names() == []
    assert torch.equal(expert.read("lm_head.weight"), tied.lm_head.weight)

    base = Checkpoint.open(str(twice))
    expert = open_expert(
        "task", saved(llama(tie_word_embeddings=True, seed=1), tmp_path / "t"), base
    )
    assert expert.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert expert.missing() == [] and "lm_head.weight" in expert.names()
    assert torch.equal(expert.read("lm_head.weight"), expert.read("model.embed_tokens.weight"))

    adapted(llama(tie_word_embeddings=True), tmp_path / "a", target_modules=["embed_tokens"])
    expert = open_expert("task", str(tmp_path / "a"), base)
    assert expert.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not torch.equal(expert.read("lm_head.weight"), base.read("lm_head.weight"))
    assert torch.equal(expert.read("lm_head.weight"), expert.read("model.embed_tokens.weight"))

    own_head = open_expert("task", saved(llama(), tmp_path / "untied"), Checkpoint.open(once))
    assert own_head.tied == {} and own_head.head_names() == ["lm_head.weight"]


def test_a_vocabulary_that_grew_says_by_how_much_and_what_to_do(tmp_path):
    base = Checkpoint.open(saved(llama(tie_word_embeddings=True), tmp_path / "base"))
    saved(llama(tie_word_embeddings=True, vocab_size=36), tmp_path / "math")
    with pytest.raises(ShapeMismatch) as caught:
        check_shapes(base, open_expert("math", str(tmp_path / "math"), base))
    assert str(caught.value) == (
        "model.embed_tokens.weight: base has shape (32, 16), expert 'math' has (36, 16).\n"
        "  The expert grew its vocabulary by 4. Resize the base to 36 rows first, or leave "
        "`math` out."
    )


def test_any_other_shape_is_a_mismatch_too(tmp_path):
    base = Checkpoint.open(saved(bert(BertModel), tmp_path / "base"))
    saved(bert(BertModel, max_position_embeddings=20), tmp_path / "task")
    with pytest.raises(ShapeMismatch, match=r"position_embeddings.*\(12, 16\).*\(20, 16\)"):
        check_shapes(base, open_expert("task", str(tmp_path / "task"), base))


def test_buffers_that_old_versions_stored_are_no_heads(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    saved(bert(), tmp_path / "task")
    file = tmp_path / "task/model.safetensors"
    save_file(load_file(file) | {"bert.embeddings.position_ids": torch.arange(12)}, file)
    expert = open_expert("task", str(tmp_path / "task"), base)
    assert expert.head_names() == [] and "position_ids" in expert.notes[0]


# ---------------------------------------------------------------------------------- errors


def test_another_architecture_is_named_with_examples_of_both_sides(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    saved(llama(), tmp_path / "llama")
    with pytest.raises(CheckpointError, match="(?s)bert.*(embed_tokens|lm_head).*another arch"):
        open_expert("task", str(tmp_path / "llama"), base)


def test_a_folder_without_config_or_without_weights_says_which(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        Checkpoint.open(str(tmp_path))
    bert().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight file.*model\.safetensors.*config.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="config.json: expected a JSON object"):
        Checkpoint.open(str(tmp_path))


def test_an_index_that_lies_names_the_shard_or_the_tensor(tmp_path):
    saved(bert(), tmp_path, max_shard_size="8KB")
    path = tmp_path / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    some_name, shard = next(iter(good.items()))
    other = next(s for s in good.values() if s != shard)
    for wrong, words in [
        (good | {some_name: other}, f"{other}.*{some_name}"),
        (good | {"ghost.weight": shard}, f"{shard}.*ghost.weight"),
        ({n: s for n, s in good.items() if n != some_name}, f"{shard}.*{some_name}, which model"),
        (good | {some_name: 3}, "a weight_map of tensors to files"),
        (good | {some_name: "model-9.safetensors"}, "model-9.safetensors.*no such file"),
        (good | {some_name: "../secret.safetensors"}, "secret"),
    ]:
        path.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CorruptCheckpoint, match=f"(?s){words}"):
            Checkpoint.open(str(tmp_path)).bytes()  # headers are read when they are needed


def test_a_damaged_safetensors_file_is_named_with_its_bytes(tmp_path):
    saved(bert(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for data, words in [
        (whole[:-10], f"{len(whole)} bytes.*got {len(whole) - 10} bytes"),
        (whole[:40], "40 bytes"),
        (b"", "0 bytes"),
        (b"\xff" * 64, "64 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ]:
        file.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=f"(?s)model.safetensors.*{words}"):
            Checkpoint.open(str(tmp_path))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(zipped, tmp_path):
    bert().config.save_pretrained(tmp_path)
    state = {"weight": torch.ones(2), "bomb": Bomb(tmp_path / "ran")}
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafePickle, match=r"(?s)pytorch_model.bin.*mkdir.*Nothing was run"):
        Checkpoint.open(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_bin_file_is_corrupt_and_not_called_unsafe(tmp_path):
    bert().config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": randn(64, 64, seed=0)}, file)
    whole = file.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        file.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match="pytorch_model.bin"):
            Checkpoint.open(str(tmp_path))
    torch.save({"state_dict": {"weight": torch.ones(2)}}, file)
    with pytest.raises(CorruptCheckpoint, match="flat dict"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    ],
    ids=["no shape", "shape of nothing", "no end", "dtype of nothing"],
)
def test_a_header_that_lacks_something_is_corrupt(entry, tmp_path):
    folder = saved(bert(), tmp_path / "task")
    header = json.dumps({"x": entry}).encode()
    path = Path(folder, "model.safetensors")
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(CorruptCheckpoint, match="expected a safetensors header, got .* bytes"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
        {
            "w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "x": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        },
    ],
    ids=["too short", "less than nothing", "a hole", "an overlap"],
)
def test_a_header_whose_tensors_do_not_fill_the_file_is_corrupt(entries, tmp_path):
    folder = saved(bert(), tmp_path / "task")
    header = json.dumps(entries).encode()
    path = Path(folder, "model.safetensors")
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(CorruptCheckpoint, match="bytes for tensor x, .* got bytes . to 4"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_one_may_not_read_is_named(name, tmp_path, monkeypatch):
    folder = saved(bert(), tmp_path / "task")
    if name.endswith(".bin"):
        torch.save(load_file(Path(folder, "model.safetensors")), Path(folder, name))
        Path(folder, "model.safetensors").unlink()
    opened = Path.open

    def refuse(path, *args, **kwargs):  # not chmod(): tests may run as root, who may read anything
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file that can be read, got Per"):
        Checkpoint.open(folder)


def test_the_home_of_nobody_is_no_folder():
    for reference in ("~nosuchuser/x", "~nosuchuser/x+~nosuchuser/y"):
        with pytest.raises(CheckpointError, match="got nothing at that path"):
            Checkpoint.open(reference)


def test_an_expert_knows_its_own_folder(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    adapted(bert(), tmp_path / "adapter", target_modules=["query"], r=2)
    task = saved(shaken(bert()), tmp_path / "task")
    assert open_expert("task", task, base).folder == tmp_path / "task"
    both = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    assert open_expert("task", both, base).folder == tmp_path / "adapter"


def test_an_unreachable_hub_is_one_error_that_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no network\nlong traceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"(?s)'acme/bert@v2': not a folder here, and the hub"
    ):
        Checkpoint.open("acme/bert@v2")
    with pytest.raises(CheckpointError, match="nothing at that path"):
        Checkpoint.open("./not/here")


def test_a_hub_id_prefers_safetensors_and_a_local_folder_wins(monkeypatch, tmp_path):
    import huggingface_hub

    saved(bert(), tmp_path / "cache")
    asked = []

    def fake(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, "*.bin" in allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert Checkpoint.open("acme/bert@v2").folder == tmp_path / "cache"
    assert asked == [("acme/bert", "v2", False)]
    monkeypatch.chdir(tmp_path)
    saved(bert(), tmp_path / "acme/bert@v2")
    assert Checkpoint.open("acme/bert@v2").folder == Path("acme/bert@v2")
    assert len(asked) == 1


def test_a_tensor_that_is_not_there_is_a_missing_tensor(tmp_path):
    base = Checkpoint.open(saved(bert(), tmp_path / "base"))
    expert = open_expert("task", str(tmp_path / "base"), base)
    for reader in (base.read, base.info, expert.read, expert.info, expert.task_vector):
        with pytest.raises(MissingTensor, match="nowhere.weight"):
            reader("nowhere.weight")
    expert.close()
    base.close()
