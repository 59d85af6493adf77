"""The runtime benchmark runs, compares like with like, and goes on where it left off."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny import EXPERTS

from twinmerge.errors import TwinMergeError
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODES = {"soft", "top-1", "uniform", "merged"}
HEADLINE = "batch=4 tokens=8 experts=3 rank=2"
CLOSE = 2e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]


@pytest.fixture(scope="module")
def runtime():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("runtime")


@pytest.fixture(scope="module")
def subjects(runtime):
    return importlib.import_module("subjects")


@pytest.fixture(scope="module")
def cells(runtime):
    return importlib.import_module("runtime_cells")


@pytest.fixture(scope="module")
def experts(bench, tmp_path_factory) -> Path:
    """A folder of nothing but experts."""
    folder = tmp_path_factory.mktemp("experts")
    for name in EXPERTS:
        (folder / name).symlink_to(bench.made.experts[name])
    return folder


@pytest.fixture(scope="module")
def run(runtime, bench, experts, tmp_path_factory):
    """Runs the benchmark on tiny experts and reads what it wrote."""
    work = tmp_path_factory.mktemp("work")

    def call(out: Path, *parts: str, **options: Any) -> dict[str, Any]:
        chosen = [runtime.Part(part) for part in parts]
        options = {"quick": True, "plots": False, "headline": HEADLINE, "router_rows": 24} | options
        runtime.main(experts, bench.data, bench.made.base, out, chosen, work=work, **options)
        return json.loads(out.read_text(encoding="utf-8"))

    return call


@pytest.fixture(scope="module")
def everything(run, tmp_path_factory):
    """All parts, with pictures."""
    folder = tmp_path_factory.mktemp("results")
    parts = ("grid", "plans", "rivals", "routing", "decode", "wide")
    return run(folder / "runtime.json", *parts, plots=True), folder


def test_every_cell_has_times_bounds_and_small_differences(everything):
    rows = everything[0]["grid"]["rows"]
    assert [(row["experts"], row["rank"]) for row in rows] == [(2, 2), (3, 2)]
    for row in [*rows, *everything[0]["wide"]["rows"]]:
        assert set(row["ratio"]) == set(row["milliseconds"]) == {"plain"} | MODES
        assert row["ratio"]["plain"] == 1 and min(row["milliseconds"].values()) > 0
        assert row["plan"]["merged"] == "merged" and row["plan"]["uniform"] == "uniform"
        assert set(row["largest_difference"]) == MODES
        assert max(row["largest_difference"].values()) < CLOSE
        bound = row["bound"]
        assert 1 == bound["merged"] <= bound["uniform"] <= bound["soft"]
        assert 1 < bound["top-1"] < bound["soft"]


def test_the_bound_counts_the_products_of_all_factors(bench, subjects):
    """By hand: rank 4 of 3 experts, 2 blocks of width 16, 6 tokens."""
    twin = load(bench.plain)
    plain = DenseMerge(twin).at(torch.zeros(3), head="math")
    rows, tokens, rank, width, inner = 2, 6, 4, 16, 24
    bounds = importlib.import_module("timing").bounds
    found = bounds(plain, subjects.random_batch(40, rows, tokens), twin.manifest)
    matrices = 2 * [(width, width)] * 4 + 2 * [(width, inner), (inner, width)]
    linear = sum(in_ * out for in_, out in matrices)
    attention = 2 * 2 * tokens * width  # scores and values, both blocks
    ends = width * width + width * 2  # pooler and classifier, for one token
    plain_products = rows * (tokens * (linear + attention) + ends)
    assert found["plain_flops"] == 2 * plain_products
    # Tables: words, positions (rank 4), token types (rank 2, there are two).
    tables = (4 + 4 + 2) * width
    per_expert = tokens * (rank * sum(in_ + out for in_, out in matrices) + tables)
    per_expert += rank * 2 * width  # the pooler's
    assert found["soft"] == pytest.approx(1 + 3 * rows * per_expert / plain_products)
    assert found["top-1"] == pytest.approx(1 + rows * per_expert / plain_products)


def test_each_plan_is_timed_where_it_is_exact(everything):
    rows = everything[0]["plans"]["rows"]
    ways = {row["weights"]: set(row["ratio"]) - {"plain"} for row in rows}
    assert ways["top-1"] == {"stacked", "selected", "split"}
    assert ways["uniform"] == {"stacked", "uniform", "merged"}
    assert all(row["predicted_break_even"] > 0 for row in rows)


def test_the_rivals_compute_what_we_compute(everything):
    full, lora = everything[0]["rivals"]["rows"]
    assert full["experts_are"] == "full fine-tunes" and lora["experts_are"] == "LoRA adapters"
    assert set(full["largest_difference"]) < set(full["ratio"])
    assert set(lora["largest_difference"]) < set(lora["ratio"])
    for row in (full, lora):
        assert max(row["largest_difference"].values()) < CLOSE
    assert lora["largest_answer"] > 0.1, "so small a difference says nothing about zeros"
    assert full["held_bytes"]["own plain experts"] > 2.9 * full["model_bytes"]


def test_routing_is_timed_at_every_layer_beside_its_share(everything):
    rows = everything[0]["routing"]["rows"]
    assert [row["share_of_layers"] for row in rows] == [0, 0.5, 1]
    assert sum(row["fitted"] for row in rows) == 1
    for row in rows:
        more = {"routed, top_k=1"} if row["fitted"] else set()
        assert set(row["ratio"]) == {"plain", "route", "forward", "routed"} | more
        assert row["added"] == row["ratio"]["routed"] - row["ratio"]["forward"]
        # the router's own small net is in the one and not in the other
        assert row["share_of_flops"] == pytest.approx(row["predicted"], abs=0.05)


def test_generation_gives_the_tokens_of_the_densely_merged_model(everything):
    rows = everything[0]["decode"]["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row["tokens_per_second"]) == {"plain", "soft", "top-1", "merged"}
        for found in row["agreement"].values():
            assert found["same_tokens"] == found["tokens"] == row["new"]
            assert found["largest_difference"] < CLOSE


def test_the_tables_of_the_docs_are_made_of_what_it_found(runtime, everything, monkeypatch):
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "read", lambda name: everything[0] if name == "runtime" else None)
    speed, plans = tables.speed().splitlines(), tables.plans().splitlines()
    assert [line.split(" | ")[0] for line in speed[2:4]] == ["| 2", "| 3"]
    assert [line.split(" | ")[0] for line in plans[2:4]] == ["| 4", "| 8"]
    for line in (*speed[2:4], *plans[2:4]):
        assert "|  |" not in line and line.count("×") >= 6
    uniform = {r["tokens"]: r["ratio"] for r in everything[0]["plans"]["rows"][-2:]}
    assert plans[2].endswith(f"| {uniform[4]['merged']:.2f}× |")
    assert "arithmetic: " in plans[-1] and "top_k=1" in speed[-1]
    monkeypatch.setattr(tables, "read", lambda name: {"grid": {}})
    assert tables.speed() is None and tables.plans() is None


def test_each_picture_is_drawn_as_png_and_svg(everything):
    _, folder = everything
    names = {"experts", "plans", "rivals", "routing", "decode"}
    pictures = {f"runtime-{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == {"runtime.json"} | pictures


def test_a_run_goes_on_only_where_the_same_commit_left_off(run, tmp_path, monkeypatch):
    results = importlib.import_module("runtime_results")
    made = results.provenance()
    monkeypatch.setattr(results, "provenance", lambda: made)
    made["commit"] = "a" * 12
    out, one, two = tmp_path / "r.json", "experts=2", "experts=3"
    first = run(out, "grid", cells=[one])["grid"]["rows"]
    both = run(out, "grid", cells=[one, two])["grid"]["rows"]
    assert both[:1] == first and [row["experts"] for row in both] == [2, 3]
    made["commit"] = "b" * 12
    (other,) = run(out, "grid", cells=[one])["grid"]["rows"]
    assert other != first[0], "timed again"
    made["commit"] += "+"
    run(out, "grid", cells=[two])
    (last,) = run(out, "grid", cells=[one])["grid"]["rows"]
    assert last["experts"] == 2, "with changes that are not committed, nothing is kept"


def test_a_copied_expert_is_an_expert_like_its_origin(bench, subjects, tmp_path):
    more = load(subjects.replicated(bench.plain, 7, tmp_path / "seven"))
    few = load(subjects.replicated(bench.plain, 2, tmp_path / "two"))
    assert more.experts[:3] == EXPERTS and more.experts[3:6] == tuple(f"{n}-1" for n in EXPERTS)
    assert few.experts == EXPERTS[:2]
    batch = subjects.random_batch(40, 3, 6)
    names = ["math", "code", "math"]
    want = bench.model(**batch, task=names).logits
    copies = more(**batch, task=["math-1", "code-1", "math-2"]).logits
    torch.testing.assert_close(copies, want)
    torch.testing.assert_close(few(**batch, task=names).logits, want)


def test_full_means_144_cells_and_the_default_runs_through_the_headline(cells):
    headline = cells.Cell()
    assert len(cells.chosen_cells([], headline, full=True, quick=False)) == 144
    default = cells.chosen_cells([], headline, full=False, quick=False)
    assert len(default) == len(set(default)) == 19 and headline in default
    for axis, values in cells.AXES.items():
        for value in values:
            assert replace(headline, **{axis: value}) in default


@pytest.mark.parametrize("text", ["expert=2", "experts", "experts=2,", "experts=two"])
def test_a_wrong_cell_is_refused_by_its_word(cells, text):
    with pytest.raises(typer.BadParameter, match=f"'{text}': expected axis=number"):
        list(cells.Cell.product(text, cells.Cell()))


def test_pictures_need_matplotlib(everything, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(TwinMergeError, match=r"pip install 'twinmerge\[plot\]'"):
        importlib.import_module("plots_runtime").write(everything[0], tmp_path / "r.json")
