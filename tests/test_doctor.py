"""The doctor says what is true: its numbers by hand, its findings by what we broke."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import randn
from safetensors.torch import load_file, save_file
from test_cli import call as call  # a fixture
from texts import save_tokenizer
from tiny import FAMILIES, adapter, made, merged_folder, opened, recipe, save

from twinmerge.errors import MissingExtra
from twinmerge.merging.doctor import Diagnosis, Finding, diagnose, examine, measure, spectra
from twinmerge.merging.doctor.spectra import Spectrum, Subject, choose, expected_bytes
from twinmerge.merging.doctor.vocabulary import compare, read_tokenizer
from twinmerge.plots import write_plots
from twinmerge.show.doctor import LEVELS
from twinmerge.weightfiles import TensorFiles

Tensors = dict[str, torch.Tensor]
NAMES = ("math", "code", "law")


@pytest.fixture
def copied(tmp_path) -> Callable[..., str]:
    """Copies a checkpoint folder, its tensors changed in place by a function."""

    def copy(folder: str, change: Callable[[Tensors], object] | None = None, name="copy") -> str:
        target = tmp_path / name
        shutil.copytree(folder, target)
        if change is not None:
            (path,) = target.glob("*.safetensors")
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, {"format": "pt"})
        return str(target)

    return copy


@pytest.fixture(scope="module")
def llama(zoo):
    """Three full experts of a model without heads: names and shapes are the base's."""
    return zoo.made("llama")


def said(found: Diagnosis, level: str) -> list[tuple[str, str]]:
    return [(f.subject, f.text) for f in found.findings if f.level == level]


def finding(found: Diagnosis, subject: str, text: str) -> Finding:
    (only,) = [f for f in found.findings if f.subject == subject and text in f.text]
    assert only.level == "ok" or only.todo
    return only


def by_hand(base: str, experts: dict[str, str]) -> tuple[Tensors, dict[str, Tensors]]:
    """W_0 and all W_t - W_0 in float64, by the safetensors library alone."""
    start = {n: t.double() for n, t in load_file(Path(base, "model.safetensors")).items()}
    return start, {
        name: {n: load_file(Path(folder, "model.safetensors"))[n].double() - w
               for n, w in start.items()}
        for name, folder in experts.items()
    }  # fmt: skip


# ---------------------------------------------------------------------------------- numbers


def test_drift_cosines_and_signs_are_those_computed_by_hand(llama, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK", 100)  # many blocks for every matrix
    found = diagnose(recipe(llama.base, llama.experts))
    base, deltas = by_hand(llama.base, llama.experts)
    matrices = [name for name, tensor in base.items() if tensor.ndim == 2]
    assert found.measured == NAMES and found.ok
    for report in found.experts:
        moved = sum(float(deltas[report.name][n].square().sum()) for n in matrices)
        norm = sum(float(base[n].square().sum()) for n in matrices)
        assert report.drift == pytest.approx((moved / norm) ** 0.5, rel=1e-5)
        assert (report.changed, report.unchanged) == (len(base), 0)
        inside = [n for n in matrices if n.startswith("model.layers.1.")]
        moved = sum(float(deltas[report.name][n].square().sum()) for n in inside)
        norm = sum(float(base[n].square().sum()) for n in inside)
        assert report.layers is not None
        assert report.layers["model.layers.1"] == pytest.approx((moved / norm) ** 0.5, rel=1e-5)
    assert found.experts[0].layers is not None
    assert list(found.experts[0].layers) == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"
    ]  # fmt: skip
    flat = torch.stack([torch.cat([d[n].flatten() for n in base]) for d in deltas.values()])
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(found.cosines, dtype=torch.float64), unit @ unit.T, atol=1e-6, rtol=0
    )
    signs = flat.sign()
    for i in range(3):
        for j in range(3):
            both = (signs[i] != 0) & (signs[j] != 0)
            apart = (both & (signs[i] != signs[j])).sum() / both.sum()
            assert found.opposed[i][j] == pytest.approx(float(apart))
    several = (signs != 0).sum(0) > 1
    conflict = (signs == 1).any(0) & (signs == -1).any(0)
    assert found.conflicts == pytest.approx(float(conflict.sum() / several.sum()))


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        ({}, [1 / 3] * 3),
        ({"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}, [0.5] * 3),
        ({"merge_method": "ties", "parameters": {"density": 0.5}}, [1 / 3] * 3),  # the average
    ],
)
def test_ranks_are_those_of_the_expert_minus_the_shared_expert(llama, more, weights):
    found = diagnose(recipe(llama.base, llama.experts, exclusive={"rank": 3}, **more), sample=5)
    _, deltas = by_hand(llama.base, llama.experts)
    assert len(found.sampled) == 5 and len(found.spectra) == 15 and found.matrices == 16
    for each in found.spectra:
        shared = sum(w * deltas[n][each.tensor] for w, n in zip(weights, NAMES, strict=True))
        energy = torch.linalg.svdvals(deltas[each.expert][each.tensor] - shared).square()
        held = energy.cumsum(0) / energy.sum()
        assert each.kept == pytest.approx(float(held[2]), rel=1e-4)
        assert each.energy["1"] == pytest.approx(float(held[0]), rel=1e-4)
        assert each.energy[str(len(held))] == pytest.approx(1.0)
        for share in (90, 95, 99):
            rank = each.ranks[f"{share}%"]
            assert held[rank - 1] >= share / 100 - 1e-5
            assert rank == 1 or held[rank - 2] < share / 100 + 1e-5
    method = more.get("merge_method", "linear")
    affine = f"the shared expert by {method}"
    assert found.against == ("the experts' average" if method == "ties" else affine)


def test_weights_that_change_with_depth_give_each_layer_its_own_shared_expert(llama):
    parameters = {"weight": [0.0, 1.0], "normalize": False}
    gradient = recipe(
        llama.base, llama.experts, merge_method="task_arithmetic", parameters=parameters
    )
    found = diagnose(gradient, sample=None)
    _, deltas = by_hand(llama.base, llama.experts)
    depth = {"model.layers.0.mlp.up_proj.weight": 0.0, "model.layers.1.mlp.up_proj.weight": 1.0}
    for each in found.spectra:
        if each.tensor in depth:
            shared = depth[each.tensor] * sum(deltas[name][each.tensor] for name in NAMES)
            energy = torch.linalg.svdvals(deltas[each.expert][each.tensor] - shared).square()
            want = float(energy[0] / energy.sum())
            assert each.energy["1"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("normalize", [False, [{"filter": "layers.1", "value": False}, True]])
def test_weights_that_do_not_sum_to_1_leave_a_part_of_the_base_to_every_expert(llama, normalize):
    flag = [{"value": v} if v is True else v for v in normalize] if normalize else normalize
    parameters = {"weight": 0.2, "normalize": flag}
    exclusive = {"rank": 3}
    found = diagnose(
        recipe(llama.base, llama.experts, parameters=parameters, exclusive=exclusive), sample=None
    )
    base, deltas = by_hand(llama.base, llama.experts)
    for each in found.spectra:
        name = each.tensor
        shrinks = normalize is False or "layers.1" in name
        models = {n: base[name] + deltas[n][name] for n in NAMES}
        shared = sum((0.2 if shrinks else 1 / 3) * model for model in models.values())
        energy = torch.linalg.svdvals(models[each.expert] - shared).square()
        assert each.kept == pytest.approx(float(energy[:3].sum() / energy.sum()), rel=1e-4)
    told = finding(found, "shared expert", "sum to 0.6 and are not normalised")
    assert told.level == "look" and found.against == "the shared expert by linear"


def test_what_stands_in_for_the_shared_expert_never_assures_of_a_rank(llama):
    ties = {"merge_method": "ties", "parameters": {"density": 0.5}, "exclusive": {"rank": 15}}
    found = diagnose(recipe(llama.base, llama.experts, **ties), sample=4)
    assert found.against == "the experts' average" and found.experts[0].kept["median"] > 0.9
    assert all(f.subject != "exclusive" for f in found.findings)
    little = diagnose(recipe(llama.base, llama.experts, **ties | {"exclusive": {"rank": 1}}))
    assert finding(little, "exclusive", "measured against the experts' average").level == "look"
    alone = diagnose(recipe(llama.base, {"math": llama.experts["math"]}, **ties), sample=4)
    assert alone.against == "the base" and alone.experts[0].ranks is not None


def test_adapters_are_measured_like_the_full_models_that_they_stand_for(zoo, tmp_path):
    wide = FAMILIES["llama"]
    sizes = wide.sizes | {"hidden_size": 32, "intermediate_size": 40, "head_dim": 16}
    family = made(type(wide)(wide.base, wide.task, wide.config, sizes), tmp_path, experts=())
    lora, full = {}, {}
    for name in ("math", "code"):
        model = opened(wide.task, family.base)
        options = dict(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
        lora[name] = adapter(model, tmp_path / name, seed=name, **options)
        full[name] = merged_folder(lora[name])
    one = diagnose(recipe(family.base, lora))
    other = diagnose(recipe(family.base, full))
    torch.testing.assert_close(
        torch.tensor(one.cosines), torch.tensor(other.cosines), atol=1e-5, rtol=0
    )
    for mine, theirs in zip(one.experts, other.experts, strict=True):
        assert (mine.kind, theirs.kind) == ("LoRA", "full")
        assert mine.drift == pytest.approx(theirs.drift, rel=1e-4)
        assert mine.changed == theirs.changed == 4
    energies = {(s.tensor, s.expert): s.energy for s in other.spectra}
    assert len(one.spectra) == len(energies) == 2 * 4
    for each in one.spectra:  # from factors: rank 2 + 2 at most, against dense ones
        assert each.ranks["99%"] <= 4
        for rank in ("1", "2", "4"):
            want = energies[each.tensor, each.expert][rank]
            assert each.energy[rank] == pytest.approx(want, abs=1e-4)
    assert "model.norm.weight" in one.unchanged
    assert one.sampled and all("q_proj" in name or "up_proj" in name for name in one.sampled)


def test_every_tensor_is_read_once(llama, monkeypatch):
    reads: Counter[tuple[int, str]] = Counter()
    read = TensorFiles.read

    def counted(self, name):
        reads[id(self), name] += 1
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "read", counted)
    found = diagnose(recipe(llama.base, llama.experts), sample=3)
    assert len(reads) == 4 * len(found.tensors) and set(reads.values()) == {1}
    size = Path(llama.base, "model.safetensors").stat().st_size
    assert found.needs is not None and 0.8 * 4 * size < found.needs.read_bytes < 4 * size


def test_the_sample_is_spread_over_kinds_and_depth_and_never_changes():
    names = [f"layers.{i}.{kind}.weight" for i in range(32) for kind in ("q", "k", "up", "down")]
    subjects = [Subject(name, (64, 64), (64, 64), 0) for name in [*names, "embed.weight"]]
    chosen = choose(subjects, 13)
    assert chosen == choose(list(reversed(subjects)), 13) and len(set(chosen)) == 13
    kinds = Counter(spectra.kind_of(name) for name in chosen)
    assert kinds["embed.weight"] == 1 and set(kinds.values()) == {1, 3}
    layers = sorted(int(name.split(".")[1]) for name in chosen if name.startswith("layers"))
    assert layers[0] < 8 and layers[-1] >= 24
    assert len(choose(subjects, None)) == len(subjects) and choose(subjects, 0) == []
    assert len(choose(subjects, 40, work=1e9)) == spectra.LEAST_MATRICES


def test_bytes_at_an_energy_count_what_was_not_sampled_like_its_kind():
    def seen(name: str, rank: int) -> Spectrum:
        return Spectrum(name, "math", (8, 4), {"90%": rank, "95%": 3, "99%": 4}, {}, None)

    subjects = [
        Subject("layers.0.q.weight", (8, 4), (8, 4), 48),
        Subject("layers.1.q.weight", (8, 4), (8, 4), 48),
        Subject("layers.2.q.weight", (16, 8), (16, 8), 96),  # not sampled: half of 8, as its kind
        Subject("up.weight", (8, 4), (8, 4), 48),  # not sampled, nor its kind: half of 4
        Subject("still.weight", (8, 4), (8, 4), 48),
        Subject("norm.weight", (8,), None, 32),
    ]
    moved = {subject.name for subject in subjects} - {"still.weight"}
    mine = [seen("layers.0.q.weight", 1), seen("layers.1.q.weight", 3)]
    got = expected_bytes(mine, subjects, moved)["90%"]
    assert got == 1 * 48 + 3 * 48 + 4 * 96 + 2 * 48 + 32


# --------------------------------------------------------------------------------- findings


def test_three_sound_experts_are_all_ok(llama):
    found = diagnose(recipe(llama.base, llama.experts))
    assert found.ok and said(found, "fail") == []
    texts = dict(said(found, "ok"))
    assert "3 experts fit the base: 21 tensors are merged, 0 head tensors" in texts["models"]
    assert texts["base"].startswith("experts are 0.") and "all different" in texts["experts"]
    assert {"disk", "memory", "exclusive"} <= set(texts)


def test_an_expert_that_is_another_one_under_another_name_fails(llama, copied):
    twin = copied(llama.experts["math"])
    found = diagnose(recipe(llama.base, llama.experts | {"twin": twin}))
    same = finding(found, "experts 'math' and 'twin'", "the same expert twice")
    assert same.level == "fail" and not found.ok


def test_an_expert_that_is_nearly_another_one_is_told_with_their_cosine(llama, copied):
    def later(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensor.add_(0.001 * randn(*tensor.shape, seed=len(name)))

    near = copied(llama.experts["math"], later)
    found = diagnose(recipe(llama.base, llama.experts | {"near": near}))
    close = finding(found, "experts 'math' and 'near'", "nearly the same expert")
    assert close.level == "look" and found.ok
    assert 0.999 < (found.cosines[0][3] or 0) < 1


def test_equal_bodies_with_other_heads_are_two_experts(zoo, copied):
    made = zoo.made("bert")
    twin = copied(made.experts["math"], lambda t: t["classifier.bias"].add_(1.0))
    found = diagnose(recipe(made.base, {"math": made.experts["math"], "twin": twin}))
    assert finding(found, "experts 'math' and 'twin'", "nearly the same").level == "look"
    assert found.experts[0].heads == ("classifier.bias", "classifier.weight")
    assert found.experts[0].outputs == 2


def test_the_base_given_as_an_expert_is_told(llama, copied):
    found = diagnose(recipe(llama.base, llama.experts | {"self": copied(llama.base)}))
    itself = finding(found, "expert 'self'", "equals the base's")
    assert itself.level == "look" and found.experts[3].drift == 0.0
    assert found.cosines[3] == (None,) * 4
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_fine_tune_of_something_else_is_told_by_its_drift(llama, copied):
    def other(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensor.copy_(tensor.std() * randn(*tensor.shape, seed=len(name)))

    stranger = copied(llama.base, other)
    found = diagnose(recipe(llama.base, llama.experts | {"stranger": stranger}))
    far = finding(found, "expert 'stranger'", "two unrelated models are about 1.41 apart")
    assert far.level == "look"
    assert found.experts[3].drift == pytest.approx(1.41, abs=0.05)


def test_experts_that_all_went_one_way_point_to_a_later_base(llama, copied):
    way = {n: 0.2 * randn(*t.shape, seed=len(n)) for n, t in
           load_file(Path(llama.base, "model.safetensors")).items()}  # fmt: skip
    moved = {
        name: copied(folder, lambda t: [t[n].add_(way[n]) for n in t], name)
        for name, folder in llama.experts.items()
    }
    found = diagnose(recipe(llama.base, moved))
    assert finding(found, "base", "all experts went the same way").level == "look"


def test_experts_that_undo_each_other_are_told(llama, copied):
    base = load_file(Path(llama.base, "model.safetensors"))
    mirror = copied(
        llama.experts["math"],
        lambda tensors: [t.copy_(2 * base[n] - t) for n, t in tensors.items()],
    )
    found = diagnose(recipe(llama.base, {"math": llama.experts["math"], "mirror": mirror}))
    assert found.opposed[0][1] == pytest.approx(1.0, abs=0.01)
    assert found.cosines[0][1] == pytest.approx(-1.0, abs=1e-4)
    assert "opposite directions 100%" in finding(found, "experts", "pull an entry").text


def test_an_expert_that_is_louder_than_the_others_is_told(llama, copied):
    base = load_file(Path(llama.base, "model.safetensors"))

    def softer(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(base[name] + 0.1 * (tensor - base[name]))

    soft = {n: copied(f, softer, n) for n, f in llama.experts.items() if n != "law"}
    found = diagnose(recipe(llama.base, soft | {"law": llama.experts["law"]}))
    assert "outweighs" in finding(found, "expert 'law'", "times as far as the median").text


def test_a_small_rank_says_what_the_energy_would_cost(llama):
    found = diagnose(recipe(llama.base, llama.experts, exclusive={"rank": 1}))
    little = finding(found, "exclusive", "rank 1 holds")
    assert little.level == "look" and "`energy: 0.9` would hold 90 %" in little.todo
    static = diagnose(recipe(llama.base, llama.experts, exclusive={"rank": "none"}))
    assert all(f.subject != "exclusive" for f in static.findings)
    assert static.experts[0].kept is None and static.experts[0].ranks is not None


# ----------------------------------------------------------------------- what would not build


def test_all_experts_that_do_not_fit_are_told_and_the_others_are_measured(
    zoo, llama, copied, tmp_path
):
    def grown(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    def short(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    bad = {
        "bert": zoo.made("bert").experts["math"],
        "grown": copied(llama.experts["math"], grown, "grown"),
        "short": copied(llama.experts["math"], short, "short"),
        "nowhere": str(tmp_path / "nowhere"),
    }
    found = diagnose(recipe(llama.base, llama.experts | bad))
    assert not found.ok
    other = finding(found, "expert 'bert'", "model_type 'bert', the base's 'llama'")
    assert "another architecture" in other.todo
    vocabulary = finding(found, "expert 'grown'", "base has shape (40, 16)")
    assert "grew its vocabulary by 2" in vocabulary.todo
    assert "2 tensors have other shapes" in vocabulary.text
    assert finding(found, "expert 'short'", "model.layers.1.mlp.up_proj.weight")
    assert finding(found, "expert 'nowhere'", "nothing at that path")
    assert [subject for subject, _ in said(found, "fail")] == [f"expert '{n}'" for n in bad]
    assert found.measured == NAMES and found.plan is None and found.shared_bytes is None
    assert [e.kind for e in found.experts] == ["full"] * 3 + [None] * 4
    assert found.experts[0].drift and found.experts[3].drift is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_experts_that_only_together_do_not_fit_are_told(zoo, tmp_path):
    made, tokens = zoo.made("bert"), zoo.made("bert tokens")
    both = {"math": made.experts["math"], "names": tokens.experts["math"]}
    found = diagnose(recipe(made.base, both))
    ((subject, text),) = said(found, "fail")
    assert subject == "experts" and "different kinds of task model" in text


def test_a_base_that_is_not_there_is_told_with_the_experts_that_are_not_either(llama, tmp_path):
    experts = {"math": llama.experts["math"], "lost": str(tmp_path / "lost")}
    found = diagnose(recipe(str(tmp_path / "base"), experts))
    assert [subject for subject, _ in said(found, "fail")] == ["base", "expert 'lost'"]
    assert found.measured == () and found.needs is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_labels_of_two_experts_that_do_not_fit_their_heads_are_both_told(zoo):
    made = zoo.made("bert")
    labels = [{"model": made.experts[n], "name": n, "labels": ["one"]} for n in ("math", "code")]
    found = diagnose(recipe(made.base, {}, models=labels))
    assert "expected 2 names" in finding(found, "expert 'math'", "labels").text
    assert "expected 3 names" in finding(found, "expert 'code'", "labels").text
    assert len(said(found, "fail")) == 2 and found.measured == ("math", "code")


def test_weights_that_a_merge_refuses_are_one_finding_and_all_else_is_measured(llama):
    weight = [{"filter": "q_proj", "value": 0}, {"value": 1}]
    found = diagnose(recipe(llama.base, llama.experts, parameters={"weight": weight}), sample=5)
    ((subject, text),) = said(found, "fail")
    assert subject == "recipe" and "sum to 0" in text
    assert found.measured == NAMES and len(found.sampled) == 5
    assert found.against.endswith("by linear, or the experts' average where that is not known")


def test_numbers_that_are_not_finite_are_told_and_left_out(llama, copied):
    name = "model.layers.0.mlp.up_proj.weight"
    broken = copied(llama.experts["math"], lambda t: t[name].view(-1)[3:4].fill_(float("nan")))
    found = diagnose(recipe(llama.base, llama.experts | {"math": broken}))
    assert finding(found, "expert 'math'", name).level == "fail"
    assert len(said(found, "fail")) == 1
    assert name not in {t.name for t in found.tensors}
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_infinite_base_is_told_once(llama, copied):
    name = "model.layers.0.mlp.up_proj.weight"
    base = copied(llama.base, lambda t: t[name].view(-1)[3:4].fill_(float("inf")))
    found = diagnose(recipe(base, llama.experts))
    assert [subject for subject, _ in said(found, "fail")] == ["base"]


def test_large_finite_numbers_are_no_infinity(llama, copied):
    def huge(tensors: Tensors) -> None:
        tensors["model.norm.weight"].fill_(1e30)

    made = {n: copied(f, huge, n) for n, f in llama.experts.items()}
    found = diagnose(recipe(llama.base, made, out_dtype="float16"))
    assert found.ok
    assert finding(found, "experts 'math', 'code', 'law'", "float16").level == "look"
    (norm,) = [t for t in found.tensors if t.name == "model.norm.weight"]
    assert norm.moved[0] == pytest.approx(4e30, rel=1e-5)


def test_a_buffer_that_differs_from_the_bases_fails(llama, copied):
    base = copied(llama.base, lambda t: t.update(steps=torch.arange(3)), "with-steps")
    same = copied(llama.experts["code"], lambda t: t.update(steps=torch.arange(3)), "same")
    other = copied(llama.experts["math"], lambda t: t.update(steps=torch.ones(3).long()), "other")
    found = diagnose(recipe(base, {"math": other, "code": same}))
    assert said(found, "fail") == [("expert 'math'", finding(found, "expert 'math'", "steps").text)]


def test_a_full_disk_and_little_memory_are_told(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(examine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(examine, "free_memory", lambda: 1000)
    found = diagnose(recipe(llama.base, llama.experts), out=tmp_path / "not" / "yet")
    assert not found.ok
    assert "has 1 kB" in finding(found, "disk", "the artifact takes").text
    assert finding(found, "memory", "1 kB are free").level == "look"
    assert found.needs is not None and found.needs.folder == str(tmp_path)


def test_what_the_build_needs_is_what_the_plan_says(llama):
    found = diagnose(recipe(llama.base, llama.experts, exclusive={"rank": 2}))
    assert found.needs is not None and found.plan is not None
    assert found.needs.peak_memory_bytes == found.plan["peak_memory_bytes"] > 0
    assert found.needs.disk_bytes is not None
    assert found.needs.disk_bytes >= Path(llama.base, "model.safetensors").stat().st_size * 0.8
    assert found.needs.free_memory_bytes is None or found.needs.free_memory_bytes > 0
    assert found.needs.svd_seconds > 0 and found.needs.seconds >= found.needs.read_seconds > 0
    dropout = diagnose(recipe(llama.base, llama.experts,
                              exclusive={"form": "dropout", "density": 0.1}))  # fmt: skip
    assert dropout.needs is not None and dropout.needs.svd_seconds == 0.0


def test_free_memory_is_what_a_container_still_has(tmp_path, monkeypatch):
    for name, content in (
        ("memory.max", "1000\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 600\nfile 300\ninactive_file 100\nactive_file 150\n"),
    ):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(examine, "CGROUP", tmp_path)
    assert examine.free_memory() == 1000 - 900 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert examine.free_memory() != 350


# --------------------------------------------------------------------------------- tokenizers


def write_vocabulary(folder: Path, tokens: dict[str, int], template: str = "", **more) -> None:
    folder.mkdir(exist_ok=True)
    model = {"vocab": tokens, "merges": more.pop("merges", [])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model} | more))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def test_tokenizers_are_compared_token_by_token(tmp_path):
    base, expert = tmp_path / "base", tmp_path / "expert"
    write_vocabulary(base, {"a": 0, "b": 1, "c": 2}, template="one", merges=["a b"])
    added = [{"content": "<new>", "id": 3}]
    write_vocabulary(
        expert, {"a": 0, "c": 1, "d": 2}, "two", merges=[["a", "c"]], added_tokens=added
    )
    one, other = read_tokenizer(base), read_tokenizer(expert)
    assert one is not None and other is not None
    found = compare(one, other)
    assert (found.lacking, found.added, found.renumbered) == (1, 2, 1)
    assert found.examples == (
        "'d' is new (2)",
        "'<new>' is new (3)",
        "'b' is missing",
        "'c': 2 -> 1",
    )
    assert found.rules == ("merges",) and found.chat_template and found
    assert not compare(one, one)


def test_the_same_tokenizer_in_other_files_is_no_difference(tmp_path):
    fast, slow, unigram = (tmp_path / name for name in ("fast", "slow", "unigram"))
    write_vocabulary(fast, {"a": 0, "b": 1}, merges=[["a", "b"]])
    slow.mkdir()
    (slow / "vocab.json").write_text('{"a": 0, "b": 1}')
    (slow / "merges.txt").write_text("#version: 0.2\na b\n")
    unigram.mkdir()
    (unigram / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}')
    read = [read_tokenizer(folder) for folder in (fast, slow, unigram)]
    assert all(tokenizer is not None for tokenizer in read)
    assert not any(compare(one, other) for one in read for other in read)  # type: ignore[arg-type]
    (slow / "vocab.txt").write_text("a\nx\n")
    other = read_tokenizer(slow)
    assert other is not None and compare(read[0], other).examples[0] == "'x' is new (1)"  # type: ignore[arg-type]
    assert read_tokenizer(tmp_path) is None


def test_another_tokenizer_and_another_template_are_told_by_expert(zoo, copied):
    made = zoo.made("llama")
    base, law = copied(made.base, name="base"), copied(made.experts["law"], name="law")
    code = copied(made.experts["code"], name="code")
    save_tokenizer(base, pairs=False)
    save_tokenizer(law, pairs=False)
    content = json.loads(Path(law, "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["the0"], vocabulary["the1"] = vocabulary["the1"], vocabulary["the0"]
    Path(law, "tokenizer.json").write_text(json.dumps(content))
    save_tokenizer(code, pairs=False)
    Path(code, "chat_template.jinja").write_text("{{ messages }}")
    found = diagnose(recipe(base, {"law": law, "code": code, "math": made.experts["math"]}))
    text = finding(found, "expert 'law'", "its tokenizer is not the base's").text
    assert "2 tokens have other numbers: 'the0': 5 -> 6; 'the1': 6 -> 5" in text
    assert finding(found, "expert 'code'", "chat template").level == "look"
    assert found.experts[2].tokenizer is None and found.ok
    alone = diagnose(recipe(base, {"math": made.experts["math"]}))
    assert finding(alone, "tokenizer", "only the base has one").level == "ok"
    none = diagnose(recipe(made.base, made.experts))
    assert finding(none, "tokenizer", "has no tokenizer").level == "look"


def test_models_of_images_are_compared_by_how_they_see(zoo, copied):
    made = zoo.made("vit")
    base, other = copied(made.base, name="base"), copied(made.experts["math"], name="other")
    for folder, mean in ((base, [0.5]), (other, [0.4])):
        content = {"image_mean": mean, "image_processor_type": folder}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(content))
    found = diagnose(recipe(base, {"math": other, "code": made.experts["code"]}))
    text = finding(found, "expert 'math'", "preprocessor_config.json").text
    assert "has image_mean = [0.4], the base's [0.5]." in text
    assert all(f.subject != "tokenizer" for f in found.findings) and found.ok


def test_configs_that_change_what_weights_mean_are_told(llama, copied):
    other = copied(llama.experts["math"])
    path = Path(other, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    found = diagnose(recipe(llama.base, llama.experts | {"math": other}))
    assert "hidden_act = 'gelu'" in finding(found, "expert 'math'", "its config.json has").text


# ------------------------------------------------------------------------------ command line


def write_recipe(folder: Path, base: str, experts: dict[str, str]) -> Path:
    models = [{"model": path, "name": name} for name, path in experts.items()]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"base_model": base, "models": models}))
    return path


def test_json_on_stdout_is_nothing_but_the_diagnosis(call, llama, tmp_path):
    path = write_recipe(tmp_path, llama.base, llama.experts)
    done = call("doctor", path, "--json", "--plots", tmp_path / "plots")
    assert done.code == 0 and done.json["ok"] and done.json["schema"] == 1
    assert set(done.json) == {
        "schema", "ok", "base", "method", "exclusive", "experts", "findings", "measured", "tensors",
        "unchanged", "cosines", "opposed", "conflicts", "spectra", "sampled", "matrices", "against",
        "shared_bytes", "needs", "plan",
    }  # fmt: skip
    assert set(done.json["findings"][0]) == {"level", "subject", "text", "todo"}
    assert set(done.json["experts"][0]) == {
        "name", "reference", "kind", "outputs", "heads", "drift", "layers", "changed", "unchanged",
        "tokenizer", "ranks", "bytes", "kept",
    }  # fmt: skip
    assert set(done.json["needs"]) == {
        "peak_memory_bytes", "free_memory_bytes", "disk_bytes", "free_disk_bytes", "folder",
        "read_bytes", "read_seconds", "svd_seconds", "seconds",
    }  # fmt: skip
    assert "drawn: " in done.err


def test_the_page_names_every_key_and_option_and_word(call):
    page = (Path(__file__).resolve().parent.parent / "docs" / "doctor.md").read_text()
    table = page[page.index("## For programs") :]
    keys = {"ok", *(field.name for field in dataclasses.fields(Diagnosis))}
    assert {key for key in keys if f"`{key}`" not in table} == set()
    options = {"--base", "--sample", "--out", "--plots", "--json"}
    for option in options:
        assert option in page and option in call("doctor", "--help").out
    for words in LEVELS.values():
        assert f"`{words}`" in page and words in page


def test_text_has_tables_and_a_line_for_every_finding(call, llama, tmp_path):
    path = write_recipe(tmp_path, llama.base, llama.experts)
    done = call("doctor", path, "--sample", 4)
    assert done.code == 0
    assert "3 experts of " in done.out and "cosines between task vectors" in done.out
    assert "over 4 of the 16 matrices" in done.out and "matrices that moved most" in done.out
    assert "look at this  tokenizer: has no tokenizer" in done.out
    assert "              -> Copy the tokenizer" in done.out
    assert "\nok            models: 3 experts fit the base" in done.out
    everything = call("doctor", path, "--sample", 0)
    assert "over 16 of the 16 matrices" in everything.out


def test_what_would_not_build_ends_with_1_and_one_expert_is_enough(call, llama, tmp_path):
    experts = {"math": llama.experts["math"], "lost": "./lost"}
    done = call("doctor", write_recipe(tmp_path, llama.base, experts))
    assert done.code == 1 and "will fail     expert 'lost': " in done.out
    assert "not opened" in done.out and "Traceback" not in done.err
    base = call("doctor", write_recipe(tmp_path, "./nothing", experts), "--json")
    assert base.code == 1 and not base.json["ok"]
    moved = write_recipe(tmp_path, "./nothing", {"math": llama.experts["math"]})
    assert call("doctor", moved, "--base", llama.base).code == 0


def test_plots_are_drawn_of_what_was_measured(llama, tmp_path):
    found = diagnose(recipe(llama.base, llama.experts), sample=3)
    paths = write_plots(found, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["energy.png", "cosines.png", "drift.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    lost = diagnose(recipe(str(tmp_path / "no"), llama.experts))
    assert write_plots(lost, tmp_path / "none") == []


def test_plots_without_matplotlib_are_refused_before_anything_is_read(call, llama, tmp_path):
    path = write_recipe(tmp_path, llama.base, llama.experts)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "matplotlib", None)
        done = call("doctor", path, "--plots", tmp_path / "plots")
        assert done.code == 1 and done.out == ""
        assert "pip install 'twinmerge[plot]'" in done.err
        with pytest.raises(MissingExtra):
            write_plots(diagnose(recipe(llama.base, llama.experts), sample=1), tmp_path)


def test_a_model_saved_in_16_bits_is_measured_in_float32(llama, tmp_path):
    base = opened(llama.family.task, llama.base, dtype=torch.bfloat16)
    expert = opened(llama.family.task, llama.experts["math"], dtype=torch.bfloat16)
    folders = save(base, tmp_path / "base"), {"math": save(expert, tmp_path / "math")}
    found = diagnose(recipe(*folders))
    start, deltas = by_hand(*folders)
    matrices = [n for n in start if start[n].ndim == 2]
    moved = sum(float(deltas["math"][n].square().sum()) for n in matrices)
    norm = sum(float(start[n].square().sum()) for n in matrices)
    assert found.experts[0].drift == pytest.approx((moved / norm) ** 0.5, rel=1e-5)
