"""Experts added, removed and replaced in an artifact that is there, the others left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from texts import BERT_TEXT, save_tokenizer, sentences, write_rows
from tiny import BERT, adapter, inherit, made, merge, opened, save, shared_tensors
from typer.testing import CliRunner

from twinmerge.artifact.format import EXAMPLES, MANIFEST, ROUTER, expert_file
from twinmerge.artifact.reader import Artifact
from twinmerge.cli import app
from twinmerge.data import encode, pad
from twinmerge.errors import (
    ArtifactError,
    CheckpointError,
    MissingTensor,
    OutputError,
    RecipeError,
    ShapeMismatch,
)
from twinmerge.grow import add, remove, replace
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.load import load, load_router
from twinmerge.runtime.router.fit import fit_router
from twinmerge.runtime.router.store import alone

TWO = ("math", "code")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and three experts, of which artifacts are built from two, by rank and the like."""
    folder = tmp_path_factory.mktemp("grow")
    world = made(BERT_TEXT, folder)
    save_tokenizer(world.base)
    return world


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """`built(rank=...)`: an artifact of two experts, built once. Read it, never write to it."""
    kept: dict[str, Path] = {}

    def of(experts=TWO, **exclusive):
        key = json.dumps([experts, exclusive])
        if key not in kept:
            kept[key] = tmp_path_factory.mktemp("built") / "artifact"
            chosen = {name: world.experts[name] for name in experts}
            merge(world.base, chosen, kept[key], exclusive=exclusive or {"rank": "full"})
        return kept[key]

    return of


@pytest.fixture
def artifact(built, tmp_path) -> Path:
    """Two experts at full rank, no router."""
    return shutil.copytree(built(), tmp_path / "artifact")


@pytest.fixture(scope="module")
def routers(built, tmp_path_factory):
    """`routers(kind)`: the artifact of two with a router of this kind."""
    kept: dict[str, Path] = {}

    def of(kind, experts=TWO, **settings):
        key = json.dumps([kind, experts, settings])
        if key not in kept:
            folder = shutil.copytree(built(experts), tmp_path_factory.mktemp("routed") / "artifact")
            quick = {"epochs": 15, "hidden": 16, "batch_size": 16, "learning_rate": 0.01}
            texts = None if kind in ("none", "projection") else rows(experts, 20)
            fit_router(folder, texts, Router(kind=kind, **quick | settings))
            kept[key] = folder
        return kept[key]

    return of


def rows(experts, count=20, seed=0):
    return {name: sentences(name, count, seed) for name in experts}


def inputs_of(model, name="math", count=6):
    return pad(model.tokenizer, encode(model.tokenizer, sentences(name, count, 3), 40).rows)


def weight_files(folder: Path) -> dict[str, bytes]:
    """The shared expert's and all experts' files."""
    found = [*folder.glob("model*.safetensors"), *folder.glob("experts/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def logits_of(folder: Path, weights: dict[str, float], head: str, plan: str = "auto"):
    model = load(folder)
    inputs = inputs_of(model)
    full = torch.tensor([[weights.get(name, 0.0) for name in model.experts]])
    given = full.expand(len(inputs["input_ids"]), -1)
    with torch.no_grad():
        return model(**inputs, weights=given, head=head, plan=plan).logits


# ------------------------------------------------------------------------------- the new expert


def test_all_weight_on_an_added_expert_of_full_rank_gives_its_own_outputs(artifact, world):
    result = add(artifact, world.experts["law"])
    model = load(artifact)
    assert model.experts == ("math", "code", "law") and result["added"]["name"] == "law"
    inputs = inputs_of(model)
    with torch.no_grad():
        found = model(**inputs, task="law").logits
        expected = opened(BERT_TEXT.task, world.experts["law"])(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert result["added"]["drift"] > 0 and result["added"]["mean_relative_error"] < 1e-5


@pytest.mark.parametrize("plan", ["auto", "merged", "uniform", "selected", "stacked", "split"])
def test_with_weights_given_the_others_answer_as_before_bit_for_bit(artifact, world, plan):
    weightings = [{"math": 1.0}, {"code": 1.0}, {"math": 0.3, "code": 0.7}]
    before = [logits_of(artifact, weights, "math", plan) for weights in weightings]
    add(artifact, world.experts["law"])
    for weights, expected in zip(weightings, before, strict=True):
        assert torch.equal(logits_of(artifact, weights, "math", plan), expected)


def test_adding_touches_neither_the_shared_expert_nor_the_others(artifact, world):
    before = weight_files(artifact)
    result = add(artifact, world.experts["law"])
    after = weight_files(artifact)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {expert_file("law")}
    assert result["shared_unchanged"]
    assert result["bytes_after"] - result["bytes_before"] == len(after[expert_file("law")])
    Artifact(artifact, check=True)


def test_added_and_removed_again_is_as_before(artifact, world, tmp_path):
    untouched = shutil.copytree(artifact, tmp_path / "untouched")
    add(artifact, world.experts["law"])
    remove(artifact, "law")
    for path in sorted(p for p in untouched.rglob("*") if p.is_file()):
        assert (artifact / path.relative_to(untouched)).read_bytes() == path.read_bytes()
    assert sum(1 for p in artifact.rglob("*") if p.is_file()) == sum(
        1 for p in untouched.rglob("*") if p.is_file()
    )


def test_what_was_merged_and_comes_back_is_no_stranger(built, world, tmp_path):
    """Its file has the bytes that the build gave it, so nothing is left to warn of."""
    folder = shutil.copytree(built(("math", "code", "law")), tmp_path / "artifact")
    before, said = weight_files(folder), Artifact(folder).manifest.warnings
    gone = remove(folder, "law")
    assert "still part of the shared expert" in gone["warnings"][0]
    add(folder, world.experts["law"])
    assert weight_files(folder) == before and Artifact(folder).manifest.warnings == said


def test_the_first_expert_can_go_and_heads_of_other_sizes_stay(artifact, world):
    remove(artifact, "math")
    manifest = Artifact(artifact).manifest
    heads = [record for record in manifest.tensors if record.kind == "head"]
    assert heads and all(record.shape[0] == 3 for record in heads)  # code's outputs
    inputs = inputs_of(load(artifact))
    with torch.no_grad():
        found = load(artifact)(**inputs, task="code").logits
        expected = opened(BERT_TEXT.task, world.experts["code"])(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_replacing_is_removing_and_adding_at_the_same_place(artifact, world, tmp_path):
    other = shutil.copytree(artifact, tmp_path / "other")
    replace(artifact, "math", world.experts["law"])
    remove(other, "math")
    add(other, world.experts["law"], name="math")
    assert weight_files(artifact) == weight_files(other)
    assert Artifact(artifact).manifest.names == ("math", "code")
    assert Artifact(other).manifest.names == ("code", "math")
    inputs = inputs_of(load(artifact))
    with torch.no_grad():
        found = load(artifact)(**inputs, task="math").logits
        expected = opened(BERT_TEXT.task, world.experts["law"])(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "exclusive",
    [
        {"rank": 3},
        {"rank": "25%", "dtype": "int8"},
        {"rank": 4, "dtype": "int4"},
        {"energy": 0.8, "dtype": "float16"},
        {"budget": "40%"},
        {"form": "magnitude", "density": 0.3},
        {"form": "magnitude", "density": 0.3, "scope": "all"},
        {"form": "dropout", "density": 0.5},
    ],
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_a_new_expert_is_cut_as_the_recipe_says(exclusive, built, world, tmp_path):
    """An expert that was merged, removed and added again gets the bytes that the build gave it;
    but a budget is then its own, and no longer spent over all experts."""
    folder = shutil.copytree(built(("math", "code", "law"), **exclusive), tmp_path / "artifact")
    before = weight_files(folder)
    shares = {r.name: r.experts["law"] for r in Artifact(folder).manifest.tensors if r.experts}
    remove(folder, "law")
    add(folder, world.experts["law"])
    after = weight_files(folder)
    if "budget" in exclusive:
        size = len(after.pop(expert_file("law")))
        allowed = 0.4 * sum(t.bytes for t in Artifact(folder).manifest.tensors)
        assert 0.8 * allowed < size <= allowed
        before.pop(expert_file("law"))
    else:
        tensors = Artifact(folder).manifest.tensors
        assert shares == {r.name: r.experts["law"] for r in tensors if r.experts}
    assert after == before
    assert torch.isfinite(logits_of(folder, {"law": 1.0}, "law")).all()


@pytest.mark.slow
def test_an_adapter_is_added_to_full_models_and_to_adapters(world, artifact, tmp_path):
    task = opened(BERT_TEXT.task, world.experts["math"])
    inherit(task, opened(BERT_TEXT.base, world.base))
    start = save(task, tmp_path / "start")
    lora = {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "modules_to_save": ["classifier"]}
    folders = {
        name: adapter(
            opened(BERT_TEXT.task, start), tmp_path / name, name, target_modules=targets, **lora
        )
        for name, targets in (("one", ["query"]), ("two", ["query"]), ("new", ["query", "value"]))
    }
    few = {name: folders[name] for name in ("one", "two")}
    merge(world.base, few, tmp_path / "loras", exclusive={"rank": "full"})
    for folder in (artifact, tmp_path / "loras"):
        before = weight_files(folder)
        result = add(folder, folders["new"], labels=["no", "yes"])
        assert result["added"]["kind"] == "LoRA"
        assert {k: v for k, v in weight_files(folder).items() if k in before} == before
        model = load(folder)
        inputs = inputs_of(model)
        with torch.no_grad():
            found = model(**inputs, task="new").logits
            expected = opened(BERT_TEXT.task, f"{folders['new']}-merged")(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        record = Artifact(folder).manifest.experts[-1]
        assert record.adapter and record.config["id2label"] == {"0": "no", "1": "yes"}


# ------------------------------------------------------------------------------- the recipe


def test_the_recipe_stays_true_and_can_be_built(artifact, world, tmp_path):
    add(artifact, world.experts["law"], name="poems")
    manifest = Artifact(artifact).manifest
    told = Recipe.model_validate(dict(manifest.recipe))
    assert [entry.name for entry in told.models] == ["math", "code", "poems"]
    assert yaml.safe_load((artifact / "recipe.yaml").read_text()) == manifest.recipe
    assert any("'poems': was added later and is no part" in each for each in manifest.warnings)
    assert "poems" in (artifact / "README.md").read_text()
    build(told, tmp_path / "again")
    rebuilt = shared_tensors(tmp_path / "again")
    here = shared_tensors(artifact)
    assert any(not torch.equal(here[name], rebuilt[name]) for name in here)


def test_a_recipe_that_cannot_be_built_any_more_says_so(world, tmp_path):
    few = {name: world.experts[name] for name in TWO}
    merge(world.base, few, tmp_path / "a", merge_method="slerp", parameters={"t": 0.5})
    add(tmp_path / "a", world.experts["law"])
    warnings = Artifact(tmp_path / "a").manifest.warnings
    assert any("cannot be built as it stands" in each for each in warnings)
    remove(tmp_path / "a", "law")
    warnings = Artifact(tmp_path / "a").manifest.warnings
    assert not any("cannot be built as it stands" in each for each in warnings)


# ------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("kind", ["none", "projection", "prompts", "prototype", "linear", "mlp"])
def test_removing_an_expert_keeps_the_odds_among_the_others(kind, routers, tmp_path):
    three = ("math", "code", "law")
    folder = shutil.copytree(routers(kind, three), tmp_path / "artifact")
    before = load(folder)
    inputs = inputs_of(before)
    features = before.router.read(before, inputs)
    expected = before.router.logits(features)[:, [0, 2]]
    remove(folder, "code")
    after = load(folder)
    assert after.router.kind == kind
    found = after.router.logits(after.router.read(after, inputs))
    odds = [logits[:, 0] - logits[:, 1] for logits in (found, expected)]
    torch.testing.assert_close(*odds, rtol=1e-5, atol=1e-5)
    fitted = after.manifest.router
    assert fitted.experts == ("math", "law") and set(fitted.rows) == {"math", "law"}
    assert fitted.held_out_accuracy is None and not fitted.confusion and not fitted.tried
    if before.router.novelty is not None:
        for layer in before.router.novelty.layers:
            means = [each.router.novelty.at(layer).means for each in (after, before)]
            assert torch.equal(means[0], means[1][[0, 2]])


@pytest.mark.parametrize("kind", ["none", "prototype", "mlp"])
def test_with_one_expert_left_all_goes_to_it(kind, routers, tmp_path):
    folder = shutil.copytree(routers(kind), tmp_path / "artifact")
    remove(folder, "math")
    model = load(folder)
    for name in ("math", "code", "law"):
        routed = model.routing(**inputs_of(model, name))
        assert bool((routed.weights == 1).all()) and not bool(routed.new.any())


def test_who_had_all_the_fixed_weight_and_goes_leaves_even_weights(routers, tmp_path):
    three = ("math", "code", "law")
    only = routers("none", three, weights={"math": 1.0, "code": 0.0, "law": 0.0})
    folder = shutil.copytree(only, tmp_path / "artifact")
    result = remove(folder, "math")
    assert "had all the weight" in result["router"]["said"][0]
    model = load(folder)
    assert model.route(**inputs_of(model))[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["prompts", "prototype"])
def test_prototypes_take_a_new_expert_by_its_rows_alone(kind, routers, world, tmp_path):
    folder = shutil.copytree(routers(kind, examples=4), tmp_path / "artifact")
    before = load(folder)
    inputs = inputs_of(before)
    expected = before.router.logits(before.router.read(before, inputs))
    precision = before.router.scorer.precision
    texts = sentences("law", 30)
    result = add(folder, world.experts["law"], rows=texts)
    after = load(folder)
    found = after.router.logits(after.router.read(after, inputs))
    torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=0)
    assert torch.equal(after.router.scorer.precision, precision)
    assert after.router.temperature == before.router.temperature
    assert after.router.sharpness == before.router.sharpness
    fresh = pad(after.tokenizer, encode(after.tokenizer, sentences("law", 20, 9), 40).rows)
    chosen = after.routing(**fresh).probabilities.argmax(dim=-1)
    assert (chosen == 2).float().mean() > 0.55  # three experts: chance is 1 / 3
    measured, fitted = result["router"]["measured"], after.manifest.router
    assert 0 < measured["held_out_rows"] < 30 and measured["right"] > 0
    assert set(measured["examples"]) == {"math", "code"} and set(measured["moved"]) == set(TWO)
    assert fitted.held_out_accuracy is None and fitted.rows["law"] == 30
    assert any("'law' was added after the fit" in each for each in fitted.warnings)
    assert set(Artifact(folder).examples()) == {"math", "code", "law"}
    if kind == "prototype":
        novelty = after.router.novelty
        assert {len(novelty.at(layer).means) for layer in novelty.layers} == {3}
        assert after.router.novelty.threshold == before.router.novelty.threshold


def test_without_rows_prototypes_are_taken_out_and_the_command_is_named(routers, world, tmp_path):
    folder = shutil.copytree(routers("prototype", examples=2), tmp_path / "artifact")
    result = add(folder, world.experts["law"])
    said = " ".join(result["router"]["said"])
    assert "needs rows of 'law'" in said and "twinmerge fit-router" in said
    assert load(folder).router is None
    assert not (folder / ROUTER).exists() and not (folder / EXAMPLES).exists()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_linear_and_mlp_are_fitted_again_with_rows_of_all_or_taken_out(
    kind, routers, world, tmp_path
):
    folder = shutil.copytree(routers(kind), tmp_path / "artifact")
    other = shutil.copytree(folder, tmp_path / "other")
    result = add(folder, world.experts["law"], rows=sentences("law", 20))
    assert "none were given of math, code" in " ".join(result["router"]["said"])
    assert load(folder).router is None
    before = Artifact(other).manifest.router
    add(other, world.experts["law"], rows=rows(("math", "code", "law")))
    fitted = load(other).manifest.router
    assert (fitted.kind, fitted.layers) == (kind, before.layers)
    assert fitted.experts == ("math", "code", "law") and fitted.held_out_accuracy is not None


def test_a_projection_takes_a_new_expert_without_data(routers, world, tmp_path):
    folder = shutil.copytree(routers("projection"), tmp_path / "artifact")
    before = load(folder)
    inputs = inputs_of(before)
    expected = before.router.logits(before.router.read(before, inputs))
    add(folder, world.experts["law"])
    after = load(folder)
    found = after.router.logits(after.router.read(after, inputs))
    assert found.shape[1] == 3
    torch.testing.assert_close(found[:, :2], expected, rtol=1e-4, atol=1e-4)


def test_fixed_weights_are_given_anew_or_even(routers, world, tmp_path):
    folder = shutil.copytree(routers("none"), tmp_path / "artifact")
    other = shutil.copytree(folder, tmp_path / "other")
    add(folder, world.experts["law"])
    model = load(folder)
    even = model.route(**inputs_of(model))[0]
    torch.testing.assert_close(even, torch.full((3,), 1 / 3))
    add(other, world.experts["law"], weights={"math": 1.0, "code": 1.0, "law": 2.0})
    model = load(other)
    torch.testing.assert_close(model.route(**inputs_of(model))[0], torch.tensor([0.25, 0.25, 0.5]))


def test_replacing_keeps_the_other_rows_of_the_router(routers, world, tmp_path):
    folder = shutil.copytree(routers("prototype"), tmp_path / "artifact")
    before = load_router(Artifact(folder))
    replace(folder, "math", world.experts["law"], rows=sentences("law", 30))
    after = load_router(Artifact(folder))
    assert torch.equal(after.scorer.means[1], before.scorer.means[1])
    assert not torch.equal(after.scorer.means[0], before.scorer.means[0])


# ------------------------------------------------------------------------------- refused


def unchanged(folder: Path):
    """What must be as it is after something was refused."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_names_that_are_taken_unknown_or_the_last_are_refused(artifact, world):
    before = unchanged(artifact)
    with pytest.raises(RecipeError, match="name is taken by 'math'"):
        add(artifact, world.experts["law"], name="Math")
    with pytest.raises(RecipeError, match="cannot be a file's name"):
        add(artifact, world.experts["law"], name="../law")
    for call in (
        lambda: remove(artifact, "mtah"),
        lambda: replace(artifact, "mtah", world.experts["law"]),
    ):
        with pytest.raises(RecipeError, match="'mtah': no such expert. Known: math, code"):
            call()
    with pytest.raises(CheckpointError, match="one and the same"):
        add(artifact, world.experts["math"], name="again")
    assert unchanged(artifact) == before
    remove(artifact, "math")
    before = unchanged(artifact)
    with pytest.raises(RecipeError, match="the only expert"):
        remove(artifact, "code")
    with pytest.raises(RecipeError, match="only expert cannot be replaced"):
        replace(artifact, "code", world.experts["law"])
    assert unchanged(artifact) == before


def other_expert(world, folder: Path, change) -> str:
    """A copy of the expert law whose tensors `change` has changed."""
    shutil.copytree(world.experts["law"], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_an_expert_that_does_not_fit_is_refused_and_nothing_changes(artifact, world, tmp_path):
    before = unchanged(artifact)
    table = "bert.embeddings.word_embeddings.weight"

    def grown_table(tensors):
        return tensors | {table: torch.cat([tensors[table], tensors[table][:2]])}

    def broken(tensors):
        name = "bert.encoder.layer.0.output.dense.weight"
        return tensors | {name: torch.full_like(tensors[name], float("nan"))}

    def headless(tensors):
        return {name: t for name, t in tensors.items() if not name.startswith("classifier")}

    def without_one(tensors):
        return {name: t for name, t in tensors.items() if "layer.1.output.dense.bias" not in name}

    for name, change, error, match in [
        ("vocabulary", grown_table, ShapeMismatch, "grew its vocabulary by 2"),
        ("nan", broken, CheckpointError, "expected finite numbers, expert 'nan'"),
        ("headless", headless, MissingTensor, "head tensor of the artifact's experts"),
        ("lacking", without_one, MissingTensor, "no expert does"),
    ]:
        folder = other_expert(world, tmp_path / name, change)
        with pytest.raises(error, match=match):
            add(artifact, folder)
    with pytest.raises(RecipeError, match="labels: expected 1 names|one output"):
        add(artifact, world.experts["law"], labels=["a", "b"])
    assert unchanged(artifact) == before


def test_an_expert_or_a_base_of_another_model_is_refused(artifact, world, tmp_path):
    wide = BERT | {"vocab_size": 43, "max_position_embeddings": 40, "intermediate_size": 48}
    strange = BERT_TEXT.task(BERT_TEXT.config(**wide, num_labels=2))
    with pytest.raises(ShapeMismatch, match="tuned from another base"):
        add(artifact, save(strange, tmp_path / "strange"))
    with pytest.raises(CheckpointError, match="nowhere': expected a folder"):
        add(artifact, world.experts["law"], base=str(tmp_path / "nowhere"))
    wide_base = save(BERT_TEXT.base(BERT_TEXT.config(**wide)), tmp_path / "wide")
    with pytest.raises(ShapeMismatch, match="tuned from another base"):
        add(artifact, world.experts["law"], base=wide_base)
    with pytest.raises(ShapeMismatch, match="is not the base that the artifact was built from"):
        add(artifact, str(tmp_path / "strange"), base=wide_base)  # these two fit each other


def test_an_unrelated_expert_and_an_unrelated_base_are_warned_of(artifact, world, tmp_path):
    """As by a build: what has all shapes in common is done, and told to look odd."""
    sizes = BERT_TEXT.sizes | {"num_labels": 2, "initializer_range": 0.3}
    torch.manual_seed(7)
    task = BERT_TEXT.task(BERT_TEXT.config(**sizes))
    strange = save(task, tmp_path / "strange")
    result = add(artifact, strange)
    assert any("Was it tuned from another base?" in each for each in result["warnings"])
    base = save(task.bert, tmp_path / "base")
    save_tokenizer(base)
    result = add(artifact, world.experts["law"], base=base)
    assert any("the shared expert is" in each for each in result["warnings"])


def test_a_base_that_is_away_is_asked_for(built, world, tmp_path):
    folder = shutil.copytree(built(), tmp_path / "artifact")
    data = json.loads((folder / MANIFEST).read_text())
    data["base"] = data["recipe"]["base_model"] = "./gone"
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="say where it is"):
        add(folder, world.experts["law"])
    add(folder, world.experts["law"], base=world.base)
    assert Artifact(folder).manifest.base == "./gone"


def test_a_static_merge_takes_no_expert(world, tmp_path):
    few = {name: world.experts[name] for name in TWO}
    merge(world.base, few, tmp_path / "static", exclusive={"rank": "none"})
    with pytest.raises(ArtifactError, match="rank: none"):
        add(tmp_path / "static", world.experts["law"])


# ------------------------------------------------------------------------------- killed


class Killed(BaseException):
    """Not an Exception: like a signal, nothing may catch it."""


def kill_at(monkeypatch, step: int) -> list[str]:
    """Count what changes the folder's own files; the step of this number raises instead."""
    steps: list[str] = []
    move, unlink = os.replace, Path.unlink

    def replace_(first, second):
        steps.append(Path(second).name)
        if len(steps) - 1 == step:
            raise Killed
        return move(first, second)

    def unlink_(path, missing_ok=False):
        if "experts" in path.parts and path.suffix == ".safetensors" and path.exists():
            if not any(part.endswith(".fitted") for part in path.parts):
                steps.append(f"-{path.name}")
                if len(steps) - 1 == step:
                    raise Killed
        return unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "replace", replace_)
    monkeypatch.setattr(Path, "unlink", unlink_)
    return steps


def changes(world):
    law, texts = world.experts["law"], sentences("law", 8)
    return {
        "add": lambda folder: add(folder, law, rows=texts),
        "remove": lambda folder: remove(folder, "math"),
        "replace": lambda folder: replace(folder, "math", law, rows=texts),
    }


STEPS = {"add": 6, "remove": 6, "replace": 6}


@pytest.mark.parametrize("change", list(STEPS))
def test_a_change_is_made_in_the_steps_that_the_next_test_kills(
    change, routers, world, tmp_path, monkeypatch
):
    folder = shutil.copytree(routers("prototype"), tmp_path / "artifact")
    with monkeypatch.context() as patched:
        steps = kill_at(patched, -1)
        changes(world)[change](folder)
    assert len(steps) == STEPS[change], steps
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "step"), [(change, step) for change in STEPS for step in range(STEPS[change])]
)
def test_a_change_killed_between_steps_leaves_a_valid_artifact(
    change, step, routers, world, tmp_path, monkeypatch
):
    folder = shutil.copytree(routers("prototype"), tmp_path / "artifact")
    before = Artifact(folder).manifest
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, step)
        changes(world)[change](folder)
    left = Artifact(folder, check=True).manifest
    after = {"add": ("math", "code", "law"), "remove": ("code",), "replace": TWO}[change]
    between = {"add": TWO, "remove": ("code",), "replace": ("code",)}[change]
    assert left.names in (before.names, between, after)
    if left.names == before.names and left.router is not None and change != "replace":
        assert left == before
    model = load(folder)
    assert torch.isfinite(model(**inputs_of(model), task="code").logits).all()
    if left.names != after or (change == "replace" and left == before):
        if change == "replace" and left.names == ("code",):
            add(folder, world.experts["law"], name="math")  # what is left to do
        else:
            changes(world)[change](folder)  # the command can be given again
        assert set(load(folder).experts) == set(after)


def test_a_change_waits_for_a_fit_that_writes(artifact, world):
    with alone(artifact), pytest.raises(OutputError, match="another command is changing"):
        add(artifact, world.experts["law"])


# ------------------------------------------------------------------------------- command line


def test_the_commands_print_what_changed_and_run_works_afterwards(routers, world, tmp_path):
    folder = shutil.copytree(routers("prototype", examples=3), tmp_path / "artifact")
    data = write_rows(
        tmp_path / "law.jsonl", [{"text": " ".join(text)} for text in sentences("law", 20)]
    )

    def run(*words, **given):
        done = CliRunner().invoke(app, [str(word) for word in words], **given)
        assert done.exit_code == 0, done.output + str(done.exception)
        return done.stdout

    said = run("add", folder, world.experts["law"], data, "--quiet")
    assert "added: law (full" in said and "held-out rows go to it" in said
    assert "unchanged: the shared expert" in said and "kept examples of the others" in said
    told = json.loads(
        run("replace", folder, "law", world.experts["law"], tmp_path, "--json", "--quiet")
    )
    assert told["removed"]["name"] == told["added"]["name"] == "law"
    lines = [" ".join(sentences(name, 20)[0]) for name in ("law", "math")]
    answers = run("run", folder, "--quiet", input="\n".join(lines))
    assert [json.loads(line)["expert"] for line in answers.splitlines()] == ["law", "math"]
    said = run("remove", folder, "law", "--quiet")
    assert "removed: law" in said and "experts: math, code" in said
    answers = run("run", folder, "--quiet", input="code1 code2 code3\n")
    assert json.loads(answers)["expert"] == "code"
