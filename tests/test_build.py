"""The build: every tensor accounted for, adapters kept in factors, nothing random but by seed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from math import prod
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_conformance import assert_close, assert_same_files
from tiny import (
    EXPERTS,
    FAMILIES,
    adapter,
    batch_of,
    densely_merged,
    exclusive,
    expert_tensors,
    inherit,
    made,
    merge,
    merged_folder,
    opened,
    recipe,
    save,
    shared_tensors,
)

from twinmerge.artifact.reader import Artifact
from twinmerge.checkpoint import Checkpoint
from twinmerge.errors import CheckpointError, MissingTensor, NotFinite, RecipeError
from twinmerge.merging import stream, work
from twinmerge.merging.build import build
from twinmerge.merging.plan import make_plan
from twinmerge.recipe import Recipe, load_recipe
from twinmerge.runtime.load import load

# -------------------------------------------------------------------------- every tensor


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_tensor_of_base_and_experts_is_accounted_for(name, zoo):
    made, folder = zoo.made(name), zoo.artifact(name, 3)
    manifest = Artifact(folder).manifest
    records = {record.name: record for record in manifest.tensors}
    base = Checkpoint.open(made.base)
    heads = {record.name for record in manifest.tensors if record.kind == "head"}
    assert set(records) == set(base.names()) | heads and len(records) == len(manifest.tensors)
    shared = shared_tensors(folder)
    assert set(shared) == set(base.names())
    parts = {expert: expert_tensors(folder, expert) for expert in EXPERTS}
    for tensor, record in records.items():
        if record.kind == "head":
            assert record.bytes == 0 and set(record.experts) == set(EXPERTS)
            continue
        assert record.bytes == shared[tensor].numel() * shared[tensor].element_size()
        assert record.shape == tuple(shared[tensor].shape) == base.info(tensor).shape
        if record.kind == "base_only":
            assert torch.equal(shared[tensor], base.read(tensor)) and not record.experts
            continue
        assert record.kind == ("matrix" if record.matrix else "vector")
        for expert, share in record.experts.items():
            if record.matrix:
                out, in_ = record.matrix
                assert share.rank == min(3, out, in_) == len(parts[expert][f"{tensor}.a"])
                assert share.bytes == 4 * share.rank * (out + in_)
                assert 0 < share.error < 1 or share.rank == min(out, in_)
            else:
                assert share.rank is None and share.error == 0
                assert share.bytes == 4 * prod(record.shape)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "vit", "llama classifier"])
def test_heads_are_the_experts_own_bits_and_know_their_outputs(name, zoo):
    made, folder = zoo.made(name), zoo.artifact(name, 3)
    manifest = Artifact(folder).manifest
    heads = [record.name for record in manifest.tensors if record.kind == "head"]
    assert heads
    for expert, outputs in zip(manifest.experts, made.family.heads, strict=True):
        assert expert.outputs == outputs
        theirs = load_file(Path(made.experts[expert.name], "model.safetensors"))
        kept = expert_tensors(folder, expert.name)
        assert all(torch.equal(kept[f"{head}.head"], theirs[head]) for head in heads)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_the_reported_error_is_that_of_the_files(name, zoo):
    made, folder = zoo.made(name), zoo.artifact(name, 3)
    shared = shared_tensors(folder)
    for expert in EXPERTS:
        theirs = Checkpoint.open(made.experts[expert])
        kept, plain = expert_tensors(folder, expert), set(theirs.names())
        for record in Artifact(folder).manifest.tensors:
            prefixed = next((p for p in (record.name, f"bert.{record.name}") if p in plain), None)
            if record.kind != "matrix" or prefixed is None:
                continue
            delta = theirs.read(prefixed).double() - shared[record.name].double()
            rest = delta - exclusive(kept, record.name, delta)
            want = float(rest.norm() / delta.norm())
            assert record.experts[expert].error == pytest.approx(want, abs=1e-5)
            exact = torch.linalg.svdvals(delta.view(record.matrix))
            bound = float(exact[record.experts[expert].rank :].norm() / exact.norm())
            assert want == pytest.approx(bound, abs=1e-5)  # Eckart-Young: no cut is better


@pytest.mark.parametrize("rank", ["full", 3, "none"])
def test_an_experts_file_weighs_what_the_records_say(rank, zoo):
    folder = zoo.artifact("bert", rank)
    manifest = Artifact(folder).manifest
    for expert in manifest.experts:
        path = folder / "experts" / f"{expert.name}.safetensors"
        tensors = sum(record.experts[expert.name].bytes for record in manifest.tensors
                      if expert.name in record.experts)  # fmt: skip
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert expert.bytes == path.stat().st_size == header + tensors
        assert tensors == sum(t.numel() * t.element_size() for t in load_file(path).values())


def test_the_plans_bounds_hold(zoo, tmp_path):
    made = zoo.made("bert")
    for rank in ("full", 3, "10%", "none"):
        plan = make_plan(recipe(made.base, made.experts, exclusive={"rank": rank}))
        manifest = merge(made.base, made.experts, tmp_path / str(rank), exclusive={"rank": rank})
        assert plan.shared_bytes() == sum(record.bytes for record in manifest.tensors)
        for name in EXPERTS:
            kept = expert_tensors(tmp_path / str(rank), name)
            size = sum(t.numel() * t.element_size() for t in kept.values())
            assert size <= plan.expert_bytes()
        plan.close()


def test_progress_names_every_tensor_and_ends_at_the_end(zoo, tmp_path):
    made, seen = zoo.made("bert"), []
    manifest = merge(
        made.base, made.experts, tmp_path / "out", progress=lambda *step: seen.append(step)
    )
    total = len(manifest.tensors)
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {name for _, _, name in seen} == {record.name for record in manifest.tensors} | {""}
    assert {of for _, of, _ in seen} == {total}


def test_a_build_holds_one_tensor_of_each_model_at_a_time(tmp_path, monkeypatch):
    deep = dataclasses.replace(
        FAMILIES["llama"], sizes=FAMILIES["llama"].sizes | {"num_hidden_layers": 6}
    )
    made_ = made(deep, tmp_path)
    alive: list[weakref.ref] = []
    most, read = 0, Checkpoint.read

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    merge(made_.base, made_.experts, tmp_path / "out")
    assert len(alive) >= 4 * 50 and most <= 4


# --------------------------------------------------------------------------- how much is kept


def ranks(folder: Path) -> dict[str, int]:
    return {
        record.name: record.experts["math"].rank
        for record in Artifact(folder).manifest.tensors
        if record.kind == "matrix" and record.experts
    }


def test_a_rank_in_percent_is_a_share_of_the_short_side(zoo, tmp_path):
    made = zoo.made("bert")
    merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": "25%"})
    want = {"embeddings.word_embeddings.weight": 4, "embeddings.position_embeddings.weight": 3}
    want |= {"embeddings.token_type_embeddings.weight": 1}
    got = ranks(tmp_path / "out")
    assert {rank for name, rank in got.items() if name not in want} == {4}
    assert {name: got[name] for name in want} == want


def test_energy_keeps_as_little_as_holds_that_share(zoo, tmp_path):
    made, errors = zoo.made("bert"), {}
    for energy in (0.5, 0.9, 1.0):
        out = tmp_path / str(energy)
        manifest = merge(made.base, made.experts, out, exclusive={"energy": energy})
        shares = [s for t in manifest.tensors if t.matrix for s in t.experts.values()]
        assert shares and all(s.error**2 <= 1 - energy + 1e-6 for s in shares)
        errors[energy] = sum(s.bytes for s in shares)
    assert errors[0.5] < errors[0.9] < errors[1.0]


def test_no_exclusive_part_is_a_static_merge_with_heads(zoo):
    folder = zoo.artifact("bert", "none")
    for expert in EXPERTS:
        names = set(expert_tensors(folder, expert))
        assert names == {"classifier.weight.head", "classifier.bias.head"}
    assert all(not t.experts for t in Artifact(folder).manifest.tensors if t.kind != "head")


# --------------------------------------------------------------------------------- adapters

LORA = [
    dict(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=8, task_type="CAUSAL_LM"),
    dict(target_modules=["q_proj", "up_proj"], r=1, use_rslora=True, task_type="CAUSAL_LM"),
    dict(target_modules=["q_proj", "embed_tokens"], r=3, task_type="CAUSAL_LM"),
]
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}


@dataclasses.dataclass(frozen=True)
class Adapted:
    base: str
    adapters: dict[str, str]
    full: dict[str, str]


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Adapted:
    """Three adapters of one Llama, of several ranks, and what peft merges them to."""
    folder = tmp_path_factory.mktemp("lora")
    family = dataclasses.replace(FAMILIES["llama"], sizes=FAMILIES["llama"].sizes | WIDE)
    base = made(family, folder, experts=()).base
    adapters = {
        name: adapter(opened(tf.LlamaForCausalLM, base), folder / name, seed=name, **options)
        for name, options in zip(EXPERTS, LORA, strict=True)
    }
    return Adapted(base, adapters, {n: merged_folder(f) for n, f in adapters.items()})


METHODS = {
    "linear": {},
    "linear, weighted": {"parameters": {"weight": 0.5, "normalize": False}},
    "task_arithmetic": {"parameters": {"weight": 0.3}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", ["full", 2])
def test_factors_of_adapters_are_those_of_the_merged_checkpoints(method, rank, lora, tmp_path):
    options = {"merge_method": method.split(",")[0], "exclusive": {"rank": rank}} | METHODS[method]
    merge(lora.base, lora.adapters, tmp_path / "adapters", **options)
    merge(lora.base, lora.full, tmp_path / "full", **options)
    one, other = shared_tensors(tmp_path / "adapters"), shared_tensors(tmp_path / "full")
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-6)
    for expert in EXPERTS:
        factored = expert_tensors(tmp_path / "adapters", expert)
        dense = expert_tensors(tmp_path / "full", expert)
        for name in other:
            torch.testing.assert_close(
                exclusive(factored, name, one[name]),
                exclusive(dense, name, one[name]),
                rtol=0,
                atol=1e-5,
            )


def test_an_adapter_among_full_checkpoints_is_merged_as_they_are(lora, tmp_path):
    mixed = lora.full | {"code": lora.adapters["code"]}
    merge(lora.base, mixed, tmp_path / "mixed", exclusive={"rank": "full"})
    merge(lora.base, lora.full, tmp_path / "full", exclusive={"rank": "full"})
    inputs = batch_of(FAMILIES["llama"])
    one, other = load(tmp_path / "mixed"), load(tmp_path / "full")
    for expert in EXPERTS:
        got, want = (twin(task=expert, **inputs).logits for twin in (one, other))
        assert_close(got[inputs["attention_mask"].bool()], want[inputs["attention_mask"].bool()])
    kinds = {expert.name: expert.adapter for expert in one.manifest.experts}
    assert kinds == {"math": False, "code": True, "law": False}


def test_no_dense_difference_is_formed_for_adapters(lora, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise AssertionError("a dense difference was decomposed")

    monkeypatch.setattr(work, "factorize", fails)
    manifest = merge(lora.base, lora.adapters, tmp_path / "out", exclusive={"rank": 16})
    with pytest.raises(AssertionError, match="decomposed"):
        merge(lora.base, lora.full, tmp_path / "full", exclusive={"rank": 16})
    monkeypatch.undo()
    records = {record.name: record for record in manifest.tensors}
    shares = records["model.layers.0.self_attn.q_proj.weight"].experts
    assert {share.rank for share in shares.values()} == {6}  # 2 + 1 + 3: all that there is
    shares = records["model.layers.1.self_attn.v_proj.weight"].experts
    assert {share.rank for share in shares.values()} == {2}
    assert not records["model.layers.1.mlp.down_proj.weight"].experts
    assert all(s.error < 1e-5 for r in manifest.tensors for s in r.experts.values())


def test_a_single_adapter_needs_no_more_rank_than_its_own(lora, tmp_path):
    only = {"math": lora.adapters["math"]}
    options = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}}
    manifest = merge(lora.base, only, tmp_path / "out", **options, exclusive={"rank": "full"})
    changed = [r for r in manifest.tensors if r.experts]
    assert {share.rank for r in changed for share in r.experts.values()} == {2}
    inputs = batch_of(FAMILIES["llama"])
    want = opened(tf.LlamaForCausalLM, lora.full["math"])(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert_close(load(tmp_path / "out")(task="math", **inputs).logits[mask], want[mask])


def test_an_average_of_one_adapter_is_that_adapter_with_nothing_left_over(lora, tmp_path):
    manifest = merge(lora.base, {"math": lora.adapters["math"]}, tmp_path / "out")
    assert all(s.rank in (None, 0) for r in manifest.tensors for s in r.experts.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    want = load_file(Path(lora.full["math"], "model.safetensors"))[name]
    torch.testing.assert_close(shared_tensors(tmp_path / "out")[name], want, rtol=0, atol=1e-6)


def test_ties_of_adapters_takes_the_dense_way_and_is_right(lora, tmp_path):
    options = {
        "merge_method": "ties",
        "parameters": {"density": 0.5},
        "exclusive": {"rank": "full"},
    }
    merge(lora.base, lora.adapters, tmp_path / "adapters", **options)
    one = densely_merged(tmp_path / "adapters", [0, 1, 0])
    for name, tensor in load_file(Path(lora.full["code"], "model.safetensors")).items():
        torch.testing.assert_close(one[name].float(), tensor, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- dare


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_depends_on_the_seed_alone_and_not_on_the_order_of_experts(method, zoo, tmp_path):
    made = zoo.made("bert")
    options = {"merge_method": method, "parameters": {"density": 0.5}}
    turned = dict(reversed(made.experts.items()))
    merge(made.base, made.experts, tmp_path / "one", **options)
    torch.manual_seed(99)
    merge(made.base, made.experts, tmp_path / "again", **options)
    merge(made.base, turned, tmp_path / "turned", **options)
    merge(made.base, made.experts, tmp_path / "seed", **options, seed=1)
    assert_same_files(tmp_path / "one", tmp_path / "again")
    one, turned, seed = (shared_tensors(tmp_path / n) for n in ("one", "turned", "seed"))
    name = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(one[name], turned[name], rtol=0, atol=1e-6)
    assert not torch.allclose(one[name], seed[name], atol=1e-4)


def test_dare_drops_other_entries_of_every_expert_and_every_tensor(zoo, tmp_path):
    made = zoo.made("bert")
    names = [f"encoder.layer.{i}.output.dense.weight" for i in (0, 1)]
    base = load_file(Path(made.base, "model.safetensors"))
    experts = {}
    for bit, (expert, folder) in enumerate(made.experts.items()):
        tensors = load_file(Path(folder, "model.safetensors"))
        tensors |= {f"bert.{name}": base[name] + 2**bit for name in names}
        experts[expert] = save(made.expert(expert), tmp_path / expert)
        save_file(tensors, tmp_path / expert / "model.safetensors", {"format": "pt"})
    parameters = {"density": 0.5, "rescale": False, "normalize": False}
    merge(
        made.base,
        experts,
        tmp_path / "out",
        merge_method="dare_linear",
        parameters=parameters,
    )
    shared = shared_tensors(tmp_path / "out")
    # Which experts' entries survived, as bits.
    one, other = ((shared[name] - base[name]).round() for name in names)
    assert set(one.unique().tolist()) == set(range(8)) and not torch.equal(one, other)


def test_full_rank_gives_the_experts_back_whatever_the_method_was(zoo, tmp_path):
    made, inputs = zoo.made("bert"), batch_of(FAMILIES["bert"])
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        options = {} if method == "task_arithmetic" else {"parameters": {"density": 0.4}}
        merge(
            made.base,
            made.experts,
            tmp_path / method,
            merge_method=method,
            exclusive={"rank": "full"},
            **options,
        )
        got = load(tmp_path / method)(task="code", **inputs).logits
        assert_close(got, made.expert("code")(**inputs).logits)


# ---------------------------------------------------------------------------------- dtypes


def halved(folder: str, out: Path, dtype: torch.dtype, **config) -> str:
    """A checkpoint stored in another dtype."""
    out.mkdir(parents=True)
    tensors = load_file(Path(folder, "model.safetensors"))
    save_file(
        {n: t.to(dtype) for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    content = json.loads(Path(folder, "config.json").read_text())
    content["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(content | config))
    return str(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_sixteen_bits_gives_an_artifact_in_sixteen_bits(dtype, zoo, tmp_path):
    made = zoo.made("llama")
    base = halved(made.base, tmp_path / "base", dtype)
    experts = {n: halved(f, tmp_path / n, dtype) for n, f in made.experts.items()}
    manifest = merge(base, experts, tmp_path / "out", exclusive={"rank": "full"})
    assert {t.dtype for t in manifest.tensors} == {str(dtype).removeprefix("torch.")}
    for tensors in (shared_tensors(tmp_path / "out"), expert_tensors(tmp_path / "out", "law")):
        assert {t.dtype for t in tensors.values()} == {dtype}
    twin, inputs = load(tmp_path / "out"), batch_of(FAMILIES["llama"])
    assert next(twin.model.parameters()).dtype == dtype
    output = twin(weights=[0.2, 0.3, 0.5], **inputs)
    assert output.logits.dtype == dtype and torch.isfinite(output.logits).all()
    wide = load(tmp_path / "out", dtype=torch.float32)
    want = opened(tf.LlamaForCausalLM, experts["law"], dtype=torch.float32)(**inputs).logits
    mask = inputs["attention_mask"].bool()
    # Two roundings, of the shared expert and of the factors.
    assert_close(wide(task="law", **inputs).logits[mask], want[mask], tolerance=0.03)


def test_a_difference_is_taken_from_the_shared_expert_as_stored_rounding_included(zoo, tmp_path):
    made = zoo.made("llama")
    merge(
        made.base, made.experts, tmp_path / "out", out_dtype="bfloat16", exclusive={"rank": "full"}
    )
    theirs = load_file(Path(made.experts["law"], "model.safetensors"))
    shared, kept = shared_tensors(tmp_path / "out"), expert_tensors(tmp_path / "out", "law")
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        delta = theirs[name].double() - shared[name].double()
        rest = delta - exclusive(kept, name, delta)
        # Rounding of the difference, far smaller than that of the weight.
        assert rest.norm() < 2**-8 * delta.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_out_dtype_is_what_is_stored_and_what_is_run(dtype, zoo, tmp_path):
    made = zoo.made("llama")
    manifest = merge(made.base, made.experts, tmp_path / "out", out_dtype=dtype)
    want = getattr(torch, dtype)
    assert {t.dtype for t in manifest.tensors} == {dtype}
    assert {t.dtype for t in shared_tensors(tmp_path / "out").values()} == {want}
    assert {p.dtype for p in load(tmp_path / "out").model.parameters()} == {want}
    assert opened(tf.AutoModelForCausalLM, tmp_path / "out", dtype="auto").dtype == want
    assert load(tmp_path / "out", dtype=torch.float32).model.dtype == torch.float32


def test_heads_keep_their_own_dtype_in_a_merge_to_sixteen_bits(zoo, tmp_path):
    made = zoo.made("bert")
    merge(made.base, made.experts, tmp_path / "out", out_dtype="bfloat16", exclusive={"rank": 3})
    theirs = load_file(Path(made.experts["math"], "model.safetensors"))
    kept = expert_tensors(tmp_path / "out", "math")
    assert torch.equal(kept["classifier.weight.head"], theirs["classifier.weight"])
    output = load(tmp_path / "out")(task="math", **batch_of(FAMILIES["bert"]))
    assert torch.isfinite(output.logits[:, :2]).all()


def test_an_expert_in_another_dtype_than_the_base_is_merged_as_it_is(zoo, tmp_path):
    made = zoo.made("llama")
    law = halved(made.experts["law"], tmp_path / "law", torch.bfloat16)
    merge(made.base, made.experts | {"law": law}, tmp_path / "out", exclusive={"rank": "full"})
    inputs = batch_of(FAMILIES["llama"])
    want = opened(tf.LlamaForCausalLM, law, dtype=torch.float32)(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert_close(load(tmp_path / "out")(task="law", **inputs).logits[mask], want[mask])


def test_heads_of_different_dtypes_are_kept_in_the_wider_one(zoo, tmp_path):
    made = zoo.made("bert")
    law = halved(made.experts["math"], tmp_path / "law", torch.bfloat16)
    merge(made.base, {"law": law, "code": made.experts["code"]}, tmp_path / "out")
    kept = expert_tensors(tmp_path / "out", "law")["classifier.weight.head"]
    assert torch.equal(kept, load_file(f"{law}/model.safetensors")["classifier.weight"].float())


def test_float64_is_computed_in_float64(zoo, tmp_path):
    made = zoo.made("bert")
    for dtype in ("float32", "float64"):
        merge(made.base, made.experts, tmp_path / dtype, dtype=dtype, exclusive={"rank": "full"})
    one, other = (shared_tensors(tmp_path / d) for d in ("float32", "float64"))
    name = "encoder.layer.0.output.dense.weight"
    assert one[name].dtype == other[name].dtype == torch.float32
    experts = [load_file(f"{f}/model.safetensors")[f"bert.{name}"] for f in made.experts.values()]
    exact = sum(expert.double() for expert in experts) / 3
    assert torch.equal(other[name], exact.float())
    torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


# -------------------------------------------------------------------- what did not change


def test_a_tensor_that_no_expert_changed_is_the_bases_bits_without_factors(zoo, tmp_path):
    made, names = (
        zoo.made("bert"),
        ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"],
    )
    base = load_file(Path(made.base, "model.safetensors"))
    experts = {}
    for expert, folder in made.experts.items():
        tensors = load_file(Path(folder, "model.safetensors"))
        tensors |= {f"bert.{name}": base[name] for name in names}
        experts[expert] = str(tmp_path / expert)
        save(made.expert(expert), experts[expert])
        save_file(tensors, tmp_path / expert / "model.safetensors", {"format": "pt"})
    for method in ("linear", "task_arithmetic", "ties"):
        out = tmp_path / method
        manifest = merge(made.base, experts, out, merge_method=method)
        shared = shared_tensors(out)
        for record in manifest.tensors:
            if record.name in names:
                assert not record.experts and torch.equal(shared[record.name], base[record.name])
        assert not any(n.startswith(tuple(names)) for n in expert_tensors(out, "math"))
    load(tmp_path / "linear")(task="math", **batch_of(FAMILIES["bert"]))


def test_an_unnormalised_average_changes_even_what_no_expert_changed(lora, tmp_path):
    options = {"parameters": {"weight": 0.5, "normalize": False}, "exclusive": {"rank": "full"}}
    merge(lora.base, lora.adapters, tmp_path / "out", **options)
    name = "model.layers.0.mlp.down_proj.weight"
    base = load_file(Path(lora.base, "model.safetensors"))[name]
    torch.testing.assert_close(shared_tensors(tmp_path / "out")[name], 1.5 * base)
    one = densely_merged(tmp_path / "out", [1, 0, 0])
    torch.testing.assert_close(one[name].float(), base, rtol=0, atol=1e-5)


def test_an_expert_that_left_a_tensor_alone_gets_the_bases_back(zoo, tmp_path):
    made, name = zoo.made("bert"), "encoder.layer.0.output.dense.weight"
    base = load_file(Path(made.base, "model.safetensors"))
    tensors = load_file(Path(made.experts["math"], "model.safetensors"))
    save(made.expert("math"), tmp_path / "math")
    tensors[f"bert.{name}"] = base[name]
    save_file(tensors, tmp_path / "math" / "model.safetensors", {"format": "pt"})
    experts = made.experts | {"math": str(tmp_path / "math")}
    merge(made.base, experts, tmp_path / "out", exclusive={"rank": "full"})
    got = densely_merged(tmp_path / "out", [1, 0, 0])[name]
    torch.testing.assert_close(got.float(), base[name], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------- tied embeddings


def test_a_tied_output_embedding_is_one_tensor_with_one_pair_of_factors(zoo):
    folder = zoo.artifact("llama tied", "full")
    names = {record.name for record in Artifact(folder).manifest.tensors}
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert not any(n.startswith("lm_head") for n in expert_tensors(folder, "math"))
    model = zoo.twin("llama tied").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held, shared = (m.twin_mixers["weight"] for m in (model.lm_head, model.model.embed_tokens))
    assert held[0].ranks == shared[0].ranks


def test_a_base_that_stores_a_tied_tensor_twice_is_merged_once(zoo, tmp_path):
    made = zoo.made("llama tied")

    def twice(folder: str, out: Path) -> str:
        model = opened(tf.LlamaForCausalLM, folder)
        save(model.config, out)
        torch.save(model.state_dict(), out / "pytorch_model.bin")
        return str(out)

    base = twice(made.base, tmp_path / "base")
    experts = {name: twice(folder, tmp_path / name) for name, folder in made.experts.items()}
    merge(base, experts, tmp_path / "out", exclusive={"rank": "full"})
    (record,) = (r for r in Artifact(tmp_path / "out").manifest.tensors if r.kind == "tied")
    assert (record.name, record.tied_to) == ("lm_head.weight", "model.embed_tokens.weight")
    assert record.bytes == 0 and not record.experts
    assert "lm_head.weight" not in shared_tensors(tmp_path / "out")
    inputs = batch_of(FAMILIES["llama tied"])
    want = zoo.twin("llama tied")(task="code", **inputs).logits
    assert torch.equal(load(tmp_path / "out")(task="code", **inputs).logits, want)


def test_an_expert_that_unties_what_the_base_ties_is_refused(zoo, tmp_path):
    made = zoo.made("llama tied")

    def twice(folder: str, out: Path, *, untie: bool) -> str:
        model = opened(tf.LlamaForCausalLM, folder)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if untie:
            state["lm_head.weight"] += 0.1
            model.config.tie_word_embeddings = False
        save(model.config, out)
        torch.save(state, out / "pytorch_model.bin")
        return str(out)

    base = twice(made.base, tmp_path / "base", untie=False)
    experts = {n: twice(f, tmp_path / n, untie=n == "code") for n, f in made.experts.items()}
    with pytest.raises(CheckpointError, match=r"lm_head.weight: .* expert 'code' .* the two diff"):
        merge(base, experts, tmp_path / "out")


def test_a_tensor_that_every_expert_lacks_is_missing_and_not_the_bases(zoo, tmp_path):
    made = zoo.made("bert")
    name = "bert.encoder.layer.1.attention.self.query.weight"
    folder = shutil.copytree(made.experts["math"], tmp_path / "math")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTensor, match=r"self.query.weight: the base has it, no expert does"):
        merge(made.base, {"math": str(folder)}, tmp_path / "out")


def test_labels_are_as_many_as_the_head_has_outputs(zoo, tmp_path):
    made = zoo.made("bert")
    for name, labels in (("math", ["a", "b", "c"]), ("law", ["a"]), ("law", ["a", "b"])):
        given = recipe(made.base, made.experts).model_dump(mode="json", exclude_none=True)
        for entry in given["models"]:
            if entry["name"] == name:
                entry["labels"] = labels
        if (name, len(labels)) == ("law", 1):
            build(Recipe.model_validate(given), tmp_path / "one")
            continue
        with pytest.raises(RecipeError, match=f"expert '{name}': labels: expected "):
            build(Recipe.model_validate(given), tmp_path / "out")


def test_a_number_that_float16_cannot_hold_is_an_error_that_names_the_tensor(zoo, tmp_path):
    made = zoo.made("bert")
    folder = shutil.copytree(made.experts["math"], tmp_path / "math")
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.bias"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    experts = made.experts | {"math": str(folder)}
    with pytest.raises(NotFinite, match=r"layer.0.output.dense.bias: .* float16 cannot"):
        merge(made.base, experts, tmp_path / "out", out_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_float64_base_is_not_rounded_on_the_way(zoo, tmp_path):
    made = zoo.made("llama")
    tensors = load_file(Path(made.base, "model.safetensors"))
    for folder in (made.base, *made.experts.values()):
        out = shutil.copytree(folder, tmp_path / Path(folder).name)
        wide = {n: t.double() for n, t in load_file(out / "model.safetensors").items()}
        wide["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double() + 1e-12
        save_file(wide, out / "model.safetensors", {"format": "pt"})
    experts = {name: str(tmp_path / Path(f).name) for name, f in made.experts.items()}
    merge(str(tmp_path / "base"), experts, tmp_path / "out")
    got = shared_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(got, tensors["model.embed_tokens.weight"].double() + 1e-12)


# ------------------------------------------------------------------ warnings, other files


def test_experts_of_this_base_give_no_warnings(zoo):
    for name in ("bert", "llama", "vit"):
        manifest = zoo.twin(name).manifest
        assert manifest.warnings == ()
        assert all(0.1 < expert.drift < 0.5 for expert in manifest.experts)


def test_the_drift_is_the_distance_of_all_matrices_from_the_base(zoo):
    made = zoo.made("llama")
    base = load_file(Path(made.base, "model.safetensors"))
    for expert in zoo.twin("llama").manifest.experts:
        theirs = load_file(Path(made.experts[expert.name], "model.safetensors"))
        matrices = [name for name, t in base.items() if t.ndim == 2]
        moved = sum(float((theirs[n] - base[n]).double().norm() ** 2) for n in matrices)
        norm = sum(float(base[n].double().norm() ** 2) for n in matrices)
        assert expert.drift == pytest.approx((moved / norm) ** 0.5, rel=1e-5)


def test_the_drift_of_adapters_is_that_of_their_merged_checkpoints(lora, tmp_path):
    one = merge(lora.base, lora.adapters, tmp_path / "adapters")
    other = merge(lora.base, lora.full, tmp_path / "full")
    for adapted, full in zip(one.experts, other.experts, strict=True):
        assert adapted.drift == pytest.approx(full.drift, rel=1e-4) and adapted.drift > 0


def test_an_expert_equal_to_the_base_is_warned_of(zoo, tmp_path):
    made = zoo.made("llama")
    save(opened(tf.LlamaForCausalLM, made.base), tmp_path / "same")
    manifest = merge(made.base, made.experts | {"same": f"{tmp_path}/same"}, tmp_path / "out")
    assert manifest.warnings == ("expert 'same': all its matrices equal the base's.",)


def test_a_config_that_changes_what_weights_mean_is_warned_of(zoo, tmp_path):
    made = zoo.made("llama")
    model = made.expert("math")
    model.config.rms_norm_eps = 0.5
    save(model, tmp_path / "math")
    experts = made.experts | {"math": str(tmp_path / "math")}
    manifest = merge(made.base, experts, tmp_path / "out")
    (warning,) = manifest.warnings
    assert warning.startswith("expert 'math': its config.json has rms_norm_eps = 0.5, the base's")


def test_labels_come_from_the_expert_or_the_recipe(zoo, tmp_path):
    made = zoo.made("bert")
    model = made.expert("code")
    model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    save(model, tmp_path / "code")
    models = [
        {"model": made.experts["math"], "name": "math", "labels": ["ham", "spam"]},
        {"model": str(tmp_path / "code"), "name": "code"},
    ]
    merge(made.base, {}, tmp_path / "out", models=models)
    twin = load(tmp_path / "out")
    assert twin.labels == {"math": ["ham", "spam"], "code": ["no", "maybe", "yes"]}


def test_the_tokenizer_goes_along_and_another_vocabulary_is_warned_of(zoo, tmp_path):
    made = zoo.made("bert")

    def with_tokenizer(folder: str, out: Path, words: list[str]) -> str:
        out.mkdir()
        for file in Path(folder).iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        tf.BertTokenizer(vocab=vocab).save_pretrained(out)
        return str(out)

    base = with_tokenizer(made.base, tmp_path / "base", ["good", "bad"])
    experts = {
        "math": with_tokenizer(made.experts["math"], tmp_path / "math", ["good", "bad"]),
        "code": with_tokenizer(made.experts["code"], tmp_path / "code", ["bad", "good"]),
    }
    model = opened(tf.BertModel, base)
    lora = adapter(model, tmp_path / "lora", target_modules=["query"], r=2)
    for file in Path(experts["code"]).glob("tokenizer*"):
        (tmp_path / "lora" / file.name).write_bytes(file.read_bytes())
    both = merge(base, {"law": f"{base}+{lora}"}, tmp_path / "both")
    assert "expert 'law': its tokenizer has another vocabulary" in "".join(both.warnings)
    manifest = merge(base, experts, tmp_path / "out")
    (warning,) = manifest.warnings
    assert warning.startswith("expert 'code': its tokenizer has another vocabulary than the base's")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(manifest.files)
    twin = load(tmp_path / "out")
    inputs = twin.tokenizer(["good bad", "bad"], return_tensors="pt", padding=True)
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3], [2, 6, 3, 0]]
    assert twin(task="math", **inputs).logits.shape == (2, 2)


def test_tokenizer_files_of_every_kind_go_along(zoo, tmp_path):
    made = zoo.made("bert")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    names = {"spm.model", "source.spm", "target.spm", "bpe.codes", "vocab.bpe", "vocab.txt"}
    for name in names:
        (base / name).write_text(name)
    manifest = merge(str(base), made.experts, tmp_path / "out")
    assert names <= set(manifest.files)
    assert all((tmp_path / "out" / name).read_text() == name for name in names)


def test_the_recipe_is_kept_as_it_was_written(zoo, tmp_path, monkeypatch):
    made = zoo.made("bert")
    folder = Path(made.base).parent
    written = recipe("base", {"math": "math", "code": "code"}, seed=3)
    build(written.resolved(folder), tmp_path / "out", written=written)
    manifest = Artifact(tmp_path / "out").manifest
    assert manifest.base == "base" and [e.reference for e in manifest.experts] == ["math", "code"]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == written.to_yaml()
    assert str(folder) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_recipes_paths_count_from_its_file_also_from_python(zoo, tmp_path, monkeypatch):
    made = zoo.made("bert")
    file = Path(made.base).parent / "beside.yaml"
    file.write_text(recipe("base", {"math": "./math", "code": "./code"}).to_yaml())
    monkeypatch.chdir(tmp_path)
    build(load_recipe(file), "out")
    manifest = Artifact(tmp_path / "out").manifest
    assert manifest.base == "base" and [e.name for e in manifest.experts] == ["math", "code"]
    moved = load_recipe(file).resolved(tmp_path)  # nothing is there: as written
    assert moved.located().base_model == "base"


def test_a_base_with_a_head_of_its_own_serves_experts_with_other_heads(zoo, tmp_path):
    # The base as some publish it: a task model, whose head has another number of classes.
    made = zoo.made("bert")
    torch.manual_seed(3)
    model = tf.BertForSequenceClassification(tf.BertConfig(**made.family.sizes, num_labels=7))
    inherit(model, opened(tf.BertModel, made.base))
    base = save(model, tmp_path / "base")
    merge(base, made.experts, tmp_path / "out", exclusive={"rank": "full"})
    inputs = batch_of(made.family)
    twin = load(tmp_path / "out")
    for expert in EXPERTS:
        assert_close(twin(task=expert, **inputs).logits, made.expert(expert)(**inputs).logits)


def test_a_head_that_one_expert_has_in_the_bases_shape_is_still_its_own(zoo, tmp_path):
    made = zoo.made("bert")
    model = tf.BertForSequenceClassification(tf.BertConfig(**made.family.sizes, num_labels=2))
    inherit(model, opened(tf.BertModel, made.base))
    merge(
        save(model, tmp_path / "base"), made.experts, tmp_path / "out", exclusive={"rank": "full"}
    )
    inputs, twin = batch_of(made.family), load(tmp_path / "out")
    assert [expert.outputs for expert in twin.manifest.experts] == [2, 3, 1]
    assert twin.labels["math"] == ["LABEL_0", "LABEL_1"]
    for expert in EXPERTS:
        assert_close(twin(task=expert, **inputs).logits, made.expert(expert)(**inputs).logits)


def test_a_head_that_all_have_alike_is_merged_like_any_matrix(tmp_path):
    family = dataclasses.replace(
        FAMILIES["bert"],
        base=tf.BertForSequenceClassification,
        sizes=FAMILIES["bert"].sizes | {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}},
        heads=None,
    )
    same = made(family, tmp_path)
    manifest = merge(same.base, same.experts, tmp_path / "out", exclusive={"rank": "full"})
    kinds = {record.name: record.kind for record in manifest.tensors}
    assert kinds["classifier.weight"] == "matrix" and "head" not in kinds.values()
    inputs, twin = batch_of(family), load(tmp_path / "out")
    output = twin(weights=[[0, 0, 0], [0, 1, 0]] * 2, **inputs)
    assert_close(output.logits[1::2], same.expert("code")(**inputs).logits[1::2])
    assert twin.labels == dict.fromkeys(EXPERTS, ["a", "b", "c"])
    assert twin.answers(output)[1].label in ("a", "b", "c")


def test_adapters_of_different_kinds_of_task_are_refused(lora, tmp_path):
    config = Path(lora.adapters["code"], "adapter_config.json")
    content = config.read_text()
    try:
        config.write_text(content.replace('"CAUSAL_LM"', '"SEQ_CLS"'))
        with pytest.raises(
            CheckpointError, match="different kinds of task model.*'code' is a AutoMod"
        ):
            merge(lora.base, lora.adapters, tmp_path / "out")
    finally:
        config.write_text(content)


def test_experts_that_share_only_some_tensors_are_told_apart():
    pairs = [(0, 1), (0, 2), (1, 2)]
    first = [torch.ones(2), torch.ones(2), torch.zeros(3)]
    assert stream.unlike(pairs, first) == [(0, 2), (1, 2)]
    assert stream.unlike([(0, 1)], [None, torch.ones(2), None]) == [(0, 1)]
    assert stream.unlike([(0, 1)], [None, None, None]) == []
    stream.refuse_twins(["a", "b"], set())
    with pytest.raises(CheckpointError, match="experts 'a' and 'c': expected two different"):
        stream.refuse_twins(["a", "b", "c"], {(0, 2), (1, 2)})
    assert stream.drift_warnings({"a": 0.0, "b": 0.02, "c": 1.4}) == [
        "expert 'a': all its matrices equal the base's.",
        "expert 'c': its matrices are 1.40 of the base's norm away from the base; fine-tuning "
        "moves them by a few hundredths, two unrelated models are about 1.4 apart. Was it tuned "
        "from another base?",
    ]
