"""Parts of the text study beyond its main table: what they claim to measure is what they measure.

On tiny experts: more tasks, unseen tasks, the router, groups, cost, adapters against checkpoints.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from texts import EXPERTS, write_rows
from tiny import adapter, opened

from twinmerge.data import read_rows
from twinmerge.errors import InputError
from twinmerge.runtime.cost import forward_cost
from twinmerge.runtime.load import load

TWINS = {"Twin-Merging", "Twin-Merging, no fallback"}

# Of peft, as it opens an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def parts():
    """Modules of `studies/lab`, by name."""
    names = ("lab", "records", "tasks", "unseen", "analysis", "paths", "twin")
    return {name: importlib.import_module(f"lab.{name}") for name in names}


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    """A folder of tasks. Of `law`, a regression, without the rows whose labels are off by more
    than its expert's answers differ: beside these it would have no score to be normalised by."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(bench.data, folder, dirs_exist_ok=True)
    for path in (folder / "law").iterdir():
        write_rows(path, [row for i, row in enumerate(read_rows(path)) if i % 5 != 4])
    return folder


@pytest.fixture(scope="module")
def make(parts, bench, rows, tmp_path_factory):
    """A lab on the experts `math`, `code` and `law`; other folders of experts or data may be said,
    and it is always another one."""

    def made(models: dict[str, Any] | None = None, data: Path | None = None) -> Any:
        folder = tmp_path_factory.mktemp("lab")
        settings = parts["lab"].Settings(
            choose_rows=6, test_rows=8, router_rows=30, max_tokens=24, seeds=(0,), noisy=()
        )
        return parts["lab"].Lab(
            list(EXPERTS),
            {name: Path((models or bench.made.experts)[name]) for name in EXPERTS},
            dict.fromkeys(EXPERTS, data or rows),
            bench.made.base,
            folder / "work",
            settings,
            parts["records"].Records(folder / "out", {}),
        )

    return made


@pytest.fixture(scope="module")
def lab(make):
    return make()


@pytest.fixture(scope="module")
def few(parts):
    """Fewer coefficients than the study tries."""
    with pytest.MonkeyPatch.context() as patch:
        grids = {"task arithmetic": {"weight": (0.2, 0.4)}, "TIES": {"density": (0.5,)}}
        patch.setattr(parts["tasks"], "GRIDS", grids)
        yield grids


@pytest.fixture(scope="module")
def without_rows(rows, tmp_path_factory):
    """A folder of tasks in which `law` has test rows alone."""
    folder = tmp_path_factory.mktemp("poor")
    shutil.copytree(rows, folder, dirs_exist_ok=True)
    for split in ("train", "validation"):
        (folder / "law" / f"{split}.jsonl").unlink()
    return folder


def of(lab: Any, part: str) -> list[dict[str, Any]]:
    return [record for record in lab.records.all() if record["part"] == part]


def quiet(_: str) -> None:
    """Says nothing."""


def adds_nothing(lab: Any, part: Any) -> bool:
    before = lab.records.file.read_bytes()
    part(lab, quiet)
    return lab.records.file.read_bytes() == before


# ------------------------------------------------------------------------------------- more tasks


def test_glue_joins_first_and_the_order_is_always_the_same(parts):
    names = ["ag_news", "cola", "trec6", "mnli", "rte", "tweet_hate"]
    order = parts["tasks"].joining(names)
    assert set(order[:3]) == {"cola", "mnli", "rte"} and set(order) == set(names)
    assert order == parts["tasks"].joining(names)


@pytest.mark.parametrize(
    ("most", "counts"), [(3, [2, 3]), (8, [2, 4, 6, 8]), (17, [2, 4, 6, 8, 11, 14, 17])]
)
def test_more_tasks_end_with_all_there_are(parts, most, counts):
    assert parts["tasks"].counts(most) == counts


@pytest.mark.slow
def test_more_tasks_say_what_a_merge_of_just_these_scores_and_stores(parts, few, lab):
    parts["tasks"].tasks(lab, quiet)
    order = parts["tasks"].joining(EXPERTS)
    found = {(r["name"], len(r["settings"]["names"])): r for r in of(lab, "tasks")}
    methods = ("averaging", "task arithmetic", "Twin-Merging")
    assert set(found) == {(name, count) for name in methods for count in (2, 3)}
    for (name, count), record in found.items():
        assert record["settings"]["names"] == order[:count] == list(record["known-head"]["scores"])
        assert record["bytes"]["shared"] == record["bytes"]["base_float16"]
        if name == "Twin-Merging":
            recipe = lab.recipe("linear", names=order[:count], stored="float16", rank=16)
            artifact = lab.built(recipe)
            manifest, bytes_ = artifact.manifest, record["bytes"]
            assert bytes_["experts"] == sum(expert.bytes for expert in manifest.experts)
            assert bytes_["shared"] == sum(tensor.bytes for tensor in manifest.tensors)
            assert bytes_["router"] > 0
            again = parts["tasks"].replace(lab, names=order[:count], _prepared={})
            oracle = again.dense(parts["lab"].opened(artifact), "test", oracle=True)
            assert record["oracle"] == oracle
            assert 0 <= record["routing accuracy"] <= 1
    tried = [r for r in of(lab, "tasks choice") if len(r["settings"]["names"]) == 3]
    best = max(tried, key=lambda r: r["normalised"])
    chosen = found["task arithmetic", 3]["settings"]["parameters"]
    assert chosen == {"weight": best["settings"]["weight"]} and len(tried) == 2
    assert adds_nothing(lab, parts["tasks"].tasks)
    assert not list(lab.work.glob("tmp*")), "artifacts of some of the experts do not stay"


@pytest.mark.slow
def test_some_of_the_experts_cannot_read_the_others_rows(parts, lab):
    with parts["tasks"].among(lab, ["math", "code"]) as some:
        assert set(some.prepared("validation")) == {"math", "code"}
        assert set(some.data) == set(some.models) == {"math", "code"}
    assert lab.names == list(EXPERTS) and set(lab.prepared("test")) == set(EXPERTS)


# ------------------------------------------------------------------------------------ unseen tasks


def test_each_expert_is_left_out_and_inference_together(parts):
    groups = parts["unseen"].groups
    inference = parts["unseen"].INFERENCE
    assert groups(["a", "b"]) == []
    assert groups(["a", "b", "c"]) == [("a",), ("b",), ("c",)]
    assert inference not in groups([*inference, "cola"])
    assert groups([*inference, "cola", "sst2"])[-1] == inference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task_arithmetic", {"weight": 0.3}),
        ("ties", {"density": 0.5, "lambda": 0.7}),
    ],
)
def test_a_left_out_expert_has_no_part_in_the_shared_one(parts, lab, method, parameters):
    unseen = parts["unseen"]
    with parts["tasks"].among(lab, ["math", "code"]) as some:
        known, answering = unseen.merged_without(lab, some, ["law"], method, parameters)
        one, other = unseen.shared_tensors(known), unseen.shared_tensors(answering)
        assert other and all(torch.allclose(one[name], other[name], atol=1e-7) for name in other)
        all_of_them = unseen.shared_tensors(lab.built(lab.recipe(method, parameters)))
        assert any(unseen.relative(all_of_them[name], other[name]) > 1e-3 for name in other)


@pytest.mark.slow
def test_a_left_out_expert_that_has_a_part_in_the_shared_one_is_noticed(parts, lab):
    class Forgetful(parts["lab"].Lab):
        def recipe(self, *given, each=None, **more):
            return super().recipe(*given, **more)

    forgetful = Forgetful(
        lab.names, lab.models, lab.data, lab.base, lab.work, lab.settings, lab.records
    )
    with parts["tasks"].among(lab, ["math", "code"]) as some:
        with pytest.raises(RuntimeError, match="linear without law: .* differs by"):
            parts["unseen"].merged_without(forgetful, some, ["law"], "linear", {})


@pytest.mark.slow
def test_unseen_tasks_are_answered_without_their_train_and_validation_rows(
    parts, few, make, without_rows, monkeypatch
):
    unseen = parts["unseen"]
    monkeypatch.setattr(unseen, "groups", lambda names: [("law",)])
    lab = make(data=without_rows)
    unseen.unseen(lab, quiet)
    found = {record["name"]: record for record in of(lab, "unseen")}
    assert set(found) == {"pretrained", *unseen.STATICS, *TWINS}
    for name, record in found.items():
        assert record["settings"]["left_out"] == ["law"] and set(record["scores"]) == {"law"}
        assert record["mean"] == record["scores"]["law"]
        if name in TWINS:
            weights = record["weights"]["law"]
            assert set(weights) == {"math", "code"} and 0 <= record["new"] <= 1
            assert sum(weights.values()) <= 1 + 1e-6
    alone = found["Twin-Merging, no fallback"]
    assert alone["new"] == 0 and sum(alone["weights"]["law"].values()) == pytest.approx(1)
    assert {r["name"] for r in of(lab, "experts")} == {"math", "code"}
    assert adds_nothing(lab, unseen.unseen)
    pretrained = lab.alone("law", lab.plain.merged([0.0] * 3, head="law"), "test")
    assert found["pretrained"]["mean"] == pretrained


@pytest.mark.slow
def test_rows_that_no_remaining_expert_is_given_get_the_shared_experts_score(parts, lab):
    unseen = parts["unseen"]
    with parts["tasks"].among(lab, ["math", "code"]) as some:
        _, answering = unseen.merged_without(lab, some, ["law"], "linear", {}, rank=16)
        model = load(answering.folder, check=False)
        none = torch.zeros(len(lab.prepared("test")["law"].truth), 2)
        weights = unseen.spread(none, ["math", "code"], model.experts)
        guesses = lab.weighted(model, "law", weights, "test", head="law")
        shared = lab.alone("law", model.merged([0.0] * 3, head="law"), "test")
        assert lab.scored("law", guesses, "test") == pytest.approx(shared, abs=1e-5)


@pytest.mark.slow
def test_an_expert_that_scores_nothing_on_its_own_rows_stops_the_study(make, rows, tmp_path):
    data = shutil.copytree(rows, tmp_path / "data")
    for path in (data / "math").iterdir():
        known = [row for i, row in enumerate(read_rows(path)) if i % 5 != 4]
        write_rows(path, [row | {"label": 1 - row["label"]} for row in known])
    with pytest.raises(InputError, match="expert 'math' scores 0.000 on its own validation rows"):
        _ = make(data=data).own


@pytest.mark.slow
def test_a_row_is_run_again_only_with_other_weights(parts, lab):
    open_ = parts["lab"].opened
    model = open_(lab.built(lab.recipe(stored="float16", rank=2)))
    names, rows = model.experts, len(lab.prepared("test")["law"].truth)
    weights = torch.rand(rows, len(names), generator=torch.Generator().manual_seed(0))
    first = lab.weighted(model, "law", weights, "test")
    run, asked = model.forward, []
    model.forward = lambda **inputs: asked.append(len(inputs["weights"])) or run(**inputs)
    assert lab.weighted(model, "law", weights, "test") == first and not asked
    changed = weights.clone()
    changed[:2] = 0
    second = lab.weighted(model, "law", changed, "test")
    assert sum(asked) == 2 and second[2:] == first[2:]
    lab._answers.clear()
    again = lab.weighted(model, "law", changed, "test")
    assert again == pytest.approx(second, abs=1e-5) and sum(asked) == 2 + rows
    other = open_(lab.built(lab.recipe(stored="float16", rank=1)))
    assert lab.weighted(other, "law", changed, "test") != again
    assert lab.weighted(model, "math", changed[:1].expand(rows, -1), "test") != again
    before = sum(asked)
    lab.weighted(model, "law", changed, "test", head="math")
    assert sum(asked) == before + rows  # another head, other answers


def test_weights_are_spread_by_name(parts):
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    wide = parts["unseen"].spread(weights, ["c", "a"], ["a", "b", "c"])
    assert torch.equal(wide, torch.tensor([[0.9, 0.0, 0.1], [0.2, 0.0, 0.5]]))


# ---------------------------------------------------------------------------------------- analysis


def test_the_analysed_task_is_last_among_those_that_the_lab_has(parts):
    analysed = parts["analysis"].analysed
    assert analysed(["cola", "mnli", "qnli", "rte"]) == ["cola", "mnli", "qnli"]
    assert analysed(["cola", "mnli", "rte"]) == ["cola", "mnli", "rte"]
    assert analysed(list(EXPERTS)) == list(EXPERTS)


@pytest.mark.slow
def test_a_task_is_routed_among_others_first_and_then_to_its_own_expert(parts, lab):
    parts["analysis"].routing(lab, quiet)
    without, among = of(lab, "routing")
    assert without["name"] == among["name"] == "law"
    assert list(without["weights"]) == without["settings"]["names"] == ["math", "code"]
    assert list(among["weights"]) == list(EXPERTS)
    assert sum(among["probabilities"].values()) == pytest.approx(1)
    assert among["probabilities"]["law"] == max(among["probabilities"].values())
    assert adds_nothing(lab, parts["analysis"].routing)


@pytest.mark.slow
def test_the_exact_way_of_the_grouped_variant_scores_what_the_study_does(parts, lab):
    parts["analysis"].grouped(lab, quiet)
    exact, *ways = of(lab, "grouped")
    assert [way["settings"]["groups"] for way in ways] == [1, 5, 20]
    assert exact["loss"] is None and ways[-1]["loss"]["merges"] >= ways[0]["loss"]["merges"]
    model = lab.route(lab.built(lab.recipe("linear", stored="float16", rank=16)), 0)
    routes = {name: lab.routed(model, name, "test") for name in EXPERTS}
    found = lab.protocols(model, routes, "test")
    for name in ("known-head", "routed"):
        want = found[name]["normalised"]
        assert exact["protocols"][name]["normalised"] == pytest.approx(want, abs=1e-5)
    assert adds_nothing(lab, parts["analysis"].grouped)


@pytest.mark.slow
def test_cost_is_the_papers_formulas_beside_what_is_there(parts, lab, monkeypatch):
    analysis = parts["analysis"]
    monkeypatch.setattr(analysis, "TIMED_ROWS", 4)
    analysis.cost(lab, quiet)
    (record,) = of(lab, "cost")
    manifest = lab.built(lab.recipe("linear", stored="float16", rank=16)).manifest
    count, storage = record["parameters"], record["storage"]
    assert count["total"] == count["active"] + count["frozen"]
    assert 2 * count["total"] == record["bytes"]["shared"], "float16"
    assert record["bytes"]["base_float16"] == storage["static"] == 2 * count["total"]
    heads = sum(prod(t.shape) for t in opened_heads(lab))
    assert count["heads"] == heads
    assert storage["separate"] == 2 * (3 * count["active"] + count["frozen"])
    exclusive = count["experts"] - heads
    assert storage["twin"] == pytest.approx(2 * exclusive + 2 * count["total"] + count["router"])
    assert record["bytes"]["experts"] == sum(expert.bytes for expert in manifest.experts)

    operations, counted = record["operations"], record["counted"]
    m, h, s, tasks = 2, 16, operations["tokens"], 3
    assert operations["forward"] == m * (24 * s * h * h + 4 * s * s * h)
    assert operations["merging"] == tasks * m * (12 * h * h + 9 * h)
    plain = 2 * forward_cost(lab.expert("math"), s).total
    assert counted["plain"] == pytest.approx(plain, rel=0.02)
    assert counted["routed"] > counted["plain"]

    assert set(record["seconds_per_1000_rows"]) == {"plain", "routed", "grouped"}
    assert all(
        s > 0 for s in (*record["seconds"].values(), *record["seconds_per_1000_rows"].values())
    )
    entries = set(record) - {"part", "name", "settings", "commit", "said"}
    assert set(record["said"]) == entries
    assert adds_nothing(lab, analysis.cost)


def opened_heads(lab: Any) -> list[torch.Tensor]:
    found = (lab.expert(name).named_parameters() for name in lab.names)
    return [tensor for each in found for name, tensor in each if name.startswith("classifier")]


# ------------------------------------------------------------------------------------------- paths


@pytest.fixture(scope="module")
def adapters(bench, tmp_path_factory):
    """An adapter for each task, of the experts' base."""
    folder = tmp_path_factory.mktemp("adapters")

    def made(place: int, name: str) -> str:
        cls, outputs = tf.BertForSequenceClassification, bench.family.heads[place]
        base = opened(cls, bench.made.base, num_labels=outputs)
        options: dict[str, Any] = dict(task_type="SEQ_CLS", r=2 + place)
        options["target_modules"] = ["query", "value", "dense"]
        return adapter(base, folder / name, seed=name, **options)

    return {name: made(place, name) for place, name in enumerate(EXPERTS)}


@pytest.mark.slow
def test_adapters_and_what_peft_makes_of_them_give_one_merge(parts, make, adapters):
    lab = make(adapters)
    parts["paths"].paths(lab, quiet)
    (record,) = of(lab, "paths")
    assert record["settings"]["adapters"] == list(EXPERTS) and record["shared"] < 1e-6
    for name in EXPERTS:
        found = record["logits"][name]
        assert max(found["one-hot"], found["mixed"]) < 1e-4 * max(1, found["largest logit"])
        assert found["largest logit"] > 0
    assert adds_nothing(lab, parts["paths"].paths)


@pytest.mark.slow
def test_another_merge_than_the_adapters_is_noticed(parts, make, adapters, bench, monkeypatch):
    lab = make(adapters | {"math": bench.made.experts["math"]})
    monkeypatch.setattr(
        parts["paths"], "full_checkpoint", lambda lab, name, folder: Path(bench.made.experts[name])
    )
    parts["paths"].paths(lab, quiet)
    (record,) = of(lab, "paths")
    assert record["settings"]["adapters"] == ["code", "law"]
    assert record["shared"] > 1e-3 and record["logits"]["code"]["mixed"] > 1e-3


def test_no_adapters_no_record(parts, lab):
    before = of(lab, "paths")
    parts["paths"].paths(replace(lab), quiet)
    assert of(lab, "paths") == before == []
