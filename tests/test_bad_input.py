"""What is wrong with a model is told by tensor and expert, and no folder is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import (
    FAMILIES,
    adapter,
    made,
    merge,
    opened,
    perturb,
    recipe,
    save,
    shared_tensors,
)

from twinmerge.errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingTensor,
    NotFinite,
    RecipeError,
    ShapeMismatch,
    TwinMergeError,
    UnsupportedCheckpoint,
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def broken(tmp_path) -> Callable[..., str]:
    """Copies a checkpoint folder with its tensors changed in place by a function."""

    def copy(folder: str, change: Callable[[Tensors], object], name: str = "broken") -> str:
        target = tmp_path / name
        shutil.copytree(folder, target)
        (path,) = target.glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        return str(target)

    return copy


@pytest.fixture
def refused(tmp_path):
    """Merging raises this error with this message, and leaves nothing behind."""

    def check(
        error: type[TwinMergeError], message: str, base: str, experts: dict[str, str], **more
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error) as caught:
            merge(base, experts, tmp_path / "out", **more)
        assert type(caught.value) is error
        assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
        assert sorted(tmp_path.iterdir()) == before

    return check


# ------------------------------------------------------------------- missing, other shapes


def test_a_tensor_that_one_expert_lacks_is_named_with_the_expert(zoo, broken, refused):
    made, name = zoo.made("bert"), "bert.encoder.layer.1.output.dense.weight"
    code = broken(made.experts["code"], lambda tensors: tensors.pop(name))
    message = (
        "encoder.layer.1.output.dense.weight: the base and expert 'math' have it, expert 'code'"
    )
    refused(MissingTensor, message, made.base, made.experts | {"code": code})


def test_a_tensor_that_all_experts_lack_stays_the_bases(zoo, broken, tmp_path):
    made, name = zoo.made("bert"), "bert.pooler.dense.bias"
    experts = {
        expert: broken(folder, lambda tensors: tensors.pop(name), expert)
        for expert, folder in made.experts.items()
    }
    manifest = merge(made.base, experts, tmp_path / "out")
    kinds = {record.name: record.kind for record in manifest.tensors}
    assert kinds["pooler.dense.bias"] == "base_only"


def test_another_shape_is_told_with_both_shapes(zoo, broken, refused):
    made, name = zoo.made("llama"), "model.layers.0.mlp.up_proj.weight"
    code = broken(made.experts["code"], lambda t: t.update({name: torch.ones(20, 16)}))
    message = rf"{name}: base has shape \(24, 16\), expert 'code' has \(20, 16\).*another base"
    refused(ShapeMismatch, message, made.base, made.experts | {"code": code})


def test_a_vocabulary_that_grew_says_by_how_much(zoo, refused, tmp_path):
    made = zoo.made("llama tied")
    model = made.expert("code")
    model.resize_token_embeddings(43, mean_resizing=False)
    code = save(model, tmp_path / "code")
    message = r"\(40, 16\), expert 'code' has \(43, 16\).*grew its vocabulary by 3. Resize the base"
    refused(ShapeMismatch, message, made.base, made.experts | {"code": code})


def test_a_checkpoint_of_another_architecture_is_refused(zoo, refused):
    bert, llama = zoo.made("bert"), zoo.made("llama")
    experts = bert.experts | {"code": llama.experts["code"]}
    refused(
        CheckpointError, "expert 'code'.*another architecture or of another", bert.base, experts
    )


# ---------------------------------------------------------------------------- damaged files


def test_a_truncated_file_is_named_with_its_bytes(zoo, refused, tmp_path):
    made = zoo.made("bert")
    shutil.copytree(made.experts["code"], tmp_path / "code")
    path = tmp_path / "code" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = r"code/model.safetensors: expected \d+ bytes .*got \d+ bytes"
    refused(CorruptCheckpoint, message, made.base, made.experts | {"code": str(tmp_path / "code")})


def test_a_folder_that_is_no_model_is_named(zoo, refused, tmp_path):
    made = zoo.made("bert")
    (tmp_path / "empty").mkdir()
    experts = made.experts | {"code": str(tmp_path / "empty")}
    refused(CheckpointError, "empty: no config.json: expected that file", made.base, experts)
    experts = made.experts | {"code": str(tmp_path / "no" / "where")}
    refused(CheckpointError, "nowhere|nothing at that path", made.base, experts)
    refused(CheckpointError, "empty: no config.json", str(tmp_path / "empty"), made.experts)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64], ids=str
)
def test_constants_of_every_dtype_that_is_read_are_written(dtype, zoo, broken, tmp_path):
    made, table = zoo.made("bert"), torch.arange(3).to(dtype)

    def add(tensors: Tensors) -> None:
        tensors["some.table"] = table

    experts = {name: broken(folder, add, name) for name, folder in made.experts.items()}
    merge(broken(made.base, add, "base"), experts, tmp_path / "out")
    stored = shared_tensors(tmp_path / "out")["some.table"]
    assert stored.dtype is dtype and torch.equal(stored, table)


# ------------------------------------------------------------------------ NaN and infinity

PLACES = {
    "a matrix": "bert.encoder.layer.0.attention.self.query.weight",
    "a vector": "bert.encoder.layer.1.output.LayerNorm.bias",
    "an embedding": "bert.embeddings.word_embeddings.weight",
    "a head": "classifier.weight",
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_are_named_with_tensor_expert_and_count(place, bad, zoo, broken, refused):
    made, name = zoo.made("bert"), PLACES[place]

    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = bad
        tensors[name].view(-1)[0] = -bad

    code = broken(made.experts["code"], spoil)
    size = load_file(f"{code}/model.safetensors")[name].numel()
    message = (
        rf"{name.removeprefix('bert.')}: expected finite numbers, expert 'code' \({code}\) has "
        rf"2 NaN or infinite of {size}"
    )
    refused(NotFinite, message, made.base, made.experts | {"code": code})


def test_nan_in_the_base_is_the_bases(zoo, broken, refused):
    made, name = zoo.made("bert"), "encoder.layer.0.output.dense.weight"
    base = broken(made.base, lambda tensors: tensors[name].fill_(float("nan")))
    refused(NotFinite, f"{name}: expected finite numbers, the base .*384 NaN", base, made.experts)


def test_large_numbers_are_no_infinity(zoo, broken, tmp_path):
    made, name = zoo.made("bert"), "bert.encoder.layer.0.output.dense.bias"
    code = broken(made.experts["code"], lambda tensors: tensors[name].fill_(3e38))
    merge(made.base, made.experts | {"code": code}, tmp_path / "out", dtype="float64")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_nan_in_a_lora_factor_is_named(part, zoo, broken, refused, tmp_path):
    made = zoo.made("llama")
    model = opened(tf.LlamaForCausalLM, made.base)
    good = adapter(model, tmp_path / "good", target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")

    def spoil(tensors: Tensors) -> None:
        name = next(n for n in tensors if "layers.1" in n and part in n)
        tensors[name][0, 0] = float("nan")

    bad = broken(good, spoil)
    name = "model.layers.1.self_attn.q_proj.weight"
    message = rf"{name}: expected finite numbers, expert 'bad' .*{bad}"
    refused(NotFinite, message, made.base, {"good": good, "bad": bad})  # kept in factors
    refused(NotFinite, message, made.base, {"full": made.experts["math"], "bad": bad})  # made dense


# ------------------------------------------------------------------------------ the same twice


def test_two_names_alike_are_a_recipe_error(zoo, refused):
    made = zoo.made("bert")
    experts = {"Code": made.experts["code"], "code": made.experts["math"]}
    refused(RecipeError, "'code' is taken by models.0. .case does not count", made.base, experts)


def test_the_same_path_twice_is_a_recipe_error(zoo, refused):
    made = zoo.made("bert")
    experts = {"one": made.experts["code"], "two": made.experts["code"] + "/"}
    refused(RecipeError, "the same expert twice", made.base, experts)


def test_the_same_model_in_two_folders_is_found(zoo, refused, tmp_path):
    made = zoo.made("bert")
    copy = str(shutil.copytree(made.experts["code"], tmp_path / "copy"))
    message = "experts 'code' and 'copy': expected two different models.*given twice: leave one"
    refused(CheckpointError, message, made.base, made.experts | {"copy": copy})


def test_experts_that_differ_in_one_number_are_two(zoo, broken, tmp_path):
    made = zoo.made("bert")
    for name in ("bert.encoder.layer.0.output.dense.bias", "classifier.bias"):
        other = broken(made.experts["code"], lambda t, n=name: t[n].view(-1)[0].add_(1e-3), name)
        merge(made.base, {"code": made.experts["code"], "other": other}, tmp_path / f"out-{name}")


def test_the_same_adapter_in_two_folders_is_found(zoo, refused, tmp_path):
    made = zoo.made("llama")
    model = opened(tf.LlamaForCausalLM, made.base)
    one = adapter(model, tmp_path / "one", target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    copy = str(shutil.copytree(one, tmp_path / "copy"))
    message = "experts 'one' and 'two': expected two different models"
    refused(CheckpointError, message, made.base, {"one": one, "two": copy})


# ------------------------------------------------------------------------------- another base


def test_an_expert_of_another_base_is_warned_of_with_what_was_measured(zoo, tmp_path):
    made_ = zoo.made("llama")
    torch.manual_seed(77)
    stranger = tf.LlamaForCausalLM(tf.LlamaConfig(**made_.family.sizes))
    perturb(stranger, 0.05, "stranger")
    experts = made_.experts | {"stranger": save(stranger, tmp_path / "stranger")}
    manifest = merge(made_.base, experts, tmp_path / "out")
    drift = {expert.name: expert.drift for expert in manifest.experts}
    assert 1.3 < drift["stranger"] < 1.5 and max(drift[name] for name in made_.experts) < 0.5
    (warning,) = manifest.warnings
    assert warning.startswith(f"expert 'stranger': its matrices are {drift['stranger']:.2f} of the")
    assert "Was it tuned from another base?" in warning
    assert warning in (tmp_path / "out" / "README.md").read_text()


# ------------------------------------------------------------------------------------- heads


def test_experts_of_different_kinds_of_task_are_refused(zoo, refused):
    one, other = zoo.made("bert"), zoo.made("bert tokens")
    experts = {"rows": one.experts["math"], "tokens": other.experts["code"]}
    message = (
        "the experts are different kinds of task model: 'rows' is a BertForSequenceClassification, "
        "'tokens' is a BertForTokenClassification.*One artifact holds one kind"
    )
    refused(CheckpointError, message, one.base, experts)


def test_an_expert_without_the_head_that_others_have_is_named(zoo, broken, refused, tmp_path):
    made = zoo.made("bert")
    bare = save(made.expert("code").bert, tmp_path / "bare")
    message = (
        "classifier.bias: a head tensor of expert 'math' that expert 'code' .* its heads: none"
    )
    refused(MissingTensor, message, made.base, made.experts | {"code": bare})

    half = broken(made.experts["code"], lambda tensors: tensors.pop("classifier.bias"))
    message = "expert 'code' .*does not have; its heads: classifier.weight"
    refused(MissingTensor, message, made.base, made.experts | {"code": half})


def test_an_adapter_without_a_head_among_experts_with_one_is_told_how_to_save_it(
    zoo, refused, tmp_path
):
    made = zoo.made("bert")
    bare = adapter(
        opened(tf.BertModel, made.base), tmp_path / "bare", target_modules=["query"], r=2
    )
    message = "classifier.bias.*'bare'.*For an adapter, save the head with modules_to_save"
    refused(MissingTensor, message, made.base, {"math": made.experts["math"], "bare": bare})


def test_an_adapter_with_a_head_but_no_task_type_says_what_to_set(zoo, refused, tmp_path):
    made = zoo.made("bert")
    model = made.expert("math")
    options = dict(target_modules=["query"], r=2, modules_to_save=["classifier"])
    folder = adapter(model, tmp_path / "untyped", **options)
    message = "expert 'untyped': has a head of its own, but .* no task_type.*SEQ_CLS"
    refused(UnsupportedCheckpoint, message, made.base, {"untyped": folder})


# ----------------------------------------------------------------------------------- buffers


def test_an_integer_buffer_must_be_equal_everywhere(zoo, broken, refused, tmp_path):
    made, name = zoo.made("bert"), "embeddings.position_ids"

    def add(start: int) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update(
            {name if name_of(tensors) else f"bert.{name}": torch.arange(start, start + 14)}
        )

    def name_of(tensors: Tensors) -> bool:
        return "embeddings.word_embeddings.weight" in tensors

    base = broken(made.base, add(0), "base")
    math = broken(made.experts["math"], add(0), "math")
    code = broken(made.experts["code"], add(1), "code")
    message = f"{name}: a torch.int64 tensor, which cannot be merged .* expert 'code' .*has other"
    refused(CheckpointError, message, base, {"math": math, "code": code})
    # Newer transformers no longer stores such constants: an expert may lack them.
    experts = {"math": math, "law": made.experts["law"]}
    manifest = merge(base, experts, tmp_path / "out")
    kinds = {record.name: record.kind for record in manifest.tensors}
    assert kinds[name] == "buffer"
    stored = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(stored, torch.arange(14))


# ------------------------------------------------------------------------------------ others


def test_a_method_that_cannot_run_on_these_weights_is_a_recipe_error(zoo, refused):
    made = zoo.made("bert")
    models = [
        {"model": folder, "name": name, "parameters": {"weight": weight}}
        for (name, folder), weight in zip(made.experts.items(), (1.0, -1.0, 0.0), strict=True)
    ]
    refused(RecipeError, "sum to 0, so they cannot be normalised", made.base, {}, models=models)


def test_a_broken_tokenizer_of_an_expert_does_not_stop_a_merge(zoo, broken, tmp_path):
    made = zoo.made("bert")
    code = broken(made.experts["code"], lambda tensors: None)
    Path(code, "tokenizer.json").write_text("{")
    merge(made.base, made.experts | {"code": code}, tmp_path / "out")
    Path(code, "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="config.json: expected a JSON object"):
        merge(made.base, made.experts | {"code": code}, tmp_path / "other")


def test_a_single_expert_is_a_merge_too(tmp_path):
    only = made(FAMILIES["bert"], tmp_path, experts=("only",))
    manifest = merge(only.base, only.experts, tmp_path / "out", merge_method="task_arithmetic")
    assert manifest.names == ("only",)


def test_what_the_manifest_records_is_plain_json(zoo):
    manifest = json.loads((zoo.artifact("bert", 3) / "manifest.json").read_text())
    made = zoo.made("bert")
    written = recipe(made.base, made.experts, exclusive={"rank": 3})
    assert manifest["recipe"] == written.model_dump(mode="json", exclude_none=True)
